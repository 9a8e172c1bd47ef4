"""The sparse products of a training step, with weights on a mask or SWAT's, and what the layers of a step share."""

from __future__ import annotations

from collections.abc import Callable
from ctypes import pointer
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from fedsieve.kernels.abi import (
    WORDS,
    Candidates,
    DotOp,
    FeatureMap,
    GatherOp,
    KeepOp,
    NormBackwardOp,
    PruneOp,
    TakeOp,
    TopOp,
    WideOp,
    address,
)
from fedsieve.kernels.graph import Graph, ProductLayer, Value
from fedsieve.kernels.index import SparseIndex
from fedsieve.kernels.program import Arena, Buffer, Program, huge_pages, trim_memory
from fedsieve.kernels.token_ops import AttentionBackwardOp
from fedsieve.kernels.token_widths import TokenWidths
from fedsieve.kernels.weights import MaskedWeights, SwatWeights, Weights
from fedsieve.sparse.masks import topk_count

CACHE = 400_000
"""Bytes of a transposed gradient that stay in the second cache while a group of samples is multiplied."""
WHOLE = 2**62
"""The period of what is selected exactly in the first step of a training alone."""

T = TypeVar("T")


@dataclass
class Selection:
    """An operation that selects the largest: exactly every ``period`` steps, ``count(n)`` numbers of n samples."""

    op: TopOp | KeepOp | PruneOp
    period: int
    count: Callable[[int], int]
    each: Callable[[int], float]
    """What a selected number multiplies, in a step of n samples."""
    lanes: int = 0
    """The samples as the operation sees them, where they are not the batch's: all lanes, of tokens."""
    threshold: Tensor = field(default_factory=lambda: torch.zeros(1))
    selected: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.int64))

    def __post_init__(self) -> None:
        self.op.top_k.threshold, self.op.top_k.selected = address(self.threshold), address(self.selected)

    def begin(self, step: int, samples: int) -> None:
        """Set how many numbers are selected in a step, and whether exactly."""
        self.op.top_k.count, self.op.top_k.exact = self.count(samples), int(step % self.period == 0)
        if not isinstance(self.op, TopOp):
            self.op.samples = self.lanes or samples


class Scratch:
    """Memory that layers use one after another."""

    def __init__(self) -> None:
        self.sizes = dict.fromkeys(("lists", "starts", "blocks", "sums", "second"), 0)
        self.threads = 0

    def need(self, **sizes: int) -> None:
        """Grow to the largest of all layers."""
        self.sizes = {name: max(size, sizes.get(name, 0)) for name, size in self.sizes.items()}

    def allocate(self) -> None:
        """Allocate what does not depend on the number of threads."""
        lists, blocks = self.sizes["lists"], self.sizes["blocks"]
        self.position, self.value = huge_pages(lists), huge_pages(lists).view(torch.float32)
        self.start = torch.empty(self.sizes["starts"], dtype=torch.int32)
        self.block = huge_pages(blocks).view(torch.float32)
        self.second = torch.empty(self.sizes["second"])

    def grow(self, threads: int) -> bool:
        """Allocate for at least this many threads; tell whether anything moved."""
        if threads <= self.threads:
            return False
        self.threads = threads
        self.sums = torch.empty(threads * self.sizes["sums"])
        self.work = torch.empty(threads * 4 * 2048, dtype=torch.int32)
        return True


