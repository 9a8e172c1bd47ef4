"""How well ``--kernels auto`` chooses: steps of many models, masks and batches, by the kernels and by PyTorch.

    python benchmarks/choice.py                 # measure all cases that are not there yet, and print the table
    python benchmarks/choice.py --fit           # print the seconds a unit of kernels/estimate.py that fit them best
    python benchmarks/choice.py --layers        # measure what it is worth that depthwise convolutions, ... are native

A step is one client's in a round: SGD with momentum, on a frozen random mask below density 1. Both ways run in turns in
one process, on one thread; the least processor time of the steps counts, as other processes may be at work.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from choice_networks import NETWORKS
from scipy.optimize import nnls
from torch import nn

from fedsieve import Data
from fedsieve.client.process import num_threads
from fedsieve.client.training import DenseSteps, train_
from fedsieve.kernels.calls import is_norm, is_product, relu_of
from fedsieve.kernels.dispatch import Kernels
from fedsieve.kernels.estimate import KERNELS, PYTORCH, count_work, kernel_seconds, pytorch_seconds, shared
from fedsieve.kernels.graph import Graph
from fedsieve.runs.provenance import cpu
from fedsieve.sparse.masks import layer_counts, random_masks
from fedsieve.sparse.policy import select_weights, uniform_densities
from fedsieve.types import Device, Mask, rng

RESULTS = Path(__file__).parent / "results" / "choice.json"
LAYERS = RESULTS.with_name("layers.json")
DENSITIES = (0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 1.0)
LEAST, LONGEST = 5, 1.0
"""Steps each way that are timed at least; seconds after which no more are."""
LARGE = ("resnet18", "resnet18_groupnorm", "mobilenet_v2")
BATCHES = (16, 32)
ODD = [("mnist_net", 0.05, 8), ("mnist_net", 0.2, 8), ("mlp", 0.1, 8), ("vgg", 0.1, 10), ("lenet5", 0.1, 64)]
"""Further cases, whose last block of sixteen samples is not full, or that have more."""


def cases() -> Iterator[tuple[str, float, int]]:
    """Yield model, density and batch."""
    for name, density, batch in product(NETWORKS, DENSITIES, BATCHES):
        if name not in LARGE or (batch == 16 and density < 1):
            yield name, density, batch
    yield from ODD


@cache
def network(name: str) -> tuple[Kernels, Graph]:
    """Return a model, always with the same weights, that the kernels have read."""
    make, channels, side, classes, _ = NETWORKS[name]
    torch.manual_seed(0)
    kernels = Kernels(train_(make(channels, classes)), "auto")
    graph = kernels.graph((channels, side, side))
    assert isinstance(graph, Graph), graph
    return kernels, graph


def densities(name: str, density: float) -> dict[str, float]:
    """Return those of the weights that are sparse."""
    model = network(name)[0].model
    names = [n for n in select_weights(NETWORKS[name][-1], model) if model.get_parameter(n).dim() > 1]
    return uniform_densities(names, density) if density < 1 else {}


def case(name: str, density: float, batch: int) -> tuple[Kernels, Graph, Device, Mask]:
    """Return a model of its own, a client's training on it, and a mask."""
    network.cache_clear()
    (kernels, graph), (_, channels, side, classes, _) = network(name), NETWORKS[name]
    model, of = kernels.model, densities(name, density)
    like = {n: model.get_parameter(n) for n in of}
    mask = random_masks(0, layer_counts(of, like), like)
    data = Data(torch.randn(batch, channels, side, side), torch.randint(classes, (batch,)))
    with torch.no_grad():
        for n, own in mask.items():
            model.get_parameter(n).mul_(own)
    device = Device(model, data, data, rng=rng(0, "x"), lr=1e-3, epochs=1, batch=batch, momentum=0.9, weight_decay=0.0)
    return kernels, graph, device, mask


def seconds(name: str, density: float, batch: int, fewer: bool = False) -> dict[str, float]:
    """Return the least processor time of a step by the kernels, by PyTorch, and by the kernels of ``fewer`` layers."""
    kernels, graph, device, mask = case(name, density, batch)
    trainer, _ = kernels.trainer(graph, device, mask)
    dense = DenseSteps(device, mask)
    x, y = device.data.batch(torch.arange(batch))
    ways: dict[str, Callable[[], Any]] = {"kernels": lambda: trainer.step(x, y), "dense": lambda: dense.step(x, y)}
    if fewer:
        with as_before():
            own, graph, other, mask = case(name, density, batch)
        less, _ = own.trainer(graph, other, mask)
        ways["fewer layers"] = lambda: less.step(x, y)
    best, began, steps = dict.fromkeys(ways, float("inf")), time.perf_counter(), 0
    while steps < LEAST or time.perf_counter() - began < LONGEST:
        for way, step in ways.items():
            before = time.thread_time()
            step()
            best[way] = min(best[way], time.thread_time() - before)
        steps += 1
    return best


def as_before() -> Any:
    """Let the kernels know no groups, GroupNorm, activations but ReLU, and concatenation: PyTorch has these."""
    return patch.multiple(
        "fedsieve.kernels.trace",
        is_product=lambda kind: getattr(kind, "groups", 1) == 1 and is_product(kind),
        is_norm=lambda kind: not isinstance(kind, nn.GroupNorm) and is_norm(kind),
        relu_of=lambda kind, node: relu_of(kind, node) % 2,
        activation_of=lambda kind, node: "",
        concatenated=lambda kind, node: [],
    )


