"""The client's half of the app: the federation as one SuperNode sees it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fedsieve.data import Dataset
from fedsieve.engine import Federation
from fedsieve.engine.engines import Worker
from fedsieve.flower.app.local_data import InputSpec, load_local_data
from fedsieve.flower.app.settings import AppConfig, message_key, read_config
from fedsieve.flower.engine import NodeContext
from fedsieve.types import InputError

_cached: tuple[Any, Worker] | None = None


def worker_for(here: Path, place: NodeContext) -> Worker:
    """Return this process's worker: the last one, unless it is another's; in a simulation it serves all clients."""
    global _cached
    own = [] if place.key else sorted(place.node.items())
    mark = (here, place.key, sorted(place.config.items()), sorted(place.about.items()), own)
    if _cached is None or _cached[0] != mark:
        config = read_config(place.config)
        name = str(place.about.get("run", ""))
        federation = replace(_federation(config, here, place), key=message_key(place.key), name=name)
        _cached = mark, Worker(federation, "cpu", config.kernels)
    return _cached[1]


def _federation(config: AppConfig, here: Path, place: NodeContext) -> Federation:
    path, client = str(place.node.get("data", "")), place.node.get("partition-id")
    if place.key is not None:
        if config.own_data:
            raise InputError("own-data is for SuperNodes: a simulation has no data but the recipe's")
        return config.federation(here)
    if config.own_data != bool(path):
        raise InputError(
            "the run is on the SuperNodes' own data: start this one with --node-config 'data=\"/PATH\" partition-id=N'"
            if config.own_data
            else "this SuperNode has data of its own, which the run is not on: -c 'own-data=true' makes it so"
        )
    if not path:
        return config.federation(here)
    if not isinstance(client, int):
        raise InputError("a SuperNode with data= needs a partition-id= as well, its number among the run's clients")
    return _own(config, here, Path(path).expanduser(), client, InputSpec.of(json.loads(str(place.about["inputs"]))))


def _own(config: AppConfig, here: Path, path: Path, client: int, inputs: InputSpec) -> Federation:
    """Return the run with the examples at ``path``, all of them this client's."""
    run, data = config.run(here), load_local_data(path, inputs)
    nothing, all_ = torch.arange(0), torch.arange(len(data))
    dataset = Dataset(path.name, data, data.subset(nothing), inputs.classes)
    shards = tuple(all_ if i == client else nothing for i in range(run.task.clients))
    return Federation(run, dataset, shards, config.measures, own={client: len(data)})
