"""The server's state: a frozen dataclass of tensors, which a checkpoint holds by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, TypeVar

from torch import Tensor

from fedsieve.types.data import Mask, Params
from fedsieve.types.errors import InputError


@dataclass(frozen=True)
class ServerState:
    """What a server keeps from round to round; a method that keeps more subclasses it (``kw_only=True``).

    Fields are tensors and dictionaries of tensors; what else they hold must follow from ``Method.init``.
    """

    params: Params
    """The global model."""
    moments: dict[str, Params] = field(default_factory=dict)
    """The server optimizer's moments, by name."""
    sparse: tuple[str, ...] = ()
    """The names of the weights that the method makes sparse."""

    def support(self, params: Params) -> Mask:
        """Return the masks of a model of this state (``params``): where its sparse weights are not zero."""
        return {name: params[name] != 0 for name in self.sparse}


S = TypeVar("S", bound=ServerState)


def flatten(state: Any, prefix: str = "") -> dict[str, Tensor]:
    """Return the tensors of a state (dataclasses and dictionaries of tensors), named by their path."""
    if isinstance(state, Tensor):
        return {prefix: state}
    flat: dict[str, Tensor] = {}
    for name, value in _children(state):
        flat |= flatten(value, f"{prefix}/{name}" if prefix else name)
    return flat


def clone_shared(tensors: Mapping[str, Tensor]) -> Params:
    """Return the tensors contiguous, copied where two share memory, which safetensors refuses."""
    result, seen = dict[str, Tensor](), set[int]()
    for name, value in tensors.items():
        value = value.contiguous()
        place = value.untyped_storage().data_ptr()
        result[name] = value.clone() if place in seen else value
        seen.add(place)
    return result


def unflatten(template: S, tensors: Mapping[str, Tensor]) -> S:
    """Return ``template`` with its tensors replaced by those that ``flatten`` named.

    Raises InputError unless names, shapes and dtypes are exactly the template's.
    """
    wanted = {name: (tuple(v.shape), v.dtype) for name, v in flatten(template).items()}
    if wanted != {name: (tuple(v.shape), v.dtype) for name, v in tensors.items()}:
        raise InputError("a checkpoint of another model or method: its tensors do not fit this run")
    restored: S = _fill(template, tensors, "")
    return restored


def _children(node: Any) -> list[tuple[str, Any]]:
    if is_dataclass(node):
        return [(f.name, getattr(node, f.name)) for f in fields(node)]
    return list(node.items()) if isinstance(node, Mapping) else []


def _fill(node: Any, tensors: Mapping[str, Tensor], path: str) -> Any:
    if isinstance(node, Tensor):
        return tensors[path]
    children = {name: _fill(value, tensors, f"{path}/{name}" if path else name) for name, value in _children(node)}
    if isinstance(node, Mapping):
        return children
    return replace(node, **children) if is_dataclass(node) and not isinstance(node, type) else node
