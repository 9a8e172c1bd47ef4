"""What this machine can do at most, measured in seconds, and what a training step would take at that.

The roof of a product is the slowest of three: its multiply-adds at the rate of registers; what they read; and its maps,
each passed over once. A weight on an unstructured mask reads one vector of samples for each multiply-add of a vector;
one that ``unit`` output channels share reads it once for all of them. They are read from the smallest cache that holds
what a tile of 16 positions looks at. What is not a product passes over its maps once: a BatchNorm reads one and writes
one, and backward reads two and writes one (its sums could be made where the maps are written); a sum, a ReLU, a pool
likewise; attention also multiplies, seven products of tokens with tokens in all; an optimizer reads and writes its
numbers. These are read and written from the cache that holds all maps of a step, or else from memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from fedsieve.client.process import num_threads
from fedsieve.kernels import Trainer
from fedsieve.kernels.abi import WORDS, RoofOp, address
from fedsieve.kernels.graph import ActivationLayer, Graph, Layer, NormLayer, PoolLayer, ProductLayer, Value
from fedsieve.kernels.program import Program, huge_pages
from fedsieve.kernels.tokens import AttentionLayer, LayerNormLayer
from fedsieve.kernels.weights import MaskedWeights
from fedsieve.runs.provenance import cpu_model

TYPICAL = {1: 32 << 10, 2: 512 << 10, 3: 8 << 20}
"""Bytes of the caches, by level, where the system does not say it."""
SAMPLE, SAMPLES = 0.004, 25
"""Seconds that a sample takes at least, and how many there are: the fastest is the roof."""
TILE = 16
"""Positions whose sums stay in registers."""
ROUND = 2 * 192
"""Floating-point operations of a round of multiply-adds in registers: of 12 vectors of the widest kind, or more."""
BYTES = 4 * WORDS
"""Bytes of a vector of samples."""
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


@dataclass(frozen=True)
class Roof:
    """What so many threads do at most: 10^9 floating-point operations, and bytes read, a second."""

    threads: int
    gflops: float
    """Fused multiply-adds in registers, two operations each."""
    l1_gb_s: float
    l2_gb_s: float
    l3_gb_s: float
    memory_gb_s: float
    cpu: str = field(default_factory=cpu_model)

    def bandwidth(self, size: float) -> float:
        """Return the bytes a second that are read, by all threads, of what takes ``size`` bytes a thread."""
        caches, rates = cache_sizes(), (self.l1_gb_s, self.l2_gb_s, self.l3_gb_s)
        share = {1: 1, 2: 1, 3: self.threads}  # the third is everybody's
        fit = [
            rate for (level, bytes_), rate in zip(caches.items(), rates, strict=True) if size * share[level] <= bytes_
        ]
        return 1e9 * (fit[0] if fit else self.memory_gb_s)


def cache_sizes() -> dict[int, int]:
    """Return the bytes of the data caches by level, 1 to 3."""
    sizes = dict(TYPICAL)
    for cache in CACHES.glob("index*"):
        level, kind, size = ((cache / name).read_text().strip() for name in ("level", "type", "size"))
        if kind != "Instruction" and size.endswith("K"):
            sizes[int(level)] = int(size[:-1]) << 10
    return {level: sizes[level] for level in TYPICAL}


def measure_roof(threads: int, clock: Callable[[], float] = time.perf_counter) -> Roof:
    """Measure the roofs of so many threads at once, in about two seconds; by processor time only of one."""
    first, second, third = cache_sizes().values()
    sizes = first // 2, second // 2, max(2 * second, third // 2 // threads), 4 * third // threads
    with num_threads(threads):
        flops = threads * ROUND / _seconds_each(threads, 2 * WORDS, False, clock)
        l1, l2, l3, memory = [threads * size / _seconds_each(threads, size // 4, True, clock) for size in sizes]
    return Roof(threads, flops / 1e9, l1 / 1e9, l2 / 1e9, l3 / 1e9, memory / 1e9)


def _seconds_each(threads: int, count: int, reads: bool, clock: Callable[[], float]) -> float:
    """Return the least seconds of a round: multiply-adds in registers, or on ``count`` numbers that a thread reads."""
    memory = huge_pages(threads * count + WORDS).view(torch.float32).zero_()
    op = RoofOp(address(memory, -memory.data_ptr() % (4 * WORDS) // 4), count, 1, int(reads))
    program = Program([op], [memory])

    def sample() -> float:
        began = clock()
        program.run()
        return clock() - began

    while sample() < SAMPLE:
        op.times *= 2
    return min(sample() for _ in range(SAMPLES)) / int(op.times)


def roof_seconds(trainer: Trainer, roof: Roof) -> float:
    """Return the seconds that a training step on a full batch would take at the roof."""
    graph, weights = trainer.lowered.graph, trainer.weights
    lanes = 32 if trainer.packed else 16
    blocks = trainer.batch / lanes if graph.token_output is not None else float(-(-trainer.batch // lanes))
    passes = roof.bandwidth(4 * trainer.lowered.arena.memory.numel() / roof.threads)
    seconds = 0.0
    for layer in graph.layers:
        own = weights.layers.get(layer) if isinstance(layer, ProductLayer) else None
        if isinstance(own, MaskedWeights):
            work = own.layer, own.count / own.numel, own.index.unit, blocks, trainer.packed
            seconds += _product(graph, *work, roof, passes)
            seconds += 4 * 5 * own.count / passes  # w, its velocity and its gradient: three are read, two written
        elif own is not None:
            seconds += _product(graph, own.layer, own.density, 1, blocks, trainer.packed, roof, passes)
            seconds += 4 * 5 * own.dense.numel() / passes  # and what is selected is read once
        else:
            seconds += BYTES * blocks * _passes(layer) / passes
        if isinstance(layer, AttentionLayer):
            seconds += trainer.batch * _attention(layer) / (1e9 * roof.gflops)
    return seconds


def _product(
    graph: Graph, layer: ProductLayer, density: float, unit: int, blocks: float, packed: bool, roof: Roof, passes: float
) -> float:
    """Return the seconds of a product and its gradients at the roof."""
    x, out = layer.inputs[0], layer.output
    vectors = blocks * layer.multiply_adds * density
    maps = BYTES * blocks * (_positions(x) + _positions(out)) / passes
    computing = 2 * WORDS * (1 + packed) * vectors / (1e9 * roof.gflops)

    def one(value: Value, other: Value, stride: int) -> float:
        """Sums for a tile of ``value``, of numbers of ``other``."""
        columns = min(TILE, value.width)
        rows = min(TILE // columns, value.height)
        height, width = ((n - 1) * stride + layer.kernel for n in (rows, columns))
        size = other.channels * BYTES * height * width
        return max(computing, BYTES * vectors / unit / roof.bandwidth(size), maps)

    forward = weight = one(out, x, layer.stride)
    return forward + weight + (one(x, out, 1) if graph.needs_grad[x] else 0)


def _attention(layer: AttentionLayer) -> float:
    """Return the operations of a sample's attention: two products forward; backward, those of scores and gradients."""
    return 2 * (2 + 5) * layer.output.channels * layer.pairs


def _passes(layer: Layer) -> float:
    """Return how many vectors a layer that is no product reads and writes, forward and backward, of a block."""
    ins, out = sum(map(_positions, dict.fromkeys(layer.inputs))), _positions(layer.output)
    if isinstance(layer, LayerNormLayer | ActivationLayer | AttentionLayer):
        return ins + out + 2 * ins + out
    if isinstance(layer, NormLayer):
        return ins + out + 3 * out
    return 2 * (ins + out) if isinstance(layer, PoolLayer) else 0


def _positions(value: Value) -> int:
    return value.channels * value.height * value.width
