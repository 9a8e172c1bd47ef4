"""When a run ends before its last round: after a round, or once a row says what was waited for (``--until``)."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from fedsieve.engine import Federation, Round
from fedsieve.server.admission import SAVED
from fedsieve.types import InputError, rng
from fedsieve.types.method import expected_of

MEASURED = {"clients": ["_clients", "_worst_tenth", "_spread"], "pruned": ["_pruned"]}
"""What ``--measure`` adds to the names of the task's metrics."""
EXAMPLE = "such as 30, or accuracy_validation>=.9, or both, by a comma"


@dataclass(frozen=True)
class StopCondition:
    """A column of the rows that is to be at least, or at most, ``bound``."""

    column: str
    sign: str
    bound: float
    text: str

    def met(self, row: Mapping[str, Any]) -> bool:
        """Tell whether a row has the value. Raises InputError if it has no such column, or one of no numbers."""
        if self.column not in row:
            raise InputError(f"until: {unknown_column(self.column, _numeric(row))}")
        value = row[self.column]
        if value is None:
            return False
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise InputError(f"until: {self.column} is no number; numbers are {', '.join(_numeric(row))}")
        return bool(value >= self.bound if self.sign == ">=" else value <= self.bound)


@dataclass(frozen=True)
class StopRule:
    """A run ends after ``round`` (0: its last), or after the first tested round that meets a condition."""

    round: int = 0
    conditions: tuple[StopCondition, ...] = ()

    def check(self, federation: Federation) -> None:
        """Raise InputError for a condition that no round of the run can meet."""
        metrics = list(federation.metrics)
        held_out = [f"{name}_validation" for name in metrics]
        for column in (one.column for one in self.conditions):
            if not federation.run.task.validation and column in held_out:
                test = column.removesuffix("_validation")
                raise InputError(
                    f"until: {column} needs examples that are held out: -s task.validation=0.1, or take {test}"
                )
            if column in ("accuracy", "accuracy_validation") and "accuracy" not in metrics:
                raise InputError(f"until: the task has no accuracy; its metrics are {', '.join([*metrics, *held_out])}")
        known = _columns(federation) if self.conditions else None
        for column in (one.column for one in self.conditions):
            if known and column not in known:
                raise InputError(f"until: {unknown_column(column, known)}{_measure(column, metrics)}")

    def reason(self, row: Mapping[str, Any] | None, metrics: Iterable[str]) -> str | None:
        """Return the condition that a row meets, None if none does or none of the task's ``metrics`` was tested.

        Raises InputError for an unknown column.
        """
        if row is None or all(row.get(name) is None for name in metrics):
            return None
        return next((one.text for one in self.conditions if one.met(row)), None)


def parse_stop_rule(text: str) -> StopRule:
    """Return what ``until`` says: a round, conditions such as ``accuracy_validation>=.9``, or some of them, by commas.

    Raises InputError for anything else.
    """
    last, conditions = 0, list[StopCondition]()
    for part in filter(None, map(str.strip, text.split(","))):
        match = re.fullmatch(r"([^<>=\s]+)\s*([<>]=)\s*(\S+)", part)
        bound = _finite(match[3]) if match else None
        if match and bound is not None:
            conditions.append(StopCondition(match[1], match[2], bound, match[1] + match[2] + match[3]))
        elif part.isdecimal():
            last = min(last or int(part), int(part))
        else:
            raise InputError(f"until must be a round, or COLUMN>=NUMBER or COLUMN<=NUMBER, {EXAMPLE}, got {part}")
    return StopRule(last, tuple(conditions))


def _columns(federation: Federation) -> list[str] | None:
    """Return the columns of numbers that rows will have; None if the method does not name its clients' metrics."""
    run, suffixes = federation.run, ["", "_validation"]
    expected = expected_of(run.method, run.method.init(federation.model(), rng(run.seed, "init")), run.context(1))
    if expected.metrics is None:
        return None
    suffixes += MEASURED["clients"] if "clients" in federation.measure else []
    suffixes += MEASURED["pruned"] if "pruned" in federation.measure else []
    plain = [f.name for f in fields(Round) if f.type in ("int", "float", "float | None") and f.name != "t"]
    masks = ["mismatch", *SAVED] if "masks" in federation.measure else []
    spent = run.method.spent(0, run.per_round, run.task.clients) or {}
    scores = [f"{name}{suffix}" for suffix in suffixes for name in federation.metrics]
    return [*dict.fromkeys([*scores, *expected.metrics, *plain, *masks, *spent, "round"])]


def _measure(column: str, metrics: Iterable[str]) -> str:
    """Return how a column would be there, if it is one that is measured where that is asked for; empty if not."""
    names = {f"{name}{suffix}": what for what, every in MEASURED.items() for suffix in every for name in metrics}
    what = names.get(column) or ("masks" if column in ("mismatch", *SAVED) else "")
    return f"; it is there with --measure {what}" if what else ""


def unknown_column(name: str, columns: Iterable[str]) -> str:
    """Return the line that says that there is no such column, with the names that are nearest, or all."""
    known = list(columns)
    near = difflib.get_close_matches(name, known, 3, 0.5)
    return f"there is no column {name!r}; " + (f"did you mean {' or '.join(near)}?" if near else ", ".join(known))


def _finite(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _numeric(row: Mapping[str, Any]) -> list[str]:
    """Return the columns of a row that are numbers, or may be in another."""
    return [k for k, v in row.items() if v is None or (isinstance(v, int | float) and not isinstance(v, bool))]
