"""``fedsieve run RECIPE --engine flower``: the app on a SuperLink of this run's own, its rows as they come."""

from __future__ import annotations

import os
import shlex
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from math import inf
from pathlib import Path
from typing import Any

from fedsieve.data.storage import read_json, write
from fedsieve.engine import Federation
from fedsieve.flower.app.project import AppConfig, write_app
from fedsieve.flower.app.server import ENDED
from fedsieve.flower.app.superlink import SuperLink, last_line, superlink
from fedsieve.runs.execution import Execution
from fedsieve.runs.record import MANIFEST, read_rows
from fedsieve.runs.recorder import check_directory
from fedsieve.types import InputError

LOG = "flower.log"
LOOK, ASK = 0.2, 20.0
"""Seconds from one look for new rows to the next, and from one question whether Flower is still at it."""
SILENT = 15
"""Questions in a row to which a SuperLink at work may give no answer: on a busy machine some are late."""


def simulate(config: AppConfig, nodes: int, workers: int) -> Iterator[dict[str, Any]]:
    """Run an app on Ray: ``nodes`` simulated SuperNodes, ``workers`` processes; yield every round's row.

    Raises InputError as the run itself does, or if Flower ends without a word.
    """
    with _home(Path(config.out)) as home:
        outcome = home / "ended.json"
        rows = read_rows(Path(config.out))
        write_app(home / "app", config)
        ray = os.environ.get("RAY_ADDRESS") or "local"  # without it, any cluster that happens to run on this machine
        federation = f"num-supernodes={nodes} client-resources-num-cpus=1"
        if not os.environ.get("RAY_ADDRESS"):  # whose cluster has its own number of workers
            federation += f" init-args-num-cpus={workers}"
        with superlink(home, {ENDED: str(outcome), "RAY_ADDRESS": ray}) as link:
            answer = link.flwr("run", str(home / "app"), "--federation-config", federation)
            yield from _followed(Path(config.out), link, answer["run-id"], outcome, rows[-1]["round"] if rows else -inf)


@contextmanager
def _home(out: Path) -> Iterator[Path]:
    """Make Flower's folder for this run, and remove it; what Flower said stays in the run directory."""
    home = Path(tempfile.mkdtemp(prefix="fedsieve-flower-"))
    try:
        yield home
    finally:
        if (out / MANIFEST).exists() and (home / "superlink.log").exists():
            write(out / LOG, (home / "superlink.log").read_bytes())
        shutil.rmtree(home, ignore_errors=True)


def _followed(out: Path, link: SuperLink, run: str, outcome: Path, last: float) -> Iterator[dict[str, Any]]:
    """Yield the rows of the rounds after ``last`` until the run has ended."""
    last_question, silent = time.monotonic(), 0
    while True:
        over = outcome.exists()
        for row in read_rows(out):
            if row["round"] > last:
                last = row["round"]
                yield row
        if over:
            break
        if link.process.poll() is not None:
            raise InputError(f"Flower's SuperLink died: {last_line(link.log)} (see {out / LOG}); --resume goes on")
        if time.monotonic() - last_question > ASK:
            status = _status(link, run)
            last_question, silent = time.monotonic(), silent + 1 if status is None else 0
            if not outcome.exists():
                _check(status, silent, f"{last_line(link.log)} (see {out / LOG}); --resume goes on")
        time.sleep(LOOK)
    if error := (read_json(outcome) or {}).get("error"):
        raise InputError(error)


def _status(link: SuperLink, run: str) -> str | None:
    """Return what Flower says of a run; None if it says nothing."""
    try:
        answer = link.flwr("list", "--run-id", run, seconds=ASK)
    except InputError:
        return None
    return next((str(one.get("status")) for one in answer.get("runs", []) if str(one.get("run-id")) == str(run)), None)


def _check(status: str | None, silent: int, known: str) -> None:
    """Raise InputError if Flower's run has ended and ours has not said so, or nobody knows for too long."""
    if status is not None and status.startswith("finished"):
        raise InputError(f"Flower's run ended ({status}) without a word: {known}")
    if silent >= SILENT:
        raise InputError(f"Flower's SuperLink has not answered {silent} times in a row: {known}")


def simulated(
    folder: Path, federation: Federation, recipe: str, settings: list[str], execution: Execution, workers: int
) -> Iterator[dict[str, Any]]:
    """Run a recipe in ``folder`` on ``workers`` Ray processes, and yield every round's row. Raises InputError."""
    check_directory(folder, federation, recipe, execution)
    place = {"out": str(folder.absolute()), "data": str(execution.root or "")}
    config = AppConfig(**asdict(execution) | place, recipe=recipe, settings=shlex.join(settings))
    return simulate(config, federation.run.most_clients, workers)
