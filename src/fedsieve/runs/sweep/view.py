"""What a person sees of a sweep while it runs: one bar and a line a running job, or plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Generator
from contextlib import closing

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from fedsieve.runs.execution import Execution
from fedsieve.runs.progress import format_clock
from fedsieve.runs.record import number, read_rows, read_summary
from fedsieve.runs.resume import check_recorded_code
from fedsieve.runs.sweep.cells import Job
from fedsieve.runs.sweep.work import JobEvent, run_jobs
from fedsieve.types import InputError


def run_sweep(jobs: list[Job], processes: int, execution: Execution, console: Console | None = None) -> str:
    """Run what is not finished yet, all of it even if a run fails; return the line that says so, or nothing.

    Raises InputError, before anything runs, if a run that is there was run with other code, unless that is accepted.
    """
    if not execution.accept_changes:
        for job in jobs:
            check_recorded_code(job.folder, job.run, job.cell.recipe)
    console = console or Console(highlight=False, markup=False, soft_wrap=not sys.stdout.isatty())
    progress = SweepProgress(jobs, execution)
    todo = [job for job in jobs if not is_finished(job, progress.last(job))]
    console.print(
        f"{len(jobs)} runs, {len(jobs) - len(todo)} of them finished; {len(todo)} to run, {processes} at once"
    )
    failed = dict[Job, str]()
    if todo:
        with closing(run_jobs(todo, processes, execution)) as events:
            (_live if console.is_terminal else _plain)(events, progress, failed, console)
    if not failed:
        return ""
    first, why = next(iter(failed.items()))
    return f"{len(failed)} of {len(jobs)} runs failed, to be tried again by the same command; {first.label}: {why}"


class SweepProgress:
    """How far every job is: its rounds done, its last accuracy, and which are at work."""

    def __init__(self, jobs: list[Job], execution: Execution):
        self.execution, self.jobs = execution, jobs
        self.done = {job: _rounds_on_disk(job) for job in jobs}
        self.accuracy: dict[Job, float | None] = dict.fromkeys(jobs)
        self.running: list[Job] = []

    def last(self, job: Job) -> int:
        """Return the round that a job stops after."""
        return self.execution.last_round(job.run)

    def total(self) -> int:
        """Return the rounds of all jobs."""
        return sum(self.last(job) for job in self.jobs)

    def rounds(self) -> int:
        """Return the rounds done in all jobs."""
        return sum(min(self.done[job], self.last(job)) for job in self.jobs)

    def update(self, event: JobEvent) -> None:
        """Note what happened."""
        if event.what == "started":
            self.running.append(event.job)
        elif event.what == "round":
            self.done[event.job] = event.round
            self.accuracy[event.job] = event.accuracy if event.accuracy is not None else self.accuracy[event.job]
        elif event.what in ("failed", "done"):
            self.running.remove(event.job)

    def describe(self, job: Job) -> str:
        """Return how far a job is: accuracy first, so that a narrow terminal cuts off the label's end at most."""
        accuracy = self.accuracy[job]
        share = "     -" if accuracy is None else f"{accuracy:6.1%}"
        return f"{share}  round {self.done[job]}/{self.last(job)}  {job.label}"


def is_finished(job: Job, last: int) -> bool:
    """Tell whether a run has got to its last round and all of its files are written."""
    try:
        summary = read_summary(job.folder) or {}
    except InputError:
        return False
    rounds = summary.get("rounds") if number(summary.get("accuracy")) is not None else None
    return isinstance(rounds, int) and rounds >= last


def _rounds_on_disk(job: Job) -> int:
    """Return the last round on disk."""
    try:
        rows = read_rows(job.folder)
        return int(rows[-1]["round"]) if rows else 0
    except InputError:
        return 0  # the run itself says what is wrong


def _live(events: Generator[JobEvent], progress: SweepProgress, failed: dict[Job, str], console: Console) -> None:
    columns = (TextColumn("rounds"), MofNCompleteColumn(), BarColumn(None), TextColumn("ETA"), TimeRemainingColumn())
    bar = Progress(*columns, console=console, expand=True, speed_estimate_period=600)
    whole = bar.add_task("", total=progress.total(), completed=progress.rounds())
    with Live(bar, console=console, refresh_per_second=4) as live:
        for event in events:
            progress.update(event)
            bar.update(whole, completed=progress.rounds())
            lines = [Text(progress.describe(job), no_wrap=True, overflow="ellipsis") for job in progress.running]
            live.update(Group(bar, *lines))
            _print_event(event, progress, failed, console)


def _plain(events: Generator[JobEvent], progress: SweepProgress, failed: dict[Job, str], console: Console) -> None:
    began, before = time.perf_counter(), progress.rounds()
    for event in events:
        progress.update(event)
        if event.what == "round":
            done, total = progress.rounds(), progress.total()
            left = (time.perf_counter() - began) / max(done - before, 1) * (total - done)
            console.print(f"{progress.describe(event.job)}  ({done}/{total} in all, ETA {format_clock(left)})")
        _print_event(event, progress, failed, console)


def _print_event(event: JobEvent, progress: SweepProgress, failed: dict[Job, str], console: Console) -> None:
    """Print what is to stay: a run that is done or failed, and warnings."""
    if event.what == "done":
        console.print(f"done  {progress.describe(event.job)}")
    elif event.what == "warned":
        console.print(f"warning: {event.job.label}: {event.text}")
    elif event.what == "failed":
        failed[event.job] = event.text
        console.print(f"failed: {event.job.label}: {event.text}")
