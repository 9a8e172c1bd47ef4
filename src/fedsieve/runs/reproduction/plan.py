"""What is to be run of a table or figure: the cells without a result, their data checked, their cost estimated."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedsieve.data import Dataset
from fedsieve.engine.setup import read_dataset
from fedsieve.recipes.papers import Published
from fedsieve.runs.comparison import data_differences
from fedsieve.runs.execution import Execution
from fedsieve.runs.record import SUMMARY, RunRecord, read_rows
from fedsieve.runs.recorder import describe_dataset
from fedsieve.runs.reproduction.cells import PaperCell
from fedsieve.runs.reproduction.costs import NOT_ESTIMATED, RunCost, estimate_cost, examples_of
from fedsieve.runs.reproduction.results import MOVE, keep_result, result_name, result_of, result_path
from fedsieve.runs.sweep.jobs import Job
from fedsieve.types import InputError

RUNS = "runs"
"""The folder of the run directories below the results."""


class LackingData(InputError):
    """A cell's dataset is not there, or is not the one of its row."""


@dataclass(frozen=True, eq=False)
class PlannedRun:
    """A cell and a seed without a result: how far it is, and what it will take."""

    cell: PaperCell
    seed: int
    folder: Path
    cost: RunCost
    examples: int
    """Training examples of a client."""
    tests: int
    """Test examples."""
    first: int = 0
    """The round that it goes on after."""

    @property
    def seconds(self) -> float:
        """What is left to do, in seconds of one core."""
        return self.cost.seconds(self.cell.run, self.examples, self.tests, self.first)

    @property
    def trained(self) -> int:
        """How many examples all clients train on in the whole run."""
        return self.cell.run.rounds * self.cell.run.per_round * self.cell.run.epochs * self.examples

    def job(self, execution: Execution) -> Job:
        """Return the run as a process runs it."""
        own = replace(execution, kernels=self.cost.kernels, measure=",".join(self.cell.measure))
        settings = (*self.cell.settings, f"seed={self.seed}")
        run, label = replace(self.cell.run, seed=self.seed), f"{self.cell.label} seed={self.seed}"
        seconds = self.cost.seconds_of_round(run, self.examples)
        return Job(label, self.cell.recipe, settings, run, self.folder, own, seconds)


class Datasets:
    """The datasets of a data folder, one in memory at a time."""

    def __init__(self, root: Path | None):
        self.root = root
        self._last: tuple[Any, Dataset] | None = None

    def __call__(self, cell: PaperCell) -> Dataset:
        """Return a cell's dataset. Raises LackingData."""
        name = cell.run.task.dataset
        if self._last is None or self._last[0] != name:
            try:
                self._last = name, read_dataset(cell.run.task, self.root)
            except InputError as error:
                raise LackingData(f"{cell.name} cannot run: {error}") from None
        return self._last[1]

    def check(self, cell: PaperCell) -> None:
        """Raise LackingData unless a cell's dataset is its row's, in version and counts."""
        dataset = self(cell)
        row = next((row for row in cell.rows if isinstance(row, Published)), None)
        different = [*data_differences(row, describe_dataset(dataset))] if row else []
        if cell.run.task.partition == "group" and len(dataset.groups) < cell.run.task.clients:
            different.append(f"{len(dataset.groups)} of {cell.run.task.clients:,} writers")
        if different:
            name = str(cell.run.task.dataset)
            remedy = f"build it whole (fedsieve data {name}), or run on what is there (--subset)"
            raise LackingData(f"{cell.name} cannot run: {name} here has {', '.join(different)}: {remedy}")

    def subset(self, cell: PaperCell) -> PaperCell:
        """Return a cell as it can run on what is there of its dataset: itself if that is all."""
        try:
            dataset, clients = self(cell), cell.run.task.clients
        except LackingData:
            return cell  # as the plan will say
        try:
            self.check(cell)
        except LackingData:
            fewer = cell.run.task.partition == "group" and len(dataset.groups) < clients
            return cell.as_variant("subset", (f"task.clients={len(dataset.groups)}",) if fewer else ())
        return cell


@dataclass(frozen=True)
class Reproduction:
    """A directory of results, and what cells are run with; ``kernels`` empty: each cell's own."""

    out: Path
    datasets: Datasets
    kernels: str = ""
    device: str = "cpu"

    def result(self, cell: PaperCell, seed: int) -> RunRecord | None:
        """Return a cell's result; what is finished in its run directory is kept first. Raises InputError."""
        record = result_of(self.out, cell, seed)
        if record is None and not result_path(self.out, cell, seed).exists() and self._finished(cell, seed):
            keep_result(self.out, cell, seed, self.folder(cell, seed))
            record = result_of(self.out, cell, seed)
        return record

    def _finished(self, cell: PaperCell, seed: int) -> bool:
        return (self.folder(cell, seed) / SUMMARY).exists() and self.rounds(cell, seed) >= cell.run.rounds

    def folder(self, cell: PaperCell, seed: int) -> Path:
        """Return the run directory of a cell and seed."""
        return self.out / RUNS / result_name(cell, seed)

    def rounds(self, cell: PaperCell, seed: int) -> int:
        """Return the last round in a cell's run directory."""
        rows = read_rows(self.folder(cell, seed))
        return max((row["round"] for row in rows), default=0)

    def plan(self, cells: Sequence[PaperCell], seeds: int, show: Callable[[str], None]) -> list[PlannedRun]:
        """Return what is to be run: what has begun, then the cheapest first.

        ``show`` is told of what is timed, and of what cannot run.

        Raises InputError for a result of another protocol, and LackingData where no cell has its data.
        """
        todo = {cell: left for cell in cells if (left := [s for s in range(seeds) if not self.result(cell, s)])}
        planned, lacking = list[PlannedRun](), dict[str, LackingData]()
        for cell in sorted(todo, key=lambda cell: str(cell.run.task.dataset)):
            try:
                if cell.variant != "subset":
                    self.datasets.check(cell)
                planned += self._planned(cell, todo[cell], show)
            except LackingData as error:
                lacking.setdefault(str(cell.run.task.dataset), error)
        if todo and not planned:
            raise next(iter(lacking.values()))
        for why in lacking.values():
            show(str(why))
        return sorted(planned, key=lambda one: (not one.first, one.seconds, one.trained, one.seed))

    def _planned(self, cell: PaperCell, seeds: Sequence[int], show: Callable[[str], None]) -> Iterator[PlannedRun]:
        dataset = self.datasets(cell)
        on_gpu = self.device != "cpu"
        cost = NOT_ESTIMATED if on_gpu else estimate_cost(self.out, cell.run, dataset, self.kernels, show)
        for seed in seeds:
            sizes = examples_of(cell.run, dataset), len(dataset.test)
            if self._finished(cell, seed):
                needs = ", ".join([f"a test every {cell.run.evaluate_every} rounds", *cell.measure])
                raise InputError(f"{self.folder(cell, seed)} has run without what {cell.name} needs ({needs}): {MOVE}")
            first = self.rounds(cell, seed)
            yield PlannedRun(cell, seed, self.folder(cell, seed), cost, *sizes, first)
