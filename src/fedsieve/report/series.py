"""What plots show, as plain numbers: runs gathered into lines, seeds averaged; nothing is drawn here.

Below stand the page's own plots, round by round: each configuration's mean, with a band of the standard deviation.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate, count
from typing import Any, TypeAlias

from fedsieve.engine import Round
from fedsieve.report.configurations import (
    TARGET,
    Configuration,
    Runs,
    Without,
    distinguishing_settings,
    group_by_seed,
    number_duplicates,
)
from fedsieve.report.plots import ACCURACY, ROUND, Axis, Line, LinePlot, Plot
from fedsieve.runs.record import RunRecord, number, numeric
from fedsieve.types import InputError

Name: TypeAlias = Callable[[RunRecord], str]
Position: TypeAlias = Callable[[Runs], float | None]
"""Where runs that differ in their seed alone stand on an axis; None for nowhere."""
Points: TypeAlias = dict[float, tuple[float, float]]
"""By round: x and y."""
DENSE = 0.995
"""From this measured density on, a model counts as dense: some weights of a dense one are zero by chance."""
SPREAD = " Bands and bars: the standard deviation over seeds."
HOLLOW = " Hollow: a run that is not finished."


class LackingError(InputError):
    """The runs do not hold what a figure shows."""


def require(there: object, lacking: str) -> None:
    """Raise LackingError unless there is something."""
    if not there:
        raise LackingError(lacking)


@dataclass(frozen=True)
class PaperFigure:
    """A whole figure: plots of the same measure have one scale, unless ``own_scales``."""

    name: str
    title: str
    caption: str
    plots: tuple[Plot, ...]
    columns: int = 3
    own_scales: bool = False

    @property
    def labelled_lines(self) -> list[tuple[str, Line]]:
        """The lines of all plots with their labels, those of the first plot last."""
        plots = [plot.lines for plot in reversed(self.plots) if isinstance(plot, LinePlot)]
        return [item for lines in plots for item in lines.items()]

    @property
    def legend(self) -> dict[str, Line]:
        """Every line once by its label, as the first plot that has it shows it, in the order of the looks."""
        return dict(sorted(dict(self.labelled_lines).items(), key=lambda item: item[1].look or 0))

    @property
    def full_caption(self) -> str:
        """The caption, and what else the lines show."""
        lines = [line for _, line in self.labelled_lines]
        spread, hollow = any(any(line.spread) for line in lines), any(any(line.hollow) for line in lines)
        return self.caption + SPREAD * spread + HOLLOW * hollow


def as_share(value: Any) -> float | None:
    """Return ``value`` if it is a share of a whole."""
    share = number(value)
    return share if share is not None and 0 <= share <= 1 else None


def labelled_series(runs: Iterable[RunRecord], base: Name, without: Without = lambda run: ()) -> dict[str, Runs]:
    """Return groups by seed by their labels: ``base``, and what tells apart those of which it says the same."""
    return label_groups(group_by_seed(runs, without), base, without)


def label_groups(groups: list[Runs], base: Name, without: Without = lambda run: ()) -> dict[str, Runs]:
    """Return the groups by labels, no two the same.

    A group that is one configuration of a page is called as it is all over the page. Of others, what ``base`` says of
    several is followed by what tells them apart.
    """
    names = [_own(group) or base(group[0]) for group in groups]
    full = list(names)
    for name in set(names):
        peers = [i for i, other in enumerate(names) if other == name]
        parts = distinguishing_settings([groups[i][0] for i in peers], without)
        for i, part in zip(peers, parts, strict=True):
            full[i] = ", ".join(filter(None, [name, part]))
    return dict(zip(number_duplicates(full), groups, strict=True))


def _own(group: Runs) -> str:
    """Return the label that a page has for the runs, if it is one."""
    labels = {run.label for run in group}
    return labels.pop() if len(labels) == 1 else ""


def assign_looks(groups: Mapping[str, Runs]) -> dict[str, int]:
    """Return the places of the groups' looks: that of the configuration on a page, else one that nothing has."""
    every = {label: {run.look for run in group} for label, group in groups.items()}
    fresh = count(1 + max((look for own in every.values() for look in own if look is not None), default=-1))
    looks = dict[str, int]()
    for label, own in every.items():
        look = next(iter(own)) if len(own) == 1 else None
        looks[label] = next(fresh) if look is None else look
    return looks


