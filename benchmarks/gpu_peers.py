"""The same FedAvg rounds as other frameworks simulate them, where they are installed: Flower (over Ray), pfl-research.

In Flower a client trains as in the plain loop of ``gpu_steps``: captured steps, channels_last, bf16, its data on the
device, which two actors share; pfl has steps of its own. Each framework runs in a process of its own.

    python benchmarks/gpu_peers.py flower|pfl WORK       (a work as JSON; prints the seconds of a round)
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import cache, partial
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from gpu_steps import PlainLoop, Work

from fedsieve.types.data import normalize_inputs

ROUNDS = 6
"""The first of which does not count."""
LIMIT = 120
"""Seconds after which a framework has not answered."""
START = 30
"""Seconds below which none is started."""
NEEDS = {"flower": ("flwr", "ray"), "pfl": ("pfl",)}
QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
PRECISION = "bf16"


def measure(peer: str, work: Work, limit: float = LIMIT) -> dict[str, Any]:
    """Return the seconds of a framework's round, or why there are none; it has ``limit`` seconds."""
    if lacking := [name for name in NEEDS[peer] if find_spec(name) is None]:
        return {"skipped": f"{' and '.join(lacking)} not installed"}
    if limit < START:
        return {"skipped": "no time was left"}
    command = [sys.executable, __file__, peer, json.dumps(asdict(work))]
    environment = os.environ | QUIET | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, env=environment)
    except subprocess.TimeoutExpired:
        return {"error": f"no answer within {limit:.0f} s"}
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        return {"error": (done.stderr.strip().splitlines() or ["no output"])[-1][:300]}
    result: dict[str, Any] = json.loads(lines[-1])
    return result


PEERS: dict[str, Callable[..., dict[str, Any]]] = {peer: partial(measure, peer) for peer in NEEDS}


@cache
def loop_of(text: str) -> PlainLoop:
    """Return a process's resident model and data."""
    torch.set_num_threads(1)
    return PlainLoop(Work(**json.loads(text)), PRECISION)


def report(work: Work, seconds: list[float]) -> None:
    """Print the median of the rounds after the first."""
    s_round = median(seconds[1:])
    print(
        json.dumps({"s_round": s_round, "ms_step": 1000 * s_round / work.clients / work.steps, "n": len(seconds) - 1})
    )


def flower(text: str) -> None:
    """Run rounds of Flower's FedAvg in its simulation."""
    from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp
    from flwr.serverapp.strategy import FedAvg
    from flwr.simulation import run_simulation

    work = Work(**json.loads(text))
    server, client = ServerApp(), ClientApp()

    @client.train()
    def train(message: Message, context: Context) -> Message:
        from gpu_peers import loop_of

        loop = loop_of(text)
        loop.stepper.model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        loop.train(int(context.node_config["partition-id"]) % loop.work.clients)
        arrays = ArrayRecord(loop.stepper.model.state_dict())
        metrics = MetricRecord({"num-examples": loop.work.examples})
        return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        arrays, seconds = ArrayRecord(work.network().state_dict()), list[float]()
        while len(nodes := [*grid.get_node_ids()]) < work.clients:
            time.sleep(0.1)
        for t in range(ROUNDS):
            began = time.perf_counter()
            content = RecordDict({"arrays": arrays})
            replies = [*grid.send_and_receive([Message(content, node, "train") for node in nodes])]
            mean, _ = FedAvg().aggregate_train(t + 1, replies)
            assert mean is not None, [reply.error for reply in replies if reply.has_error()][:1]
            arrays = mean
            seconds.append(time.perf_counter() - began)
        report(work, seconds)

    resources = {"num_cpus": 1, "num_gpus": 0.5 if work.is_gpu else 0.0}
    backend: Any = {"client_resources": resources, "init_args": {"num_cpus": 2}}
    run_simulation(server, client, work.clients, backend_config=backend)


def pfl(text: str) -> None:
    """Run rounds of pfl-research's federated averaging: its own eager steps, under bf16 autocast."""
    from pfl.aggregate.simulate import SimulatedBackend
    from pfl.algorithm.base import NNAlgorithmParams
    from pfl.algorithm.federated_averaging import FederatedAveraging
    from pfl.callback.base import TrainingProcessCallback
    from pfl.data.dataset import Dataset
    from pfl.data.federated_dataset import FederatedDataset
    from pfl.data.sampling import get_user_sampler
    from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
    from pfl.internal.ops.pytorch_ops import get_default_device
    from pfl.metrics import Metrics, Weighted
    from pfl.model.pytorch import PyTorchModel

    work, times = Work(**json.loads(text)), [time.perf_counter()]
    torch.set_num_threads(1)
    network: Any = work.network().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    where = get_default_device()
    x, y = (part.to(where) for part in work.data())

    def loss(x: torch.Tensor, y: torch.Tensor, is_eval: bool = False) -> torch.Tensor:
        network.train(not is_eval)
        return F.cross_entropy(network(normalize_inputs(x, (0.5,), (0.5,))), y)

    def metrics(x: torch.Tensor, y: torch.Tensor) -> dict[str, Any]:
        return {"loss": Weighted(float(loss(x, y, is_eval=True)) * len(y), len(y))}

    class Clock(TrainingProcessCallback):
        def after_central_iteration(self, aggregate_metrics: Any, model: Any, *, central_iteration: int) -> Any:
            work.wait()
            times.append(time.perf_counter())
            return False, Metrics()

    network.loss, network.metrics = loss, metrics
    model = PyTorchModel(network, torch.optim.SGD, torch.optim.SGD(network.parameters(), 1.0), amp_dtype=torch.bfloat16)
    users = FederatedDataset(
        lambda user: Dataset((x[user], y[user]), user_id=str(user)), get_user_sampler("random", [*range(work.clients)])
    )
    FederatedAveraging().run(
        algorithm_params=NNAlgorithmParams(ROUNDS, ROUNDS + 1, work.clients, 0),
        backend=SimulatedBackend(users, users),
        model=model,
        model_train_params=NNTrainHyperParams(work.batch, 1, 0.01),
        model_eval_params=NNEvalHyperParams(work.batch),
        callbacks=[Clock()],
    )
    report(work, [after - before for before, after in pairwise(times)])


if __name__ == "__main__":
    {"flower": flower, "pfl": pfl}[sys.argv[1]](sys.argv[2])
