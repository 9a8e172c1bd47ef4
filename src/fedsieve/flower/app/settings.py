"""What a Flower app is told: the fields of an ``Order``, which are the settings of ``flwr run -c``."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from fedsieve.data import root_from
from fedsieve.engine import Federation, Patience, Run, open_run
from fedsieve.recipes import made
from fedsieve.recipes.settings import changed
from fedsieve.types import InputError
from fedsieve.wire.authentication import key_of_run


@dataclass(frozen=True)
class Words:
    """What the user wrote: other processes open the same run from it."""

    settings: tuple[str, ...]
    data: str | None


@dataclass(frozen=True)
class Order:
    """A run of a recipe, as the command line gives it to ``fedsieve run``."""

    recipe: str
    """A built-in recipe, or ``file.py:function`` of a file beside the app's modules."""
    settings: str = ""
    """``name=value`` as after ``-s``, apart by blanks, quoted as in a shell."""
    out: str = ""
    """The run directory, on the server's machine."""
    data: str = ""
    """The folder of the datasets; empty: FEDSIEVE_DATA."""
    own_data: bool = False
    """Whether every SuperNode names examples of its own, which the server does not see."""
    measure: str = ""
    """Further columns of the rows, by commas: masks, pruned."""
    kernels: str = "auto"
    """How clients train: auto, sparse or dense."""
    until: int = 0
    """The round to stop after; 0: the last."""
    resume: bool = False
    """Whether to go on after the last checkpoint in ``out``."""
    accept_changes: bool = False
    """Whether to go on although the recipe's file, or what it imports, has changed."""
    min_clients: int = Patience.min_clients
    """The answers that a round needs; 0: half of its clients, rounded up."""
    round_timeout: float = Patience.round_timeout
    """The seconds after which a client that has not answered is lost to the round."""

    def __post_init__(self) -> None:
        if self.until < 0:
            raise InputError(f"-c until must be a round, or 0 for the last, got {self.until}")

    @property
    def patience(self) -> Patience:
        """How long the server waits for clients. Raises InputError."""
        return Patience(self.min_clients, self.round_timeout)

    def config(self) -> dict[str, Any]:
        """Return the order as an app's settings."""
        return {f.name.replace("_", "-"): getattr(self, f.name) for f in fields(self)}

    @property
    def measured(self) -> tuple[str, ...]:
        """The further columns."""
        return tuple(name.strip() for name in self.measure.split(",") if name.strip())

    def run(self, here: Path) -> Run:
        """Return the run. Raises InputError."""
        recipe = str(here / self.recipe) if ".py:" in self.recipe else self.recipe
        return changed(made(recipe), shlex.split(self.settings))

    def federation(self, here: Path) -> Federation:
        """Return the run with the recipe's own data. Raises InputError."""
        return open_run(self.run(here), root_from(self.data or None), self.measured)


def order_from(config: Mapping[str, Any]) -> Order:
    """Return the order that an app's settings are. Raises InputError for values of a wrong kind."""
    values: dict[str, Any] = {}
    for field in fields(Order):
        value = config.get(field.name.replace("_", "-"), field.default)
        kind = str if field.name == "recipe" else type(field.default)
        if not isinstance(value, int | float if kind is float else kind) or isinstance(value, bool) != (kind is bool):
            wanted = {str: "text", bool: "true or false", int: "a whole number", float: "a number"}[kind]
            raise InputError(f"-c {field.name.replace('_', '-')} must be {wanted}, got {value!r}")
        values[field.name] = value
    return Order(**values)


def message_key(simulations: bytes | None) -> bytes:
    """Return what letters are sealed with: a simulation's key, or else that of the environment. Raises InputError.

    A simulation takes none from the environment: a cluster's workers have that of whoever started Ray.
    """
    return key_of_run() if simulations is None else simulations
