"""A Flower app in miniature: what its clients train, and the strategies that average it."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import (
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideFixedClipping,
    FedAdam,
    FedAvg,
    Krum,
    Result,
    Strategy,
)

from tiny import TinyNet

NODES = 4


def moved(name: str, value: np.ndarray, node: int, t: int) -> np.ndarray:
    """What training does: some hundredths more or less in every float, one more in every integer."""
    if value.dtype.kind != "f" or value.ndim == 0:
        return np.asarray(value + 1)
    seed = [node, t, len(name), value.size]
    return value + np.random.default_rng(seed).normal(0, 0.02, value.shape).astype(value.dtype)


def app_of(*mods: Any, change: Callable[..., np.ndarray] = moved) -> ClientApp:
    app = ClientApp(mods=[*mods])

    @app.train()
    def train(message: Message, context: Any) -> Message:
        t, node = int(message.content["config"]["server-round"]), context.node_id
        arrays = {n: Array(change(n, v.numpy(), node, t)) for n, v in message.content["arrays"].items()}
        metrics = MetricRecord({"num-examples": 10 * node, "loss": 0.5, "each": [1.0, 2.0]})
        return Message(RecordDict({"arrays": ArrayRecord(arrays), "metrics": metrics}), reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Any) -> Message:
        size = sum(float(np.abs(v.numpy().astype("float64")).sum()) for v in message.content["arrays"].values())
        return Message(RecordDict({"m": MetricRecord({"num-examples": 1, "size": size})}), reply_to=message)

    return app


def initial() -> ArrayRecord:
    torch.manual_seed(0)
    return ArrayRecord(TinyNet().state_dict())


def started(strategy: Strategy, grid: Any, arrays: ArrayRecord | None = None, rounds: int = 2) -> Result:
    random.seed(0)  # the order of the nodes
    np.random.seed(0)  # the noise of the strategies
    return strategy.start(grid, arrays or initial(), num_rounds=rounds)


def strategies() -> dict[str, Callable[[], Strategy]]:
    every: dict[str, Any] = {"min_train_nodes": NODES, "min_available_nodes": NODES}
    return {
        "fedavg": lambda: FedAvg(**every),
        "fedadam": lambda: FedAdam(**every),
        "krum": lambda: Krum(num_malicious_nodes=1, **every),
        "dp on the server": lambda: DifferentialPrivacyServerSideFixedClipping(FedAvg(**every), 0.1, 1.0, NODES),
        "dp on the clients": lambda: DifferentialPrivacyClientSideFixedClipping(FedAvg(**every), 0.1, 1.0, NODES),
    }
