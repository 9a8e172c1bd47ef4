"""A training step by the kernels beside the dense one: what ``--measure kernels`` adds to a finished run.

Each trains a client of the last round for some steps, in a process of its own: its memory is that of nothing else, and
neither the run nor any of its chance is touched.
"""

from __future__ import annotations

import multiprocessing
import statistics
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from typing import Any

import torch

from fedsieve.client.process import peak_memory_mb
from fedsieve.engine.federation import Federation
from fedsieve.engine.loop import Worker, kernels_for, run_client
from fedsieve.engine.messages import Messages
from fedsieve.engine.processes import check_sendable
from fedsieve.engine.round import Checkpoint
from fedsieve.types import InputError

STEPS, WARM = 12, 2
"""Steps at least, of which the first are not counted."""


def measure_kernels(federation: Federation, state: Any, start: Checkpoint) -> dict[str, dict[str, Any]]:
    """Return what a step costs each way on this machine's CPU; or why one of them cannot be, in ``because``."""
    client = federation.run.sample(start.t)[0]
    tree = federation.run.method.broadcast(state, federation.run.context(start.t, federation.run.task.tier(client)))
    small, memory = _small(federation, client), start.memory.get(client, b"")
    message = Messages(small).broadcast(start.t, {client: 0}, {0: tree})[client]
    return {way: _of_one(way, small, start.t, client, message, memory) for way in ("sparse", "dense")}


def _small(federation: Federation, client: int) -> Federation:
    """Return a federation of which one client has a few examples, for at least ``STEPS`` steps, and nobody else any."""
    run, shard = federation.run, federation.shards[client][: STEPS * federation.run.batch]
    if len(shard) % run.batch == 1 < len(shard):  # BatchNorm may need two
        shard = shard[:-1]
    epochs = -(-STEPS * run.batch // len(shard))
    train = federation.dataset.train.subset(shard)
    dataset = replace(federation.dataset, train=train, test=train.subset(torch.arange(0)), group=None)
    shards = tuple(torch.arange(len(shard) if k == client else 0) for k in range(run.task.clients))
    run = replace(run, task=replace(run.task, validation=0.0), epochs=epochs)
    return replace(federation, run=run, dataset=dataset, shards=shards, measure=())


def _of_one(way: str, federation: Federation, t: int, client: int, message: bytes, memory: bytes) -> dict[str, Any]:
    try:
        kernels_for(federation, way)
        check_sendable(federation)
    except InputError as error:
        return {"because": str(error)}
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as executor:
        return executor.submit(_step, way, federation, t, client, message, memory).result()


def _step(way: str, federation: Federation, t: int, client: int, message: bytes, memory: bytes) -> dict[str, Any]:
    torch.set_num_threads(1)
    worker = Worker(federation, "cpu", way)
    run_client(worker, t, client, message, memory)
    cost = worker.cost
    return {
        "ms_per_step": 1000 * statistics.median(cost.times[WARM:]),
        "multiply_adds_per_step": cost.real / cost.steps,
        "peak_memory_mb": peak_memory_mb(),
    }
