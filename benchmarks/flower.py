"""What a client costs in a Flower simulation, and what FedSieve's messages add: rounds without work, over Ray.

Claim: a round without work takes at most 10 % longer with SparseMod and SparseGrid than the plain app's. A client
loads the weights and sends them back; the server averages (FedAvg). "Moved": a fixed step is added to every weight, as
training would, and has to be told. "As many bytes": a plain app whose arrays are one of bytes, as many as FedSieve's
messages have, and that loads nothing. n: 100 nodes, 10 a round, two actors of one thread; the ways take turns in one
simulation, and a round from which the hypervisor took more than 2 % of a core's time does not count.
Processor seconds are those of the server, Ray and its actors together. Hardware and versions stand in the results,
benchmarks/results/flower.json. The simulation is begun by flwr.simulation's run_simulation: in one process with the
measurement, which `flwr run` is not; messages, actors and polls are the same.

    python benchmarks/flower.py mnist_net      (2 minutes)
    python benchmarks/flower.py resnet18       (3 minutes)
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

os.environ |= {"FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS": "0"}

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

from fedsieve.bench.clock import machine, stolen
from fedsieve.flower import SparseGrid, SparseMod
from fedsieve.models import MODELS

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "flower.json"
NODES, PER_ROUND = 100, 10
ROUNDS = {"mnist_net": (3, 40), "resnet18": (1, 6)}
"""How many rounds warm up, and how many are measured."""
WAYS = {
    "plain": "plain app",
    "same": "FedSieve",
    "bytes_same": "plain app, as many bytes",
    "plain_moved": "plain app, moved",
    "moved": "FedSieve, moved",
    "bytes_moved": "plain app, as many bytes",
    "tenth": "FedSieve, moved, a tenth of the update",
}
TICK = os.sysconf("SC_CLK_TCK")
STOLEN = 0.02
"""The share of a round's time that the hypervisor may have taken from one core."""
client, server = ClientApp(), ServerApp()
steps: dict[int, np.ndarray] = {}
found: dict[str, Any] = {}


def arrays_of(model: str) -> ArrayRecord:
    torch.manual_seed(0)
    net = MODELS[model](1 if model == "mnist_net" else 3, 10)
    return ArrayRecord({name: value for name, value in net.state_dict().items() if value.is_floating_point()})


def stepped(value: np.ndarray) -> np.ndarray:
    """Return what a training would: the same step in every round, drawn once a process."""
    if value.size not in steps:
        steps[value.size] = np.random.default_rng(value.size).normal(0, 0.001, value.size).astype(np.float32)
    return value + steps[value.size].reshape(value.shape)


def same(message: Message, context: Context) -> Message:
    return answer(message, lambda value: value)


def moved(message: Message, context: Context) -> Message:
    return answer(message, stepped)


def answer(message: Message, change: Callable[[np.ndarray], np.ndarray]) -> Message:
    torch.set_num_threads(1)
    arrays = ArrayRecord({name: Array(change(v.numpy())) for name, v in message.content["arrays"].items()})
    return Message(RecordDict({"arrays": arrays, "m": MetricRecord({"num-examples": 1})}), reply_to=message)


def echo(message: Message, context: Context) -> Message:
    """Answer as many bytes as were asked for."""
    asked, size = message.content["arrays"]["bytes"].numpy(), int(message.content["m"]["size"])
    data = np.resize(asked, size) + np.uint8(context.node_id % 251)
    arrays = ArrayRecord({"bytes": Array(data)})
    return Message(RecordDict({"arrays": arrays, "m": MetricRecord({"num-examples": 1})}), reply_to=message)


client.train("plain")(same)
client.train("same", mods=[SparseMod()])(same)
client.train("plain_moved")(moved)
client.train("moved", mods=[SparseMod()])(moved)
client.train("tenth", mods=[SparseMod(top=0.1)])(moved)
client.train("bytes")(echo)


def cpu_seconds() -> float:
    """Return the processor seconds of this process and all that it started, Ray's among them."""
    times, parents = dict[int, int](), dict[int, int]()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(") ")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        parents[int(stat.parent.name)] = int(fields[1])
        times[int(stat.parent.name)] = sum(int(field) for field in fields[11:15])
    own = {os.getpid()}
    while grown := {p for p, parent in parents.items() if parent in own} - own:
        own |= grown
    return sum(times[p] for p in own) / TICK


