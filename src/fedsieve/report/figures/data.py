"""What a figure shows, as plain numbers: runs gathered into lines, seeds averaged; nothing is drawn here."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate, count
from typing import Any

from fedsieve.report.configurations import TARGET, Runs, Without, apart, nothing, seeds, unique
from fedsieve.report.style import Axis, Bits, Line
from fedsieve.runs.record import RunRecord, number, numeric
from fedsieve.types import InputError

Points = dict[float, tuple[float, float]]
"""By round: x and y."""
DENSE = 0.995
"""From this measured density on, a model counts as dense: some weights of a dense one are zero by chance."""


class LackingError(InputError):
    """The runs do not hold what a figure shows."""


@dataclass(frozen=True)
class Panel:
    """One pair of axes, and its lines by their labels."""

    title: str
    x: Axis
    y: Axis
    lines: Mapping[str, Line]


@dataclass(frozen=True)
class Map:
    """One map of what is present."""

    title: str
    bits: Bits


@dataclass(frozen=True)
class Picture:
    """A whole figure: panels of the same measure have one scale, unless they stand ``apart``."""

    name: str
    title: str
    caption: str
    panels: tuple[Panel, ...] = ()
    maps: tuple[Map, ...] = ()
    columns: int = 3
    apart: bool = False


def share(value: Any) -> float | None:
    """Return ``value`` if it is a share of a whole."""
    known = number(value)
    return known if known is not None and 0 <= known <= 1 else None


def series(runs: Iterable[RunRecord], base: Callable[[RunRecord], str], without: Without = nothing) -> dict[str, Runs]:
    """Return groups of ``seeds`` by their labels: ``base``, and what tells apart those of which it says the same."""
    return labelled(seeds(runs, without), base, without)


def labelled(groups: list[Runs], base: Callable[[RunRecord], str], without: Without = nothing) -> dict[str, Runs]:
    """Return the groups by labels, no two the same.

    A group that is one configuration of a page is called as it is all over the page. Of others, what ``base`` says of
    several is followed by what tells them apart.
    """
    names = [_own(group) or base(group[0]) for group in groups]
    full = list(names)
    for name in set(names):
        peers = [i for i, other in enumerate(names) if other == name]
        parts = apart([groups[i][0] for i in peers], without)
        full = [", ".join(filter(None, [name, parts[peers.index(i)]])) if i in peers else n for i, n in enumerate(full)]
    return dict(zip(unique(full), groups, strict=True))


def _own(group: Runs) -> str:
    """Return the label that a page has for the runs, if it is one."""
    labels = {run.label for run in group}
    return labels.pop() if len(labels) == 1 else ""


def looks(groups: Mapping[str, Runs]) -> dict[str, int]:
    """Return the places of the groups' looks: that of the configuration on a page, else one that nothing has."""
    every = {label: {run.look for run in group} for label, group in groups.items()}
    fresh = count(1 + max((look for own in every.values() for look in own if look is not None), default=-1))
    return {label: only if len(own) == 1 and (only := next(iter(own))) is not None else next(fresh)
            for label, own in every.items()}  # fmt: skip


def field(run: RunRecord, name: str) -> float | None:
    """Return a setting that is a number, or the largest of several."""
    return numeric(run.settings.get(name, ""))


def density(runs: Runs) -> float | None:
    """Return the density that the method of one configuration aims at, or else the mean of what was measured last."""
    if runs[0].target is not None:
        return runs[0].target
    known = [d for run in runs if (d := share(run.last("density"))) is not None]
    mean = statistics.fmean(known) if known else None
    return 1.0 if mean is not None and mean >= DENSE else float(f"{mean:.3g}") if mean else mean


def aims(runs: Runs) -> Without:
    """Return what does not count where runs of a method are one line over density: the settings that say the target.

    They are those that equal the target, or 1 less it, in every run of the method.
    """
    of: dict[object, set[str]] = {}
    for run in runs:
        said = {name for name in run.settings if name.startswith("method.") and _says(run, name)}
        of[_method(run)] = of.get(_method(run), said) & said
    return lambda run: of[_method(run)] | {TARGET} if run.target is not None else set()


def _method(run: RunRecord) -> tuple[object, ...]:
    return str(run.manifest.get("class")), run.settings.get("method.kind"), run.target is None


def _says(run: RunRecord, name: str) -> bool:
    value, target = field(run, name), run.target
    return None not in (value, target) and any(
        math.isclose(v, target or 0, rel_tol=1e-9) for v in (value or 0, 1 - (value or 0))
    )


def over_rounds(run: RunRecord, measured: str) -> Points:
    """Return a share, in percent, by round; what cannot be one is left out."""
    return {t: (t, 100 * y) for t, y in zip(*run.series(measured), strict=True) if share(y) is not None}


def over_bytes(run: RunRecord) -> Points:
    """Return the accuracy, in percent, over the megabytes sent both ways until then; as far as all were counted."""
    each = (_sum(number(row.get("bytes_up")), number(row.get("bytes_down"))) for row in run.rows)
    sent = dict(zip((row["round"] for row in run.rows), accumulate(each), strict=True))
    return {t: (sent[t] / 1e6, y) for t, (_, y) in over_rounds(run, "accuracy").items() if sent[t] > 0}


def _sum(up: float | None, down: float | None) -> float:
    return math.nan if up is None or down is None else up + down


def averaged(every: Iterable[Points], place: int) -> Line:
    """Return the mean over the seeds, with its standard deviation, at the rounds that all seeds reached.

    A seed that has measured nothing yet is left out.
    """
    begun = [points for points in every if points]
    rounds = sorted(set(begun[0]).intersection(*begun)) if begun else []
    middle = [tuple(statistics.fmean(points[t][i] for points in begun) for t in rounds) for i in (0, 1)]
    spread = [statistics.stdev(points[t][1] for points in begun) if len(begun) > 1 else 0.0 for t in rounds]
    return Line(middle[0], middle[1], place, spread=tuple(spread))


def ending(runs: Runs, place: int) -> tuple[float, float, bool] | None:
    """Return the accuracy at the last round that all seeds were tested in: mean, spread, and if one is not finished."""
    line = averaged([over_rounds(run, "accuracy") for run in runs], place)
    return (line.y[-1], line.spread[-1], not all(run.whole for run in runs)) if line.x else None


def swept(runs: Runs, at: Callable[[Runs], float | None], place: int, steps: Mapping[float, int] | None) -> Line:
    """Return the accuracy at the end over ``at``, of a configuration; or over the place of its value in ``steps``."""
    points = [(x, end) for group in seeds(runs) if (x := at(group)) is not None and (end := ending(group, place))]
    known = [(steps[x] if steps else x, *end) for x, end in sorted(points)]
    xs, ys, spread, hollow = ([point[i] for point in known] for i in range(4))
    return Line(xs, ys, place, spread=spread, bars=True, hollow=[bool(one) for one in hollow])


def level(runs: Runs, place: int, ends: tuple[float, float]) -> Line:
    """Return the accuracy of a method without the setting that a figure varies: the same all the way."""
    reached = ending(runs, place)
    if reached is None:
        return Line((), (), place)
    middle, spread, hollow = reached
    return Line(ends, (middle,) * 2, place, spread=(spread,) * 2, hollow=(hollow,) * 2, level=True)
