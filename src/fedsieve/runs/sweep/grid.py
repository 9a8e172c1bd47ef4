"""The grid of a sweep, from what the command line says, and the directory that holds it and no other sweep.

sweep.json    the command's recipes, settings and seeds, and what every run is
runs/         a run directory for every cell and seed
results.json  what the table says, in numbers
table.md      the table
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import combinations, product
from pathlib import Path
from typing import Any

from fedsieve.data.storage import is_leftover, read_json, write_json
from fedsieve.engine import Run
from fedsieve.engine.federation import described
from fedsieve.engine.setup import build_federation, read_dataset
from fedsieve.engine.worker import kernels_for
from fedsieve.recipes import apply_settings, load_recipe
from fedsieve.runs.execution import Execution
from fedsieve.runs.record import OTHER
from fedsieve.runs.recorder import locked_directory
from fedsieve.runs.sweep.jobs import Job
from fedsieve.types import InputError

FILE = "sweep.json"


@dataclass(frozen=True, eq=False)
class Cell:
    """One recipe with one value of every axis; ``run`` has seed 0."""

    number: int
    recipe: str
    settings: dict[str, str]
    swept: dict[str, str]
    """Of the settings, those that differ between cells, under their short names."""
    run: Run

    @property
    def label(self) -> str:
        """What tells this cell from the others."""
        return " ".join([recipe_label(self.recipe), *(f"{name}={value}" for name, value in self.swept.items())])

    def folder(self, seed: int, runs: Path) -> Path:
        """Return the directory of the cell's run of one seed, below ``runs``."""
        name = re.sub(r"[^\w.=:,+-]", "_", self.label.replace(" ", ","))[:120]
        return runs / f"{self.number:02d}-{name}-seed{seed}"

    def job(self, seed: int, runs: Path, execution: Execution) -> Job:
        """Return the cell's run of one seed, in a directory below ``runs``."""
        settings = (*(f"{name}={value}" for name, value in self.settings.items()), f"seed={seed}")
        run, folder = replace(self.run, seed=seed), self.folder(seed, runs)
        return Job(f"{self.label} seed={seed}", self.recipe, settings, run, folder, execution)


@dataclass(frozen=True)
class Grid:
    """A whole sweep: ``axes`` are the values of every setting, by its name, as they were written."""

    recipes: tuple[str, ...]
    axes: dict[str, list[str]]
    seeds: int
    cells: tuple[Cell, ...]
    execution: Execution

    def jobs(self, folder: Path) -> list[Job]:
        """Return every run of the sweep in the directory ``folder``, seed by seed: all cells are seen early."""
        runs = folder / "runs"
        return [cell.job(seed, runs, self.execution) for seed in range(self.seeds) for cell in self.cells]


def grid(recipes: list[str], settings: list[str], seeds: int, execution: Execution | None = None) -> Grid:
    """Return the product of recipes, axes (``name=v1,v2``) and seeds 0 to N-1. Raises InputError for what cannot be.

    Where several recipes are swept, a field of the method (``method.density``) concerns those whose method has it.
    """
    execution = execution or Execution()
    if "kernels" in execution.measures:
        raise InputError("--measure kernels is for fedsieve run: the runs of a sweep share the cores, and tell no time")
    if seeds < 1:
        raise InputError(f"--seeds must be at least 1, got {seeds}: it is the number of seeds, 0 to N-1")
    twice = sorted({name for name in recipes if recipes.count(name) > 1})
    if twice:
        raise InputError(f"recipe {twice[0]} is named twice: name it once")
    bases = {name: load_recipe(name) for name in recipes}
    axes = _axes(settings, bases)
    parts = [name.split(".")[-1] for name in axes]
    short = {name: last if parts.count(last) == 1 else name for name, last in zip(axes, parts, strict=True)}
    cells: list[Cell] = []
    for recipe in recipes:
        axes_of_recipe = {name: of for name, of in axes.items() if _concerns(name, recipe, bases)}
        for values in product(*axes_of_recipe.values()):
            fields = dict(zip(axes_of_recipe, values, strict=True))
            swept = {short[name]: value for name, value in fields.items() if len(axes[name]) > 1}
            cells.append(Cell(len(cells) + 1, recipe, fields, swept, _changed(bases[recipe], recipe, fields)))
    for other, cell in combinations(cells, 2):
        if cell.run == other.run:
            raise InputError(f"{other.label!r} and {cell.label!r} are the same run: drop one of the two")
    return Grid(tuple(recipes), axes, seeds, tuple(cells), execution)


