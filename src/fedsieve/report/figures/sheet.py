"""How a figure looks on paper: a column or two wide, 8 pt text, fonts embedded, legends beside the data.

The same runs give the same bytes: no date is written, and the font comes with matplotlib.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Collection, Mapping
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from fedsieve.report.figures.data import Map, Panel, Picture
from fedsieve.report.style import PALETTE, RC, Line, map_bits, plot, style

COLUMN, PAGE = 3.4, 7.0
"""Inches: one column of a paper, and both with the gap between them."""
ALONE, PANEL, MAP, LINE, CHARACTER = 2.2, 1.75, 2.1, 0.16, 0.065
"""Inches: the heights of a panel, of one of several, of a map, of a line of the legend; the width of a letter in it."""
MANY, SMALL = 12, 6
"""A legend of more lines than that is in points so small, to stay shorter than the panels."""
INK, SOFT = PALETTE["ink"][0], PALETTE["soft"][0]

PAPER: dict[Any, Any] = {
    **RC,
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.titlecolor": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": SOFT,
    "axes.linewidth": 0.6,
    "axes.spines.left": True,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "ytick.left": True,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "lines.linewidth": 1.1,
    "lines.markersize": 5,
    "legend.frameon": False,
    "legend.handlelength": 2.4,
    "legend.labelspacing": 0.25,
    "legend.columnspacing": 1.2,
    "legend.borderpad": 0.2,
    "pdf.fonttype": 42,
    "svg.fonttype": "path",
    "savefig.dpi": 300,
}
UNDATED: dict[str, dict[str, Any]] = {"pdf": {"CreationDate": None}, "svg": {"Date": None}, "png": {}}


def drawn(picture: Picture, kind: str) -> bytes:
    """Return a picture as a file: png, pdf or svg."""
    with mpl.rc_context(PAPER):
        figure, content = sheet(picture), io.BytesIO()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing")  # a box in its place, in a name of the user's
            figure.savefig(content, format=kind, metadata=UNDATED[kind])
    return content.getvalue()


def sheet(picture: Picture) -> Figure:
    """Return the drawn figure: a column wide if it is one panel, else both."""
    parts: list[Panel | Map] = [*picture.panels, *picture.maps]
    columns = min(picture.columns, len(parts))
    width, rows = COLUMN if columns == 1 else PAGE, math.ceil(len(parts) / columns)
    legend = _legend_height(picture, width)
    each = ALONE if len(parts) == 1 else MAP if picture.maps else PANEL
    figure = Figure(figsize=(width, each * rows + legend), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for i, (part, one) in enumerate(zip(parts, axes, strict=False)):
        if isinstance(part, Map):
            map_bits(one, part.bits)
            one.set(title=part.title, ylabel=part.bits.y)
        else:
            _panel(one, part, i % columns == 0 or part.y != picture.panels[i - 1].y)
    for spare in axes[len(parts) :]:
        spare.remove()
    _same_scale(figure, picture)
    _legend(figure, picture, width)
    return figure


def _same_scale(figure: Figure, picture: Picture) -> None:
    """Give panels of the same measure the same range."""
    for y in {panel.y for panel in picture.panels if not picture.apart}:
        shared = [axes for axes, panel in zip(figure.axes, picture.panels, strict=True) if panel.y == y]
        low, high = zip(*(axes.get_ylim() for axes in shared), strict=True)
        for axes in shared:
            axes.set_ylim(min(low), max(high))


def _panel(axes: Axes, panel: Panel, named: bool) -> None:
    plot(axes, list(panel.lines.values()), panel.x, panel.y)
    axes.set(title=panel.title, xlabel=panel.x.name, ylabel=panel.y.name if named else "")


def _legend(figure: Figure, picture: Picture, width: float) -> None:
    """Put one legend under all panels."""
    lines = _labelled(picture)
    if len(lines) > 1:
        look = {"ncols": _columns(lines, width), "fontsize": 8 * _scale(lines)}
        figure.legend(_handles(lines), list(lines), loc="outside lower center", **look)


def _labelled(picture: Picture) -> dict[str, Line]:
    """Return every line once, as the first panel that has it shows it, in the order of its looks."""
    lines = {label: line for panel in reversed(picture.panels) for label, line in panel.lines.items()}
    return dict(sorted(lines.items(), key=lambda item: item[1].run or 0))


def _legend_height(picture: Picture, width: float) -> float:
    """Return how many inches the legend takes."""
    lines = _labelled(picture)
    return LINE * _scale(lines) * math.ceil(len(lines) / _columns(lines, width)) if len(lines) > 1 else 0


def _scale(lines: Collection[str]) -> float:
    return SMALL / 8 if len(lines) > MANY else 1


def _columns(labels: Collection[str], width: float) -> int:
    """Return how many columns of a legend fit side by side."""
    return min(max(1, int(width / _scale(labels) / (0.5 + CHARACTER * max(map(len, labels))))), len(labels))


def _handles(lines: Mapping[str, Line]) -> list[Line2D]:
    """Return a sample of each line."""
    looks = [(line.level, {**style(line, 1 + (line.run or 0)), "markevery": 1}) for line in lines.values()]
    return [Line2D([0], [0], **(look | {"marker": ""} if level else look)) for level, look in looks]
