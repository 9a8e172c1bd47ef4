"""What a client costs in a Flower simulation, and what FedSieve's messages add: rounds without work, over Ray.

Claim: at MNISTNet's size a round without work of FedSieve's engine takes at most 10 % longer than one of a plain
Flower app, whether that sends the same model or as many bytes; at ResNet-18's up to two fifths longer than one that
sends the same model. A client loads the weights and sends them back; the server averages (FedAvg). "SparseMod": the
plain app with SparseMod and SparseGrid. "Moved": a fixed step is added to every weight, as training would, and has to
be told. "As many bytes": a plain app whose arrays are one of bytes, as many as the messages of the line above have,
and that loads nothing. n: 100 nodes, 10 a round, two actors of one thread; the ways take turns in one simulation, and
a round from which the hypervisor took more than 2 % of a core's time does not count. Processor seconds are those of
the server, Ray and its actors together. Hardware and versions stand in the results, benchmarks/results/flower.json.
The simulation is begun by flwr.simulation's run_simulation: in one process with the measurement, which `flwr run` is
not; messages, actors and polls are the same.

    python benchmarks/flower.py mnist_net      (2 minutes)
    python benchmarks/flower.py resnet18       (4 minutes)
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

os.environ |= {"FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": str(Path(__file__).parent)}

import numpy as np
from flower_clients import NODES, PER_ROUND, client, idle
from flower_table import ROUNDS as RESULTS
from flower_table import WAYS, rounds_table
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

from fedsieve import Federation
from fedsieve.cli.bench.measurement import machine, steal_ticks
from fedsieve.client.training import params_of
from fedsieve.engine import Quorum
from fedsieve.engine.loop import rounds
from fedsieve.flower import SparseGrid
from fedsieve.flower.engine import SimulatedNodes, grid_engine

COUNTS = {"mnist_net": (3, 40), "resnet18": (1, 11)}
"""How many rounds warm up, and how many are measured."""
TICK = os.sysconf("SC_CLK_TCK")
STOLEN = 0.02
"""The share of a round's time that the hypervisor may have taken from one core."""
server = ServerApp()
numbers: dict[str, Any] = {}


def arrays_of(federation: Federation) -> ArrayRecord:
    """Return the fresh model's arrays."""
    return ArrayRecord(dict(params_of(federation.model())))


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
    while children := {p for p, parent in parents.items() if parent in own} - own:
        own |= children
    return sum(times[p] for p in own) / TICK


class Ways:
    """Rounds, one way or another, over one grid."""

    def __init__(self, grid: Grid, model: str):
        federation = idle(model)
        self.grid, self.nodes, self.arrays = grid, sorted(grid.get_node_ids()), arrays_of(federation)
        self.engine = rounds(federation, grid_engine(grid, SimulatedNodes(grid), Quorum()))
        plain = sum(len(array.data) for array in self.arrays.values())
        self.sizes = {"plain": (plain, plain), "plain_moved": (plain, plain)}

    def round(self, way: str, t: int) -> None:
        """Run round t."""
        if way == "engine":
            record = next(self.engine)
            assert not record.refused
            self.sizes[way] = record.bytes_down // PER_ROUND, record.bytes_up // PER_ROUND
            return
        action, content = way, RecordDict({"arrays": self.arrays})
        if way.startswith("bytes_"):
            action, (down, up) = "bytes", self.sizes[way.removeprefix("bytes_")]
            self.sizes[way] = down, up
            payload = np.resize(np.arange(t, t + 65536, dtype=np.uint32).view(np.uint8), down)
            content = RecordDict({"arrays": ArrayRecord({"bytes": Array(payload)}), "m": MetricRecord({"size": up})})
        nodes = [self.nodes[(t * PER_ROUND + i) % NODES] for i in range(PER_ROUND)]
        around = self.grid if action.startswith(("plain", "bytes")) else SparseGrid(self.grid)
        replies = [*around.send_and_receive([Message(content, node, f"train.{action}") for node in nodes])]
        assert not [reply.error.reason for reply in replies if reply.has_error()]
        if isinstance(around, SparseGrid):
            self.sizes[way] = around.bytes_down // PER_ROUND, around.bytes_up // PER_ROUND
        if action != "bytes":
            FedAvg().aggregate_train(t, replies)


@server.main()
def main(grid: Grid, context: Context) -> None:
    model = sys.argv[-1]
    ways, (warm, measured) = Ways(grid, model), COUNTS[model]
    samples: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
    dropped = 0
    for t in range(warm + measured):
        for way in WAYS:
            ticks, before, began = steal_ticks(), cpu_seconds(), time.perf_counter()
            ways.round(way, t)
            seconds, cpu = time.perf_counter() - began, cpu_seconds() - before
            if steal_ticks() - ticks > STOLEN * seconds * TICK:
                dropped += 1
            elif t >= warm:
                samples[way].append((seconds, cpu))
    numbers["parameters"] = sum(int(np.prod(array.shape)) for array in ways.arrays.values())
    numbers["dropped"] = dropped
    numbers["ways"] = {
        way: {
            "seconds": median(seconds for seconds, _ in own),
            "cpu_seconds": median(cpu for _, cpu in own),
            "fastest": min(seconds for seconds, _ in own),
            "slowest": max(seconds for seconds, _ in own),
            "rounds": len(own),
            "bytes_down": ways.sizes[way][0],
            "bytes_up": ways.sizes[way][1],
        }
        for way, own in samples.items()
    }


def measured(model: str) -> None:
    """Measure a model's rounds, and store them."""
    resources = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}, "init_args": {"num_cpus": 2}}
    simulate: Callable[..., None] = run_simulation
    simulate(server, client[model], NODES, backend_config=resources)
    if not numbers:
        sys.exit("the simulation ended without a result: see above")
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"models": {}}
    results["machine"], results["models"][model] = machine(), {**numbers}
    results["models"] = {name: results["models"][name] for name in COUNTS if name in results["models"]}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[-1] not in COUNTS:
        sys.exit(f"usage: python benchmarks/flower.py {'|'.join(COUNTS)}")
    measured(sys.argv[-1])
    print(rounds_table())
