"""The clients of benchmarks/flower.py, in a module of its own: Ray's actors import it, and keep what it keeps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from round import Idle, noise

from fedsieve import Data, Dataset, Federation, Run, Task, open_run
from fedsieve.engine.worker import Worker
from fedsieve.flower import SparseMod
from fedsieve.flower.engine import NodeContext, make_client_app

NODES, PER_ROUND = 100, 10


def coloured() -> Dataset:
    """Return a thousand coloured images of noise."""
    x, y = torch.randint(256, (1000, 3, 32, 32), dtype=torch.uint8), torch.arange(1000) % 10
    return Dataset("noise", Data(x, y), Data(x[:1], y[:1]), tuple("0123456789"))


DATA = {"mnist_net": noise, "resnet18": coloured}


def idle(model: str) -> Federation:
    """Return the federation whose clients do nothing, as every process opens it."""
    run = Run(Idle(), Task(model, DATA[model], NODES), 10**6, PER_ROUND, evaluate_every=10**6)
    return replace(open_run(run), key=bytes(32))


@cache
def worker(model: str) -> Worker:
    """Return this process's worker."""
    return Worker(idle(model), kernels="dense")


@cache
def step(size: int) -> np.ndarray:
    """Return what a training would change: the same in every round."""
    return np.random.default_rng(size).normal(0, 0.001, size).astype(np.float32)


def same(message: Message, context: Context) -> Message:
    """Answer with the arrays as they came."""
    return answer(message, lambda value: value)


def moved(message: Message, context: Context) -> Message:
    """Answer with every number a step on."""
    return answer(message, lambda value: value + step(value.size).reshape(value.shape))


def answer(message: Message, change: Callable[[np.ndarray], np.ndarray]) -> Message:
    """Answer with changed arrays."""
    torch.set_num_threads(1)
    arrays = ArrayRecord({name: Array(change(v.numpy())) for name, v in message.content["arrays"].items()})
    return Message(RecordDict({"arrays": arrays, "m": MetricRecord({"num-examples": 1})}), reply_to=message)


def echo(message: Message, context: Context) -> Message:
    """Answer with as many bytes as were asked for, other ones for every client: Flower sends the same ones once."""
    content, size = message.content["arrays"]["bytes"].numpy(), int(message.content["m"]["size"])
    arrays = ArrayRecord({"bytes": Array(np.resize(content, size) + np.uint8(context.node_id % 251))})
    return Message(RecordDict({"arrays": arrays, "m": MetricRecord({"num-examples": 1})}), reply_to=message)


def opened_mnist_net(place: NodeContext) -> Worker:
    """Return this process's worker."""
    return worker("mnist_net")


def opened_resnet18(place: NodeContext) -> Worker:
    """Return this process's worker."""
    return worker("resnet18")


client = {"mnist_net": make_client_app(opened_mnist_net), "resnet18": make_client_app(opened_resnet18)}
for app in client.values():
    app.train("plain")(same)
    app.train("same", mods=[SparseMod()])(same)
    app.train("plain_moved")(moved)
    app.train("moved", mods=[SparseMod()])(moved)
    app.train("tenth", mods=[SparseMod(top=0.1)])(moved)
    app.train("bytes")(echo)
