"""Recipes: experiments by name, each a ``Run`` to copy and change: the built-in ones, and functions of the user's.

``-s name=value`` changes one field of a run, or of the dataclasses inside it, from text (``apply_settings``).
"""

from __future__ import annotations

import importlib
import inspect
import sys
import types
from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields, is_dataclass, replace
from pathlib import Path
from traceback import extract_tb
from typing import Any, Literal, TypeAlias, TypeVar, Union, get_args, get_origin, get_type_hints

from fedsieve.engine import Run
from fedsieve.recipes.catalogue import Recipe, recipes
from fedsieve.types import InputError
from fedsieve.types.errors import error_of

__all__ = ["Recipe", "apply_settings", "load_model", "load_recipe", "recipes"]

T = TypeVar("T")

Changes: TypeAlias = dict[str, Any]
"""Changes by field: each a tree of the fields below it, its own text under TEXT."""
TEXT = "="


def load_recipe(name: str, settings: Sequence[str] = ()) -> Run:
    """Return the run of a recipe, built-in (``zerofl.digits``) or ``file.py:function``. Raises InputError.

    ``settings`` change it: ``["method.sparsity=0.95", "rounds=10"]``.
    """
    return apply_settings(_find_run(name), settings)


def _find_run(name: str) -> Run:
    if ".py:" not in name:
        if name not in recipes():
            raise InputError(
                f"unknown recipe {name!r}; see `fedsieve list recipes`, or give your own as file.py:function"
            )
        return recipes()[name].run
    function = _load_function(*name.rsplit(":", 1))
    try:
        inspect.signature(function).bind()
    except TypeError as error:
        raise InputError(f"{name} cannot be called without arguments ({error}): a recipe takes none") from None
    try:
        run = function()
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{name}: {error_of(function, error)}") from error
    if not isinstance(run, Run):
        raise InputError(f"{name} returns no Run but {type(run).__name__}: a recipe is a function that returns a Run")
    return run


def load_model(name: str) -> Callable[[], Any]:
    """Return the function, or class, of a model that is given as ``file.py:function``. Raises InputError."""
    if ".py:" not in name:
        raise InputError(f"{name} is no model of yours: give the function that makes it as file.py:function")
    return _load_function(*name.rsplit(":", 1))


def _load_function(path: str, function: str) -> Callable[[], object]:
    """Import the user's file as a module of its own name, so that worker processes can import it again."""
    file = Path(path).resolve()
    if not file.is_file():
        raise InputError(f"there is no file {path}: a recipe of your own is given as file.py:function")
    if not file.stem.isidentifier():
        raise InputError(f"{path} cannot be imported: rename it to letters, digits and underscores")
    sys.path.append(str(file.parent))
    try:
        module = importlib.import_module(file.stem)
    except SyntaxError as error:
        raise InputError(f"{path} cannot be loaded: SyntaxError in line {error.lineno}: {error.msg}") from None
    except ImportError as error:
        raise InputError(f"{path} cannot be loaded: {error}") from None
    except Exception as error:
        line = next((f.lineno for f in reversed(extract_tb(error.__traceback__)) if Path(f.filename) == file), 0)
        what = f"{type(error).__name__} in line {line}: {error}"
        raise InputError(f"{path} cannot be loaded: {what}") from error
    if Path(module.__file__ or "").resolve() != file:
        raise InputError(f"{path} has the name of another module: rename the file")
    recipe: Callable[[], object] | None = getattr(module, function, None)
    if not callable(recipe):
        raise InputError(f"{path} has no function {function!r}")
    return recipe


def apply_settings(run: T, settings: Sequence[str]) -> T:
    """Return ``run`` with every ``name=value`` applied, the last of each name. Raises InputError.

    Names are paths of fields (``method.sparsity``). A field that takes one of several dataclasses is set by the class's
    name (``method.server=adam``), whose own fields can then be set in turn.
    """
    changes: Changes = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals:
            raise InputError(f"-s {setting}: write it as name=value")
        node = changes
        for part in name.split("."):
            node = node.setdefault(part, {})
        node[TEXT] = text
    final: T = _replaced(run, changes, "")
    return final


def _replaced(node: Any, changes: Changes, path: str) -> Any:
    """Return a dataclass with all of its changes made at once, so that their order does not matter."""
    known = [f.name for f in fields(node)] if is_dataclass(node) else []
    values: dict[str, Any] = {}
    for part, below in changes.items():
        name = f"{path}.{part}" if path else part
        if part not in known:
            has = f"{type(node).__name__} has {', '.join(known)}" if known else _without_fields(node, path)
            raise InputError(f"unknown field {name!r}: {has}")
        value = getattr(node, part)
        if TEXT in below:
            value = _parsed(below[TEXT], get_type_hints(type(node))[part], name)
        deeper = {key: tree for key, tree in below.items() if key != TEXT}
        values[part] = _replaced(value, deeper, name) if deeper else value
    return replace(node, **values)


def _without_fields(node: Any, path: str) -> str:
    """Return why a value has no settings of its own, with the remedy where it is one that is to be chosen first."""
    return f"choose it first, -s {path}=..." if node is None else f"{type(node).__name__} has no fields"


def _parsed(text: str, kind: Any, name: str) -> Any:
    """Return the value that ``text`` stands for in a field of type ``kind``."""
    if get_origin(kind) is Literal:
        if text in get_args(kind):
            return text
        raise InputError(f"{name} must be one of {', '.join(map(str, get_args(kind)))}, got {text!r}")
    if get_origin(kind) in (Union, types.UnionType):
        return _parsed_union(text, get_args(kind), name)
    if get_origin(kind) is tuple:
        return tuple(_parsed(part, get_args(kind)[0], name) for part in text.split(",") if part)
    if kind is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if kind in (int, float, str):
        try:
            return kind(text)
        except ValueError:
            pass
    what = {int: "a whole number", float: "a number", bool: "true or false"}.get(kind)
    raise InputError(f"{name} must be {what}, got {text!r}" if what else f"{name} cannot be set with -s")


def _has_defaults(kind: Any) -> bool:
    """Tell whether a type is a dataclass that can be made of nothing: one that needs an object is given in Python."""
    return is_dataclass(kind) and all(
        not f.init or f.default is not MISSING or f.default_factory is not MISSING for f in fields(kind)
    )


def _parsed_union(text: str, kinds: tuple[Any, ...], name: str) -> Any:
    """Return the first of several types that ``text`` fits: a dataclass by its name, or a plain value."""
    classes: dict[str, Any] = {k.__name__.lower(): k for k in kinds if isinstance(k, type) and _has_defaults(k)}
    if text.lower() in classes:
        return classes[text.lower()]()
    if text.lower() == "none" and type(None) in kinds:
        return None
    words = [word for kind in kinds if get_origin(kind) is Literal for word in get_args(kind)]
    if text in words:
        return text
    for kind in (k for k in kinds if k in (int, float, str, bool)):
        try:
            return _parsed(text, kind, name)
        except InputError:
            continue
    raise InputError(f"{name} must be one of {', '.join([*classes, *words])}, got {text!r}")
