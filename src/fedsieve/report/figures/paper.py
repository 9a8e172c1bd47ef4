"""How a figure looks on paper: a column or two wide, 8 pt text, fonts embedded, legends beside the data.

The same runs give the same bytes: no date is written, and the font comes with matplotlib.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Collection
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from fedsieve.report.figures.series import PaperFigure
from fedsieve.report.plots import MaskPlot
from fedsieve.report.style import PAPER

COLUMN, PAGE = 3.4, 7.0
"""Inches: one column of a paper, and both with the gap between them."""
ALONE, PANEL, MAP, LINE, CHARACTER = 2.2, 1.75, 2.1, 0.16, 0.065
"""Inches: the heights of a plot, of one of several, of a map, of a line of the legend; the width of a letter in it."""
MANY, SMALL = 12, 6
"""A legend of more lines than that is in points so small, to stay shorter than the plots."""
UNDATED: dict[str, dict[str, Any]] = {"pdf": {"CreationDate": None}, "svg": {"Date": None}, "png": {}}


def encode_figure(figure: PaperFigure, kind: str) -> bytes:
    """Return a figure as a file: png, pdf or svg."""
    with mpl.rc_context(PAPER):
        drawing, content = draw_figure(figure), io.BytesIO()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing")  # a box in its place, in a name of the user's
            drawing.savefig(content, format=kind, metadata=UNDATED[kind])
    return content.getvalue()


def draw_figure(figure: PaperFigure) -> Figure:
    """Return the figure as matplotlib's: a column wide if it is one plot, else both."""
    plots, columns = figure.plots, min(figure.columns, len(figure.plots))
    maps = isinstance(plots[0], MaskPlot)
    width, rows = COLUMN if columns == 1 else PAGE, math.ceil(len(plots) / columns)
    height = (ALONE if len(plots) == 1 else MAP if maps else PANEL) * rows
    drawing = Figure(figsize=(width, height + _legend_height(figure, width)), layout="constrained")
    axes = drawing.subplots(rows, columns, squeeze=False).ravel()
    for i, (plot, own) in enumerate(zip(plots, axes, strict=False)):
        plot.draw(own)
        named = maps or i % columns == 0 or plot.y != plots[i - 1].y
        own.set(title=plot.title, xlabel=plot.x.name, ylabel=plot.y.name if named else "")
    for spare in axes[len(plots) :]:
        spare.remove()
    if not (maps or figure.own_scales):
        _share_scales(drawing, figure)
    _draw_legend(drawing, figure, width)
    return drawing


def _share_scales(drawing: Figure, figure: PaperFigure) -> None:
    """Give plots of the same measure the same range."""
    for y in {plot.y for plot in figure.plots}:
        shared = [axes for axes, plot in zip(drawing.axes, figure.plots, strict=True) if plot.y == y]
        low, high = zip(*(axes.get_ylim() for axes in shared), strict=True)
        for axes in shared:
            axes.set_ylim(min(low), max(high))


def _draw_legend(drawing: Figure, figure: PaperFigure, width: float) -> None:
    """Put one legend with a sample of each line under all plots."""
    lines = figure.legend
    if len(lines) < 2:
        return
    samples = []
    for line in lines.values():
        style = line.style(1 + (line.look or 0)) | {"markevery": 1} | ({"marker": ""} if line.level else {})
        samples.append(Line2D([0], [0], **style))
    look = {"ncols": _legend_columns(lines, width), "fontsize": 8 * _legend_scale(lines)}
    drawing.legend(samples, list(lines), loc="outside lower center", **look)


def _legend_height(figure: PaperFigure, width: float) -> float:
    """Return how many inches the legend takes."""
    lines = figure.legend
    rows = math.ceil(len(lines) / _legend_columns(lines, width)) if len(lines) > 1 else 0
    return LINE * _legend_scale(lines) * rows


def _legend_scale(lines: Collection[str]) -> float:
    return SMALL / 8 if len(lines) > MANY else 1


def _legend_columns(labels: Collection[str], width: float) -> int:
    """Return how many columns of a legend fit side by side."""
    fitting = int(width / _legend_scale(labels) / (0.5 + CHARACTER * max(map(len, labels))))
    return min(max(1, fitting), len(labels))
