"""From a model's layers to a forward pass: maps hold sixteen samples side by side, or one sample alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from fedsieve.kernels.abi import (
    WORDS,
    ConvolutionOp,
    CopyOp,
    FeatureMap,
    GatherOp,
    LinearOp,
    MapPointer,
    NormOp,
    Operation,
    PackOp,
    PoolOp,
    Unfold,
    WindowOp,
    address,
)
from fedsieve.kernels.graph import FusedProduct, Graph, Layer, NormLayer, PoolLayer, Value, Window
from fedsieve.kernels.index import SparseIndex
from fedsieve.kernels.program import Arena, Buffer

COPY = Window(1, 1, 0, 0)
"""The window that changes nothing."""
FLATTEN = 2
"""The mode of a CopyOp from maps to features."""
SMALL = 16
"""Positions of a map whose every tap is laid out on its own, where a sample is alone: whole cache lines to read."""


class ForwardPass(ABC):
    """A forward pass of up to ``samples`` samples: ``x``, ``logits``, and the program that computes these of those."""

    def __init__(self, graph: Graph, samples: int, packed: bool = False):
        value, output = graph.input, graph.output
        self.graph, self.samples, self.arena = graph, samples, Arena(packed)
        self.x, self.logits = torch.zeros(samples, *value.sizes), torch.zeros(samples, output.channels)
        first = self.buffer(value)
        self.arena.step(lambda: self.copy(value, first, self.x, 0), first)
        buffers = {value: first}
        for layer in graph.layers:
            out = self.buffer(layer.output)
            self._lower(layer, [buffers[value] for value in layer.inputs], out)
            buffers[layer.output] = out
        self.arena.step(lambda: self.copy(output, buffers[output], self.logits, 1), buffers[output])
        self.program = self.arena.settle()
        products = [layer for layer in graph.layers if isinstance(layer, FusedProduct)]
        self.multiply_adds = samples * sum(len(p.values) * p.output.height * p.output.width for p in products)

    def _lower(self, layer: Layer, ins: list[Buffer], out: Buffer) -> None:
        if isinstance(layer, FusedProduct):
            self.product(layer, ins, out)
        elif isinstance(layer, NormLayer):
            self.arena.step(lambda: _norm(layer, ins, out), *ins, out)
        elif isinstance(layer, PoolLayer):
            self.arena.step(lambda: self.pool(layer, ins[0], out), *ins, out)
        else:
            self.arena.step(lambda: self.flatten(layer.inputs[0], ins[0], out), *ins, out)

    @abstractmethod
    def buffer(self, value: Value) -> Buffer:
        """Return a new buffer for a value."""

    @abstractmethod
    def product(self, layer: FusedProduct, ins: list[Buffer], out: Buffer) -> None:
        """Add a product to the arena."""

    @abstractmethod
    def pool(self, layer: PoolLayer, x: Buffer, out: Buffer) -> Operation:
        """Return a pool."""

    @abstractmethod
    def flatten(self, value: Value, x: Buffer, out: Buffer) -> Operation:
        """Return the change of a value from maps to features."""

    @abstractmethod
    def copy(self, value: Value, x: Buffer, plain: Tensor, out: int) -> Operation:
        """Return the copy of samples, as PyTorch has them, into a buffer; or, if ``out`` is 1, out of it."""


class BlockPass(ForwardPass):
    """Sixteen samples side by side, or thirty-two if ``packed``: the lanes are samples."""

    def buffer(self, value: Value) -> Buffer:
        """Return a new buffer, with the halo that the value's readers need."""
        halo = max((u.padding for u in self.graph.users(value) if isinstance(u, FusedProduct)), default=0)
        blocks = -(-self.samples // (32 if self.arena.packed else 16))
        return Buffer(value.channels, blocks, value.height, value.width, halo)

    def product(self, layer: FusedProduct, ins: list[Buffer], out: Buffer) -> None:
        """Add a product: each tap of the kernel is a shift by whole blocks."""
        x = ins[0]

        def fill(index: SparseIndex) -> None:
            mask = torch.zeros(layer.shape, dtype=torch.bool)
            mask.view(-1)[layer.positions] = True
            index.fill_values(layer.values, layer.positions, mask, x)

        index = _index(layer, ("block", x.channel, x.line, x.halo), layer.stride, fill)
        self.arena.step(lambda: _gather(layer, index, ins, out), *ins, out)

    def pool(self, layer: PoolLayer, x: Buffer, out: Buffer) -> Operation:
        """Return a pool."""
        return PoolOp(in_=x, out=out, **vars(layer.window))

    def flatten(self, value: Value, x: Buffer, out: Buffer) -> Operation:
        """Return the change from maps to features."""
        return CopyOp(x, out, FLATTEN)

    def copy(self, value: Value, x: Buffer, plain: Tensor, out: int) -> Operation:
        """Return the copy of samples into a buffer, or out of it."""
        return PackOp(x, address(plain), len(plain), out)


class SinglePass(ForwardPass):
    """One sample alone: the lanes are positions, and features are positions of one channel."""

    def buffer(self, value: Value) -> Buffer:
        """Return a new buffer."""
        return _line(1, value.channels) if value.flat else _line(value.channels, value.height * value.width)

    def product(self, layer: FusedProduct, ins: list[Buffer], out: Buffer) -> None:
        """Add a product: a convolution's input is unfolded first, for each tap to lie at one distance."""
        if layer.output.flat:
            index = _index(layer, ("single",), 1, lambda index: index.fill_taps(layer.values, layer.positions, 1, [0]))
            self.arena.step(lambda: _linear(layer, index, ins, out), *ins, out)
            return
        k, s, height, width = layer.kernel, layer.stride, layer.output.height, layer.output.width
        every = height * width <= SMALL
        lines, rows = (k, height) if every else (min(k, s), height + (k - 1) // s)
        at_ = [(i, 0) if every else (i % s, i // s) for i in range(k)]
        taps = [((j * lines + line) * rows + down) * width for line, down in at_ for j in range(k)]
        wide = _line(1, k * lines * rows * width + WORDS)  # a last vector may reach beyond
        wide = ins[0] if (k, s, layer.padding) == (1, 1, 0) else wide
        index = _index(
            layer,
            ("single", wide.channel, *taps),
            1,
            lambda i: i.fill_taps(layer.values, layer.positions, wide.channel, taps),
        )
        self.arena.slack = max(self.arena.slack, (layer.padding + 1) * (layer.inputs[0].width + 1) + 4 * WORDS)
        self.arena.step(lambda: _convolution(layer, (lines, rows, width), wide, index, ins, out), *ins, out)

    def pool(self, layer: PoolLayer, x: Buffer, out: Buffer) -> Operation:
        """Return a pool."""
        value = layer.inputs[0]
        return _window(layer.window, value, layer.output, _place(value, x), _place(layer.output, out))

    def flatten(self, value: Value, x: Buffer, out: Buffer) -> Operation:
        """Return the change from maps to features."""
        return _window(COPY, value, value, _place(value, x), (out.data, value.height * value.width))

    def copy(self, value: Value, x: Buffer, plain: Tensor, out: int) -> Operation:
        """Return the copy of a sample into a buffer, or out of it."""
        places = [(address(plain), value.height * value.width), _place(value, x)]
        return _window(COPY, value, value, places[out], places[1 - out])


def _index(
    layer: FusedProduct, key: tuple[object, ...], stride: int, fill: Callable[[SparseIndex], None]
) -> SparseIndex:
    """Return the index of a product for a layout, which passes of the same size share."""
    if key not in layer.indices:
        layer.indices[key] = SparseIndex(*layer.shape[:3], stride, layer.padding, len(layer.values))
        fill(layer.indices[key])
    index: SparseIndex = layer.indices[key]
    return index


def _gather(layer: FusedProduct, index: SparseIndex, ins: list[Buffer], out: Buffer) -> GatherOp:
    op = index.gather(ins[0], out)
    op.bias, op.relu = address(layer.bias), int(layer.relu)
    if len(ins) == 2:
        op.add = MapPointer(ins[1])
    return op


def _norm(layer: NormLayer, ins: list[Buffer], out: Buffer) -> NormOp:
    """Return a BatchNorm by running statistics, a sum, a ReLU, that no product stands before."""
    op = NormOp(y=ins[0], out=out, relu=int(layer.relu))
    if len(ins) == 2:
        op.add = MapPointer(ins[1])
    if (norm := layer.module) is not None:
        op.kept = scratch = torch.empty(2, len(norm.weight))
        vectors = norm.weight, norm.bias, *layer.running, *scratch
        op.gamma, op.beta, op.running_mean, op.running_var, op.mean, op.invstd = map(address, vectors)
        op.eps = norm.eps
    return op


def _linear(layer: FusedProduct, index: SparseIndex, ins: list[Buffer], out: Buffer) -> LinearOp:
    lists = address(index.row), address(index.offset), index.value
    op = LinearOp(ins[0].data, out.data, *lists, address(layer.bias), rows=index.outer, relu=int(layer.relu))
    op.add = ins[1].data if len(ins) == 2 else None
    return op


def _convolution(
    layer: FusedProduct,
    sizes: tuple[int, int, int],
    wide: Buffer,
    index: SparseIndex,
    ins: list[Buffer],
    out: Buffer,
) -> ConvolutionOp:
    gather, x = _gather(layer, index, ins, out), layer.inputs[0]
    gather.in_.width = wide.width
    mask = None if wide is ins[0] else _inside(layer, *sizes)
    where = ins[0].data, address(mask), ins[0].channel, wide.channel
    kernel = layer.kernel, layer.stride, layer.padding
    op = ConvolutionOp(Unfold(*where, x.channels, x.height, x.width, *sizes, *kernel), gather)
    op.kept = mask
    return op


def _inside(layer: FusedProduct, lines: int, rows: int, columns: int) -> Tensor:
    """Return the mask of an Unfold: which of its elements lie inside the map."""
    x, k, s, p = layer.inputs[0], layer.kernel, layer.stride, layer.padding
    row = torch.arange(rows) * s + torch.arange(lines)[:, None] - p
    column = torch.arange(columns) * s + torch.arange(k)[:, None] - p
    inside = ((row >= 0) & (row < x.height))[:, :, None] & ((column >= 0) & (column < x.width))[:, None, None]
    return torch.cat([inside.flatten(), torch.zeros(WORDS, dtype=torch.bool)]).to(torch.int32).neg()


def _place(value: Value, x: FeatureMap) -> tuple[int | None, int]:
    """Return where a value begins, and its distance from channel to channel."""
    return x.data, 1 if value.flat else x.channel


def _window(
    window: Window, value: Value, to: Value, source: tuple[int | None, int], target: tuple[int | None, int]
) -> WindowOp:
    places = (source[0], target[0], source[1], target[1])
    sizes = (value.channels, value.height, value.width, to.height, to.width)
    return WindowOp(*places, *sizes, *vars(window).values())


def _line(channels: int, positions: int) -> Buffer:
    return Buffer(channels, 1, 1, -(-positions // WORDS))
