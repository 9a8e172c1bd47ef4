"""The papers' figures of run directories: ``write_figure`` makes a file, ``paper_figures`` what a page shows.

On paper a figure is a column or two wide, with 8 pt text, fonts embedded, and legends beside the data. The same runs
give the same bytes: no date is written, and the font comes with matplotlib.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from fedsieve.data.storage import check_output, write_output
from fedsieve.report.configurations import Runs, deduplicate, group_by_seed
from fedsieve.report.figures import layers as by_layer
from fedsieve.report.figures import papers
from fedsieve.report.plots import INK, RC, SOFT, Line, LinePlot, MaskPlot
from fedsieve.report.series import LackingError, PaperFigure
from fedsieve.runs.record import RunRecord, number, read_record
from fedsieve.types import InputError

__all__ = [
    "FIGURES",
    "draw_figure",
    "draw_records",
    "encode_figure",
    "figure_kind",
    "paper_figure",
    "paper_figures",
    "write_figure",
]

FIGURES: dict[str, Callable[..., PaperFigure]] = {
    "zerofl-1": papers.zerofl_1,
    "zerofl-2": by_layer.zerofl_2,
    "zerofl-3": by_layer.zerofl_3,
    "zerofl-4": papers.zerofl_4,
    "flash-1": papers.flash_1,
    "flash-2": papers.flash_2,
    "sparsefedpp-1": papers.sparsefedpp_1,
}
BY_LAYER = ("zerofl-2", "zerofl-3")
"""The figures of which one can choose the layers."""
UNDATED: dict[str, dict[str, Any]] = {"png": {}, "pdf": {"CreationDate": None}, "svg": {"Date": None}}
"""The metadata of a file by its suffix."""
COLUMN, PAGE = 3.4, 7.0
"""Inches: one column of a paper, and both with the gap between them."""
ALONE, PANEL, MAP, LINE, CHARACTER = 2.2, 1.75, 2.1, 0.16, 0.065
"""Inches: the heights of a plot, of one of several, of a map, of a line of the legend; the width of a letter in it."""
MANY, SMALL = 12, 6
"""A legend of more lines than that is in points so small, to stay shorter than the plots."""

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


def write_figure(name: str, dirs: Sequence[Path], out: Path, layers: Sequence[str] = ()) -> None:
    """Draw one of the papers' figures of the runs in ``dirs`` to ``out``; InputError names what is wrong."""
    _check_figure(name, out, layers)
    if not dirs:
        raise InputError("figure: no run directory given: name at least one that `fedsieve run` wrote")
    draw_records(name, [read_record(folder) for folder in dict.fromkeys(dirs)], out, layers)


def draw_records(name: str, records: Sequence[RunRecord], out: Path, layers: Sequence[str] = ()) -> None:
    """Draw one of the papers' figures of runs, or kept results of runs, to ``out``; InputError names what is wrong.

    Figure 3 of ZeroFL needs the masks of a run directory, which a kept result does not hold.
    """
    suffix = _check_figure(name, out, layers)
    if not records:
        raise InputError(f"{name} shows no run yet: run some first")
    runs = deduplicate(records, partial(_has_data, name=name))
    write_output(out, encode_figure(paper_figure(name, runs, layers), suffix))


def _check_figure(name: str, out: Path, layers: Sequence[str]) -> str:
    """Return the kind of file that ``out`` is. Raises InputError."""
    if name not in FIGURES:
        raise InputError(f"unknown figure {name!r}; the figures are {', '.join(FIGURES)}")
    if layers and name not in BY_LAYER:
        raise InputError(f"{name} has no layers to choose: drop --layers, or draw {' or '.join(BY_LAYER)}")
    return figure_kind(out, name)


def figure_kind(out: Path, name: str) -> str:
    """Return the kind of file that ``out`` is, where a figure is to be written. Raises InputError."""
    suffix = out.suffix[1:].lower()
    if suffix not in UNDATED:
        raise InputError(f"{out} does not end in .png, .pdf or .svg: choose one, such as {name}.pdf")
    check_output(out, f"{name}.{suffix}")
    return suffix


