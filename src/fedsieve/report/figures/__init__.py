"""The papers' figures, drawn from run directories: ``figure`` makes a file, ``pictures`` what a page can show."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from fedsieve.report.configurations import Runs, once, seeds
from fedsieve.report.figures import papers, positions
from fedsieve.report.figures.data import LackingError, Map, Panel, Picture
from fedsieve.report.figures.sheet import drawn
from fedsieve.runs.output import check_output, write_output
from fedsieve.runs.record import RunRecord, number, read_record
from fedsieve.types import InputError

__all__ = ["FIGURES", "Map", "Panel", "Picture", "figure", "picture", "pictures"]

BY_LAYER: dict[str, Callable[[Runs, Sequence[str]], Picture]] = {
    "zerofl-2": papers.zerofl_2,
    "zerofl-3": papers.zerofl_3,
}
BY_RUN: dict[str, Callable[[Runs], Picture]] = {
    "zerofl-1": papers.zerofl_1,
    "zerofl-4": papers.zerofl_4,
    "flash-1": papers.flash_1,
    "flash-2": papers.flash_2,
    "sparsefedpp-1": papers.sparsefedpp_1,
}
FIGURES = ("zerofl-1", "zerofl-2", "zerofl-3", "zerofl-4", "flash-1", "flash-2", "sparsefedpp-1")
SUFFIXES = ("png", "pdf", "svg")


def figure(name: str, dirs: Sequence[Path], out: Path, layers: Sequence[str] = ()) -> None:
    """Draw one of the papers' figures of the runs in ``dirs`` to ``out``; InputError names what is wrong."""
    _check_name(name, layers)
    kind = out.suffix[1:].lower()
    if kind not in SUFFIXES:
        raise InputError(f"{out} does not end in .png, .pdf or .svg: choose one, such as {name}.pdf")
    if not dirs:
        raise InputError("figure: no run directory given: name at least one that `fedsieve run` wrote")
    check_output(out, f"{name}.{kind}")
    runs = once([read_record(folder) for folder in dict.fromkeys(dirs)], partial(_holds, name=name))
    write_output(out, drawn(picture(name, runs, layers), kind))


def picture(name: str, runs: Runs, layers: Sequence[str] = ()) -> Picture:
    """Return what a figure shows of ``runs``; LackingError, an InputError, says what they do not hold."""
    return BY_LAYER[name](runs, layers) if name in BY_LAYER else BY_RUN[name](runs)


def pictures(runs: Runs) -> list[Picture]:
    """Return those figures that ``runs``, or some of them, have something to show in."""
    made: list[Picture] = []
    for name in FIGURES:
        held = [run for run in runs if name == "flash-2" or _holds(run, name)]
        held = [group[0] for group in seeds(held)] if name == "zerofl-3" else held
        with suppress(LackingError):
            made += [picture(name, held)] if held else []
    return [one for one in made if _compares(one)]


def _holds(run: RunRecord, name: str) -> bool:
    """Tell whether a run was measured for a figure."""
    if name == "zerofl-2":
        return any(row.get("layers") for row in run.rows)
    if name == "zerofl-3":
        return bool(positions.recorded_rounds(run))
    if name == "flash-2":
        return any(number(row.get("mismatch")) is not None for row in run.rows)
    return name != "zerofl-4" or papers.is_zerofl(run)


def _compares(one: Picture) -> bool:
    """Tell whether a figure says more than that there is a run: it was measured for, or a setting varies."""
    lines = [line for panel in one.panels for line in panel.lines.values()]
    if one.name in ("flash-1", "zerofl-4", "sparsefedpp-1"):
        return any(line.bars and len(line.x) > 1 for line in lines)
    return one.name != "zerofl-1" or any(len(panel.lines) > 1 for panel in one.panels)


def _check_name(name: str, layers: Sequence[str]) -> None:
    if name not in FIGURES:
        raise InputError(f"unknown figure {name!r}; the figures are {', '.join(FIGURES)}")
    if layers and name not in BY_LAYER:
        raise InputError(f"{name} has no layers to choose: drop --layers, or draw {' or '.join(BY_LAYER)}")
