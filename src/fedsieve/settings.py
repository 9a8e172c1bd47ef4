"""``-s name=value``: change one field of a run, or of the dataclasses inside it, from text."""

from __future__ import annotations

import types
from dataclasses import fields, is_dataclass, replace
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from fedsieve.types import InputError

T = TypeVar("T")


def changed(run: T, settings: list[str]) -> T:
    """Return ``run`` with every ``name=value`` applied, in order. Raises InputError for unknown names and wrong values.

    Names are paths of fields (``method.sparsity``). A field that takes one of several dataclasses is set by the class's
    name (``method.server=adam``), whose own fields can then be set in turn.
    """
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals:
            raise InputError(f"-s {setting}: write it as name=value")
        run = _replaced(run, name.split("."), text, name)
    return run


def _replaced(node: Any, path: list[str], text: str, name: str) -> Any:
    known = [f.name for f in fields(node)] if is_dataclass(node) else []
    if path[0] not in known:
        has = f"{type(node).__name__} has {', '.join(known)}" if known else f"{type(node).__name__} has no fields"
        raise InputError(f"unknown field {name!r}: {has}")
    if len(path) > 1:
        value = _replaced(getattr(node, path[0]), path[1:], text, name)
    else:
        value = _parsed(text, get_type_hints(type(node))[path[0]], name)
    return replace(node, **{path[0]: value})


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
