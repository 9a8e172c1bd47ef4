"""The server's half of the app: the ordinary loop, in an ordinary run directory, over Flower's grid."""

from __future__ import annotations

import json
import os
import re
import secrets
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fedsieve.data.storage import read_json, write_json
from fedsieve.engine import Federation
from fedsieve.flower.app.project import AppConfig, message_key, read_config
from fedsieve.flower.engine import SimulatedNodes, SuperNodes, grid_engine, simulation_key
from fedsieve.flower.private import is_simulated
from fedsieve.runs.progress import show_run
from fedsieve.runs.record import MANIFEST
from fedsieve.runs.recorder import inputs_of, record_run, row_of
from fedsieve.types import InputError
from fedsieve.types.errors import of_machine

if TYPE_CHECKING:
    from flwr.app import Context
    from flwr.serverapp import Grid

NAME = "flower.json"
"""Holds the run's random name: messages are bound to it, and SuperNodes keep their clients' memories under it."""
ENDED = "FEDSIEVE_ENDED"
"""Names the file that says how the run ended, for whoever started Flower: its own exit codes do not."""
PENDING = 32
"""Messages under way at once in a simulation, which holds them all in one process's memory."""


def serve(here: Path, grid: Grid, context: Context) -> None:
    """Run to the end, and say how it ended."""
    try:
        _serve(here, grid, context)
    except BaseException as error:
        line = str(error) if isinstance(error, InputError) else of_machine(error)
        _say(line or f"{type(error).__name__}: {error}")
        raise
    _say("")


def _serve(here: Path, grid: Grid, context: Context) -> None:
    config, key = read_config(context.run_config), simulation_key(context.run_id) if is_simulated(grid) else None
    if not config.out:
        raise InputError("""no run directory: name one on the server's machine, -c 'out="/srv/fedsieve/run1"'""")
    out, about = Path(config.out).expanduser(), dict[str, str]()
    federation = replace(server_federation(config, here), key=message_key(key), name=run_name(out))
    config.quorum.check(federation.run)
    if key is None:
        engine = grid_engine(grid, SuperNodes(grid, federation, about), config.quorum, pause=0.5)
    else:
        engine = grid_engine(grid, SimulatedNodes(grid, about), config.quorum, PENDING)
    execution = replace(config, engine="flower", resume=config.resume and (out / MANIFEST).exists())
    rounds = record_run(out, federation, engine, config.recipe, execution)
    write_json(out / NAME, {"run": federation.name})
    about |= {"run": federation.name, "inputs": json.dumps(inputs_of(federation.dataset)), "own": str(config.own_data)}
    show_run(out, federation, map(row_of, rounds), config.last_round(federation.run))


def server_federation(config: AppConfig, here: Path) -> Federation:
    """Return the server's federation: the recipe's, of whose examples clients with their own have none."""
    federation = config.federation(here)
    if not config.own_data:
        return federation
    if "kernels" in config.measures:
        raise InputError("measure=kernels trains on the server, which has no client's data here: leave it out")
    nothing = torch.arange(0)
    return replace(federation, shards=(nothing,) * federation.run.task.clients, own={})


def run_name(out: Path) -> str:
    """Return what nodes know the run of a directory by, drawn where it has none. Raises InputError if it is damaged."""
    path, remedy = out / NAME, "put back what stood there, or choose another out"
    content = read_json(path, remedy)
    if content is None:
        return secrets.token_hex(16)
    name = content.get("run")
    if not isinstance(name, str) or not re.fullmatch(r"[0-9a-f]{32}", name):
        raise InputError(f"{path} is damaged: {remedy}")
    return name


def _say(error: str) -> None:
    if path := os.environ.get(ENDED):
        write_json(Path(path), {"error": error})