def layers_table() -> str:
    """Return what a step takes, by PyTorch, and by the kernels with the layers of ``as_before`` and with all."""
    lines = [
        "| step, batch 16 | density | PyTorch | kernels, these layers by PyTorch | kernels | faster than PyTorch |",
        "|---" * 6 + "|",
    ]
    for row in json.loads(LAYERS.read_text())["rows"]:
        dense, before, now = (row[way] for way in ("dense", "fewer layers", "kernels"))
        times = " | ".join(f"{1e3 * t:,.{int(t < 0.1)}f} ms" for t in (dense, before, now))
        lines.append(f"| {row['model']} | {row['density']:g} | {times} | {dense / before:.1f}x → {dense / now:.1f}x |")
    return "\n".join(lines)


def measure_layers() -> None:
    """Measure the steps of ``layers_table``."""
    names = ("mobilenet", "mobilenet_v2", "densenet", "resnet18_groupnorm", "convnext")
    with num_threads(1):
        rows = [{"model": n, "density": d, **seconds(n, d, 16, fewer=True)} for n in names for d in (0.05, 0.2)]
    LAYERS.write_text(json.dumps({"cpu": cpu(), "rows": rows}, indent=1) + "\n")
    print(layers_table())


def steps() -> list[Row]:
    """Return what was measured, beside what is counted."""
    return [Row(**row, counts=counted(row["model"], row["density"])) for row in json.loads(RESULTS.read_text())["rows"]]


@cache
def counted(name: str, density: float) -> dict[str, float]:
    """Return what ``auto`` counts of a step."""
    of = densities(name, density)
    graph = network(name)[1]
    return count_work(
        graph,
        lambda layer: of.get(layer.weight_name, 1.0),
        lambda layer: layer.weight_name not in of and shared({}, layer),  # random masks are not
    )


@dataclass(frozen=True)
class Row:
    """A step that was measured: processor seconds either way, and what ``auto`` counts of it."""

    model: str
    density: float
    batch: int
    kernels: float
    dense: float
    counts: dict[str, float]

    @property
    def loss(self) -> float:
        """How many times as long as the faster way the one takes that ``auto`` chooses."""
        ours, theirs = kernel_seconds(self.counts, self.batch), pytorch_seconds(self.counts, self.batch)
        return (self.kernels if ours < theirs else self.dense) / min(self.kernels, self.dense)


def table() -> str:
    """Return, of each model, how many times as fast the kernels are, and what ``auto`` loses; and of all."""
    rows = steps()
    lines = [
        f"| step, batch 16, density | {' | '.join(f'{d:g}' for d in DENSITIES)} | chosen rightly | slower at most |",
        "|---" * (len(DENSITIES) + 3) + "|",
    ]
    for name in [*dict.fromkeys(row.model for row in rows), ""]:
        own = [row for row in rows if name in ("", row.model)]
        ratios = {row.density: f"{row.dense / row.kernels:.1f}x" for row in own if name and row.batch == 16}
        right = sum(row.loss == 1 for row in own)
        cells = " | ".join(ratios.get(d, "") for d in DENSITIES)
        worst = max(row.loss for row in own) - 1
        lines.append(f"| {name or 'all'} | {cells} | {right} of {len(own)} | {worst:.0%} |")
    return "\n".join(lines)


def fitted(rows: list[Row]) -> dict[str, dict[str, float]]:
    """Return the seconds a unit that fit best, none below 0: the squares of relative errors are least."""
    best = {}
    for name, units, way in (("KERNELS", KERNELS, kernel_seconds), ("PYTORCH", PYTORCH, pytorch_seconds)):
        times = np.array([row.kernels if name == "KERNELS" else row.dense for row in rows])
        parts = [[way({**dict.fromkeys(units, 0.0), u: row.counts[u]}, row.batch) for u in units] for row in rows]
        shares, _ = nnls(np.array(parts) / times[:, None], np.ones(len(rows)))
        best[name] = {u: float(f"{share * each:.3g}") for share, (u, each) in zip(shares, units.items(), strict=True)}
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fit", action="store_true")
    parser.add_argument("--layers", action="store_true")
    arguments = parser.parse_args()
    if arguments.layers:
        measure_layers()
        return
    if arguments.fit:
        print(json.dumps(fitted(steps()), indent=4))
        return
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"cpu": cpu(), "rows": []}
    there = {(row["model"], row["density"], row["batch"]) for row in results["rows"]}
    with num_threads(1):
        for name, density, batch in cases():
            if (name, density, batch) in there:
                continue
            row = {"model": name, "density": density, "batch": batch, **seconds(name, density, batch)}
            results["rows"].append(row)
            results["rows"].sort(key=lambda row: [*NETWORKS].index(row["model"]))
            rows = ",\n".join(map(json.dumps, results["rows"]))
            RESULTS.write_text(f'{{"cpu": {json.dumps(results["cpu"])}, "rows": [\n{rows}\n]}}\n')
            print(f"{name} {density} {batch}: {row['dense'] / row['kernels']:.2f}x", flush=True)
    print(table())


if __name__ == "__main__":
    main()
