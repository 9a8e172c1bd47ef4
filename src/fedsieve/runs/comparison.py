"""A run beside the papers: which published row it is, in data and protocol, and what it reaches, read as that row was.

A number of a paper stands beside a run only where nothing differs; else a phrase says what does.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from fedsieve.engine import Run
from fedsieve.engine.federation import described
from fedsieve.recipes.papers import Published, published
from fedsieve.runs.record import RunRecord, flatten_settings, number

SAME = ("task.dataset", "task.partition", "task.tiers")
"""What, with the method, a run has in common with the rows that it is compared with at all."""
FREE = ("seed", "evaluate_every")
"""Settings that no row fixes."""
MOST = 3
"""Of a run that differs in more settings from every row, nothing is said."""
BEYOND = 2
"""Standard deviations."""
EXACT = 1e-9
"""What floats add to a difference of numbers with two decimals."""
UNKNOWN = object()


@dataclass(frozen=True)
class Comparison:
    """Runs that differ in their seed alone, beside a published row; accuracies in percent."""

    row: Published
    differs: str
    """What differs in data or protocol; empty: nothing, and the number may stand."""
    values: tuple[float, ...] = ()
    """What each run reaches, read as the row was; only where nothing differs."""

    @property
    def difference(self) -> float | None:
        """The runs' mean less the row's number; None where something differs."""
        return statistics.fmean(self.values) - self.row.accuracy if self.values else None

    @property
    def spread(self) -> float | None:
        """The standard deviation over the runs; None of fewer than two."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    @property
    def verdict(self) -> Literal["within", "above", "below", "not judged", ""]:
        """Whether the difference is beyond two standard deviations, the paper's and the runs' combined.

        The runs' is left out of one run; where neither is known, nothing is judged. Empty where there is no difference.
        """
        if self.difference is None:
            return ""
        spreads = [spread for spread in (self.row.std, self.spread) if spread is not None]
        if not spreads:
            return "not judged"
        beyond = abs(self.difference) - BEYOND * math.hypot(*spreads)
        return "within" if beyond < EXACT else "above" if self.difference > 0 else "below"

    @property
    def text(self) -> str:
        """The number with how it was read and of how many seeds, or what differs."""
        if self.differs:
            return self.differs
        seeds, spread = self.row.says.seeds, "" if self.row.std is None else f" ± {self.row.std:.2f}"
        some = f"({len(self.values)} of {seeds} seeds)" if len(self.values) < seeds else ""
        return " ".join(filter(None, [f"{self.row.accuracy:.2f}{spread}", self.row.reading.short, some]))


def compare_row(row: Published, runs: Sequence[RunRecord]) -> Comparison:
    """Return a row beside runs of its very settings, which differ in their seed."""
    return _compare(row, [], runs)


def settings_of(run: Run) -> dict[str, Any]:
    """Return every field of a run by its dotted name, as its ``run.json`` holds it."""
    settings: dict[str, Any] = flatten_settings(json.loads(json.dumps(described(run))))
    return settings


def compare_published(settings: Mapping[str, Any], runs: Sequence[RunRecord | None]) -> list[Comparison]:
    """Return the rows beside runs of these ``settings``, which differ in their seed: all rows that they are.

    Where they are none, the nearest row, with what differs. A run that has not begun is None.
    """
    near = [(row, differing) for row, own in _rows() if (differing := _differing(settings, own)) is not None]
    least = min((len(differing) for _, differing in near), default=MOST + 1)
    if least > MOST:
        return []
    comparisons: dict[Any, Comparison] = {}
    for row, differing in near:
        if len(differing) == least and (key := (row.accuracy, row.std, row.reading)) not in comparisons:
            comparisons[key] = _compare(row, differing, runs)
    return [one for one in comparisons.values() if not one.differs] or [*comparisons.values()][:1]


@cache
def _rows() -> tuple[tuple[Published, dict[str, Any]], ...]:
    return tuple((row, settings_of(row.run())) for row in published())


