"""What every plot shares: its palette, its lines and axes as plain data, and how they are drawn with matplotlib.

Colours are those of Okabe and Ito (2008), which colour-blind readers tell apart. The looks of lines are numbered: the
first seven differ in colour and marker, the next seven in dash and marker too, and so on, 196 of them all different.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator
from numpy.typing import NDArray

PALETTE = {  # name: (light, dark)
    "ink": ("#1c2126", "#e4e7ea"),
    "soft": ("#59626b", "#a3acb5"),
    "rule": ("#d9dde1", "#363d44"),
    "page": ("#ffffff", "#15191d"),
    "tint": ("#f5f7f8", "#1d2328"),
    "mark": ("#fff3d6", "#3d3318"),
    "run0": ("#0072b2", "#56b4e9"),
    "run1": ("#d55e00", "#e8762b"),
    "run2": ("#009e73", "#1fb98d"),
    "run3": ("#cc79a7", "#d98fb8"),
    "run4": ("#e69f00", "#f0b429"),
    "run5": ("#56b4e9", "#f0e442"),
    "run6": ("#4d4d4d", "#c4c4c4"),
}
"""Light ones are told apart by their hex code in the SVG, so all differ."""

MARKERS = "os^DvPX"
COLOURS = 7
DASHES = ("-", "--", "-.", (0, (1, 1.2)))

RC: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "fedsieve",
    "text.parse_math": False,
    "font.family": "DejaVu Sans",
    "font.size": 11.5 * 0.72,
    "text.color": PALETTE["ink"][0],
    "axes.edgecolor": PALETTE["rule"][0],
    "axes.labelcolor": PALETTE["soft"][0],
    "axes.titlecolor": PALETTE["soft"][0],
    "axes.titlesize": 11.5 * 0.72,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": PALETTE["rule"][0],
    "grid.linewidth": 0.6,
    "xtick.color": PALETTE["rule"][0],
    "ytick.color": PALETTE["rule"][0],
    "xtick.labelcolor": PALETTE["soft"][0],
    "ytick.labelcolor": PALETTE["soft"][0],
    "ytick.left": False,
    "lines.linewidth": 1.5,
}


@dataclass(frozen=True)
class Line:
    """One line of a plot: its points and the place of its look (None: a reference, dotted).

    ``spread`` is a standard deviation for each point: a band, or ``bars`` where points stand for runs. A point is
    ``hollow`` if one of its runs is not finished. A ``level`` has no points of its own.
    """

    x: Sequence[float]
    y: Sequence[float]
    run: int | None
    spread: Sequence[float] = ()
    bars: bool = False
    hollow: Sequence[bool] = ()
    level: bool = False


@dataclass(frozen=True)
class Axis:
    """The name of an axis, and whether it counts in whole numbers, in percent, from zero, or in powers of ten.

    An axis of ``steps`` has these names at 0, 1, 2 and so on.
    """

    name: str
    whole: bool = False
    percent: bool = False
    zero: bool = False
    log: bool = False
    steps: tuple[str, ...] = ()


@dataclass(frozen=True)
class Bits:
    """A map of what is ``present`` [rows, columns]: a name for every column, for some rows, and for both axes."""

    present: NDArray[np.bool_]
    columns: tuple[str, ...]
    rows: tuple[tuple[int, str], ...]
    x: str
    y: str


def plot(axes: Axes, lines: Sequence[Line], x: Axis, y: Axis) -> None:
    """Draw ``lines`` and set both scales."""
    runs = 1 + max((line.run for line in lines if line.run is not None), default=0)
    for line in lines:
        look = style(line, runs)
        axes.plot(line.x, line.y, **look)
        _spread(axes, line, look)
    ends = [
        v
        for line in lines
        for v, by in zip(line.y, line.spread or [0] * len(line.y), strict=True)
        for v in (v - by, v + by)
    ]
    _scale(axes, "x", x, [v for line in lines for v in line.x])
    _scale(axes, "y", y, ends)


def _spread(axes: Axes, line: Line, look: dict[str, Any]) -> None:
    """Draw the standard deviation around a line, and the points of unfinished runs as rings."""
    low, high = ([v + sign * by for v, by in zip(line.y, line.spread, strict=False)] for sign in (-1, 1))
    if any(line.spread) and line.bars:
        axes.vlines(line.x, low, high, colors=look["color"], linewidth=look.get("linewidth", 1.0))
    elif any(line.spread):
        axes.fill_between(line.x, low, high, color=look["color"], alpha=0.18, linewidth=0)
    rings = [i for i, hollow in enumerate(line.hollow) if hollow]
    if rings:
        look = {**look, "markerfacecolor": PALETTE["page"][0], "linestyle": "", "markevery": 1}
        axes.plot([line.x[i] for i in rings], [line.y[i] for i in rings], **look)


def map_bits(axes: Axes, shown: Bits) -> None:
    """Draw what is present dark, with as many names of columns and rows as there is room for."""
    axes.imshow(shown.present, aspect="auto", interpolation="none", cmap="Greys", vmin=0, vmax=1.15)
    axes.grid(visible=False)
    columns = range(0, len(shown.columns), math.ceil(len(shown.columns) / _ticks(axes, "x")))
    axes.set_xticks(list(columns), [shown.columns[i] for i in columns])
    rows = shown.rows[:: math.ceil(len(shown.rows) / (2 * _ticks(axes, "y")))]
    axes.set_yticks([row for row, _ in rows], [text for _, text in rows])
    axes.set_xlabel(shown.x)


def style(line: Line, runs: int) -> dict[str, Any]:
    """Return how a line of one of ``runs`` runs is drawn."""
    if line.run is None:
        return {
            "color": PALETTE["soft"][0],
            "linestyle": ":",
            "linewidth": 1.1,
            "marker": "_" if len(line.x) == 1 else "",
        }
    marker = MARKERS[(line.run + line.run // COLOURS) % len(MARKERS)]
    every, colour = max(1, len(line.x) // 8), PALETTE[f"run{line.run % COLOURS}"][0]
    larger = 1 - (line.run + 1) / runs if every == 1 and not line.bars else 0
    return {
        "color": colour,
        "linestyle": DASHES[line.run // COLOURS % len(DASHES)],
        "marker": marker,
        "markevery": [] if line.level else (line.run * every // runs, every),  # lines that coincide take turns,
        "markersize": (0.7 + 0.67 * larger) * mpl.rcParams["lines.markersize"],  # or show one behind the other
        "markeredgewidth": 0.9,
        "clip_on": False,  # a marker at 0 or 100 % is whole
    }


def _scale(axes: Axes, side: str, spec: Axis, values: Sequence[float]) -> None:
    """Set one axis: its scale, its ticks, and a range that keeps a single point in the middle."""
    values = [v for v in values if v > 0] if spec.log else values  # a band may reach below zero
    axis, low, high = getattr(axes, side + "axis"), min(values), max(values)
    if spec.steps:
        axis.set_ticks(range(len(spec.steps)), spec.steps)
        getattr(axes, f"set_{side}lim")(-0.4, len(spec.steps) - 0.6)
        return
    axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.6g}"))
    if spec.log:
        getattr(axes, f"set_{side}scale")("log")
        axis.set_major_locator(FixedLocator(_log_ticks(low, high)))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.6g}"))
        margin = (high / low) ** 0.05
        getattr(axes, f"set_{side}lim")(low / margin, high * margin)
        return
    axis.set_major_locator(MaxNLocator(_ticks(axes, side), integer=spec.whole, min_n_ticks=1, steps=[1, 2, 2.5, 5, 10]))
    margin = 0.05 * (high - low) or (0.5 if spec.whole else 0.1 * abs(high) or 1)
    bottom, top = low - margin, high + margin
    if side == "y":
        bottom, top = 0 if spec.zero else max(bottom, 0), min(top, 101.5) if spec.percent else top
    getattr(axes, f"set_{side}lim")(bottom, top)


def _ticks(axes: Axes, side: str) -> int:
    """Return how many ticks there is room for: 6 but where panels are small."""
    extent, root = axes.get_window_extent(), axes.get_figure(root=True)
    wide, high = (inches / (root.dpi if root else 100) for inches in (extent.width, extent.height))
    return int(min(max(wide / 0.5 if side == "x" else high / 0.3, 3), 6))


def _log_ticks(low: float, high: float) -> list[float]:
    """Return ticks within ``low`` to ``high``: powers of ten, with 2 and 5 between where few; the ends if none."""
    near = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1,), (1, 2, 5)):
        ticks = [step * 10.0**e for e in near for step in steps if 0.9 * low <= step * 10.0**e <= 1.1 * high]
        if len(ticks) > 2:
            return ticks[:: math.ceil(len(ticks) / 8)]
    return ticks if len(ticks) > 1 else [low, high]
