"""What the layers of a training step share while they are lowered."""

from __future__ import annotations

from typing import Any, TypeVar

from fedsieve.kernels.abi import NormBackwardOp, WideOp, address
from fedsieve.kernels.graph import Graph, Value
from fedsieve.kernels.lower.selection import Scratch, Selection
from fedsieve.kernels.lower.weights import Weights
from fedsieve.kernels.program import Arena, Buffer

T = TypeVar("T")


class StepContext:
    """A training step's arena, weights and scratch memory, and the operations that change from step to step."""

    def __init__(self, graph: Graph, weights: Weights, batch: int, packed: bool, low_memory: bool):
        self.graph, self.weights, self.batch, self.low_memory = graph, weights, batch, low_memory
        self.blocks = -(-batch // (32 if packed else 16))
        self.arena, self.scratch = Arena(packed, low_memory), Scratch()
        self.sized: list[Any] = []
        """Operations whose field ``samples`` is the batch's."""
        self.selections: list[Selection] = []
        self.wide: list[WideOp] = []

    def buffer(self, value: Value, halo: int = 0) -> Buffer:
        """Return a new buffer for a value or its gradient."""
        return Buffer(value.channels, self.blocks, value.height, value.width, halo)

    def sized_(self, op: T) -> T:
        """Register an operation that must know how many samples there are, and return it."""
        self.sized.append(op)
        return op

    def begin(self, step: int, samples: int, threads: int) -> None:
        """Set what changes from step to step: the number of samples, and which selections are exact."""
        for op in self.sized:
            (op.of if isinstance(op, NormBackwardOp) else op).samples = samples
        for selection in self.selections:
            selection.begin(step, samples)
        if (self.selections or self.wide) and self.scratch.grow(threads):
            for selection in self.selections:
                selection.op.top_k.work = address(self.scratch.work)
            for wide in self.wide:
                wide.sums = address(self.scratch.sums)

    def multiply_adds(self, samples: int) -> tuple[float, float]:
        """Return the multiply-adds of the step just done, at its densities, and were all dense."""
        needs_grad, layers = self.graph.needs_grad, self.weights.layers
        times = {layer: 2 + needs_grad[layer.inputs[0]] for layer in layers}
        fixed = sum(own.layer.multiply_adds * own.count / own.numel * times[own.layer] for own in self.weights.masked)
        selected = sum(selection.multiply_adds(samples) for selection in self.selections)
        return samples * fixed + selected, samples * sum(layer.multiply_adds * times[layer] for layer in layers)
