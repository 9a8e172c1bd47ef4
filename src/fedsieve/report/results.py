"""What was reached, and what it took: a row for each configuration, mean ± standard deviation over its seeds."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable
from html import escape
from typing import TypeAlias

from fedsieve.report.configurations import Configuration
from fedsieve.report.parts import NONE, folded, sample, soft, wide
from fedsieve.runs.record import RunRecord, format_kernels, number
from fedsieve.runs.units import (
    format_bytes,
    format_count,
    format_duration,
    format_megabytes,
    format_milliseconds,
    format_percent,
    format_ratio,
)

Get: TypeAlias = Callable[[RunRecord], float | None]
Form: TypeAlias = Callable[[float, float | None], str]
NOTE = """Bytes are those of the encoded messages, as counted; 1 MB is 10<sup>6</sup> bytes. Dense is what plain
federated averaging of the same model costs in the same rounds; under a measure stands what it is measured against, and
by how much it is below or above. A step is a client's, with what goes before and after its steps; sparse is by the
kernels, dense by PyTorch. Below, if it was measured at the end of the run: one step each way, alone, and the peak
memory of a process that takes it."""
SEEDS = """ Of several seeds: the mean ± the standard deviation of the sample (none is shown that rounds to zero), of
those that are finished."""
COLUMNS = (
    "Accuracy",
    "Density",
    "Bytes up",
    "Bytes down",
    "One upload",
    "Multiply-adds",
    "A step",
    "Time",
    "Peak memory",
)


def results(every: list[Configuration]) -> str:
    """Return the table, and, where seeds are many, that of every run by itself."""
    several = any(len(one.runs) > 1 for one in every)
    rows = [_row(one, sample("result", one.look), _seeds(one)) for one in every]
    note = f"<p><small>{NOTE}{SEEDS * several}</small></p>\n"
    return note + _table("Configuration" if several else "Run", rows) + (_each(every) if several else "")


def state(runs: list[RunRecord]) -> str:
    """Return how far the runs are."""
    done, planned = sorted({run.last_round for run in runs}), runs[0].settings.get("rounds", "?")
    span = f"{done[0]}" if len(done) == 1 else f"{done[0]} to {done[-1]}"
    whole = sum(run.whole for run in runs)
    if whole == len(runs):
        return f"<span class=state>finished, {span} round{'s' * (done[-1] != 1)}</span>"
    some = f"{whole} of {len(runs)} finished, " if len(runs) > 1 else ""
    return f'<span class="state going">{some}{span} of {escape(planned)} rounds</span>'


def _each(every: list[Configuration]) -> str:
    singles = [(one, run) for one in every for run in one.runs]
    rows = []
    for i, (one, run) in enumerate(singles):
        alone = Configuration(f"{one.label}, seed {run.settings.get('seed', '–')}", one.look, [run])
        rows.append(_row(alone, sample(f"run{i}-", one.look), run.folder.name))
    return folded("Every run by itself", _table("Run", rows), len(rows))


def _table(first: str, rows: list[str]) -> str:
    heads = "".join(f"<th scope=col class=number>{name}</th>" for name in COLUMNS)
    body = f"<thead><tr><th scope=col>{first}</th>{heads}</tr></thead>\n<tbody>\n{''.join(rows)}</tbody>"
    return wide(body, "results sorts" if len(rows) > 1 else "results")


def _seeds(one: Configuration) -> str:
    return f"{len(one.runs)} seeds" if len(one.runs) > 1 else ""


def _row(one: Configuration, look: str, about: str) -> str:
    runs = one.counted
    cells = [
        _accuracy(runs),
        _value(runs, lambda run: run.last("density"), format_percent)
        + _under("of all", runs, lambda run: run.last("density_of_all"), format_percent),
        _measured(runs, "bytes_up", format_bytes, "bytes_dense_up"),
        _measured(runs, "bytes_down", format_bytes, "bytes_dense_down"),
        _against(runs, RunRecord.upload, format_bytes, "paper", lambda run: run.final("paper_bytes_up")),
        _measured(runs, "multiply_adds", format_count, "multiply_adds_dense") + _not_counted(runs),
        _step(runs),
        _value(runs, lambda run: run.total("seconds"), format_duration),
        _value(runs, lambda run: run.final("peak_memory_mb"), format_megabytes),
    ]
    name = f"<span class=named>{look}<span>{soft(one.label)}</span></span>"
    going = "" if all(run.whole for run in one.runs) else state(one.runs)
    below = "".join(f"<small>{text}</small>" for text in (soft(about), going) if text)
    numbers = "".join(f"<td class=number>{cell}</td>" for cell in cells)
    return f"<tr><th scope=row>{name}{below}</th>{numbers}</tr>\n"


def _accuracy(runs: list[RunRecord]) -> str:
    return (
        _value(runs, lambda run: run.last("accuracy"), format_percent)
        + _under("pruned", runs, lambda run: run.last("accuracy_pruned"), format_percent)
        + _under("validation", runs, lambda run: run.last("accuracy_validation"), format_percent)
    )


def _known(runs: list[RunRecord], get: Get) -> list[float]:
    return [value for run in runs if (value := get(run)) is not None]


def _value(runs: list[RunRecord], get: Get, form: Form) -> str:
    """Return the mean over the runs that have a measure, with its spread; a dash where none has."""
    known = _known(runs, get)
    if not known:
        return NONE
    mean = known[0] if len(known) == 1 else statistics.fmean(known)
    return f'<data value="{mean!r}">{form(mean, statistics.stdev(known) if len(known) > 1 else None)}</data>'


def _under(what: str, runs: list[RunRecord], get: Get, form: Form) -> str:
    return f"<small>{what} {_value(runs, get, form)}</small>" if _known(runs, get) else ""


def _measured(runs: list[RunRecord], name: str, form: Form, dense: str) -> str:
    return _against(runs, lambda run: run.total(name), form, "dense", lambda run: run.total(dense))


def _not_counted(runs: list[RunRecord]) -> str:
    """Return what the multiply-adds lack: the operations that have no formula."""
    every = [(run.summary or {}).get("multiply_adds_not_counted") for run in runs]
    names = sorted({str(name) for one in every if isinstance(one, list) for name in one})
    return f"<small>not counted: {escape(', '.join(names))}</small>" if names else ""


def _against(runs: list[RunRecord], get: Get, form: Form, what: str, reference: Get) -> str:
    """Return a measure, and under it what it stands against, with the factor between the two."""
    own, others = _known(runs, get), _known(runs, reference)
    if not own or not others:
        return _value(runs, get, form)
    mean = statistics.fmean(others)
    factor = format_ratio(mean, statistics.fmean(own))
    below = f"<small>{what} {_value([runs[0]], lambda _: mean, form)}</small>" + (
        f"<small>{factor}</small>" if factor else ""
    )
    return _value(runs, get, form) + below


def _step(runs: list[RunRecord]) -> str:
    """Return the milliseconds of a training step and which way it was computed; and both ways, where measured."""
    ways = format_kernels(sum((run.kernels for run in runs), Counter[str]()))
    both = dict.fromkeys(way for run in runs for way in run.measured)
    measured = "".join(
        f"<small>{escape(way)} {_value(runs, _both(way, 'ms_per_step'), format_milliseconds)}, "
        f"{_value(runs, _both(way, 'peak_memory_mb'), format_megabytes)}</small>"
        for way in both
    )
    return (
        _value(runs, RunRecord.step, format_milliseconds)
        + (f"<small>{escape(ways)}</small>" if ways else "")
        + measured
    )


def _both(way: str, name: str) -> Get:
    return lambda run: number(run.measured.get(way, {}).get(name))