def numeric_setting(run: RunRecord, name: str) -> float | None:
    """Return a setting that is a number, or the largest of several."""
    return numeric(run.settings.get(name, ""))


def density_of(runs: Runs) -> float | None:
    """Return the density that the method of one configuration aims at, or else the mean of what was measured last."""
    if runs[0].target is not None:
        return runs[0].target
    densities = [d for run in runs if (d := as_share(run.last("density"))) is not None]
    if not densities:
        return None
    mean = statistics.fmean(densities)
    return 1.0 if mean >= DENSE else float(f"{mean:.3g}")


def target_settings(runs: Runs) -> Without:
    """Return what does not count where runs of a method are one line over density: the settings that say the target.

    They are those that equal the target, or 1 less it, in every run of the method.
    """
    of: dict[object, set[str]] = {}
    for run in runs:
        names = {name for name in run.settings if name.startswith("method.") and _tells_target(run, name)}
        of[_method(run)] = of.get(_method(run), names) & names
    return lambda run: of[_method(run)] | {TARGET} if run.target is not None else set()


def _method(run: RunRecord) -> tuple[object, ...]:
    return str(run.manifest.get("class")), run.settings.get("method.kind"), run.target is None


def _tells_target(run: RunRecord, name: str) -> bool:
    value, target = numeric_setting(run, name), run.target
    if value is None or target is None:
        return False
    return any(math.isclose(v, target, rel_tol=1e-9) for v in (value, 1 - value))


def percent_by_round(run: RunRecord, measure: str) -> Points:
    """Return a share, in percent, by round; what cannot be one is left out."""
    return {t: (t, 100 * y) for t, y in zip(*run.series(measure), strict=True) if as_share(y) is not None}


def accuracy_by_bytes(run: RunRecord) -> Points:
    """Return the accuracy, in percent, over the megabytes sent both ways until then; as far as all were counted."""
    each = (_sum(number(row.get("bytes_up")), number(row.get("bytes_down"))) for row in run.rows)
    traffic = dict(zip((row["round"] for row in run.rows), accumulate(each), strict=True))
    return {t: (traffic[t] / 1e6, y) for t, (_, y) in percent_by_round(run, "accuracy").items() if traffic[t] > 0}


def _sum(up: float | None, down: float | None) -> float:
    return math.nan if up is None or down is None else up + down


def mean_line(every: Iterable[Points], place: int) -> Line:
    """Return the mean over the seeds, with its standard deviation, at the rounds that all seeds reached.

    A seed that has measured nothing yet is left out.
    """
    seeds = [points for points in every if points]
    rounds = sorted(set(seeds[0]).intersection(*seeds)) if seeds else []
    middle = [tuple(statistics.fmean(points[t][i] for points in seeds) for t in rounds) for i in (0, 1)]
    spread = [statistics.stdev(points[t][1] for points in seeds) if len(seeds) > 1 else 0.0 for t in rounds]
    return Line(middle[0], middle[1], place, spread=tuple(spread))


def final_accuracy(runs: Runs) -> tuple[float, float, bool] | None:
    """Return the accuracy at the last round that all seeds were tested in: mean, spread, and if one is not finished."""
    line = mean_line([percent_by_round(run, "accuracy") for run in runs], 0)
    return (line.y[-1], line.spread[-1], not all(run.ended for run in runs)) if line.x else None