def one(grid: Grid, way: str, arrays: ArrayRecord, t: int, sizes: dict[str, tuple[int, int]]) -> ArrayRecord:
    """Run a round one way, and return its mean."""
    nodes = sorted(grid.get_node_ids())
    chosen = [nodes[(t * PER_ROUND + i) % len(nodes)] for i in range(PER_ROUND)]
    action, content = way, RecordDict({"arrays": arrays})
    if way.startswith("bytes_"):
        action, (down, up) = "bytes", sizes[way.removeprefix("bytes_")]
        sent = np.resize(np.arange(t, t + 65536, dtype=np.uint32).view(np.uint8), down)
        content = RecordDict({"arrays": ArrayRecord({"bytes": Array(sent)}), "m": MetricRecord({"size": up})})
    around = grid if action.startswith(("plain", "bytes")) else SparseGrid(grid)
    replies = [*around.send_and_receive([Message(content, node, f"train.{action}") for node in chosen])]
    assert not [reply.error.reason for reply in replies if reply.has_error()]
    if isinstance(around, SparseGrid):
        sizes[way] = around.bytes_down // PER_ROUND, around.bytes_up // PER_ROUND
    if action == "bytes":
        return arrays
    mean, _ = FedAvg().aggregate_train(t, replies)
    assert mean is not None
    return mean


@server.main()
def main(grid: Grid, context: Context) -> None:
    model = sys.argv[-1]
    arrays, sizes = arrays_of(model), dict[str, tuple[int, int]]()
    samples: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
    dropped = 0
    warm, rounds = ROUNDS[model]
    for t in range(warm + rounds):
        for way in WAYS:
            taken, before, began = stolen(), cpu_seconds(), time.perf_counter()
            one(grid, way, arrays, t, sizes)
            seconds, cpu = time.perf_counter() - began, cpu_seconds() - before
            if stolen() - taken > STOLEN * seconds * TICK:
                dropped += 1
            elif t >= warm:
                samples[way].append((seconds, cpu))
    plain = sum(len(array.data) for array in arrays.values())
    sizes |= {"plain": (plain, plain), "plain_moved": (plain, plain)} | {
        f"bytes_{way}": size for way, size in sizes.items()
    }
    found["parameters"] = sum(int(np.prod(array.shape)) for array in arrays.values())
    found["dropped"] = dropped
    found["ways"] = {
        way: {
            "seconds": median(seconds for seconds, _ in own),
            "cpu_seconds": median(cpu for _, cpu in own),
            "fastest": min(seconds for seconds, _ in own),
            "slowest": max(seconds for seconds, _ in own),
            "rounds": len(own),
            "bytes_down": sizes[way][0],
            "bytes_up": sizes[way][1],
        }
        for way, own in samples.items()
    }


def table() -> str:
    """Return the results as the table that the docs show: a round's seconds, and a client's share."""
    lines = [
        "| model | way | down, up, MB a client | a round, s (fastest to slowest) | CPU-s | a client, s | CPU-s |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, own in told()["models"].items():
        for way, got in own["ways"].items():
            sizes = ", ".join(f"{got[f'bytes_{d}'] / 1e6:.2f}" for d in ("down", "up"))
            spread = f"{got['seconds']:.2f} ({got['fastest']:.2f} to {got['slowest']:.2f})"
            each = f"{got['seconds'] / PER_ROUND:.3f} | {got['cpu_seconds'] / PER_ROUND:.3f}"
            label = f"{name}, {own['parameters'] / 1e6:.2f} M" if way == "plain" else ""
            lines.append(f"| {label} | {WAYS[way]} | {sizes} | {spread} | {got['cpu_seconds']:.2f} | {each} |")
    return "\n".join(lines)


def told() -> dict[str, Any]:
    """Return the committed results."""
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"models": {}}
    return results


def measured(model: str) -> None:
    """Measure a model's rounds, and store them."""
    resources = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}, "init_args": {"num_cpus": 2}}
    simulate: Callable[..., None] = run_simulation
    simulate(server, client, NODES, backend_config=resources)
    if not found:
        sys.exit("the simulation ended without a result: see above")
    results = told()
    results["machine"], results["models"][model] = machine(), {**found}
    results["models"] = {name: results["models"][name] for name in ROUNDS if name in results["models"]}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[-1] not in ROUNDS:
        sys.exit(f"usage: python benchmarks/flower.py {'|'.join(ROUNDS)}")
    measured(sys.argv[-1])
    print(table())
