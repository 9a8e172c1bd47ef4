"""``fedsieve run``: a recipe on an engine, in a directory of its own."""

from __future__ import annotations

import glob
from dataclasses import replace
from pathlib import Path

import typer

from fedsieve.cli.engines import find_engine
from fedsieve.engine.engines import kernels_for
from fedsieve.recipes import load_recipe
from fedsieve.runs.execution import Execution
from fedsieve.runs.progress import show_run
from fedsieve.runs.provenance import usable_cores
from fedsieve.runs.record import MANIFEST, read_manifest
from fedsieve.runs.recorder import record_run, row_of
from fedsieve.types import InputError


def start_run(recipe: str, settings: list[str], execution: Execution, *, kernels_given: bool = True) -> None:
    """Run a recipe with ``settings`` and show its progress; without ``kernels_given``, by the recorded kernels.

    Raises InputError before anything is written.
    """
    run = load_recipe(recipe, settings)
    folder = Path(execution.out) if execution.out else run_folder(recipe, resume=True) if execution.resume else None
    if folder and not kernels_given and (manifest := read_manifest(folder)):
        execution = replace(execution, kernels=manifest["kernels"])
    execution.quorum.check(run)
    kind, number = find_engine(execution)
    if kind.make:
        engine = kind.make(execution, number)
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
    show_run(folder, federation, rows, execution.last_round(run))


def run_folder(recipe: str, resume: bool) -> Path:
    """Return runs/RECIPE-N: a new one, made here so that nobody else takes it, or with ``resume`` the last."""
    name = Path(recipe).name.replace(".py:", ".")
    numbered = {p.name[len(name) + 1 :]: p for p in Path("runs").glob(f"{glob.escape(name)}-*")}
    folders = {int(number): p for number, p in numbered.items() if number.isdecimal()}
    started = [number for number, p in folders.items() if (p / "run.json").exists()]
    if resume and started:
        return folders[max(started)]
    if resume:
        raise InputError(f"there is no run of {recipe} under runs/ to go on with: drop --resume, or name it with --out")
    last = max(folders, default=0)
    folder = Path("runs") / f"{name}-{last + 1}"
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        return run_folder(recipe, resume)
    return folder