def accuracy_line(runs: Runs, at: Position, place: int) -> Line:
    """Return the accuracy at the end over ``at``, of a configuration."""
    groups = group_by_seed(runs)
    points = sorted((x, *end) for group in groups if (x := at(group)) is not None and (end := final_accuracy(group)))
    xs, ys, spread, hollow = ([point[i] for point in points] for i in range(4))
    return Line(xs, ys, place, spread=spread, bars=True, hollow=[bool(one) for one in hollow])


def level_line(runs: Runs, place: int, ends: tuple[float, float]) -> Line:
    """Return the accuracy of a method without the setting that a figure varies: the same all the way."""
    accuracy = final_accuracy(runs)
    if accuracy is None:
        return Line((), (), place)
    middle, spread, hollow = accuracy
    return Line(ends, (middle,) * 2, place, spread=(spread,) * 2, hollow=(hollow,) * 2, level=True)


def non_empty(lines: Mapping[str, Line]) -> dict[str, Line]:
    """Return the lines that have points."""
    return {label: line for label, line in lines.items() if line.x}


def curves(every: list[Configuration]) -> dict[str, LinePlot]:
    """Return the plots by their ids; one without a line has nothing measured yet."""
    means = {measure: _mean_lines(every, measure) for measure in ("accuracy", "sent", "density")}
    traffic = Axis("sent up and down so far, MB", log=_spans([line.x[-1] for line in means["sent"].values()], 10))
    densities = [y for line in means["density"].values() for y in line.y]
    density = Axis("density, %", percent=True, zero=True, log=_spans(densities, 30))
    accuracy = {
        "accuracy": LinePlot("Accuracy over rounds", ROUND, ACCURACY, means["accuracy"]),
        "sent": LinePlot("Accuracy over bytes sent", traffic, ACCURACY, means["sent"]),
    }
    own = {name: None for one in every for run in one.runs for name in run.metrics if name != "accuracy"}
    plots = {f"task-{i}": _metric(name, every) for i, name in enumerate(own)}
    if all("accuracy" in run.metrics for one in every for run in one.runs):
        first = next(iter(every[0].runs[0].metrics)) == "accuracy"
        plots = accuracy | plots if first else plots | accuracy
    return plots | {
        "density": LinePlot("Density over rounds", ROUND, density, means["density"]),
        "bytes-up": _traffic("up", every),
        "bytes-down": _traffic("down", every),
        **{f"metric-{i}": _metric(name, every) for i, name in enumerate(_metrics(every)) if name not in own},
    }


def _metrics(every: list[Configuration]) -> list[str]:
    """Return the metrics that clients report: the columns of numbers that not every run has."""
    known = {"round", "mismatch", *(f.name for f in fields(Round))}
    rows = (row for one in every for run in one.runs for row in run.rows)
    return sorted({name for row in rows for name, value in row.items() if number(value) is not None} - known)


def _metric(name: str, every: list[Configuration]) -> LinePlot:
    """Return the plot of a metric over rounds."""
    lines = _mean_lines(every, name)
    below = any(y < 0 for line in lines.values() for y in line.y)
    return LinePlot(f"{name} over rounds", ROUND, Axis(name, signed=below), lines)


def best_first(every: list[Configuration], plot: LinePlot, higher_is_better: bool = True) -> list[Configuration]:
    """Return the configurations by their metric at the end of a plot, those without one last."""
    sign = -1 if higher_is_better else 1
    return sorted(every, key=lambda one: sign * line.y[-1] if (line := plot.lines.get(one.label)) else math.inf)


def _mean_lines(every: list[Configuration], measure: str) -> dict[str, Line]:
    """Return the line of each configuration that has measured something."""
    return non_empty({one.label: mean_line((_points(run, measure) for run in one.runs), one.look) for one in every})


def _points(run: RunRecord, measure: str) -> Points:
    if measure in ("accuracy", "density"):
        return percent_by_round(run, measure)
    if measure == "sent":
        return accuracy_by_bytes(run)
    return {t: (t, y) for t, y in zip(*run.series(measure), strict=True)}


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
