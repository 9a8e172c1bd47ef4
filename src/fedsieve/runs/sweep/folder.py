"""The directory of a sweep: which one it is, and that no other sweep is in it.

sweep.json    the command's recipes, settings and seeds, and what every run is
runs/         a run directory for every cell and seed
results.json  what the table says, in numbers
table.md      the table
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fedsieve.data.storage import is_leftover, read_json, write_json
from fedsieve.engine.federation import described
from fedsieve.runs.record import OTHER
from fedsieve.runs.recorder import locked_directory
from fedsieve.runs.sweep.cells import Grid, recipe_label
from fedsieve.types import InputError

FILE = "sweep.json"


def describe_sweep(grid: Grid) -> dict[str, Any]:
    """Return what tells a sweep from every other: the content of ``sweep.json``."""
    runs = {job.folder.name: described(job.run) for job in grid.jobs(Path())}
    return {
        "recipes": list(grid.recipes),
        "settings": grid.axes,
        "seeds": grid.seeds,
        "measure": list(grid.execution.measures),
        "kernels": grid.execution.kernels,
        "runs": runs,
    }


def default_folder(grid: Grid) -> Path:
    """Return sweeps/RECIPES-N: that of the same sweep, so that the same command goes on, or the first free one."""
    names = [recipe_label(recipe) for recipe in grid.recipes]
    name = "+".join(names) if len("+".join(names)) <= 80 else f"{names[0]}+{len(names) - 1}"
    number, wanted = 1, describe_sweep(grid)
    while (folder := Path("sweeps") / f"{name}-{number}").exists() and _read(folder) != wanted:
        number += 1
    return folder


@contextmanager
def open_folder(folder: Path, grid: Grid) -> Iterator[None]:
    """Make or check the directory of a sweep, and keep others out of it meanwhile.

    Raises InputError if another sweep or anything else is in it, or another process is at work there.
    """
    with locked_directory(folder):
        if not (folder / FILE).exists():
            if any(not is_leftover(path) for path in folder.iterdir()):
                raise InputError(f"{folder} is not empty and holds no sweep: {OTHER}")
            write_json(folder / FILE, describe_sweep(grid))
        check_same_sweep(folder, grid)
        yield


def check_same_sweep(folder: Path, grid: Grid) -> None:
    """Raise InputError unless the directory holds this very sweep."""
    if not (folder / FILE).exists():
        raise InputError(f"{folder} holds no sweep yet: run it first, without --table")
    there, wanted = _read(folder), describe_sweep(grid)
    if there is None:
        raise InputError(f"{folder / FILE} is damaged: {OTHER}")
    if there != wanted:
        raise InputError(f"{folder} holds another sweep ({_difference(there, wanted)}): {OTHER}")


def _read(folder: Path) -> dict[str, Any] | None:
    with suppress(InputError):
        return read_json(folder / FILE)
    return None


def _difference(there: dict[str, Any], wanted: dict[str, Any]) -> str:
    for name in ("recipes", "settings", "seeds", "measure", "kernels"):
        if there.get(name) != wanted[name]:
            return f"{name} {_format(there.get(name))} there, {_format(wanted[name])} here"
    return "its recipes have changed since"


def _format(part: Any) -> str:
    if isinstance(part, dict):
        return " ".join(f"-s {name}={';'.join(map(str, values))}" for name, values in part.items()) or "none"
    return (" ".join(map(str, part)) or "none") if isinstance(part, list) else str(part)
