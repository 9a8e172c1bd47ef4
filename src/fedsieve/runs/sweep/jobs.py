"""The runs of a sweep or a reproduction: each in a process of its own, and what a person sees of them meanwhile.

A run's memory is its own, and a process that dies takes no other with it. In a terminal there is one bar and a line a
running job; elsewhere there are plain lines. A round that takes longer shows how many of its clients have answered.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

import torch
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from fedsieve.engine import Run
from fedsieve.engine.cohorts import in_process
from fedsieve.engine.engines import follow_parent, watched
from fedsieve.recipes import load_recipe
from fedsieve.runs.execution import Execution
from fedsieve.runs.progress import QUIET, format_clock, progress_bar
from fedsieve.runs.record import metrics_of_manifest, number, read_manifest, read_rows, read_summary
from fedsieve.runs.recorder import record_run
from fedsieve.runs.resume import check_recorded_code
from fedsieve.types import InputError
from fedsieve.types.errors import of_machine

Kind: TypeAlias = Literal["started", "client", "round", "warned", "failed", "paused", "done"]
Message: TypeAlias = tuple[Kind, int, float | None, str]
"""What a process says: the kind, the round, its first metric, and a line of text: of a round the metric's name."""
ENDS = ("failed", "paused", "done")
BETWEEN = 1.0
"""Seconds from one answer of a client that a process tells of to the next."""


@dataclass(frozen=True, eq=False)
class Job:
    """One run: its recipe and settings, seed included, the run that these make, its directory, and how it is run."""

    label: str
    recipe: str
    settings: tuple[str, ...]
    run: Run
    folder: Path
    execution: Execution
    seconds: float = 0.0
    """What one of its rounds is expected to take; with a deadline, it starts if there is time for one."""

    @property
    def last(self) -> int:
        """The round that it stops after."""
        return self.execution.last_round(self.run)


@dataclass(frozen=True)
class Limits:
    """What the processes may use: how many at once, until when (``time.time``), and whether others go first."""

    processes: int = 1
    deadline: float = math.inf
    nice: bool = False


class JobEvent(NamedTuple):
    """What happened to a job: it started, heard of a client, finished a round, warned, failed, paused, or is done."""

    job: Job
    what: Kind
    round: int = 0
    metric: float | None = None
    text: str = ""


def run_sweep(jobs: list[Job], processes: int, console: Console | None = None) -> str:
    """Run what is not finished yet, all of it even if a run fails; return the line that says so, or nothing.

    Raises InputError, before anything runs, if a run that is there was run with other code, unless that is accepted.
    """
    return follow_jobs(jobs, Limits(processes), console)


def follow_jobs(
    jobs: list[Job], limits: Limits, console: Console | None = None, done: Callable[[Job], None] | None = None
) -> str:
    """Do as ``run_sweep`` does, within ``limits``, and call ``done`` with every job that is."""
    for job in jobs:
        if not job.execution.accept_changes:
            check_recorded_code(job.folder, job.run, job.recipe)
    console = console or Console(highlight=False, markup=False, soft_wrap=not sys.stdout.isatty())
    progress = SweepProgress(jobs)
    todo = [job for job in jobs if not is_finished(job, job.last)]
    console.print(
        f"{len(jobs)} runs, {len(jobs) - len(todo)} of them finished; {len(todo)} to run, {limits.processes} at once"
    )
    if todo:
        with closing(_with_callback(run_jobs(todo, limits), done)) as events:
            (_live if console.is_terminal else _plain)(events, progress, console)
    if not progress.failures:
        return ""
    first, why = next(iter(progress.failures.items()))
    count = f"{len(progress.failures)} of {len(jobs)}"
    return f"{count} runs failed, to be tried again by the same command; {first.label}: {why}"


def _with_callback(events: Generator[JobEvent], done: Callable[[Job], None] | None) -> Generator[JobEvent]:
    with closing(events):
        for event in events:
            if event.what == "done" and done:
                try:
                    done(event.job)
                except (InputError, OSError) as error:
                    event = event._replace(what="failed", text=str(error))
            yield event


