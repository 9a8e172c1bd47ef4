"""``fedsieve run``: a recipe on an engine, in a directory of its own. A new engine is one more entry in ``ENGINES``."""

from __future__ import annotations

import glob
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import typer

from fedsieve.client.process import usable_cores
from fedsieve.engine import Engine
from fedsieve.engine.engines import watched
from fedsieve.recipes import load_recipe
from fedsieve.runs.engines import OWN_ENGINES, EngineKind
from fedsieve.runs.execution import Execution
from fedsieve.runs.progress import ClientProgress, show_run
from fedsieve.runs.record import MANIFEST
from fedsieve.runs.recorder import record_run, row_of
from fedsieve.runs.run import as_begun, open_ready
from fedsieve.runs.sweep.grid import recipe_label
from fedsieve.types import InputError


def _inline(execution: Execution, _: int) -> Engine:
    from fedsieve.flower.engine import inline

    return inline(execution.device, execution.kernels, execution.quorum)


ENGINES = {
    **OWN_ENGINES,
    "flower:N": EngineKind(
        "Flower's simulation on N Ray workers (flower: one a core), the bits of local; docs/how-to/deploy.md",
        None,
        True,
    ),
    "flower:inline": EngineKind("Flower's messages in one process, for a debugger", _inline, True),
}


def start_run(recipe: str, settings: list[str], execution: Execution, *, keep_kernels: bool = False) -> None:
    """Run a recipe with ``settings`` and show its progress; ``keep_kernels``: go on with those it was begun with.

    Raises InputError before anything is written.
    """
    settings, execution = _with_cohort(settings, execution)
    run = load_recipe(recipe, settings)
    folder = Path(execution.out) if execution.out else run_folder(recipe, resume=True) if execution.resume else None
    if folder and keep_kernels:
        execution = as_begun(folder, execution)
    execution.quorum.check(run)
    by_auto = execution.engine == "auto"
    clients, (federation, engine, number, execution) = ClientProgress(), open_ready(run, execution, ENGINES)
    if by_auto and execution.engine != "local":
        typer.echo(f"engine auto: {execution.engine}, a process for each core; the bits are those of local", err=True)
    folder = folder or run_folder(recipe, resume=False)
    new = not (folder / MANIFEST).exists()
    rows: Iterator[dict[str, Any]]
    if engine:
        rows = map(row_of, record_run(folder, federation, watched(engine, clients.answer), recipe, execution))
    else:
        from fedsieve.flower.app.simulation import simulated

        rows = simulated(folder, federation, recipe, settings, execution, number or usable_cores())
    if execution.resume and new:
        typer.echo(f"{folder} holds no run yet: starting at round 1", err=True)
    show_run(folder, federation, rows, execution.last_round(run), clients=clients)


def _with_cohort(settings: list[str], execution: Execution) -> tuple[list[str], Execution]:
    """Return the settings without ``cohort=N``, which says how a run is executed, and the execution by cohort:N."""
    several = [setting.partition("=")[2] for setting in settings if setting.partition("=")[0].strip() == "cohort"]
    if not several:
        return settings, execution
    if execution.engine not in ("auto", "local", f"cohort:{several[-1]}"):
        raise InputError(f"-s cohort={several[-1]} is --engine cohort:{several[-1]}, not --engine {execution.engine}")
    rest = [setting for setting in settings if setting.partition("=")[0].strip() != "cohort"]
    return rest, replace(execution, engine=f"cohort:{several[-1].strip()}")


def run_folder(recipe: str, resume: bool) -> Path:
    """Return runs/RECIPE-N: a new one, made here so that nobody else takes it, or with ``resume`` the last."""
    name = recipe_label(recipe)
    paths = {p.name[len(name) + 1 :]: p for p in Path("runs").glob(f"{glob.escape(name)}-*")}
    folders = {int(number): p for number, p in paths.items() if number.isdecimal()}
    started = [number for number, p in folders.items() if (p / "run.json").exists()]
    if resume and started:
        return folders[max(started)]
    if resume:
        raise InputError(f"there is no run of {recipe} under runs/ to go on with: drop --resume, or name it with --out")
    folder = Path("runs") / f"{name}-{max(folders, default=0) + 1}"
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        return run_folder(recipe, resume)
    return folder
