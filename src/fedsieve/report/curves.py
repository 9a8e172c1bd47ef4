"""Round by round: the mean of each configuration's seeds, with a band of their standard deviation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeAlias

from fedsieve.report.configurations import Configuration
from fedsieve.report.figures.data import Points, averaged, over_bytes, over_rounds
from fedsieve.report.parts import legend, sample
from fedsieve.report.style import Axis, Line
from fedsieve.report.svg import chart, legend_list
from fedsieve.runs.record import RunRecord

ROUND, REACHED = Axis("round", whole=True), Axis("accuracy, %", percent=True)
Get: TypeAlias = Callable[[RunRecord], Points]


def curves(every: list[Configuration]) -> str:
    """Return the plots, under one legend: the best at the end of the first plot comes first."""
    accuracy = _lines(every, lambda run: over_rounds(run, "accuracy"))
    density = _lines(every, lambda run: over_rounds(run, "density"))
    sent = _lines(every, over_bytes)
    cost = Axis("sent up and down so far, MB", log=_spans([line.x[-1] for line in sent if line.x], 10))
    kept = Axis("density, %", percent=True, zero=True, log=_spans([y for line in density for y in line.y], 30))
    plots = [
        _plot("accuracy", "Accuracy over rounds", every, accuracy, ROUND, REACHED),
        _plot("sent", "Accuracy over bytes sent", every, sent, cost, REACHED),
        _plot("density", "Density over rounds", every, density, ROUND, kept),
        _traffic("up", every),
        _traffic("down", every),
    ]
    ends = {line.run: line.y[-1] for line in accuracy if line.x}
    ordered = sorted(every, key=lambda one: -ends.get(one.look, -1))
    several = any(len(one.runs) > 1 for one in every)
    said = "<p><small>Bands: the standard deviation over seeds.</small></p>\n" if several else ""
    return f"{legend('curve', ordered)}{said}<div class=plots>\n{''.join(plots)}</div>"


def _lines(every: list[Configuration], get: Get) -> list[Line]:
    return [averaged(map(get, one.runs), one.look) for one in every]


def _spans(values: Sequence[float], factor: float) -> bool:
    return bool(values) and min(values) > 0 and max(values) / min(values) > factor


def _traffic(way: str, every: list[Configuration]) -> str:
    """Return the plot of bytes sent one way in a round, and each distinct dense reference dotted, once."""
    dense = {tuple(map(tuple, run.series(f"bytes_dense_{way}"))) for one in every for run in one.runs}
    lines = [Line(x, y, None) for x, y in sorted(dense) if x]
    lines += _lines(every, lambda run: {t: (t, y) for t, y in zip(*run.series(f"bytes_{way}"), strict=True)})
    values = [y for line in lines for y in line.y]
    unit, size = ("MB", 1e6) if max(values, default=0) >= 1e6 else ("kB", 1e3)
    lines = [replace(one, y=[y / size for y in one.y], spread=[s / size for s in one.spread]) for one in lines]
    axis = Axis(f"{unit} in a round", zero=True, log=_spans(values, 10))
    reference = legend_list([f"{sample(f'dense-{way}', None)}dense"]) if dense else ""
    return _plot(f"bytes-{way}", f"Bytes {way} in a round", every, lines, ROUND, axis, reference)


def _plot(
    name: str, title: str, every: list[Configuration], lines: Sequence[Line], x: Axis, y: Axis, below: str = ""
) -> str:
    """Return a titled plot; without a point to show, the sentence that says so."""
    lines = [line for line in lines if line.x]
    if not lines:
        return f"<figure><h3>{title}</h3><p class=soft>Nothing measured yet.</p></figure>\n"
    own = [line for line in lines if line.run is not None]
    ends = "; ".join(f"{every[line.run or 0].label}: {line.y[0]:.4g} to {line.y[-1]:.4g}" for line in own)
    drawn = chart(name, lines, x, y, f"{title}. {y.name}, first to last: {ends}.")
    return f"<figure><h3>{title}</h3>{drawn}{below}</figure>\n"
