"""``fedsieve reproduce``: what there is of the papers, run, laid out and drawn."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import typer
from rich.console import Console

from fedsieve.data.storage import check_output, write_output
from fedsieve.engine.cohorts import check_precision
from fedsieve.engine.engines import devices_of
from fedsieve.kernels.dispatch import check_choice
from fedsieve.recipes.papers.parts import PAPERS, PaperPart, find_part, paper_parts
from fedsieve.report.figures import draw_records
from fedsieve.report.paper_tables import FORMS, paper_table
from fedsieve.report.paper_tables.summary import WITH_MASKS, read_causes
from fedsieve.runs.execution import Execution
from fedsieve.runs.record import SUMMARY, RunRecord, read_record
from fedsieve.runs.reproduction.cells import PaperCell, cells_of
from fedsieve.runs.reproduction.plan import Datasets, LackingData, PlannedRun, Reproduction
from fedsieve.runs.reproduction.results import keep_result, row_results
from fedsieve.runs.sweep.jobs import Job, Limits, follow_jobs
from fedsieve.runs.units import format_duration
from fedsieve.types import InputError


class NoTwin(InputError):
    """The authors' code is asked for where none is known, or it does as the paper says."""


@dataclass(frozen=True)
class Wishes:
    """What the command line asks for. Raises InputError for what cannot be."""

    paper: str
    part: str
    rows: str
    seeds: int
    jobs: int
    hours: float | None
    nice: bool
    authors: bool
    subset: bool
    table: str
    to: Path | None

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise InputError(f"--seeds must be at least 1, got {self.seeds}: it is the number of seeds, 0 to N-1")
        if self.jobs < 1:
            raise InputError(f"--jobs must be at least 1 run at once, got {self.jobs}")
        if self.hours is not None and not 0 < self.hours < 1e6:
            raise InputError(f"--hours must be a positive number, got {self.hours}")
        if self.table and self.table not in FORMS:
            raise InputError(f"--table must be one of {', '.join(FORMS)}, got {self.table!r}")
        if self.paper and self.paper not in PAPERS:
            raise InputError(f"there is no paper {self.paper!r}: choose {', '.join(PAPERS)}")
        if self.rows and not self.part:
            raise InputError("--rows needs a table: fedsieve reproduce flash table2 --rows 12,13")
        if self.authors and self.subset:
            raise InputError("--authors and --subset are two variants of a row: choose one")
        if self.table and (self.rows or self.authors or self.subset or self.hours):
            raise InputError("--table lays out all that is there: leave --rows, --authors, --subset and --hours out")
        if self.rows and not self.numbers:
            raise InputError(f"--rows must be numbers, such as 16,17, got {self.rows!r}")

    @property
    def numbers(self) -> list[int]:
        """The numbers of the rows."""
        try:
            return [int(text) for text in self.rows.split(",") if text.strip()]
        except ValueError:
            raise InputError(f"--rows must be numbers, such as 16,17, got {self.rows!r}") from None


def reproduce(wishes: Wishes, out: Path, execution: Execution, kernels: str) -> None:
    """List, run, lay out or draw; ``kernels`` empty: each cell's own. Raises InputError before anything runs."""
    if kernels:
        check_choice(kernels)
    devices_of(execution.device)
    check_precision(execution.precision, execution.device, kernels or "auto")
    if execution.device != "cpu" and wishes.jobs > 1:
        raise InputError("a run takes the whole of a GPU: --jobs 1, or a device for each of several commands")
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file: name a folder with --out")
    console = Console(highlight=False, markup=False, soft_wrap=not sys.stdout.isatty())
    reproduction = Reproduction(out, Datasets(execution.root), kernels, execution.device)
    if not wishes.part:
        return _list(wishes, reproduction, console)
    part = find_part(wishes.paper, wishes.part)
    if wishes.to and not wishes.table and not part.figure:
        raise InputError("--to is where a table or a figure is written: say --table md, html or tex")
    if wishes.to:
        check_output(wishes.to, f"{part.paper}-{part.name}.{wishes.table or 'svg'}")
    if wishes.table:
        return _lay_out(part, wishes, out)
    if not part.figure or wishes.hours is not None:
        _run(part, wishes, reproduction, execution, console)
    if part.figure:
        return _draw(part, wishes, reproduction, console)
    console.print(f"fedsieve reproduce {part.label} --table md lays out what is there")
    return None


def _cells(part: PaperPart, wishes: Wishes, datasets: Datasets) -> list[PaperCell]:
    """Return the cells that are asked for. Raises InputError where the authors' code is asked for and there is none."""
    cells = [cell.in_part(part) if wishes.table else cell for cell in cells_of(part, wishes.numbers)]
    if wishes.authors:
        cells = [twin for cell in cells if (twin := cell.as_authors())]
        if not cells:
            raise NoTwin(f"no public code is known that runs {part.label} in another way: leave --authors out")
    return [datasets.subset(cell) for cell in cells] if wishes.subset else cells


