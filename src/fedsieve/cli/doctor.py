"""``fedsieve doctor``: what bites users of Flower and Ray on this machine; a line each: what, why, and the remedy."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TypeAlias

import torch

from fedsieve.client.process import usable_cores
from fedsieve.flower.app.superlink import healthy
from fedsieve.kernels import unavailable_reason
from fedsieve.kernels.library import get_num_threads
from fedsieve.types.errors import install

OLDEST = (1, 41)
"""The first Flower whose Message API and HTTP transport the engine is written for."""
PORT = "39091"
"""Where `flwr run` looks for the local SuperLink that it leaves behind."""
SHARE = 0.3
"""Of the memory, what Ray's object store takes in /dev/shm; with less it goes to the disk."""


@dataclass(frozen=True)
class Finding:
    """One thing about this machine: fine, something to know, or something to mend."""

    level: str
    line: str


Environment: TypeAlias = Mapping[str, str]


def examine(environment: Environment | None = None, cores: int | None = None) -> Iterator[Finding]:
    """Yield a finding for everything that is looked at."""
    environment = os.environ if environment is None else environment
    yield _extra()
    yield _dependencies(environment)
    yield _superlink(environment)
    yield _telemetry(environment)
    yield _threads(environment, cores or usable_cores())
    yield _actors(cores or usable_cores())
    yield _shared_memory(Path("/dev/shm"))
    yield _kernels()
    yield _key(environment)


def _extra() -> Finding:
    try:
        flwr = version("flwr")
        version("ray")
    except PackageNotFoundError as error:
        return Finding("mend", f"no {error.name}: --engine flower needs it: {install('flower')}")
    if tuple(int(part) for part in re.findall(r"\d+", flwr)[:2]) < OLDEST:
        return Finding("mend", f"Flower is {flwr}: 1.41 is the oldest that works: pip install -U 'flwr[simulation]'")
    return Finding("fine", f"Flower {flwr}, Ray {version('ray')}")


def _dependencies(environment: Environment) -> Finding:
    name = "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"
    if environment.get(name) == "1":
        return Finding("fine", "Flower installs no dependencies")
    return Finding(
        "mend",
        "Flower installs an app's dependencies anew for every run: that fails offline, takes long, and hides a "
        f"FedSieve of your own: export {name}=1 before SuperLink or flwr run starts (fedsieve run does so itself)",
    )


def _superlink(environment: Environment) -> Finding:
    name = "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT"
    port = environment.get(name, PORT)
    if not (port.isdecimal() and 0 < int(port) < 1 << 16):
        return Finding("mend", f"{name}={port} is no port: unset it, or set it to one of 1 to 65535")
    if not healthy(int(port)):
        return Finding("fine", "no local SuperLink is left over")
    who = _listener(port)
    named, stop = (f", process {who[0]} in {who[1]}", f"kill {who[0]}") if who else ("", "end flower-superlink")
    return Finding(
        "mend",
        f"a local SuperLink of an earlier flwr run is at work on port {port}{named}: it keeps the folder and the "
        f"environment that it was started with, whatever you set now: {stop}",
    )


def _listener(port: str) -> tuple[str, str] | None:
    """Return number and folder of the SuperLink on a port, where the system tells (Linux)."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().decode(errors="replace").split("\0")
            if any(part.endswith("flower-superlink") for part in command) and port in command:
                return path.parent.name, str((path.parent / "cwd").readlink())
        except OSError:
            continue
    return None


def _telemetry(environment: Environment) -> Finding:
    on = [name for name in ("FLWR_TELEMETRY_ENABLED", "RAY_USAGE_STATS_ENABLED") if environment.get(name) != "0"]
    if not on:
        return Finding("fine", "no telemetry")
    variables = " ".join(f"{name}=0" for name in on)
    return Finding("mend", f"{' and '.join(n.split('_')[0] for n in on)} report what runs here: export {variables}")


def _threads(environment: Environment, cores: int) -> Finding:
    threads = environment.get("OMP_NUM_THREADS", "")
    if environment.get("OMP_WAIT_POLICY", "passive").lower() == "active":
        return Finding(
            "mend", "OMP_WAIT_POLICY=active: waiting threads spin, and busy cores train several times slower: unset it"
        )
    if threads.isdecimal() and int(threads) > cores:
        return Finding(
            "mend",
            f"OMP_NUM_THREADS={threads} on {cores} cores: threads wait for one another: unset it, or set it to 1",
        )
    return Finding("fine", "a client trains with one thread, and threads that wait are passive")


def _actors(cores: int) -> Finding:
    default = "Flower's simulation gives every client 2 cores unless told otherwise"
    remedy = "flwr run --federation-config 'client-resources-num-cpus=1' (fedsieve run does so itself)"
    if cores < 2:
        return Finding("mend", f"{default}, and here is {cores}: nobody would ever train: {remedy}")
    return Finding("note", f"{default}: {cores // 2} at once on {cores} cores; for {cores}: {remedy}")


def _shared_memory(folder: Path) -> Finding:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free = shutil.disk_usage(folder).free if folder.is_dir() else memory
    if free < SHARE * memory:
        return Finding(
            "note",
            f"{folder} has {free / 1e9:.1f} GB free, Ray would like {SHARE * memory / 1e9:.1f}: its object store goes "
            f"to the disk, which is slow: mount -o remount,size={SHARE:.0%} {folder} (docker: --shm-size)",
        )
    return Finding("fine", f"{folder} has room for Ray's object store")


def _kernels() -> Finding:
    if missing := unavailable_reason():
        return Finding("mend", f"no sparse kernels ({missing}): every training is dense")
    ours, torchs = get_num_threads(), torch.get_num_threads()
    if ours < torchs:
        return Finding(
            "mend",
            f"the sparse kernels use {ours} thread, PyTorch {torchs}: they were compiled without OpenMP, or found "
            "another OpenMP library than PyTorch's: `python -m fedsieve.kernels.build --force` compiles them here",
        )
    return Finding("fine", f"the sparse kernels are there and use as many threads as PyTorch: {ours}")


def _key(environment: Environment) -> Finding:
    if {"FEDSIEVE_KEY", "FEDSIEVE_KEY_FILE"} & environment.keys():
        return Finding("fine", "a key to authenticate messages with")
    return Finding(
        "note",
        "no FEDSIEVE_KEY: a deployment's messages are authenticated with one that server and SuperNodes share: "
        "openssl rand -hex 32 makes it, FEDSIEVE_KEY or FEDSIEVE_KEY_FILE names it",
    )
