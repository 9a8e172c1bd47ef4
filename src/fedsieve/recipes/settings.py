"""``-s name=value``: change one field of a run, or of the dataclasses inside it, from text."""

from __future__ import annotations

import types
from collections.abc import Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any, Literal, TypeAlias, TypeVar, Union, get_args, get_origin, get_type_hints

from fedsieve.types import InputError

T = TypeVar("T")

Wanted: TypeAlias = dict[str, Any]
"""Changes by field: each a tree of the fields below it, its own text under TEXT."""
TEXT = "="


def apply_settings(run: T, settings: Sequence[str]) -> T:
    """Return ``run`` with every ``name=value`` applied, the last of each name. Raises InputError.

    Names are paths of fields (``method.sparsity``). A field that takes one of several dataclasses is set by the class's
    name (``method.server=adam``), whose own fields can then be set in turn.
    """
    wanted: Wanted = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals:
            raise InputError(f"-s {setting}: write it as name=value")
        node = wanted
        for part in name.split("."):
            node = node.setdefault(part, {})
        node[TEXT] = text
    final: T = _replaced(run, wanted, "")
    return final


def _replaced(node: Any, wanted: Wanted, path: str) -> Any:
    """Return a dataclass with all of its wanted changes made at once, so that their order does not matter."""
    known = [f.name for f in fields(node)] if is_dataclass(node) else []
    changes: dict[str, Any] = {}
    for part, below in wanted.items():
        name = f"{path}.{part}" if path else part
        if part not in known:
            has = f"{type(node).__name__} has {', '.join(known)}" if known else f"{type(node).__name__} has no fields"
            raise InputError(f"unknown field {name!r}: {has}")
        value = getattr(node, part)
        if TEXT in below:
            value = _parsed(below[TEXT], get_type_hints(type(node))[part], name)
        deeper = {key: tree for key, tree in below.items() if key != TEXT}
        changes[part] = _replaced(value, deeper, name) if deeper else value
    return replace(node, **changes)


def _parsed(text: str, kind: Any, name: str) -> Any:
    """Return the value that ``text`` stands for in a field of type ``kind``."""
    if get_origin(kind) is Literal:
        if text in get_args(kind):
            return text
        raise InputError(f"{name} must be one of {', '.join(map(str, get_args(kind)))}, got {text!r}")
    if get_origin(kind) in (Union, types.UnionType):
        return _chosen(text, get_args(kind), name)
    if get_origin(kind) is tuple:
        return tuple(_parsed(part, get_args(kind)[0], name) for part in text.split(",") if part)
    if kind is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if kind in (int, float, str):
        try:
            return kind(text)
        except ValueError:
            pass
    wanted = {int: "a whole number", float: "a number", bool: "true or false"}.get(kind)
    raise InputError(f"{name} must be {wanted}, got {text!r}" if wanted else f"{name} cannot be set with -s")


def _chosen(text: str, kinds: tuple[Any, ...], name: str) -> Any:
    """Return the first of several types that ``text`` fits: a dataclass by its name, or a plain value."""
    classes: dict[str, Any] = {
        str(kind.__name__).lower(): kind for kind in kinds if isinstance(kind, type) and is_dataclass(kind)
    }
    if text.lower() in classes:
        return classes[text.lower()]()
    for kind in (k for k in kinds if k in (int, float, str, bool)):
        try:
            return _parsed(text, kind, name)
        except InputError:
            continue
    raise InputError(f"{name} must be one of {', '.join(classes)}, got {text!r}")