class StepContext:
    """A training step's arena, weights and scratch memory, and the operations that change from step to step."""

    def __init__(self, graph: Graph, weights: Weights, batch: int, packed: bool, low_memory: bool):
        self.graph, self.weights, self.batch, self.low_memory = graph, weights, batch, low_memory
        self.blocks = -(-batch // (32 if packed else 16))
        self.arena, self.scratch = Arena(packed, low_memory), Scratch()
        self.activations: dict[Value, Buffer] = {}
        self.widths: TokenWidths | None = None
        self.sized: list[Any] = []
        """Operations whose field ``samples`` is the batch's."""
        self.token_counts: list[tuple[Any, str, int]] = []
        """Operations with a field that has the number of the batch's tokens, and those of a sample."""
        self.selections: list[Selection] = []
        self.wide: list[WideOp] = []

    def buffer(self, value: Value, halo: int = 0) -> Buffer:
        """Return a new buffer for a value or its gradient."""
        if value.tokens:
            width = -(-self.batch * value.width // (32 if self.arena.packed else WORDS))
            return Buffer(value.channels, 1, 1, width, 0, WORDS * (1 - width % 2))  # an odd number of cache lines apart
        return Buffer(value.channels, self.blocks, value.height, value.width, halo)

    def sized_(self, op: T, value: Value | None = None) -> T:
        """Register an operation that must know how many samples there are, and return it; all lanes, of tokens."""
        if value is not None and value.tokens:
            _sized(op).samples = self.lanes(value)
        else:
            self.sized.append(op)
        return op

    def fit_widths(self, program: Program) -> None:
        """Let smaller batches of tokens compute less."""
        values = [value for value in self.activations if value.tokens]
        if values:
            lengths: dict[int, int] = {}
            for value in values:  # of two lengths that fill as many vectors, the larger
                width = int(self.activations[value].width)
                lengths[width] = max(value.width, lengths.get(width, 0))
            self.widths = TokenWidths(program.steps, lengths, self.lanes(values[0]))

    def lanes(self, value: Value) -> int:
        """Return how many samples the maps of tokens have for operations on samples; 0 of other maps."""
        return (32 if self.arena.packed else WORDS) if value.tokens else 0

    def clear_tail(self, value: Value, x: Buffer) -> None:
        """Set the lanes that are no tokens to zero, before something is selected from all."""
        if not value.tokens:
            return

        def clear() -> None:
            lanes = self.lanes(value)
            groups, rest = divmod(self.samples * value.width, lanes)
            place = (int(x.data) - self.arena.memory.data_ptr()) // 4 + groups * WORDS
            left = self.arena.memory.as_strided((x.channels, (x.width - groups) * WORDS), (x.channel, 1), place)
            words = torch.zeros(left.shape[1], dtype=torch.int32)
            for lane in range(rest):
                words[lane % WORDS] |= -1 if lanes == WORDS else (0xFFFF if lane >= WORDS else -0x10000)
            left.bitwise_and_(words)

        self.arena.step(lambda: clear, x)

    def counted(self, op: T, each: int) -> T:
        """Register an operation that must know how many tokens there are, so many a sample, and return it."""
        self.token_counts.append((op, "count" if hasattr(op, "count") else "tokens", each))
        return op

    def begin(self, step: int, samples: int, threads: int) -> None:
        """Set what changes from step to step: the number of samples, and which selections are exact."""
        self.samples = samples
        if self.widths:
            self.widths.set(samples)
        for op in self.sized:
            _sized(op).samples = samples
        for op, name, each in self.token_counts:
            setattr(op, name, samples * each)
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
        times = {layer: 1 + layer.trained + needs_grad[layer.inputs[0]] for layer in layers}
        fixed = sum(own.layer.multiply_adds * own.count / own.numel * times[own.layer] for own in self.weights.masked)
        selected = sum(int(selection.selected) * selection.each(samples) for selection in self.selections)
        return samples * fixed + selected, samples * sum(layer.multiply_adds * times[layer] for layer in layers)


def _sized(op: Any) -> Any:
    """Return the operation whose samples are counted."""
    return op.of if isinstance(op, NormBackwardOp | AttentionBackwardOp) else op


class Product:
    """A convolution or a linear layer in a training step, by an index of its entries."""

    def __init__(self, step: StepContext, layer: ProductLayer, index: SparseIndex):
        self.step, self.layer, self.index = step, layer, index

    def gather(self, x: FeatureMap, out: FeatureMap) -> GatherOp:
        """Return the forward product, with the layer's bias and ReLU."""
        op = self.index.gather(x, out)
        op.bias, op.relu = self.step.weights.bias_address(self.layer), int(self.layer.relu)
        return op

    def gather_back(self, g: Buffer, into: Buffer, more: bool) -> None:
        """Add the gradient of the input, for each parity of the stride; ``more``: to what stands there."""
        for parity in self.index.parities(into):
            self.step.arena.step(lambda p=parity: self.index.gather_back(g, into, p, more), g, into)  # type: ignore[misc]


class MaskedProduct(Product):
    """A product with a layer's weights on a mask that stays as it is."""

    def __init__(self, step: StepContext, layer: ProductLayer, own: MaskedWeights):
        super().__init__(step, layer, own.index)
        self.own = own
        self.takes: list[TakeOp] = []
        """The copy of the entries for the input's gradient, where that has lists of its own."""

    def forward(self, x: Buffer, out: Buffer) -> None:
        """Index the mask, and add the forward product."""
        own, step, weights = self.own, self.step, self.step.weights
        self.index.fill(own.mask, x, step.arena.packed)
        own.mask = torch.empty(0, dtype=torch.bool)
        if step.low_memory:
            own.read(weights)
            own.release()
            trim_memory()
        self.index.value = address(weights.effective, own.start)
        step.arena.step(lambda: self.gather(x, out), x, out)

    def backward(self, x: Buffer, g: Buffer) -> None:
        """Add the weights' gradient, from the largest inputs alone where the layer prunes them."""
        own, step, inputs = self.own, self.step, x
        if own.prune and own.count < own.numel:
            inputs = step.buffer(self.layer.inputs[0], x.halo)
            step.clear_tail(self.layer.inputs[0], x)
            step.arena.step(lambda: self._prune(x, inputs), x, inputs)
        grad, halves = address(step.weights.grad, own.start), 3 * own.count < x.words and self.index.unit == 1
        if halves:
            step.scratch.need(second=own.count)
        step.arena.step(
            lambda: DotOp(self.gather(inputs, g), grad, address(step.scratch.second) if halves else None), inputs, g
        )

    def _prune(self, x: Buffer, out: Buffer) -> PruneOp:
        op = PruneOp(in_=x, out=out)
        value = self.layer.inputs[0]
        share, each = self.own.count / self.own.numel, value.channels * value.height * value.width
        period, lanes = WHOLE if self.own.cached else 1, self.step.lanes(value)
        select = Selection(op, period, lambda n: topk_count(max(share, 1 / (n * each)), n * each), lambda _: 0, lanes)
        self.step.selections.append(select)
        return op

    def input_gradient(self, g: Buffer, into: Buffer, more: bool) -> None:
        """Index the entries by input, and add the gradient of the input; ``more``: to what stands there."""
        own, weights, index = self.own, self.step.weights, self.index
        if index.unit > 1:
            index.fill_scatter(into)
            self.step.arena.step(lambda: index.scatter(g, into, more), g, into)
            return
        order = weights.order[own.start : own.start + own.count]
        index.fill_back(g, order)
        order += own.start
        index.back_value = address(weights.back_value, own.start)
        self.takes.append(TakeOp(address(weights.effective), address(order), index.back_value, own.count))
        self.gather_back(g, into, more)


class SwatProduct(Product):
    """A SWAT layer's product: dense weights, of which the largest are indexed anew at every step, and their dense step.

    Raihan & Aamodt 2020, as ``sparse.layers`` has it. The largest inputs are found when backward needs them: BatchNorm
    keeps what they are computed from in any case, so that nothing more is saved.
    """

    def __init__(self, step: StepContext, layer: ProductLayer, own: SwatWeights):
        super().__init__(step, layer, own.index)
        self.own, index, (out, inner, k, _) = own, own.index, layer.shape
        self.top = TopOp(
            dense=address(own.dense), out=out, in_=inner, kernel=k, stride=layer.stride, padding=layer.padding,
            row=address(index.row), offset=address(index.offset), value=index.value, capacity=own.capacity,
            tally=address(own.tally),
        )  # fmt: skip
        if own.counts is not None:
            places = address(own.marks), address(own.candidates), address(own.counts)
            self.top.candidates = Candidates(*places, own.most)

    def forward(self, x: Buffer, out: Buffer) -> None:
        """Add the selection of the weights, and the forward product."""
        top, step = self.top, self.step
        top.channel, top.line, top.shift = x.channel, x.line, x.halo - self.layer.padding
        value = self.layer.output
        products = value.height * value.width * (1 + step.graph.needs_grad[self.layer.inputs[0]])
        step.selections.append(Selection(top, self.own.period, lambda _: self.own.k, lambda n: n * products))
        top.candidates.threshold = top.top_k.threshold
        step.arena.step(lambda: top)
        step.arena.step(lambda: self.gather(x, out), x, out)

    def backward(self, x: Buffer, g: Buffer) -> None:
        """Add the selection of the inputs, and the weights' gradient and step."""
        layer, step, own, scratch = self.layer, self.step, self.own, self.step.scratch
        halo, value = layer.reach, layer.inputs[0]
        line, plane = g.width + 2 * halo, (g.width + 2 * halo) * (g.height + 2 * halo)
        batch = step.lanes(value) or step.batch
        group = max(1, min(batch, CACHE // (plane * own.lanes * 4)))
        group = group // 16 * 16 if group >= 16 else group
        groups, each = -(-batch // group), value.channels * value.height * value.width
        scratch.need(
            lists=x.channels * x.height * x.width * batch,
            starts=x.channels * groups * layer.stride**2 + 1,
            blocks=own.blocks * batch * plane * own.lanes,
            sums=own.dense[0].numel(),
        )
        keep = KeepOp(groups=groups, group=group, stride=layer.stride, line=line, plane=plane, corner=halo * (line + 1))
        products, lanes = layer.multiply_adds / each, step.lanes(value)
        selection = Selection(keep, own.period, lambda n: topk_count(own.density, n * each), lambda _: products, lanes)
        step.selections.append(selection)
        step.clear_tail(value, x)

        def select() -> KeepOp:
            keep.in_ = x
            keep.start, keep.position, keep.value = map(address, (scratch.start, scratch.position, scratch.value))
            return keep

        def wide(phase: int) -> WideOp:
            op = WideOp(grad=g, halo=halo, blocks=address(scratch.block), kernel=layer.kernel, phase=phase)
            op.padding, op.dense, op.grad_out = layer.padding, address(own.dense), address(own.grad)
            op.velocity = address(own.moments[0]) if own.moments else None
            op.from_, op.candidates = pointer(keep), self.top.candidates
            step.wide.append(op)
            return op

        step.arena.step(select, x)
        step.arena.step(lambda: wide(0), g)
        step.arena.step(lambda: wide(1), g)

    def input_gradient(self, g: Buffer, into: Buffer, more: bool) -> None:
        """Let the selection of the weights index them by input, too, and add the gradient of the input, as above."""
        top, index = self.top, self.index
        top.back_channel, top.back_line, top.back_halo = g.channel, g.line, g.halo
        top.back_row, top.back_offset = address(index.back_row), address(index.back_offset)
        top.back_value = index.back_value
        self.gather_back(g, into, more)
