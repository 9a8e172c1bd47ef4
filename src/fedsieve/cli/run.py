"""``fedsieve run``: a recipe on an engine, in a directory of its own. A new engine is one more entry in ``ENGINES``."""

from __future__ import annotations

import glob
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import typer

from fedsieve.engine import Engine, Quorum, cohort, pool
from fedsieve.engine.cohorts import check_precision, in_process
from fedsieve.engine.engines import kernels_for, watched
from fedsieve.recipes import load_recipe
from fedsieve.runs.execution import Execution
from fedsieve.runs.progress import ClientProgress, show_run
from fedsieve.runs.provenance import usable_cores
from fedsieve.runs.record import MANIFEST, read_manifest
from fedsieve.runs.recorder import record_run, row_of
from fedsieve.runs.sweep.grid import recipe_label
from fedsieve.types import InputError


class EngineKind(NamedTuple):
    """One entry of the list of engines."""

    about: str
    make: Callable[[Execution, int], Engine] | None
    """Makes the engine from what it is asked for and the number in its name (0: none). None: ``flower/app`` runs it."""
    loses_clients: bool = False
    """Whether a client's answer may be missing, so that quorum and timeout mean something."""


def _inline(execution: Execution, _: int) -> Engine:
    from fedsieve.flower.engine import inline

    return inline(execution.device, execution.kernels, execution.quorum)


ENGINES = {
    "local": EngineKind(
        "one process, clients one after another; on a GPU as many at once as its memory holds (the default)",
        lambda execution, _: in_process(execution.device, execution.kernels, execution.precision),
    ),
    "pool:N": EngineKind(
        "N worker processes, the same bits as local",
        lambda execution, workers: pool(workers, execution.device, execution.kernels),
    ),
    "cohort:N": EngineKind(
        "N clients at once on each GPU (on a CPU one after another), the bits of local there",
        lambda execution, clients: cohort(clients, execution.device, execution.kernels, execution.precision),
    ),
    "flower:N": EngineKind(
        "Flower's simulation on N Ray workers (flower: one a core), the bits of local; docs/how-to/deploy.md",
        None,
        True,
    ),
    "flower:inline": EngineKind("Flower's messages in one process, for a debugger", _inline, True),
}


def find_engine(execution: Execution) -> tuple[EngineKind, int]:
    """Return the engine that ``execution`` names, and the number in its name, 0 where it has none.

    Raises InputError for a name that there is not, or an option that the engine does not have.
    """
    name = execution.engine
    base, _, number = name.partition(":")
    kind = ENGINES.get(name) or (ENGINES.get(f"{base}:N") if number.isdecimal() or name == "flower" else None)
    numbered = kind in (ENGINES["flower:N"], ENGINES["cohort:N"])
    if kind is None or (numbered and number and not int(number)):
        raise InputError(
            f"unknown engine {name!r}; the engines are {', '.join(ENGINES)} (pool:2 and flower:2 have two processes)"
        )
    if not kind.loses_clients and execution.quorum != Quorum():
        raise InputError("--min-clients and --round-timeout are for --engine flower: no client is lost here")
    check_precision(execution.precision, execution.device, execution.kernels)
    if execution.precision != "fp32" and base not in ("local", "cohort"):
        raise InputError(f"--precision {execution.precision} is for --engine local and cohort:N")
    if not kind.make and execution.device != "cpu":
        raise InputError("--engine flower computes on the CPU: use --engine local for --device cuda")
    return kind, int(number) if number.isdecimal() else 0


def start_run(recipe: str, settings: list[str], execution: Execution, *, keep_kernels: bool = False) -> None:
    """Run a recipe with ``settings`` and show its progress; ``keep_kernels``: go on with those it was begun with.

    Raises InputError before anything is written.
    """
    settings, execution = _with_cohort(settings, execution)
    run = load_recipe(recipe, settings)
    folder = Path(execution.out) if execution.out else run_folder(recipe, resume=True) if execution.resume else None
    if folder and keep_kernels and (manifest := read_manifest(folder)):
        execution = replace(execution, kernels=manifest["kernels"], precision=manifest.get("precision", "fp32"))
    execution.quorum.check(run)
    kind, number = find_engine(execution)
    clients = ClientProgress()
    if kind.make:
        engine = watched(kind.make(execution, number), clients.answer)
    else:
        from fedsieve.flower.app.simulation import simulated
    federation = execution.open(run)
    kernels_for(federation, execution.kernels, execution.device)
    folder = folder or run_folder(recipe, resume=False)
    new = not (folder / MANIFEST).exists()
    rows = (
        map(row_of, record_run(folder, federation, engine, recipe, execution))
        if kind.make
        else simulated(folder, federation, recipe, settings, execution, number or usable_cores())
    )
    if execution.resume and new:
        typer.echo(f"{folder} holds no run yet: starting at round 1", err=True)
    show_run(folder, federation, rows, execution.last_round(run), clients=clients)


def _with_cohort(settings: list[str], execution: Execution) -> tuple[list[str], Execution]:
    """Return the settings without ``cohort=N``, which says how a run is executed, and the execution by cohort:N."""
    several = [setting.partition("=")[2] for setting in settings if setting.partition("=")[0].strip() == "cohort"]
    if not several:
        return settings, execution
    if execution.engine not in ("local", f"cohort:{several[-1]}"):
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
