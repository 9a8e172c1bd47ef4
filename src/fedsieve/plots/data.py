"""What a figure shows, as plain numbers: runs gathered into lines, seeds averaged; nothing is drawn here."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from fedsieve.drawing import Axis, Bits, Line
from fedsieve.recorded import Recorded, number
from fedsieve.types import InputError

Runs = list[Recorded]
Points = dict[float, tuple[float, float]]
"""By round: x and y."""

SEED = "seed"
WRITTEN = {
    "fedavg": "FedAvg",
    "fedadam": "FedAdam",
    "swat": "SWAT",
    "zerofl": "ZeroFL",
    "topk": "Top-k",
    "sparsefedpp": "SparseFedPP",
    "dnr": "DNR",
    "nst": "NST",
    "pdst": "PDST",
    "flash": "FLASH",
    "hetero_flash": "hetero-FLASH",
}
DASHES = ("--", "-.", ":")
CUTS = ("method.sparsity", "method.density", "method.densities")
"""The fields that say how sparse a run is; the densities of several device classes count as the largest."""


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
    """A whole figure. Its legend is one for all panels, or ``apart``: each panel has its own."""

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


def seeds(runs: Iterable[Recorded], without: Sequence[str] = ()) -> list[Runs]:
    """Return the runs that differ in nothing but the seed and the fields ``without``, group by group."""
    groups: dict[frozenset[tuple[str, str]], Runs] = {}
    for run in runs:
        kept = frozenset(item for item in run.settings.items() if item[0] not in (SEED, *without))
        groups.setdefault(kept, []).append(run)
    return list(groups.values())


def series(runs: Iterable[Recorded], base: Callable[[Recorded], str], without: Sequence[str] = ()) -> dict[str, Runs]:
    """Return groups of ``seeds`` by their labels: ``base``, and what tells apart those of which it says the same."""
    return labelled(seeds(runs, without), base, (SEED, *without))


def labelled(groups: list[Runs], base: Callable[[Recorded], str], without: Sequence[str] = ()) -> dict[str, Runs]:
    """Return the groups by labels, no two the same.

    What ``base`` says of several is told apart by the method, then by up to three settings, then by a number.
    """
    first = [group[0] for group in groups]
    names = [_name(run, [other for other in first if base(other) == base(run)], base(run), without) for run in first]
    twins = {name for name in names if names.count(name) > 1}
    names = [f"{name} ({i})" if name in twins else name for i, name in enumerate(names, 1)]
    return dict(zip(names, groups, strict=True))


def _name(run: Recorded, peers: Runs, base: str, without: Sequence[str]) -> str:
    alike = [peer for peer in peers if kind(peer) == kind(run)]
    if len(alike) < len(peers):
        return _name(run, alike, f"{base}, {kind(run)}", without)
    apart = [key for key in run.settings if len({peer.settings.get(key) for peer in peers}) > 1 and key not in without]
    told = (f"{key.removesuffix('.kind').split('.')[-1]} {run.settings[key]}" for key in apart[:3])
    return ", ".join(filter(None, [base, *told]))


def kind(run: Recorded) -> str:
    """Return the method's name, as its paper writes it."""
    name = str(run.about.get("method", ""))
    return WRITTEN.get(name, name) or run.settings.get("method.kind", run.recipe)


def field(run: Recorded, name: str) -> float | None:
    """Return a setting that is a number, or the largest of several."""
    return numeric(run.settings.get(name, ""))


def numeric(text: str) -> float | None:
    """Return the number that a setting says, or the largest of several."""
    with suppress(ValueError, RecursionError):
        value = json.loads(text)
        known = [number(one) for one in (value if isinstance(value, list) else [value])]
        return max((one for one in known if one is not None), default=None)
    return None


def density(run: Recorded) -> float | None:
    """Return the share of the weights that a run's method keeps; None if it is dense."""
    if (sparsity := share(field(run, "method.sparsity"))) is not None:
        return round(1 - sparsity, 12)
    return next((d for name in CUTS[1:] if (d := share(field(run, name))) is not None), None)


def over_rounds(run: Recorded, measured: str) -> Points:
    """Return a share, in percent, by round; what cannot be one is left out."""
    return {t: (t, 100 * y) for t, y in zip(*run.series(measured), strict=True) if share(y) is not None}


def over_bytes(run: Recorded) -> Points:
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


def swept(runs: Runs, at: Callable[[Recorded], float | None], place: int, steps: Mapping[float, int] | None) -> Line:
    """Return the accuracy at the end over ``at``, a setting; or over the place of its value in ``steps``."""
    values = sorted({x for run in runs if (x := at(run)) is not None})
    ends = [(x, ending([run for run in runs if at(run) == x], place)) for x in values]
    known = [(steps[x] if steps else x, *end) for x, end in ends if end]
    xs, ys, spread, hollow = ([point[i] for point in known] for i in range(4))
    return Line(xs, ys, place, spread=spread, bars=True, hollow=[bool(one) for one in hollow])


def level(runs: Runs, place: int, ends: tuple[float, float]) -> Line:
    """Return the accuracy of a method without the setting that a figure varies: the same all the way."""
    reached = ending(runs, place)
    if reached is None:
        return Line((), (), place)
    middle, spread, hollow = reached
    return Line(ends, (middle,) * 2, place, DASHES[place % 3], (spread,) * 2, hollow=(hollow,) * 2, level=True)
