"""A convolution or a linear layer in a training step, on a mask that stays as it is."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from fedsieve.kernels.abi import DotOp, FeatureMap, GatherOp, PruneOp, address
from fedsieve.kernels.graph import ProductLayer
from fedsieve.kernels.lower.context import StepContext
from fedsieve.kernels.lower.index import SparseIndex
from fedsieve.kernels.lower.selection import Selection
from fedsieve.kernels.lower.weights import MaskedWeights
from fedsieve.kernels.program import Buffer, trim_memory
from fedsieve.sparse.masks import topk_count


class Product(ABC):
    """A sparse product, by an index that ``forward`` and ``fill_back`` must fill."""

    def __init__(self, step: StepContext, layer: ProductLayer, index: SparseIndex):
        self.step, self.layer, self.index = step, layer, index

    def gather(self, x: FeatureMap, out: FeatureMap) -> GatherOp:
        """Return the forward product, with the layer's bias and ReLU."""
        op = self.index.gather(x, out)
        op.bias, op.relu = self.step.weights.address(self.layer.module.bias), int(self.layer.relu)
        return op

    def input_gradient(self, g: Buffer, into: Buffer, more: bool) -> None:
        """Add the gradient of the input, for each parity of the stride; ``more``: to what stands there."""
        self.fill_back(g)
        for parity in self.index.parities(into):
            self.step.arena.step(lambda p=parity: self.index.gather_back(g, into, p, more), g, into)  # type: ignore[misc]

    @abstractmethod
    def forward(self, x: Buffer, out: Buffer) -> None:
        """Add the forward product."""

    @abstractmethod
    def backward(self, x: Buffer, g: Buffer) -> None:
        """Add the weights' gradient."""

    @abstractmethod
    def fill_back(self, g: Buffer) -> None:
        """Index the entries for the input's gradient."""


class MaskedProduct(Product):
    """A product with a layer's weights on its mask."""

    def __init__(self, step: StepContext, layer: ProductLayer, own: MaskedWeights):
        super().__init__(step, layer, own.index)
        self.own = own

    def forward(self, x: Buffer, out: Buffer) -> None:
        """Add the forward product."""
        own, weights = self.own, self.step.weights
        self.index.fill(own.mask, x)
        own.mask = torch.empty(0, dtype=torch.bool)
        if self.step.low_memory:
            own.read(weights)
            own.release()
            trim_memory()
        self.index.value = address(weights.effective, own.start)
        self.step.arena.step(lambda: self.gather(x, out), x, out)

    def backward(self, x: Buffer, g: Buffer) -> None:
        """Add the weights' gradient, from the largest inputs alone where the layer prunes them."""
        own, step, kept = self.own, self.step, x
        if own.prune and own.count < own.numel:
            kept = step.buffer(self.layer.inputs[0], x.halo)
            step.arena.step(lambda: self._prune(x, kept), x, kept)
        grad, halves = address(step.weights.grad, own.start), 3 * own.count < x.words
        if halves:
            step.scratch.need(second=own.count)
        step.arena.step(
            lambda: DotOp(self.gather(kept, g), grad, address(step.scratch.second) if halves else None), kept, g
        )

    def _prune(self, x: Buffer, kept: Buffer) -> PruneOp:
        op = PruneOp(in_=x, out=kept)
        share, each = self.own.count / self.own.numel, x.channels * x.height * x.width
        select = Selection(op, 1, lambda n: topk_count(max(share, 1 / (n * each)), n * each), lambda _: 0)
        self.step.selections.append(select)
        return op

    def fill_back(self, g: Buffer) -> None:
        """Index the entries for the input's gradient."""
        own, weights = self.own, self.step.weights
        order = weights.order[own.start : own.start + own.count]
        self.index.fill_back(g, order)
        order += own.start
        self.index.back_value = address(weights.back_value, own.start)
