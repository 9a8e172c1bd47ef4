"""The papers' figures of run directories: ``write_figure`` makes a file, ``paper_figures`` what a page shows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from fedsieve.data.storage import check_output, write_output
from fedsieve.report.configurations import Runs, deduplicate, group_by_seed
from fedsieve.report.figures import mask_files, papers
from fedsieve.report.figures.paper import encode_figure
from fedsieve.report.figures.series import LackingError, PaperFigure
from fedsieve.report.plots import LinePlot
from fedsieve.runs.record import RunRecord, number, read_record
from fedsieve.types import InputError

__all__ = ["FIGURES", "PaperFigure", "paper_figure", "paper_figures", "write_figure"]

BY_LAYER: dict[str, Callable[[Runs, Sequence[str]], PaperFigure]] = {
    "zerofl-2": papers.zerofl_2,
    "zerofl-3": papers.zerofl_3,
}
BY_RUN: dict[str, Callable[[Runs], PaperFigure]] = {
    "zerofl-1": papers.zerofl_1,
    "zerofl-4": papers.zerofl_4,
    "flash-1": papers.flash_1,
    "flash-2": papers.flash_2,
    "sparsefedpp-1": papers.sparsefedpp_1,
}
FIGURES = ("zerofl-1", "zerofl-2", "zerofl-3", "zerofl-4", "flash-1", "flash-2", "sparsefedpp-1")
SUFFIXES = ("png", "pdf", "svg")


def write_figure(name: str, dirs: Sequence[Path], out: Path, layers: Sequence[str] = ()) -> None:
    """Draw one of the papers' figures of the runs in ``dirs`` to ``out``; InputError names what is wrong."""
    if name not in FIGURES:
        raise InputError(f"unknown figure {name!r}; the figures are {', '.join(FIGURES)}")
    if layers and name not in BY_LAYER:
        raise InputError(f"{name} has no layers to choose: drop --layers, or draw {' or '.join(BY_LAYER)}")
    suffix = out.suffix[1:].lower()
    if suffix not in SUFFIXES:
        raise InputError(f"{out} does not end in .png, .pdf or .svg: choose one, such as {name}.pdf")
    if not dirs:
        raise InputError("figure: no run directory given: name at least one that `fedsieve run` wrote")
    check_output(out, f"{name}.{suffix}")
    runs = deduplicate([read_record(folder) for folder in dict.fromkeys(dirs)], partial(_has_data, name=name))
    write_output(out, encode_figure(paper_figure(name, runs, layers), suffix))


def paper_figure(name: str, runs: Runs, layers: Sequence[str] = ()) -> PaperFigure:
    """Return what a figure shows of ``runs``; LackingError, an InputError, says what they do not hold."""
    return BY_LAYER[name](runs, layers) if name in BY_LAYER else BY_RUN[name](runs)


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
        return bool(mask_files.recorded_rounds(run))
    if name == "flash-2":
        return any(number(row.get("mismatch")) is not None for row in run.rows)
    return name != "zerofl-4" or papers.is_zerofl(run)


def _compares(figure: PaperFigure) -> bool:
    """Tell whether a figure says more than that there is a run: it was measured for, or a setting varies."""
    plots = [plot.lines for plot in figure.plots if isinstance(plot, LinePlot)]
    if figure.name in ("flash-1", "zerofl-4", "sparsefedpp-1"):
        return any(line.bars and len(line.x) > 1 for lines in plots for line in lines.values())
    return figure.name != "zerofl-1" or any(len(lines) > 1 for lines in plots)