def _run(part: PaperPart, wishes: Wishes, reproduction: Reproduction, execution: Execution, console: Console) -> None:
    deadline = time.time() + 3600 * wishes.hours if wishes.hours else float("inf")
    cells = _cells(part, wishes, reproduction.datasets)
    todo = reproduction.plan(cells, wishes.seeds, console.print)
    done = sum(bool(reproduction.result(cell, seed)) for cell in cells for seed in range(wishes.seeds))
    seconds = sum(one.seconds for one in todo) / wishes.jobs
    estimate = f"about {format_duration(seconds)}, an estimate" if todo else "nothing to run"
    if todo and execution.device != "cpu":
        estimate = f"{len(todo)} to run, their time seen from the first rounds"
    console.print(f"{part.label}, {part.title}: {len(cells)} cells, {wishes.seeds} seeds; {done} runs done; {estimate}")
    if not todo:
        return
    execution = replace(execution, accept_changes=True)
    runs: dict[Job, PlannedRun] = {one.job(execution): one for one in todo}

    def keep(job: Job) -> None:
        keep_result(reproduction.out, runs[job].cell, runs[job].seed, job.folder)

    trouble = follow_jobs([*runs], Limits(wishes.jobs, deadline, wishes.nice), console, keep)
    if trouble:
        raise InputError(trouble)
    if left := [one for one in todo if not reproduction.result(one.cell, one.seed)]:
        begun = any(reproduction.rounds(one.cell, one.seed) for one in left)
        console.print(
            f"{len(left)} of {len(todo)} runs are left: the same command goes on" if begun else _no_time(runs)
        )


def _no_time(jobs: Iterable[Job]) -> str:
    return f"no run fits: a round takes about {format_duration(min(job.seconds for job in jobs))}, give it more --hours"


def _lay_out(part: PaperPart, wishes: Wishes, out: Path) -> None:
    text = paper_table(part, row_results(out, part, range(wishes.seeds)), wishes.table, read_causes(out))  # type: ignore[arg-type]
    if wishes.to is None:
        typer.echo(text)
        return
    write_output(wishes.to, text.encode())
    typer.echo(f"wrote {wishes.to}")


def _draw(part: PaperPart, wishes: Wishes, reproduction: Reproduction, console: Console) -> None:
    """Draw what is there of a figure, and say what is missing."""
    assert part.figure
    cells = [cell.in_part(part) for cell in _cells(part, wishes, reproduction.datasets)]
    records = {cell: _records(cell, wishes.seeds, reproduction, masks=part.figure == WITH_MASKS) for cell in cells}
    missing = [cell for cell in cells if not records[cell]]
    for cell in missing:
        console.print(f"missing: {cell.label}")
    if missing:
        console.print(f"fedsieve reproduce {part.label} --hours 8 runs what is missing")
    if len(missing) == len(cells):
        other = next((one for one in paper_parts() if one.label == f"{part.label}_mnist"), None)
        if other is None or wishes.rows:
            raise InputError(f"no run of {part.label} is there yet: run it first, with --hours")
        console.print(f"no run of {part.label} is there yet; instead, {other.label}: {other.title}")
        return _draw(other, wishes, reproduction, console)
    to = wishes.to or Path(f"{part.paper}-{part.name}.svg")
    draw_records(part.figure, [record for some in records.values() for record in some], to)
    console.print(f"wrote {to}, of {len(cells) - len(missing)} of {len(cells)} cells")
    return None


def _records(cell: PaperCell, seeds: int, reproduction: Reproduction, *, masks: bool) -> list[RunRecord]:
    """Return what is kept of a cell; the run directories, where a figure shows the ``masks`` that they alone hold."""
    records = {seed: record for seed in range(seeds) if (record := reproduction.result(cell, seed))}
    folders = {seed: reproduction.folder(cell, seed) for seed in records}
    return [
        read_record(folders[seed]) if masks and (folders[seed] / SUMMARY).exists() else record
        for seed, record in records.items()
    ]


def _list(wishes: Wishes, reproduction: Reproduction, console: Console) -> None:
    """Print tables and figures, each as soon as its runs are timed: runs done, to do, and about how long those take."""
    parts = [part for part in paper_parts() if wishes.paper in ("", part.paper)]
    widths = [max(len(part.label) for part in parts), max(len(part.title) for part in parts), 4, 4, 5]
    troubles = list[str]()

    def print_row(*cells: str) -> None:
        padded = [text.ljust(width) for text, width in zip(cells, widths, strict=False)]
        console.print("  ".join([*padded, *cells[len(widths) :]]).rstrip())

    console.print(f"{wishes.seeds} seeds a cell, one run at a time; times are estimates for this machine, timed once")
    print_row("", "", "runs", "done", "begun", "about")
    for part in parts:
        try:
            print_row(part.label, part.title, *_state(part, wishes, reproduction, console))
        except InputError as error:
            print_row(part.label, part.title, "", "", "", str(error))
            troubles += [] if isinstance(error, LackingData | NoTwin) else [str(error)]
    if troubles:
        raise InputError(troubles[0])


def _state(part: PaperPart, wishes: Wishes, reproduction: Reproduction, console: Console) -> tuple[str, ...]:
    cells = _cells(part, wishes, reproduction.datasets)
    runs = [(cell, seed) for cell in cells for seed in range(wishes.seeds)]
    done = [one for one in runs if reproduction.result(*one)]
    begun = [one for one in runs if one not in done and reproduction.rounds(*one)]
    try:
        todo = reproduction.plan(cells, wishes.seeds, console.print)
        time_left = format_duration(sum(one.seconds for one in todo)) if todo else "-"
        without = len(runs) - len(done) - len(todo)
        time_left += f", without {without} runs whose data are not there" if without else ""
    except LackingData as error:
        time_left = str(error)
    return str(len(runs)), str(len(done)), str(len(begun)), time_left