def check_grid(grid: Grid) -> None:
    """Raise InputError, naming the cell, unless its dataset is there and model, method and kernels fit it.

    So it does for a logger that is not installed.
    """
    for logger in grid.execution.loggers:
        logger.check(Path())
    read: dict[Any, Any] = {}
    for cell in grid.cells:
        task = cell.run.task
        try:
            if task.dataset not in read:
                read = {task.dataset: read_dataset(task, grid.execution.root)}  # one at a time in memory
            kernels_for(build_federation(cell.run, read[task.dataset]), grid.execution.kernels)
        except InputError as error:
            raise InputError(f"{cell.label}: {error}") from None


def recipe_label(recipe: str) -> str:
    """Return a recipe's name without the folders of its file: ``mine.digits`` for ``some/mine.py:digits``."""
    return Path(recipe).name.replace(".py:", ".")


def _axes(settings: list[str], bases: Mapping[str, Run]) -> dict[str, list[str]]:
    axes: dict[str, list[str]] = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals:
            raise InputError(f"-s {setting}: write it as name=value, or name=value,value,...")
        if name == "seed":
            raise InputError(f"-s {setting}: a sweep's seeds are chosen by --seeds N, which runs seeds 0 to N-1")
        if name in axes:
            raise InputError(f"-s {setting}: {name} is named twice: give all of its values at once")
        axes[name] = axis_values(name, text, any(_holds_several(run, name) for run in bases.values()))
    return axes


def axis_values(name: str, text: str, several: bool) -> list[str]:
    """Return the values of an axis, apart by ``;`` where one is written or a value holds ``several`` parts, else ``,``.

    A ``;`` may end the text, so that a single value with commas can be given as well.
    """
    values = text.removesuffix(";").split(";") if several or ";" in text else text.split(",")
    if not all(value.strip() for value in values):
        apart = "';'" if several or ";" in text else "','"
        raise InputError(f"-s {name}={text}: a value is empty (values stand between {apart}): remove it, or fill it in")
    return [value.strip() for value in values]


def _holds_several(run: Run, name: str) -> bool:
    """Tell whether a field holds a tuple, whose parts are what commas separate."""
    value: object = run
    for part in name.split("."):
        value = getattr(value, part, None)
    return isinstance(value, tuple)


def _concerns(name: str, recipe: str, bases: Mapping[str, Run]) -> bool:
    """Tell whether a setting is meant for a recipe: not if it is a field that only other recipes' methods have."""
    owner, _, field = name.partition(".")
    owners = [other for other, run in bases.items() if hasattr(run.method, field.partition(".")[0])]
    return owner != "method" or not owners or recipe in owners


def _changed(base: Run, recipe: str, settings: Mapping[str, str]) -> Run:
    texts = [f"{name}={value}" for name, value in settings.items()]
    try:
        return apply_settings(base, texts)
    except InputError as error:
        raise InputError(" ".join([recipe, *(f"-s {setting}" for setting in texts)]) + f": {error}") from None


def describe_sweep(grid: Grid) -> dict[str, Any]:
    """Return what tells a sweep from every other: the content of ``sweep.json``."""
    return {
        "recipes": list(grid.recipes),
        "settings": grid.axes,
        "seeds": grid.seeds,
        "measure": list(grid.execution.measures),
        "kernels": grid.execution.kernels,
        "runs": {job.folder.name: described(job.run) for job in grid.jobs(Path())},
    }


def default_folder(grid: Grid) -> Path:
    """Return sweeps/RECIPES-N: that of the same sweep, so that the same command goes on, or the first free one."""
    names = [recipe_label(recipe) for recipe in grid.recipes]
    name = "+".join(names) if len("+".join(names)) <= 80 else f"{names[0]}+{len(names) - 1}"
    number, sweep = 1, describe_sweep(grid)
    while (folder := Path("sweeps") / f"{name}-{number}").exists() and _read(folder) != sweep:
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
    there, here = _read(folder), describe_sweep(grid)
    if there is None:
        raise InputError(f"{folder / FILE} is damaged: {OTHER}")
    if there != here:
        raise InputError(f"{folder} holds another sweep ({_difference(there, here)}): {OTHER}")


def _read(folder: Path) -> dict[str, Any] | None:
    with suppress(InputError):
        return read_json(folder / FILE)
    return None


def _difference(there: dict[str, Any], here: dict[str, Any]) -> str:
    for name in ("recipes", "settings", "seeds", "measure", "kernels"):
        if there.get(name) != here[name]:
            return f"{name} {_format(there.get(name))} there, {_format(here[name])} here"
    return "its recipes have changed since"


def _format(part: Any) -> str:
    if isinstance(part, dict):
        return " ".join(f"-s {name}={';'.join(map(str, values))}" for name, values in part.items()) or "none"
    return (" ".join(map(str, part)) or "none") if isinstance(part, list) else str(part)
