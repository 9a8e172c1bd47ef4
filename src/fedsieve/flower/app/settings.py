"""The run config of a Flower app: a recipe, its settings, and how it is executed; ``flwr run -c`` changes them."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedsieve.engine import Federation, Run
from fedsieve.recipes import load_recipe
from fedsieve.runs.execution import Execution, execution_options
from fedsieve.types import InputError
from fedsieve.wire.authentication import key_of_run


@dataclass(frozen=True)
class AppConfig(Execution):
    """A recipe and how it is executed, as a Flower app's two halves read it from the app's run config."""

    recipe: str = ""
    """A built-in recipe, or ``file.py:function`` of a file beside the app's modules."""
    settings: str = ""
    """``name=value`` as after ``-s``, apart by blanks, quoted as in a shell."""

    def run_config(self) -> dict[str, Any]:
        """Return the run config: its keys and their values."""
        return {name.replace("_", "-"): getattr(self, name) for name in _DEFAULTS}

    def run(self, here: Path) -> Run:
        """Return the recipe's run; its own file is looked for in ``here``. Raises InputError."""
        recipe = str(here / self.recipe) if ".py:" in self.recipe else self.recipe
        return load_recipe(recipe, shlex.split(self.settings))

    def federation(self, here: Path) -> Federation:
        """Return the run with the recipe's own data. Raises InputError."""
        return self.open(self.run(here))


_DEFAULTS: dict[str, Any] = {"recipe": "", "settings": ""}
_DEFAULTS |= {option.name: option.default for option in execution_options("flower")}


def read_config(keys: Mapping[str, Any]) -> AppConfig:
    """Return what an app's run config says. Raises InputError for values of a wrong kind, and where no recipe is."""
    values: dict[str, Any] = {}
    for name, default in _DEFAULTS.items():
        key, kind = name.replace("_", "-"), type(default)
        value = keys.get(key, None if name == "recipe" else default)
        if not isinstance(value, int | float if kind is float else kind) or isinstance(value, bool) != (kind is bool):
            wanted = {str: "text", bool: "true or false", int: "a whole number", float: "a number"}[kind]
            raise InputError(f"-c {key} must be {wanted}, got {value!r}")
        values[name] = value
    return AppConfig(**values)


def message_key(simulations: bytes | None) -> bytes:
    """Return what letters are sealed with: a simulation's key, or else that of the environment. Raises InputError.

    A simulation takes none from the environment: a cluster's workers have that of whoever started Ray.
    """
    return key_of_run() if simulations is None else simulations
