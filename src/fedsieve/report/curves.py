"""Round by round: the mean of each configuration's seeds, with a band of their standard deviation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fedsieve.report.configurations import Configuration
from fedsieve.report.figures.series import Points, accuracy_by_bytes, mean_line, percent_by_round
from fedsieve.report.plots import Axis, Line, LinePlot
from fedsieve.runs.record import RunRecord

ROUND, ACCURACY = Axis("round", whole=True), Axis("accuracy, %", percent=True)


def curves(every: list[Configuration]) -> dict[str, LinePlot]:
    """Return the plots by their ids; one without a line has nothing measured yet."""
    means = {measure: _mean_lines(every, measure) for measure in ("accuracy", "sent", "density")}
    cost = Axis("sent up and down so far, MB", log=_spans([line.x[-1] for line in means["sent"].values()], 10))
    densities = [y for line in means["density"].values() for y in line.y]
    kept = Axis("density, %", percent=True, zero=True, log=_spans(densities, 30))
    return {
        "accuracy": LinePlot("Accuracy over rounds", ROUND, ACCURACY, means["accuracy"]),
        "sent": LinePlot("Accuracy over bytes sent", cost, ACCURACY, means["sent"]),
        "density": LinePlot("Density over rounds", ROUND, kept, means["density"]),
        "bytes-up": _traffic("up", every),
        "bytes-down": _traffic("down", every),
    }


def best_first(every: list[Configuration], accuracy: LinePlot) -> list[Configuration]:
    """Return the configurations by their accuracy at the end of a plot."""
    return sorted(every, key=lambda one: -line.y[-1] if (line := accuracy.lines.get(one.label)) else 1)


def _mean_lines(every: list[Configuration], measure: str) -> dict[str, Line]:
    """Return the line of each configuration that has measured something."""
    lines = {one.label: mean_line((_points(run, measure) for run in one.runs), one.look) for one in every}
    return {label: line for label, line in lines.items() if line.x}


def _points(run: RunRecord, measure: str) -> Points:
    if measure.startswith("bytes_"):
        return {t: (t, y) for t, y in zip(*run.series(measure), strict=True)}
    return accuracy_by_bytes(run) if measure == "sent" else percent_by_round(run, measure)


def _spans(values: Sequence[float], factor: float) -> bool:
    return bool(values) and min(values) > 0 and max(values) / min(values) > factor


def _traffic(way: str, every: list[Configuration]) -> LinePlot:
    """Return the plot of bytes sent one way in a round, and each distinct dense reference dotted, once."""
    series = {tuple(map(tuple, run.series(f"bytes_dense_{way}"))) for one in every for run in one.runs}
    references = [Line(x, y, None) for x, y in sorted(series) if x]
    lines = _mean_lines(every, f"bytes_{way}")
    values = [y for line in (*references, *lines.values()) for y in line.y]
    unit, size = ("MB", 1e6) if max(values, default=0) >= 1e6 else ("kB", 1e3)
    axis = Axis(f"{unit} in a round", zero=True, log=_spans(values, 10))
    scaled = {label: _divide(line, size) for label, line in lines.items()}
    return LinePlot(f"Bytes {way} in a round", ROUND, axis, scaled, tuple(_divide(line, size) for line in references))


def _divide(line: Line, unit: float) -> Line:
    return replace(line, y=[y / unit for y in line.y], spread=[s / unit for s in line.spread])