class SweepProgress:
    """How far every job is: its rounds, its last test, which are at work, and why some failed."""

    def __init__(self, jobs: list[Job]):
        self.jobs = jobs
        self.clients = dict[Job, str]()
        """Of a round that is at work, how many clients have answered."""
        self.last_rounds = {job: _rounds_on_disk(job) for job in jobs}
        self.tests = dict[Job, str]()
        self.running: list[Job] = []
        self.failures: dict[Job, str] = {}

    def total(self) -> int:
        """Return the rounds of all jobs."""
        return sum(job.last for job in self.jobs)

    def rounds(self) -> int:
        """Return the rounds done in all jobs."""
        return sum(min(self.last_rounds[job], job.last) for job in self.jobs)

    def update(self, event: JobEvent) -> None:
        """Note what happened."""
        if event.what == "started":
            self.running.append(event.job)
        elif event.what == "client":
            self.clients[event.job] = f", clients {event.text}"
        elif event.what == "round":
            self.clients.pop(event.job, None)
            self.last_rounds[event.job] = event.round
            if event.metric is not None:
                percent = event.text == "accuracy"
                self.tests[event.job] = f"{event.metric:6.1%}" if percent else f"{event.text} {event.metric:.4g}"
        elif event.what in ENDS:
            self.running.remove(event.job)
        if event.what == "failed":
            self.failures[event.job] = event.text

    def describe(self, job: Job) -> str:
        """Return how far a job is: its metric first, so that a narrow terminal cuts off the label's end at most."""
        rounds = f"round {self.last_rounds[job]}/{job.last}{self.clients.get(job, '')}"
        return f"{self.tests.get(job, '     -')}  {rounds}  {job.label}"


def is_finished(job: Job, last: int) -> bool:
    """Tell whether a run has got to its last round, or its condition, and all of its files are written."""
    try:
        summary = read_summary(job.folder) or {}
        metric = next(iter(metrics_of_manifest(read_manifest(job.folder) or {})))
    except InputError:
        return False
    rounds = summary.get("rounds") if number(summary.get(metric)) is not None else None
    return isinstance(rounds, int) and (rounds >= last or job.execution.stopped(summary))


def _rounds_on_disk(job: Job) -> int:
    """Return the last round on disk."""
    try:
        rows = read_rows(job.folder)
        return int(rows[-1]["round"]) if rows else 0
    except InputError:
        return 0  # the run itself says what is wrong


def _live(events: Generator[JobEvent], progress: SweepProgress, console: Console) -> None:
    bar = progress_bar("rounds", console)
    whole = bar.add_task("", total=progress.total(), completed=progress.rounds())
    with Live(bar, console=console, refresh_per_second=4) as live:
        for event in events:
            progress.update(event)
            bar.update(whole, completed=progress.rounds())
            lines = [Text(progress.describe(job), no_wrap=True, overflow="ellipsis") for job in progress.running]
            live.update(Group(bar, *lines))
            _print_event(event, progress, console)


def _plain(events: Generator[JobEvent], progress: SweepProgress, console: Console) -> None:
    began, before = time.perf_counter(), progress.rounds()
    last_line = dict.fromkeys(progress.jobs, began)
    for event in events:
        progress.update(event)
        now = time.perf_counter()
        if event.what == "client" and now > last_line[event.job] + QUIET:
            last_line[event.job] = now
            console.print(progress.describe(event.job))
        if event.what == "round":
            last_line[event.job] = now
            rounds, total = progress.rounds(), progress.total()
            left = (time.perf_counter() - began) / max(rounds - before, 1) * (total - rounds)
            console.print(f"{progress.describe(event.job)}  ({rounds}/{total} in all, ETA {format_clock(left)})")
        _print_event(event, progress, console)


def _print_event(event: JobEvent, progress: SweepProgress, console: Console) -> None:
    """Print what is to stay: a run that is done or failed, and warnings."""
    if event.what in ("done", "paused"):
        console.print(f"{event.what}  {progress.describe(event.job)}")
    elif event.what == "warned":
        console.print(f"warning: {event.job.label}: {event.text}")
    elif event.what == "failed":
        console.print(f"failed: {event.job.label}: {event.text}")


