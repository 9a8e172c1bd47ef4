"""What a client reports of its training beside its update: metrics, multiply-adds, notes. None of it costs the update.

``read_diagnostics`` brings it into the form that the server reads, on either side: a client sends what it returns, and
the server reads through it what arrives. What is no number is NaN there; the server leaves it out and says so.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from itertools import islice
from typing import Any, TypeAlias

from fedsieve.types.contract import printable

FIELDS = ("metrics", "work", "notes")
SAVED = ("saved_bytes", "saved_nonzero")
"""The metrics that clients add where masks are measured."""
LARGEST = 1e30
"""No metric and no count of work is larger: sums of them stay finite."""
METRICS = 100
"""How many metrics of one client are read."""
REASON, NAME = 300, 60
"""Characters of a reason, and of a metric's name, that are read."""

Diagnostics: TypeAlias = dict[str, dict[str, Any]]
"""``metrics`` by name; ``work``, the multiply-adds ``real`` and ``dense``; ``notes``: ``steps``, ``seconds``, whether
training was ``sparse``, and ``why`` not, a tree whose only name is the reason. Work and notes may be empty."""


def read_diagnostics(message: Mapping[str, Any]) -> Diagnostics:
    """Return a client's diagnostics in the form that the server reads, whatever they are."""
    return {
        "metrics": _metrics(message.get("metrics")),
        "work": _work(message.get("work")),
        "notes": _notes(message.get("notes")),
    }


def one_line(text: str, length: int = REASON) -> str:
    """Return a text as it may be printed: one line of so many characters at most."""
    return "".join(c if c.isprintable() else "?" for c in text[:length])


def check_diagnostics(
    diagnostics: Diagnostics, known: tuple[str, ...] | None, columns: Collection[str]
) -> tuple[Diagnostics, tuple[str, ...]]:
    """Return readable diagnostics without what does not count, and a line on each of those.

    ``known`` are the metrics that the method names (None: any), ``columns`` the names that a metric must not have.
    """
    lines, metrics = list[str](), dict[str, float]()
    for name, value in islice(diagnostics["metrics"].items(), METRICS):
        if why := _unfit(name, value, known, columns):
            lines.append(f"its metric {printable(name)} {why}")
        else:
            metrics[name] = value
    if len(diagnostics["metrics"]) > METRICS:
        lines.append(f"it reports more than {METRICS} metrics: the others are left out")
    if not diagnostics["work"]:
        lines.append("its count of multiply-adds is none, and is left out of the sum")
    if not diagnostics["notes"]:
        lines.append("its notes on its training are none: steps and seconds are those of the others")
    return {**diagnostics, "metrics": metrics}, tuple(lines)


def _unfit(name: str, value: float, known: tuple[str, ...] | None, columns: Collection[str]) -> str:
    """Return why a metric is left out; "" if it is not."""
    if name in columns:
        return "has the name of a column of rounds.jsonl and is left out: rename it"
    if known is not None and name not in known:
        named = *(metric for metric in known if metric not in SAVED), name
        return f"is none that the method names, and is left out: let expected return Expected(..., metrics={named})"
    return "is no finite number, and is left out" if math.isnan(value) else ""


def _metrics(value: object) -> dict[str, float]:
    """Return metrics by their names, one more than are read at most."""
    if not isinstance(value, Mapping):
        return {}
    return {one_line(str(name), NAME): _number(one, -LARGEST) for name, one in islice(value.items(), METRICS + 1)}


def _work(value: object) -> dict[str, float]:
    """Return the multiply-adds, real and dense; nothing if one of them is no number."""
    work = {name: _number(value.get(name)) for name in ("real", "dense")} if isinstance(value, Mapping) else {}
    return {} if any(map(math.isnan, work.values())) else work


def _notes(value: object) -> dict[str, Any]:
    """Return the notes, their reason cut short; nothing if a number among them is none."""
    if not isinstance(value, Mapping):
        return {}
    numbers = {name: _number(value.get(name)) for name in ("steps", "seconds", "sparse")}
    if any(map(math.isnan, numbers.values())) or not numbers["steps"].is_integer() or numbers["sparse"] not in (0, 1):
        return {}
    why = value.get("why")
    return {**numbers, "why": {one_line(line): 1.0 for line in islice(why, 1)} if isinstance(why, Mapping) else {}}


def _number(value: Any, least: float = 0.0) -> float:
    """Return a number, whatever holds it; NaN where there is none, or not from ``least`` to ``LARGEST``."""
    if isinstance(value, str | bytes):
        return math.nan
    try:
        number = float(value)
    except Exception:  # whatever a number of somebody's own raises
        return math.nan
    return number if least <= number <= LARGEST else math.nan
