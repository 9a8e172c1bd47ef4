"""What was reached, and what it took: a row for each configuration, mean ± standard deviation over its seeds.

What else is to be said of runs stands below: updates that were refused, and what privacy was spent.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple, TypeAlias

from fedsieve.methods.private import EPSILON, REHEARSED
from fedsieve.report.configurations import Configuration, Runs
from fedsieve.runs.comparison import compare_published
from fedsieve.runs.record import RunRecord, flatten_settings, format_kernels, number, without_numbers
from fedsieve.runs.units import (
    format_bytes,
    format_count,
    format_duration,
    format_megabytes,
    format_milliseconds,
    format_number,
    format_percent,
    format_ratio,
)

ABOUT_NOISE = {
    EPSILON: "",
    REHEARSED: " – of a rehearsal: the noise came from the run\u2019s seed, and whoever has run.json can subtract it. "
    "With method.secret=true it would hold",
}
"""What is said after an epsilon, by its column."""

Get: TypeAlias = Callable[[RunRecord], float | None]
Format: TypeAlias = Callable[[float, float | None], str]


class MeasuredValue(NamedTuple):
    """A mean over runs, to sort by, and as text with its spread; None and a dash where no run has the measure."""

    number: float | None
    text: str


TableLine: TypeAlias = list[str | MeasuredValue]
Cell: TypeAlias = list[TableLine]
"""The lines of a cell: the measure, and in small what it stands against."""


def _mean(runs: Runs, get: Get, form: Format) -> MeasuredValue:
    known = _known(runs, get)
    if not known:
        return MeasuredValue(None, "–")
    mean = known[0] if len(known) == 1 else statistics.fmean(known)
    return MeasuredValue(mean, form(mean, statistics.stdev(known) if len(known) > 1 else None))


def _known(runs: Runs, get: Get) -> list[float]:
    return [value for run in runs if (value := get(run)) is not None]


def _last(name: str) -> Get:
    return lambda run: run.last(name)


def _percents(runs: Runs, name: str, below: Mapping[str, str]) -> Cell:
    """Return a share at the end, and ``below`` it those further shares that a run has."""
    cell: Cell = [[_mean(runs, _last(name), format_percent)]]
    for text, other in below.items():
        if _known(runs, _last(other)):
            cell.append([f"{text} ", _mean(runs, _last(other), format_percent)])
    return cell


def _accuracy(runs: Runs) -> Cell:
    """Return the metrics at the end, their further forms, and what the papers print of the very same runs."""
    cell: Cell = []
    for name in runs[0].metrics:
        if name == "accuracy":
            cell += _percents(runs, name, {"pruned": "accuracy_pruned", "validation": "accuracy_validation"})
            continue
        line: TableLine = [f"{name} ", _mean(runs, _last(name), _plain)]
        cell.append(line)
        if _known(runs, _last(f"{name}_validation")):
            cell.append(["validation ", _mean(runs, _last(f"{name}_validation"), _plain)])
    for one in compare_published(flatten_settings(runs[0].manifest.get("run") or {}), runs):
        cell.append([f"paper {one.text}"])
        if one.difference is not None:
            cell.append([f"difference {one.difference:+.2f}"])
    return cell


def _against(runs: Runs, get: Get, form: Format, **references: Get) -> Cell:
    """Return a measure, and under it each of those that it stands against, with the factor between the two."""
    own, cell = _known(runs, get), list[TableLine]([[_mean(runs, get, form)]])
    for what, reference in references.items():
        if own and (others := _known(runs, reference)):
            mean = statistics.fmean(others)
            cell.append([f"{what} ", MeasuredValue(mean, form(mean, None))])
            if factor := format_ratio(mean, statistics.fmean(own)):
                cell.append([factor])
    return cell


def _against_dense(runs: Runs, name: str, dense: str, form: Format) -> Cell:
    return _against(runs, lambda run: run.total(name), form, dense=lambda run: run.total(dense))


def _multiply_adds(runs: Runs) -> Cell:
    """Return the multiply-adds, and what they lack: the operations that have no formula."""
    every = [(run.summary or {}).get("multiply_adds_not_counted") for run in runs]
    names = sorted({str(name) for one in every if isinstance(one, list) for name in one})
    cell = _against_dense(runs, "multiply_adds", "multiply_adds_dense", format_count)
    if names:
        cell.append([f"not counted: {', '.join(names)}"])
    return cell


def _step(runs: Runs) -> Cell:
    """Return the milliseconds of a training step and which way it was computed; and both ways, where measured."""
    ways = format_kernels(sum((run.kernels for run in runs), Counter[str]()))
    cell: Cell = [[_mean(runs, RunRecord.step, format_milliseconds)]]
    if ways:
        cell.append([ways])
    for way in dict.fromkeys(way for run in runs for way in run.measured):
        time, memory = (partial(_measured, way=way, name=name) for name in ("ms_per_step", "peak_memory_mb"))
        cell.append([f"{way} ", _mean(runs, time, format_milliseconds), ", ", _mean(runs, memory, format_megabytes)])
    return cell


def _measured(run: RunRecord, way: str, name: str) -> float | None:
    return number(run.measured.get(way, {}).get(name))


COLUMNS: dict[str, Callable[[Runs], Cell]] = {
    "Accuracy": _accuracy,
    "Density": lambda runs: _percents(
        runs, "density", {"of the policy": "density_of_policy", "of all": "density_of_all"}
    ),
    "Bytes up": lambda runs: _against_dense(runs, "bytes_up", "bytes_dense_up", format_bytes),
    "Bytes down": lambda runs: _against_dense(runs, "bytes_down", "bytes_dense_down", format_bytes),
    "One upload": lambda runs: _against(
        runs,
        RunRecord.upload,
        format_bytes,
        paper=lambda run: run.final("paper_bytes_up"),
        CSR=lambda run: run.final("csr_bytes_up"),
    ),
    "Multiply-adds": _multiply_adds,
    "A step": _step,
    "Time": lambda runs: [[_mean(runs, lambda run: run.total("seconds"), format_duration)]],
    "Peak memory": lambda runs: [[_mean(runs, lambda run: run.final("peak_memory_mb"), format_megabytes)]],
}
"""The columns of the table of results, and the cell of each for the runs of one configuration."""


def _plain(mean: float, spread: float | None) -> str:
    return format_number(mean) + (f" ± {format_number(spread)}" if spread else "")


def columns_of(runs: Runs) -> list[str]:
    """Return the titles of the table of results."""
    title = "Accuracy" if all([*run.metrics] == ["accuracy"] for run in runs) else "Metrics"
    return [title, *list(COLUMNS)[1:]]


def result_cells(runs: Runs) -> list[Cell]:
    """Return a row of the table of results."""
    return [cell(runs) for cell in COLUMNS.values()]


def progress_text(runs: Runs) -> str:
    """Return how far the runs are."""
    rounds, planned = sorted({run.last_round for run in runs}), runs[0].settings.get("rounds", "?")
    span = f"{rounds[0]}" if len(rounds) == 1 else f"{rounds[0]} to {rounds[-1]}"
    if all_finished(runs):
        stopped = " or ".join(dict.fromkeys(run.stopped for run in runs if run.stopped))
        how = f"stopped at {stopped}" if stopped else "finished"
        return f"{how}, {span} round{'s' * (rounds[-1] != 1)}"
    ended = sum(run.ended for run in runs)
    some = f"{ended} of {len(runs)} finished, " if len(runs) > 1 else ""
    return f"{some}{span} of {planned} rounds"


def all_finished(runs: Runs) -> bool:
    """Tell whether every run got to its last round, or to the condition that it was to end with."""
    return all(run.ended for run in runs)


def refused_updates(every: list[Configuration]) -> list[tuple[int, str, str]]:
    """Return how many updates were refused, why, and of which configurations; reasons that differ in numbers as one."""
    alike: dict[str, Counter[tuple[str, str]]] = {}
    for one in every:
        for reason, n in sum((run.refused() for run in one.runs), Counter[str]()).items():
            alike.setdefault(without_numbers(reason), Counter())[one.label, reason] += n
    return [_reason(own) for own in sorted(alike.values(), key=lambda own: -own.total())]


def _reason(counts: Counter[tuple[str, str]]) -> tuple[int, str, str]:
    reasons, labels = Counter[str](), Counter[str]()
    for (label, reason), n in counts.items():
        reasons[reason] += n
        labels[label] += n
    first, _ = reasons.most_common(1)[0]
    like = f" (and {len(reasons) - 1} like it, of other numbers)" if len(reasons) > 1 else ""
    return counts.total(), first + like, "; ".join(f"{label} {n}" for label, n in labels.most_common())


def privacy_spent(every: list[Configuration]) -> dict[tuple[str, str], None]:
    """Return what the rounds of private runs have spent, and of rehearsals what they would have: label and sentence."""
    return dict.fromkeys(
        (one.label, _sentence(run, epsilon) + about)
        for one in every
        for run in one.runs
        for column, about in ABOUT_NOISE.items()
        if (epsilon := run.last(column)) is not None
    )


def _sentence(run: RunRecord, epsilon: float) -> str:
    delta, rounds = run.settings.get("method.delta", "?"), f"{run.last_round} round{'s' * (run.last_round != 1)}"
    return f"ε = {format_number(epsilon)} at δ = {delta}, after {rounds}"
