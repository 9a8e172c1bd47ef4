"""The grid of a sweep, from what the command line says: cells, each the same run under several seeds."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from fedsieve.engine import Run
from fedsieve.engine.engines import kernels_for
from fedsieve.engine.setup import build_federation, read_dataset
from fedsieve.recipes import apply_settings, load_recipe
from fedsieve.runs.execution import Execution
from fedsieve.types import InputError


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

    def job(self, seed: int, runs: Path) -> Job:
        """Return the cell's run of one seed, in a folder of its own below ``runs``."""
        name = re.sub(r"[^\w.=:,+-]", "_", self.label.replace(" ", ","))[:120]
        return Job(self, seed, runs / f"{self.number:02d}-{name}-seed{seed}")


@dataclass(frozen=True)
class Job:
    """One run of the sweep: a cell, a seed, and the run directory."""

    cell: Cell
    seed: int
    folder: Path

    @property
    def label(self) -> str:
        """What tells this run from the others."""
        return f"{self.cell.label} seed={self.seed}"

    @property
    def run(self) -> Run:
        """The run, with its seed."""
        return replace(self.cell.run, seed=self.seed)


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
        return [cell.job(seed, folder / "runs") for seed in range(self.seeds) for cell in self.cells]


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
    cells: list[Cell] = []
    for recipe in recipes:
        axes_of_recipe = {name: of for name, of in axes.items() if _concerns(name, recipe, bases)}
        for values in product(*axes_of_recipe.values()):
            chosen = dict(zip(axes_of_recipe, values, strict=True))
            swept = {_brief(name, axes): value for name, value in chosen.items() if len(axes[name]) > 1}
            cells.append(Cell(len(cells) + 1, recipe, chosen, swept, _changed(bases[recipe], recipe, chosen)))
    _check_different(cells)
    return Grid(tuple(recipes), axes, seeds, tuple(cells), execution)


def check_grid(grid: Grid) -> None:
    """Raise InputError, naming the cell, unless its dataset is there and model, method and kernels fit it."""
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
    owners = [name for name, run in bases.items() if hasattr(run.method, field.partition(".")[0])]
    return owner != "method" or not owners or recipe in owners


def _brief(name: str, axes: Mapping[str, list[str]]) -> str:
    last = name.split(".")[-1]
    return last if sum(other.split(".")[-1] == last for other in axes) == 1 else name


def _changed(base: Run, recipe: str, settings: Mapping[str, str]) -> Run:
    written = [f"{name}={value}" for name, value in settings.items()]
    try:
        return apply_settings(base, written)
    except InputError as error:
        raise InputError(" ".join([recipe, *(f"-s {setting}" for setting in written)]) + f": {error}") from None


def _check_different(cells: list[Cell]) -> None:
    for i, cell in enumerate(cells):
        for other in cells[:i]:
            if cell.run == other.run:
                raise InputError(f"{other.label!r} and {cell.label!r} are the same run: drop one of the two")
