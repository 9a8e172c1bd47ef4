"""The gradients of a training step's values: who writes one first, who adds to it, and in whose memory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

from fedsieve.kernels.abi import CopyOp
from fedsieve.kernels.graph import ActivationLayer, Graph, NormLayer, ProductLayer, Value
from fedsieve.kernels.products import StepContext
from fedsieve.kernels.program import Buffer, Step
from fedsieve.kernels.weights import Weights


class Gradients(StepContext, ABC):
    """A training step's context, with the gradients of its values."""

    def __init__(self, graph: Graph, weights: Weights, batch: int, packed: bool, low_memory: bool):
        super().__init__(graph, weights, batch, packed, low_memory)
        self.gradients: dict[Value, Buffer] = {}

    @abstractmethod
    def recompute(self, value: Value) -> None:
        """Compute a value again that forward did not keep, before backward reads it."""

    def gradient_halo(self, value: Value) -> int:
        """Return the halo that a gradient's readers need; a buffer may be handed on from value to value."""
        maker = self.graph.maker(value)
        if isinstance(maker, ProductLayer) and self.graph.needs_grad[maker.inputs[0]]:
            return maker.reach
        if isinstance(maker, NormLayer | ActivationLayer):
            return max(self.gradient_halo(v) for v in maker.inputs)
        return 0

    def hand_on(self, value: Value, g: Buffer) -> None:
        """Make ``g``, which nobody else needs, the gradient of a value, or a part of it."""
        if not self.graph.needs_grad[value]:
            return
        if value in self.gradients:
            to = self.gradients[value]
            self.arena.step(lambda: CopyOp(g, to, CopyOp.ADD), g, to)
        else:
            self.gradients[value] = g

    def change(self, value: Value, g: Buffer, make: Callable[[Buffer], Step], *used: Buffer) -> None:
        """Add an operation that makes a value's gradient of ``g``: in place, unless others wrote before."""
        if value in self.gradients:
            self.deliver(value, make, g, *used)
        else:
            self.arena.step(lambda: make(g), *used, g)
            self.gradients[value] = g

    def deliver(self, value: Value, make: Callable[[Buffer], Step], *used: Buffer) -> None:
        """Add an operation that writes a gradient: by way of a buffer of its own, where others wrote before."""
        if not self.graph.needs_grad[value]:
            unused = self.buffer(value)
            self.arena.step(lambda: make(unused), *used, unused)
            return
        into, more = self.gradient(value)
        if not more:
            self.arena.step(lambda: make(into), *used, into)
            return
        between = self.buffer(value)
        self.arena.step(lambda: make(between), *used, between)
        self.arena.step(lambda: CopyOp(between, into, CopyOp.ADD), between, into)

    def gradient(self, value: Value) -> tuple[Buffer, bool]:
        """Return the buffer of a value's gradient, and whether something stands in it already."""
        if value in self.gradients:
            return self.gradients[value], True
        self.gradients[value] = self.buffer(value, self.gradient_halo(value))
        return self.gradients[value], False