def _differing(settings: Mapping[str, Any], row: Mapping[str, Any]) -> list[str] | None:
    """Return in which settings a run differs from a row, a phrase each; None where it is another experiment."""
    names = [name for name in dict.fromkeys((*row, *settings)) if name not in FREE]
    differing = [name for name in names if settings.get(name, UNKNOWN) != row.get(name, UNKNOWN)]
    if any(name in SAME or name.partition(".")[0] == "method" for name in differing):
        return None
    return [_phrase(name, settings.get(name, "default"), row.get(name, "default"), row) for name in differing]


def _phrase(name: str, value: Any, expected: Any, row: Mapping[str, Any]) -> str:
    if name == "task.clients":
        unit = "writers" if row["task.partition"] == "group" else "clients"
        return f"{value:,} of {expected:,} {unit}" if _less(value, expected) else f"{value} {unit}, not {expected:,}"
    if name == "rounds" and _less(value, expected):
        return f"{value} of {expected} rounds"
    return f"{name.removesuffix('.kind').split('.')[-1]} {value}, not {expected}"


def _less(value: Any, expected: Any) -> bool:
    return isinstance(value, int) and isinstance(expected, int) and value < expected


def _compare(row: Published, differing: Sequence[str], runs: Sequence[RunRecord | None]) -> Comparison:
    phrases = [*differing, *(["another implementation than the paper's"] if row.variant else [])]
    if not differing:
        phrases += [text for run in runs if run for text in (*_of_data(row, run), *_of_answers(run))]
        if not phrases:
            phrases += [text for run in runs for text in _of_progress(row, run)][:1]
    if phrases or not runs:
        return Comparison(row, ", ".join(dict.fromkeys(phrases)) or "not run")
    values = (read_accuracy(row, run) for run in runs if run)
    return Comparison(row, "", tuple(100 * value for value in values if value is not None))


def _of_data(row: Published, run: RunRecord) -> Iterable[str]:
    dataset = run.manifest.get("dataset")
    return data_differences(row, dataset if isinstance(dataset, Mapping) else {})


def data_differences(row: Published, dataset: Mapping[str, Any]) -> Iterable[str]:
    """Yield in which version and counts of examples data are not the row's; ``dataset`` as ``run.json`` has it."""
    if row.says.version and dataset.get("version", row.says.version) != row.says.version:
        yield f"{dataset['version'] or 'data of unknown version'}, not {row.says.version}"
    for part, name in (("train", "training"), ("test", "test")):
        expected, value = getattr(row.says, part), number(dataset.get(name))
        if expected and value is None:
            yield f"{name} examples not counted"
        elif expected and value is not None and value < expected[0]:
            yield f"{value:,.0f} of {expected[0]:,} {name} examples"
        elif expected and value is not None and value > expected[1]:
            yield f"{value:,.0f} {name} examples, not {expected[0]:,}"


def _of_answers(run: RunRecord) -> Iterable[str]:
    """Yield how many updates a run did without."""
    left = [one for row in run.rows if isinstance(row.get("left_out"), list) for one in row["left_out"]]
    if missing := run.refused().total() + len(left):
        yield f"{missing} update{'s' * (missing > 1)} refused or left out"


def _of_progress(row: Published, run: RunRecord | None) -> Iterable[str]:
    """Yield why a run cannot be read as the row was, if so."""
    rounds = row.run().rounds
    until = row.reading.round if row.reading.kind == "at" else rounds
    if run is None:
        yield f"not yet {until} rounds"
    elif run.last_round < until or (until == rounds and not run.whole):
        yield f"round {run.last_round} of {rounds}"
    elif row.reading.kind == "best" and (every := run.settings.get("evaluate_every")) != "1":
        yield f"tested every {every} rounds"
    elif read_accuracy(row, run) is None:
        yield f"no {row.reading.data} in round {until}"


def read_accuracy(row: Published, run: RunRecord) -> float | None:
    """Return the accuracy of a run that the row's reading names."""
    reading, (rounds, values) = row.reading, run.series(row.reading.column)
    if reading.kind == "best":
        return max(values, default=None)
    return dict(zip(rounds, values, strict=True)).get(reading.round if reading.kind == "at" else run.last_round)
