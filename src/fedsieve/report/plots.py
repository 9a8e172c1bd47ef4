"""A plot as plain data that draws itself with matplotlib, in the page and on paper alike: lines, masks, maps, bars.

Colours are those of Okabe and Ito (2008), which colour-blind readers tell apart. The looks of lines are numbered: the
first seven differ in colour and marker, the next seven in dash and marker too, and so on, 196 of them all different.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
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
INK, SOFT, RULE = (PALETTE[name][0] for name in ("ink", "soft", "rule"))
MARKERS = "os^DvPX"
COLOURS = 7
DASHES = ("-", "--", "-.", (0, (1, 1.2)))

RC: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "fedsieve",
    "text.parse_math": False,
    "font.family": "DejaVu Sans",
    "font.size": 11.5 * 0.72,
    "text.color": INK,
    "axes.edgecolor": RULE,
    "axes.labelcolor": SOFT,
    "axes.titlecolor": SOFT,
    "axes.titlesize": 11.5 * 0.72,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": SOFT,
    "ytick.labelcolor": SOFT,
    "ytick.left": False,
    "lines.linewidth": 1.5,
}
"""Of a plot on the page; the settings of ``PAPER`` come on top of it in a figure's file."""


@dataclass(frozen=True)
class Line:
    """One line of a plot: its points and the number of its look (None: a reference, dotted).

    ``spread`` is a standard deviation for each point: a band, or ``bars`` where points stand for runs. A point is
    ``hollow`` if one of its runs is not finished. A ``level`` has no points of its own.
    """

    x: Sequence[float]
    y: Sequence[float]
    look: int | None
    spread: Sequence[float] = ()
    bars: bool = False
    hollow: Sequence[bool] = ()
    level: bool = False

    def style(self, lines: int) -> dict[str, Any]:
        """Return matplotlib's properties of this line among ``lines`` lines."""
        if self.look is None:
            marker = "_" if len(self.x) == 1 else ""
            return {"color": SOFT, "linestyle": ":", "linewidth": 1.1, "marker": marker}
        every = max(1, len(self.x) // 8)
        larger = 1 - (self.look + 1) / lines if every == 1 and not self.bars else 0
        return {
            "color": PALETTE[f"run{self.look % COLOURS}"][0],
            "linestyle": DASHES[self.look // COLOURS % len(DASHES)],
            "marker": MARKERS[(self.look + self.look // COLOURS) % len(MARKERS)],
            "markevery": [] if self.level else (self.look * every // lines, every),  # lines that coincide take turns,
            "markersize": (0.7 + 0.67 * larger) * mpl.rcParams["lines.markersize"],  # or show one behind the other
            "markeredgewidth": 0.9,
            "clip_on": False,  # a marker at 0 or 100 % is whole
        }


@dataclass(frozen=True)
class Axis:
    """The name of an axis, and whether it counts in whole numbers, in percent, from zero, or in powers of ten.

    A ``signed`` one shows numbers below zero too. An axis of ``steps`` has these names at 0, 1, 2 and so on.
    """

    name: str
    whole: bool = False
    percent: bool = False
    zero: bool = False
    log: bool = False
    signed: bool = False
    steps: tuple[str, ...] = ()


ROUND, ACCURACY = Axis("round", whole=True), Axis("accuracy, %", percent=True)


@dataclass(frozen=True)
class LinePlot:
    """Lines by their labels, and references, on one pair of axes."""

    title: str
    x: Axis
    y: Axis
    lines: Mapping[str, Line]
    references: tuple[Line, ...] = ()
    """Dotted, without a label."""

    @property
    def description(self) -> str:
        """What a screen reader reads."""
        ends = "; ".join(f"{name}: {line.y[0]:.4g} to {line.y[-1]:.4g}" for name, line in self.lines.items())
        return f"{self.title or self.x.name}. {self.y.name}, first to last: {ends}."

    def draw(self, axes: Axes) -> None:
        """Draw the lines and set both scales."""
        lines = [*self.references, *self.lines.values()]
        count = 1 + max((line.look for line in lines if line.look is not None), default=0)
        ends: list[float] = []
        for line in lines:
            style = line.style(count)
            axes.plot(line.x, line.y, **style)
            low, high = ([v + sign * by for v, by in zip(line.y, line.spread, strict=False)] for sign in (-1, 1))
            if any(line.spread) and line.bars:
                axes.vlines(line.x, low, high, colors=style["color"], linewidth=style.get("linewidth", 1.0))
            elif any(line.spread):
                axes.fill_between(line.x, low, high, color=style["color"], alpha=0.18, linewidth=0)
            rings = [i for i, hollow in enumerate(line.hollow) if hollow]
            if rings:
                style |= {"markerfacecolor": PALETTE["page"][0], "linestyle": "", "markevery": 1}
                axes.plot([line.x[i] for i in rings], [line.y[i] for i in rings], **style)
            ends += [*low, *high] if line.spread else line.y
        _set_scale(axes, "x", self.x, [v for line in lines for v in line.x])
        _set_scale(axes, "y", self.y, ends)


@dataclass(frozen=True)
class MaskPlot:
    """Which positions of a layer a mask holds [positions, rounds], dark; and the names of its columns and some rows."""

    title: str
    x: Axis
    y: Axis
    present: NDArray[np.bool_]
    columns: tuple[str, ...]
    rows: tuple[tuple[int, str], ...]

    @property
    def description(self) -> str:
        """What a screen reader reads."""
        span = (
            f"rounds {self.columns[0]} to {self.columns[-1]}" if len(self.columns) > 1 else f"round {self.columns[0]}"
        )
        return f"{self.title}, {span}: {100 * self.present.mean():.1f} % of what is shown is present."

    def draw(self, axes: Axes) -> None:
        """Draw what is present dark, with as many names of columns and rows as there is room for."""
        axes.imshow(self.present, aspect="auto", interpolation="none", cmap="Greys", vmin=0, vmax=1.15)
        axes.grid(visible=False)
        columns = range(0, len(self.columns), math.ceil(len(self.columns) / _tick_count(axes, "x")))
        axes.set_xticks(list(columns), [self.columns[i] for i in columns])
        rows = self.rows[:: math.ceil(len(self.rows) / (2 * _tick_count(axes, "y")))]
        axes.set_yticks([row for row, _ in rows], [text for _, text in rows])


@dataclass(frozen=True)
class HeatMap:
    """How many examples of every class clients have: ``counts`` [columns, classes], the columns spread over them."""

    title: str
    x: Axis
    counts: NDArray[np.float64]
    classes: Sequence[str]
    clients: int
    description: str
    y: Axis = field(default=Axis("class"))

    def draw(self, axes: Axes) -> None:
        """Draw the map, and what its colours stand for above its right half."""
        style: dict[str, Any] = {"aspect": "auto", "interpolation": "none", "cmap": "Blues"}
        norm = PowerNorm(0.5, 0, max(1.0, float(self.counts.max())))
        extent = (-0.5, self.clients - 0.5, len(self.classes) - 0.5, -0.5)
        axes.imshow(self.counts.T, norm=norm, extent=extent, **style)
        axes.grid(visible=False)
        names = [name if len(name) <= 12 else name[:11] + "…" for name in self.classes]
        rows = range(0, len(names), math.ceil(len(names) / 22))
        axes.set_yticks(list(rows), [names[i] for i in rows])
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
        top = norm.vmax or 1
        key = axes.inset_axes((0.6, 1.04, 0.4, 0.03))
        key.imshow(np.linspace(0, top, 256)[None], norm=norm, extent=(0, top, 0, 1), **style)
        key.grid(visible=False)
        key.set_yticks([0.5], ["examples"])
        key.tick_params("y", length=0)
        key.xaxis.set_major_locator(MaxNLocator(3, integer=True))
        key.xaxis.tick_top()


@dataclass(frozen=True)
class SizePlot:
    """How many examples clients have: a bar for each of ``sizes`` [clients]."""

    title: str
    x: Axis
    sizes: NDArray[np.float64]
    description: str
    y: Axis = field(default=Axis("examples", zero=True))

    def draw(self, axes: Axes) -> None:
        """Draw the bars from zero up, side by side."""
        axes.stairs(self.sizes, np.arange(len(self.sizes) + 1) - 0.5, fill=True, color=PALETTE["run0"][0])
        _set_scale(axes, "y", self.y, [0, *self.sizes.tolist()])
        axes.set_xlim(-0.5, len(self.sizes) - 0.5)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))


Plot: TypeAlias = LinePlot | MaskPlot | HeatMap | SizePlot


def _set_scale(axes: Axes, side: str, spec: Axis, values: Sequence[float]) -> None:
    """Set one axis: its scale, its ticks, and a range that keeps a single point in the middle."""
    values = [v for v in values if v > 0] if spec.log else values  # a band may reach below zero
    axis, low, high = getattr(axes, side + "axis"), min(values), max(values)
    set_limits = getattr(axes, f"set_{side}lim")
    if spec.steps:
        axis.set_ticks(range(len(spec.steps)), spec.steps)
        set_limits(-0.4, len(spec.steps) - 0.6)
        return
    if spec.log:
        getattr(axes, f"set_{side}scale")("log")
        axis.set_major_locator(FixedLocator(_log_ticks(low, high)))
        axis.set_minor_locator(NullLocator())
        margin = (high / low) ** 0.05
        set_limits(low / margin, high * margin)
    else:
        most = _tick_count(axes, side)
        axis.set_major_locator(MaxNLocator(most, integer=spec.whole, min_n_ticks=1, steps=[1, 2, 2.5, 5, 10]))
        margin = 0.05 * (high - low) or (0.5 if spec.whole else 0.1 * abs(high) or 1)
        bottom, top = low - margin, high + margin
        if side == "y":
            bottom, top = (
                0 if spec.zero else bottom if spec.signed else max(bottom, 0),
                min(top, 101.5) if spec.percent else top,
            )
        set_limits(bottom, top)
    axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.6g}"))


def _tick_count(axes: Axes, side: str) -> int:
    """Return how many ticks there is room for: 6 but where panels are small."""
    extent, root = axes.get_window_extent(), axes.get_figure(root=True)
    wide, high = (pixels / (root.dpi if root else 100) for pixels in (extent.width, extent.height))
    return int(min(max(wide / 0.5 if side == "x" else high / 0.3, 3), 6))


def _log_ticks(low: float, high: float) -> list[float]:
    """Return ticks within ``low`` to ``high``: powers of ten, with 2 and 5 between where few; the ends if none."""
    near = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1,), (1, 2, 5)):
        ticks = [step * 10.0**e for e in near for step in steps if 0.9 * low <= step * 10.0**e <= 1.1 * high]
        if len(ticks) > 2:
            return ticks[:: math.ceil(len(ticks) / 8)]
    return ticks if len(ticks) > 1 else [low, high]