def paper_figure(name: str, runs: Runs, layers: Sequence[str] = ()) -> PaperFigure:
    """Return what a figure shows of ``runs``; LackingError, an InputError, says what they do not hold."""
    return FIGURES[name](runs, layers) if name in BY_LAYER else FIGURES[name](runs)


def paper_figures(runs: Runs) -> list[PaperFigure]:
    """Return those figures that ``runs``, or some of them, have something to show in."""
    figures: list[PaperFigure] = []
    for name in FIGURES:
        suitable = [run for run in runs if name == "flash-2" or _has_data(run, name)]
        suitable = [group[0] for group in group_by_seed(suitable)] if name == "zerofl-3" else suitable
        with suppress(LackingError):
            figures += [paper_figure(name, suitable)] if suitable else []
    return [figure for figure in figures if _compares(figure)]


def _has_data(run: RunRecord, name: str) -> bool:
    """Tell whether a run was measured for a figure."""
    if name == "zerofl-2":
        return any(row.get("layers") for row in run.rows)
    if name == "zerofl-3":
        return bool(by_layer.recorded_rounds(run))
    if name == "flash-2":
        return any(number(row.get("mismatch")) is not None for row in run.rows)
    return name != "zerofl-4" or papers.is_zerofl(run)


def _compares(figure: PaperFigure) -> bool:
    """Tell whether a figure says more than that there is a run: it was measured for, or a setting varies."""
    plots = [plot.lines for plot in figure.plots if isinstance(plot, LinePlot)]
    if figure.name in ("flash-1", "zerofl-4", "sparsefedpp-1"):
        return any(line.bars and len(line.x) > 1 for lines in plots for line in lines.values())
    return figure.name != "zerofl-1" or any(len(lines) > 1 for lines in plots)


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
    lines = figure.legend
    legend_rows = math.ceil(len(lines) / _legend_columns(lines, width)) if len(lines) > 1 else 0
    height += LINE * _legend_scale(lines) * legend_rows
    drawing = Figure(figsize=(width, height), layout="constrained")
    axes = drawing.subplots(rows, columns, squeeze=False).ravel()
    for i, (plot, own) in enumerate(zip(plots, axes, strict=False)):
        plot.draw(own)
        named = maps or i % columns == 0 or plot.y != plots[i - 1].y
        own.set(title=plot.title, xlabel=plot.x.name, ylabel=plot.y.name if named else "")
    for spare in axes[len(plots) :]:
        spare.remove()
    if not (maps or figure.own_scales):
        _share_scales(drawing, figure)
    if len(lines) > 1:
        _draw_legend(drawing, lines, width)
    return drawing


def _share_scales(drawing: Figure, figure: PaperFigure) -> None:
    """Give plots of the same measure the same range."""
    for y in {plot.y for plot in figure.plots}:
        shared = [axes for axes, plot in zip(drawing.axes, figure.plots, strict=True) if plot.y == y]
        low, high = zip(*(axes.get_ylim() for axes in shared), strict=True)
        for axes in shared:
            axes.set_ylim(min(low), max(high))


def _draw_legend(drawing: Figure, lines: Mapping[str, Line], width: float) -> None:
    """Put one legend with a sample of each line under all plots."""
    samples = []
    for line in lines.values():
        style = line.style(1 + (line.look or 0)) | {"markevery": 1} | ({"marker": ""} if line.level else {})
        samples.append(Line2D([0], [0], **style))
    look = {"ncols": _legend_columns(lines, width), "fontsize": 8 * _legend_scale(lines)}
    drawing.legend(samples, list(lines), loc="outside lower center", **look)


def _legend_scale(lines: Collection[str]) -> float:
    return SMALL / 8 if len(lines) > MANY else 1


def _legend_columns(labels: Collection[str], width: float) -> int:
    """Return how many columns of a legend fit side by side."""
    fitting = int(width / _legend_scale(labels) / (0.5 + CHARACTER * max(map(len, labels))))
    return min(max(1, fitting), len(labels))
