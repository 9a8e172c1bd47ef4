"""Recipes: one module a paper, one function an experiment, each returning a ``Run`` to copy and change."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable
from inspect import getmembers, isfunction
from pathlib import Path

from fedsieve.engine import Run
from fedsieve.types import InputError

MODULES = (
    "fedavg",
    "fedadam",
    "swat",
    "zerofl",
    "topk",
    "sparsefedpp",
    "dnr",
    "nst",
    "pdst",
    "flash",
    "hetero_flash",
    "private",
)


def recipes() -> dict[str, Callable[[], Run]]:
    """Return the built-in recipes by name."""
    found: dict[str, Callable[[], Run]] = {}
    for name in MODULES:
        module = importlib.import_module(f"fedsieve.recipes.{name}")
        own = [(n, f) for n, f in getmembers(module, isfunction) if f.__module__ == module.__name__ and n[0] != "_"]
        found |= {f"{name}.{n}": f for n, f in sorted(own, key=lambda nf: nf[1].__code__.co_firstlineno)}
    return found


def made(name: str) -> Run:
    """Return the run of a recipe, built-in or ``file.py:function``. Raises InputError."""
    recipe = find(name)
    try:
        inspect.signature(recipe).bind()
    except TypeError as error:
        raise InputError(f"{name} cannot be called without arguments ({error}): a recipe takes none") from None
    run: object = recipe()
    if not isinstance(run, Run):
        raise InputError(f"{name} returns no Run but {type(run).__name__}: a recipe is a function that returns a Run")
    return run


def find(name: str) -> Callable[[], Run]:
    """Return a recipe: a built-in one's, or that of ``file.py:function``. Raises InputError."""
    if ".py:" in name:
        return _own(*name.rsplit(":", 1))
    known = recipes()
    if name not in known:
        raise InputError(f"unknown recipe {name!r}; see `fedsieve list recipes`, or give your own as file.py:function")
    return known[name]


def _own(path: str, function: str) -> Callable[[], Run]:
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
    if Path(module.__file__ or "").resolve() != file:
        raise InputError(f"{path} has the name of another module: rename the file")
    found = getattr(module, function, None)
    if not callable(found):
        raise InputError(f"{path} has no function {function!r}")
    recipe: Callable[[], Run] = found
    return recipe
