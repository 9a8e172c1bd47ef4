"""What is called with every round after it is recorded, and what happens where that fails.

A callback is a function of the ``Round``. A logger (``runs.loggers``) is one that is opened and closed with the run.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from fedsieve.data.dataset import type_name
from fedsieve.engine import Round
from fedsieve.engine.models import first_line
from fedsieve.types import InputError

Callback: TypeAlias = "Callable[[Round], object] | RunLogger"
ON_ERROR = ("stop", "warn")


class CallbackFailed(UserWarning):
    """A callback raised, and the run goes on."""


@dataclass(frozen=True)
class ObservedRun:
    """A run as its loggers see it: its directory (None: there is none), ``run.json``, and its rows so far."""

    folder: Path | None
    manifest: Mapping[str, Any]
    rows: list[dict[str, Any]]


class RunLogger(ABC):
    """A callback that takes the rows of a run, and is opened before the first of them and closed after the last."""

    @abstractmethod
    def check(self, folder: Path | None) -> None:
        """Raise InputError if it cannot log a run in this directory (None: in none), before anything is written."""

    @abstractmethod
    def open(self, run: ObservedRun) -> AbstractContextManager[None]:
        """Begin, or go on after the rows that there are; it is closed with the error that ended the run, if one did."""

    @abstractmethod
    def log_row(self, row: Mapping[str, Any]) -> None:
        """Take the row of a round."""


class Callbacks:
    """The callbacks of a run, and whether it stops (``on_error="stop"``) or goes on ("warn") where one raises."""

    def __init__(self, every: Sequence[Callback] = (), on_error: str = "stop", folder: Path | None = None):
        check_on_error(on_error)
        self.every, self.on_error, self.failed = tuple(every), on_error, set[str]()
        for one in self.every:
            if isinstance(one, RunLogger):
                one.check(folder)
            elif isinstance(one, type) or not callable(one):
                raise InputError(f"a callback must be a function of the Round, or a logger: {one}")

    @contextmanager
    def opened(self, run: ObservedRun) -> Iterator[None]:
        """Open the loggers, and close them."""
        with ExitStack() as stack:
            for one in [one for one in self.every if isinstance(one, RunLogger)]:
                try:
                    stack.enter_context(one.open(run))
                except Exception as error:
                    line = f"the logger {type_name(one)} does not start ({type(error).__name__}: {first_line(error)})"
                    if self.on_error == "stop":
                        raise InputError(f"{line}: leave it out, or on_error=warn goes on without it") from error
                    warnings.warn(f"{line}; the run goes on without it", CallbackFailed, stacklevel=4)
                    self.every = tuple(other for other in self.every if other is not one)
            yield

    def __call__(self, round: Round, row: Mapping[str, Any]) -> None:
        """Give every callback a round. Raises InputError, naming the one that fails, unless the run is to go on."""
        for one in self.every:
            try:
                one.log_row(row) if isinstance(one, RunLogger) else one(round)
            except Exception as error:
                self._fail(getattr(one, "__name__", type_name(one)), round.t, error)

    def _fail(self, name: str, t: int, error: Exception) -> None:
        line = f"callback {name} failed in round {t} ({type(error).__name__}: {first_line(error)})"
        if self.on_error == "stop":
            how = "resume goes on after it, on_error=warn past it"
            raise InputError(f"{line}: the round is recorded, {how}") from error
        if name not in self.failed:
            self.failed.add(name)
            warnings.warn(f"{line}; the run goes on, and this is said once", CallbackFailed, stacklevel=3)


def check_on_error(on_error: str) -> None:
    """Raise InputError unless it is said what happens where a callback raises."""
    if on_error not in ON_ERROR:
        raise InputError(f"on_error must be {' or '.join(ON_ERROR)}, got {on_error!r}")
