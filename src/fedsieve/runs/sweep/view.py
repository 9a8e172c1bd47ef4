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

from fedsieve.data.storage import read_json
from fedsieve.runs.execution import Execution
from fedsieve.runs.progress import clock
from fedsieve.runs.recorded import number
from fedsieve.runs.store import check_source, read_rows
from fedsieve.runs.sweep.cells import Job
from fedsieve.runs.sweep.work import News, work
from fedsieve.types import InputError


def run_sweep(jobs: list[Job], processes: int, execution: Execution, console: Console | None = None) -> str:
    """Run what is not finished yet, all of it even if a run fails; return the line that says so, or nothing.

    Raises InputError, before anything runs, if a run that is there was run with other code, unless that is accepted.
    """
    if not execution.accept_changes:
        for job in jobs:
            check_source(job.folder, job.run, job.cell.recipe)
    console = console or Console(highlight=False, markup=False, soft_wrap=not sys.stdout.isatty())
    stand = Standing(jobs, execution)
    todo = [job for job in jobs if not finished(job, stand.last(job))]
    console.print(
        f"{len(jobs)} runs, {len(jobs) - len(todo)} of them finished; {len(todo)} to run, {processes} at once"
    )
    failed = dict[Job, str]()
    if todo:
        with closing(work(todo, processes, execution)) as news:
            (_live if console.is_terminal else _plain)(news, stand, failed, console)
    if not failed:
        return ""
    first, why = next(iter(failed.items()))
    return f"{len(failed)} of {len(jobs)} runs failed, to be tried again by the same command; {first.label}: {why}"


class Standing:
    """How far every job is: its rounds done, its last accuracy, and which are at work."""

    def __init__(self, jobs: list[Job], execution: Execution):
        self.execution, self.jobs = execution, jobs
        self.done = {job: _done(job) for job in jobs}
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

    def take(self, news: News) -> None:
        """Note what happened."""
        if news.what == "started":
            self.running.append(news.job)
        elif news.what == "round":
            self.done[news.job] = news.round
            self.accuracy[news.job] = news.accuracy if news.accuracy is not None else self.accuracy[news.job]
        elif news.what in ("failed", "done"):
            self.running.remove(news.job)

    def line(self, job: Job) -> str:
        """Return how far a job is: accuracy first, so that a narrow terminal cuts off the label's end at most."""
        known = self.accuracy[job]
        share = "     -" if known is None else f"{known:6.1%}"
        return f"{share}  round {self.done[job]}/{self.last(job)}  {job.label}"


def finished(job: Job, last: int) -> bool:
    """Tell whether a run has got to its last round and all of its files are written."""
    try:
        found = read_json(job.folder / "summary.json") or {}
    except InputError:
        return False
    rounds = found.get("rounds") if number(found.get("accuracy")) is not None else None
    return isinstance(rounds, int) and rounds >= last


def _done(job: Job) -> int:
    """Return the last round on disk."""
    try:
        rows = read_rows(job.folder)
        return int(rows[-1]["round"]) if rows else 0
    except InputError:
        return 0  # the run itself says what is wrong


def _live(news: Generator[News], stand: Standing, failed: dict[Job, str], console: Console) -> None:
    columns = (TextColumn("rounds"), MofNCompleteColumn(), BarColumn(None), TextColumn("ETA"), TimeRemainingColumn())
    bar = Progress(*columns, console=console, expand=True, speed_estimate_period=600)
    whole = bar.add_task("", total=stand.total(), completed=stand.rounds())
    with Live(bar, console=console, refresh_per_second=4) as live:
        for one in news:
            stand.take(one)
            bar.update(whole, completed=stand.rounds())
            lines = [Text(stand.line(job), no_wrap=True, overflow="ellipsis") for job in stand.running]
            live.update(Group(bar, *lines))
            _tell(one, stand, failed, console)


def _plain(news: Generator[News], stand: Standing, failed: dict[Job, str], console: Console) -> None:
    began, before = time.perf_counter(), stand.rounds()
    for one in news:
        stand.take(one)
        if one.what == "round":
            done, total = stand.rounds(), stand.total()
            left = (time.perf_counter() - began) / max(done - before, 1) * (total - done)
            console.print(f"{stand.line(one.job)}  ({done}/{total} in all, ETA {clock(left)})")
        _tell(one, stand, failed, console)


def _tell(news: News, stand: Standing, failed: dict[Job, str], console: Console) -> None:
    """Print what is to stay: a run that is done or failed, and warnings."""
    if news.what == "done":
        console.print(f"done  {stand.line(news.job)}")
    elif news.what == "warned":
        console.print(f"warning: {news.job.label}: {news.text}")
    elif news.what == "failed":
        failed[news.job] = news.text
        console.print(f"failed: {news.job.label}: {news.text}")
