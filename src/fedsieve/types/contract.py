"""What honest clients send: a method's promise to the server, which holds every answer against it.

A method says it in its ``expected``, from what the server knows before it asks: names, shapes, types, how many values,
and what the model would be without the client.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fedsieve.types.data import Params, Sparse, Tree

Norms: TypeAlias = tuple[float, float, float, float]
"""What an update changes: Euclidean norms, of the weights and of BatchNorm's running statistics, which know no scale;
then the largest absolute values, of either."""


class ContractError(ValueError):
    """An update that parses, but that no honest client sends: the message says why."""


class NotFinite(ContractError):
    """An update of which a number, or a norm, is NaN or infinite."""


@dataclass(frozen=True)
class Whole:
    """A tensor of the shape and type of ``base``, which is what a client that changes nothing sends."""

    base: Tensor
    least: Tensor | float = -math.inf
    """No element is below it."""
    most: Tensor | float = math.inf
    """No element is above it."""
    counts: bool = True
    """Whether it is a part of the update's norm."""


@dataclass(frozen=True)
class Part:
    """At most ``most`` elements of a tensor like ``base``, where the client chooses."""

    base: Tensor
    most: int
    or_whole: bool = False
    """Whether the whole tensor will do too."""


@dataclass(frozen=True)
class Number:
    """A number that the server knows beforehand."""

    value: float


Entry: TypeAlias = Whole | Part | Number


@dataclass(frozen=True)
class Expected:
    """What the clients of a device class send in one round."""

    tree: Mapping[str, Entry]
    """Every name, and no other."""
    most: int | None = None
    """How many elements all parts may have together."""
    metrics: tuple[str, ...] | None = ("loss",)
    """The metrics that a client may tell; None: any."""
    rule: Callable[[Tree], str | None] | None = None
    """What else must hold of a tree that is otherwise as expected: returns what is wrong, or None."""

    def check(self, tree: Tree) -> None:
        """Raise ContractError unless the tree is as expected, and finite."""
        for name in tree:
            if name not in self.tree:
                raise ContractError(f"{printable(name)} is nothing that this method sends")
        for name, entry in self.tree.items():
            if name not in tree:
                raise ContractError(f"{name} is missing")
            _check(name, entry, tree[name])
        count = sum(len(v.values) for v in tree.values() if isinstance(v, Sparse))
        if self.most is not None and count > self.most:
            raise ContractError(f"{count} values at positions of the client's choice, where {self.most} are allowed")
        if self.rule and (wrong := self.rule(tree)):
            raise ContractError(wrong)

    def fill_frozen(self, tree: Tree, frozen: Set[str]) -> Tree:
        """Return the tree with what is frozen, as it is on the server, in the order that is expected: messages of it
        are the same before and after a checkpoint. Raises ContractError if a client sends of what is frozen.
        """
        if names := sorted(frozen & tree.keys()):
            raise ContractError(f"{names[0]} is frozen: nobody sends it")
        bases = {name: entry.base for name, entry in self.tree.items() if not isinstance(entry, Number)}
        filled = {**tree, **{name: base for name, base in bases.items() if name in frozen}}
        ordered = [name for name in self.tree if name in filled] if frozen else []
        return {name: filled[name] for name in dict.fromkeys([*ordered, *filled])}

    def client_chosen(self) -> list[str]:
        """Return the names of which every client sends a part of its own."""
        return [name for name, entry in self.tree.items() if isinstance(entry, Part)]

    def norms(self, tree: Tree) -> Norms | None:
        """Return how long an update is, where it sends anything; None if it changes no model."""
        changes = ((name, _change(entry, tree[name])) for name, entry in self.tree.items() if _counts(entry))
        return norms_of(changes) if any(map(_counts, self.tree.values())) else None

    def scale_changes(self, tree: Tree, factors: tuple[float, float]) -> dict[str, Any]:
        """Return the tree with what it changes multiplied by a factor for each of its norms; every tensor is whole."""
        result = dict[str, Any](tree)
        for name, value in tree.items():
            entry, factor = self.tree[name], factors[is_statistic(name)]
            if isinstance(entry, Whole) and entry.counts and isinstance(value, Tensor) and factor < 1:
                result[name] = (value.double() - entry.base).mul_(factor).add_(entry.base).to(value.dtype)
        return result


def is_statistic(name: str) -> bool:
    """Tell BatchNorm's running statistics, which are averaged but never learned."""
    return name.endswith(("running_mean", "running_var"))