def run_jobs(jobs: list[Job], limits: Limits) -> Generator[JobEvent]:
    """Run the jobs, so many at once, and yield what happens. All processes end when this generator does."""
    waiting, running = deque(jobs), dict[Connection, tuple[Job, ForkServerProcess]]()
    try:
        while waiting or running:
            while waiting and len(running) < limits.processes:
                job = waiting.popleft()
                if time.time() + job.seconds > limits.deadline:
                    continue
                pipe, process = _start(job, limits)
                running[pipe] = job, process
                yield JobEvent(job, "started")
            ready = wait(list(running)) if running else []
            for pipe in [pipe for pipe in running if pipe in ready]:
                job, process = running[pipe]
                event = _receive(pipe, job, process)
                if event.what in ENDS:
                    del running[pipe]
                    pipe.close()
                    process.join()
                yield event
    finally:
        for _, process in running.values():
            process.kill()
        for _, process in running.values():
            process.join()


def _start(job: Job, limits: Limits) -> tuple[Connection, ForkServerProcess]:
    """Start a process that never sees Ctrl-C: the sweep does, and ends it.

    It is forked from a server that has done nothing but import: half the time of a new interpreter that imports anew.
    It gets the recipe's name and the settings, and makes the run itself: a run may hold what cannot be pickled.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fedsieve.runs.sweep.jobs"])
    ours, theirs = context.Pipe(duplex=False)
    arguments = (job.recipe, job.settings, job.folder, job.execution, limits, theirs)
    process = context.Process(target=_work, args=arguments, daemon=True)
    resource_tracker.ensure_running()  # which unblocks Ctrl-C when it starts itself
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    theirs.close()
    return ours, process


def _receive(pipe: Connection, job: Job, process: ForkServerProcess) -> JobEvent:
    """Return what a process said, or that it died without a word."""
    try:
        message: Message = pipe.recv()
    except (EOFError, OSError):
        process.join()
        how = f"exit code {process.exitcode}" if (process.exitcode or 0) >= 0 else f"signal {-(process.exitcode or 0)}"
        return JobEvent(job, "failed", text=f"its process died ({how}; killed, or out of memory?)")
    return JobEvent(job, *message)


def _work(
    recipe: str, settings: Sequence[str], folder: Path, execution: Execution, limits: Limits, pipe: Connection
) -> None:
    """Be a process of the sweep: one run, from where it stands to its end, or to the deadline."""
    threading.Thread(target=follow_parent, daemon=True).start()
    torch.set_num_threads(1)
    if limits.nice:
        os.nice(19)

    def show(message: Warning | str, *_: object, **__: object) -> None:
        pipe.send(("warned", 0, None, str(message)))

    warnings.showwarning = show
    try:
        end = _run_until(load_recipe(recipe, settings), recipe, folder, execution, limits.deadline, pipe)
    except InputError as error:
        pipe.send(("failed", 0, None, str(error)))
    except Exception as error:
        if (line := of_machine(error)) is None:
            raise
        pipe.send(("failed", 0, None, line))
    else:
        pipe.send((end, 0, None, ""))


def _run_until(
    run: Run, recipe: str, folder: Path, execution: Execution, deadline: float, pipe: Connection
) -> Literal["paused", "done"]:
    """Run, and tell of it in ``pipe``; pause after a round whose like would end after the deadline."""
    last_message = began = time.time()
    longest = 0.0

    def answer(t: int, answers: int, clients: int) -> None:
        nonlocal last_message
        if time.time() > last_message + BETWEEN and answers < clients:
            last_message = time.time()
            pipe.send(("client", t, None, f"{answers}/{clients}"))

    engine = watched(in_process(execution.device, execution.kernels, execution.precision), answer)
    federation = execution.open(run)
    metric = next(iter(federation.metrics))
    rounds = record_run(folder, federation, engine, recipe, replace(execution, resume=True))
    with closing(rounds):
        for round in rounds:
            now = time.time()
            longest, began, last_message = max(longest, now - began), now, now
            value = round.accuracy if metric == "accuracy" else round.scores[metric]
            pipe.send(("round", round.t, value, metric))
            if now + longest > deadline and round.t < execution.last_round(run):
                return "paused"
    return "done"
