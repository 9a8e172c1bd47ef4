"""What `fedsieve run` names: an engine, and the directory of a run."""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

from fedsieve.engine import Engine, Federation, Patience, local, pool
from fedsieve.flower.app.settings import Words
from fedsieve.runs.environment import cores
from fedsieve.runs.progress import Shown
from fedsieve.runs.run_json import Origin
from fedsieve.runs.store import keep
from fedsieve.types import InputError

Launch: TypeAlias = Callable[..., Iterator[Shown]]
"""Run a federation in a directory: what ``store.keep`` takes, the engine aside."""


def launcher(name: str, device: str, kernels: str, patience: Patience, words: Words) -> Launch:
    """Return how the engine of that name runs a federation. Raises InputError if it cannot be one."""
    kind, _, number = name.partition(":")
    if kind == "flower" and number != "inline":
        return _on_ray(number, device, patience, words)
    engine = _here(name, device, kernels, patience)

    def launch(folder: Path, federation: Federation, origin: Origin, **how: Any) -> Iterator[Shown]:
        return keep(folder, federation, engine, origin, **how)

    return launch


def _on_ray(number: str, device: str, patience: Patience, words: Words) -> Launch:
    if number and not (number.isdecimal() and int(number)):
        raise InputError(f"unknown engine 'flower:{number}': flower:N has N processes; flower:inline needs none")
    if device != "cpu":
        raise InputError("--engine flower computes on the CPU: use --engine local for --device cuda")
    import fedsieve.flower.engine  # noqa: F401 (Flower must be there)
    from fedsieve.flower.app.simulation import simulated

    def launch(folder: Path, federation: Federation, origin: Origin, **how: Any) -> Iterator[Shown]:
        workers = int(number) if number else cores()
        return simulated(folder, federation, origin, words, patience, workers, **how)

    return launch


def _here(name: str, device: str, kernels: str, patience: Patience) -> Engine:
    """Return an engine that is this process's, with or without processes of its own."""
    kind, _, number = name.partition(":")
    if name == "flower:inline":
        from fedsieve.flower.engine import inline

        return inline(device, kernels, patience)
    if patience != Patience() and kind in ("local", "pool"):
        raise InputError("--min-clients and --round-timeout are for --engine flower: no client is lost here")
    if kind == "local" and not number:
        return local(device, kernels)
    if kind == "pool" and number.isdecimal():
        return pool(int(number), device, kernels)
    raise InputError(f"unknown engine {name!r}; the engines are local, pool:N (pool:2: two processes) and flower")


def run_folder(recipe: str, resume: bool) -> Path:
    """Return runs/RECIPE-N: a new one, made here so that nobody else takes it, or with ``resume`` the last."""
    name = Path(recipe).name.replace(".py:", ".")
    numbered = {p.name[len(name) + 1 :]: p for p in Path("runs").glob(f"{glob.escape(name)}-*")}
    found = {int(number): p for number, p in numbered.items() if number.isdecimal()}
    begun = [number for number, p in found.items() if (p / "run.json").exists()]
    if resume and begun:
        return found[max(begun)]
    if resume:
        raise InputError(f"there is no run of {recipe} under runs/ to go on with: drop --resume, or name it with --out")
    last = max(found, default=0)
    folder = Path("runs") / f"{name}-{last + 1}"
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        return run_folder(recipe, resume)
    return folder