def norms_of(tensors: Iterable[tuple[str, Tensor]]) -> Norms:
    """Return the norms of tensors by name, all weights together and all running statistics."""
    squares: tuple[list[float], list[float]] = ([], [])
    largest = [0.0, 0.0]
    for name, value in tensors:
        kind = is_statistic(name)
        squares[kind].append(float(torch.linalg.vector_norm(value, dtype=torch.float64)) ** 2)
        if value.numel():
            largest[kind] = max(largest[kind], float(torch.linalg.vector_norm(value, math.inf)))
    return math.sqrt(math.fsum(squares[0])), math.sqrt(math.fsum(squares[1])), largest[0], largest[1]


def expect_weights(params: Params, most: Mapping[str, int] | None = None) -> dict[str, Entry]:
    """Expect the parameters themselves, of those in ``most`` so many elements; variances are not negative."""
    most = most or {}
    least = dict.fromkeys((name for name in params if name.endswith("running_var")), 0.0)
    return {n: Part(v, most[n]) if n in most else Whole(v, least.get(n, -math.inf)) for n, v in params.items()}


def expect_changes(params: Params, most: Mapping[str, int] | None = None) -> dict[str, Entry]:
    """Expect changes of the parameters, of those in ``most`` so many elements; variances stay above 0 or at it."""
    most, none = most or {}, {name: v.new_zeros(()).expand(v.shape) for name, v in params.items()}
    least = {name: -v for name, v in params.items() if name.endswith("running_var")}
    return {n: Part(v, most[n]) if n in most else Whole(v, least.get(n, -math.inf)) for n, v in none.items()}


def printable(text: str, length: int = 60) -> str:
    """Return a client's text as it may be printed: one line of plain characters, cut short."""
    plain = "".join(c if c.isprintable() else "?" for c in text[: length + 1])
    return repr(plain if len(text) <= length else plain[: length - 1] + "…")


def _check(name: str, entry: Entry, value: object) -> None:
    if isinstance(entry, Number):
        if not isinstance(value, float) or value != entry.value:
            raise ContractError(f"{name} is not {entry.value:g}")
        return
    if isinstance(value, Tensor) and (isinstance(entry, Whole) or entry.or_whole):
        _check_values(name, value, tuple(value.shape), entry.base)
        if isinstance(entry, Whole) and not _within(value, entry):
            raise ContractError(f"{name} has values that cannot be")
    elif isinstance(value, Sparse) and isinstance(entry, Part):
        _check_positions(name, value)
        _check_values(name, value.values, tuple(value.shape), entry.base)
        if len(value.values) > entry.most:
            raise ContractError(f"{name} has {len(value.values)} values, where {entry.most} are allowed")
    else:
        raise ContractError(f"{name} is {_kind(value)}, not {_kind(entry)}")


def _check_values(name: str, values: Tensor, shape: tuple[int, ...], like: Tensor) -> None:
    if shape != tuple(like.shape):
        raise ContractError(f"{name} has the shape {list(shape)[:8]}, not {list(like.shape)}")
    if values.dtype != like.dtype:
        raise ContractError(f"{name} is of {values.dtype}, not of {like.dtype}")
    flat = values.reshape(-1)
    if not math.isfinite(float(torch.dot(flat, flat))):
        whole = bool(torch.isfinite(flat).all())
        raise NotFinite(f"{name} is {'so large that its norm overflows' if whole else 'not finite'}")


def _check_positions(name: str, value: Sparse) -> None:
    """Raise ContractError unless the positions rise strictly inside the tensor, a value each."""
    index, numel = value.index, math.prod(value.shape)
    good = index.dtype == torch.int64 and index.dim() == value.values.dim() == 1 and len(index) == len(value.values)
    if good and len(index):
        good = int(index[0]) >= 0 and int(index[-1]) < numel and bool((index[1:] > index[:-1]).all())
    if not good:
        raise ContractError(f"{name} has positions that are none of {numel} elements")


def _within(value: Tensor, entry: Whole) -> bool:
    low = (isinstance(entry.least, float) and entry.least == -math.inf) or bool((value >= entry.least).all())
    return low and ((isinstance(entry.most, float) and entry.most == math.inf) or bool((value <= entry.most).all()))


def _kind(thing: object) -> str:
    kinds = {Sparse: "a sparse tensor", Part: "a sparse tensor", Tensor: "a tensor", Whole: "a tensor"}
    return kinds.get(type(thing), "a number" if isinstance(thing, float) else "a tree")


def _counts(entry: Entry) -> bool:
    return isinstance(entry, Part) or (isinstance(entry, Whole) and entry.counts)


def _change(entry: Entry, value: object) -> Tensor:
    """Return by how much a value differs from what a client sends that changes nothing."""
    assert not isinstance(entry, Number)
    if isinstance(value, Sparse):
        return value.values - entry.base.reshape(-1)[value.index]
    assert isinstance(value, Tensor)
    return value - entry.base
