"""Recipes: experiments by name, each a ``Run`` to copy and change: the built-in ones, and functions of the user's."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from fedsieve.engine import Run
from fedsieve.recipes.catalogue import Recipe, recipes
from fedsieve.recipes.settings import apply_settings
from fedsieve.types import InputError

__all__ = ["Recipe", "load_recipe", "recipes"]


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
    run = function()
    if not isinstance(run, Run):
        raise InputError(f"{name} returns no Run but {type(run).__name__}: a recipe is a function that returns a Run")
    return run


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
    if Path(module.__file__ or "").resolve() != file:
        raise InputError(f"{path} has the name of another module: rename the file")
    found = getattr(module, function, None)
    if not callable(found):
        raise InputError(f"{path} has no function {function!r}")
    recipe: Callable[[], object] = found
    return recipe
