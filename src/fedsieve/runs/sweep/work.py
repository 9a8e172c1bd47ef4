"""Jobs in processes, one process a run: its memory is its own, and one that dies takes no other with it."""

from __future__ import annotations

import multiprocessing
import signal
import threading
import warnings
from collections import deque
from collections.abc import Generator
from dataclasses import replace
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

import torch

from fedsieve.engine import local
from fedsieve.engine.engines import follow_parent
from fedsieve.recipes import load_recipe
from fedsieve.runs.execution import Execution
from fedsieve.runs.recorder import record_run
from fedsieve.runs.sweep.cells import Job
from fedsieve.types import InputError
from fedsieve.types.errors import of_machine

Message: TypeAlias = tuple[Literal["round", "warned", "failed", "done"], int, float | None, str]
"""What a process says: the kind, the round, its accuracy, and a line of text."""


class JobEvent(NamedTuple):
    """What happened to a job: it started, finished a round, warned, failed, or is done."""

    job: Job
    what: Literal["started", "round", "warned", "failed", "done"]
    round: int = 0
    accuracy: float | None = None
    text: str = ""


def run_jobs(jobs: list[Job], processes: int, execution: Execution) -> Generator[JobEvent]:
    """Run the jobs, ``processes`` at once, and yield what happens. All processes end when this generator does."""
    waiting, running = deque(jobs), dict[Connection, tuple[Job, ForkServerProcess]]()
    try:
        while waiting or running:
            while waiting and len(running) < processes:
                job = waiting.popleft()
                pipe, process = _start(job, execution)
                running[pipe] = job, process
                yield JobEvent(job, "started")
            ready = wait(list(running))
            for pipe in [pipe for pipe in running if pipe in ready]:
                job, process = running[pipe]
                event = _receive(pipe, job, process)
                if event.what in ("failed", "done"):
                    del running[pipe]
                    pipe.close()
                    process.join()
                yield event
    finally:
        for _, process in running.values():
            process.kill()
        for _, process in running.values():
            process.join()


def _start(job: Job, execution: Execution) -> tuple[Connection, ForkServerProcess]:
    """Start a process that never sees Ctrl-C: the sweep does, and ends it.

    It is forked from a server that has done nothing but import: half the time of a new interpreter that imports anew.
    It gets the recipe's name and the settings, and makes the run itself: a run may hold what cannot be pickled.
    """
    settings = [*(f"{name}={value}" for name, value in job.cell.settings.items()), f"seed={job.seed}"]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fedsieve.runs.sweep.work"])
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(
        target=_work, args=(job.cell.recipe, settings, job.folder, execution, theirs), daemon=True
    )
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


def _work(recipe: str, settings: list[str], folder: Path, execution: Execution, pipe: Connection) -> None:
    """Be a process of the sweep: one run, from where it stands to its end."""
    threading.Thread(target=follow_parent, daemon=True).start()
    torch.set_num_threads(1)

    def say(message: Message) -> None:
        pipe.send(message)

    def show(message: Warning | str, *_: object, **__: object) -> None:
        say(("warned", 0, None, str(message)))

    warnings.showwarning = show
    try:
        federation, engine = (
            execution.open(load_recipe(recipe, settings)),
            local(kernels=execution.kernels),
        )
        for round in record_run(folder, federation, engine, recipe, replace(execution, resume=True)):
            say(("round", round.t, round.accuracy, ""))
    except InputError as error:
        say(("failed", 0, None, str(error)))
    except Exception as error:
        if (line := of_machine(error)) is None:
            raise
        say(("failed", 0, None, line))
    else:
        say(("done", 0, None, ""))
