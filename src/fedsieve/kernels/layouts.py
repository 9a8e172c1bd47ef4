"""How a forward pass lays out its maps: sixteen samples side by side, or one sample alone."""

from __future__ import annotations

from ctypes import pointer
from typing import Protocol

import torch
from torch import Tensor

from fedsieve.kernels import recognise
from fedsieve.kernels.arena import Arena, Room
from fedsieve.kernels.fold import Fused
from fedsieve.kernels.graph import Graph, Pool, Unsupported, Value
from fedsieve.kernels.program import WORDS, Convolution, Copy, Gather, Linear, Operation, Pack, Unfold, Window, at
from fedsieve.kernels.program import Pool as PoolOp
from fedsieve.kernels.weights import SMALL as BORDERED

COPY = Pool([], Value(0), recognise.Window(1, 1, 0, 0))
"""The pool that changes nothing."""
SMALL = 16
"""Positions of a map whose every tap is laid out on its own, where a sample is alone: whole cache lines to read."""


class Layout(Protocol):
    """Rooms for values, and the operations between them, made once the arena has settled."""

    arena: Arena
    samples: int

    def room(self, graph: Graph, value: Value) -> Room:
        """Return a new room for a value."""

    def product(self, layer: Fused, ins: list[Room], out: Room) -> None:
        """Add a product to the arena."""

    def pool(self, layer: Pool, x: Room, out: Room) -> Operation:
        """Return a pool."""

    def flatten(self, value: Value, x: Room, out: Room) -> Operation:
        """Return the change of a value from maps to features."""

    def load(self, value: Value, plain: Tensor, room: Room) -> Operation:
        """Return the copy of samples, as PyTorch has them, into a room."""

    def save(self, value: Value, room: Room, plain: Tensor) -> Operation:
        """Return the copy out of a room."""


class Blocks:
    """Sixteen samples side by side, or thirty-two if ``packed``: the lanes are samples."""

    def __init__(self, samples: int, packed: bool):
        self.arena, self.samples, self.blocks = Arena(packed), samples, -(-samples // (32 if packed else 16))

    def room(self, graph: Graph, value: Value) -> Room:
        """Return a new room, with the halo that the value's readers need."""
        halo = max((u.padding for u in graph.users(value) if isinstance(u, Fused)), default=0)
        return _checked(Room(value.channels, self.blocks, value.height, value.width, halo))

    def product(self, layer: Fused, ins: list[Room], out: Room) -> None:
        """Add a product: each tap of the kernel is a shift by whole blocks."""
        x, k, shift = ins[0], layer.kernel, ins[0].halo - layer.padding
        taps = [(shift + i) * x.line + (shift + j) * WORDS for i in range(k) for j in range(k)]
        bordered = (k, layer.stride, layer.padding) == (3, 1, 1) and x.width <= BORDERED
        layer = layer.by_tap if bordered else layer
        offset = layer.offsets(x.channel, taps)
        self.arena.step(lambda: _gather(self.arena, layer, offset, ins, out, layer.stride), *ins, out)

    def pool(self, layer: Pool, x: Room, out: Room) -> Operation:
        """Return a pool."""
        w, op = layer.window, PoolOp(in_=self.arena.map(x), out=self.arena.map(out))
        op.kernel, op.stride, op.padding, op.average = w.kernel, w.stride, w.padding, w.average
        return op

    def flatten(self, value: Value, x: Room, out: Room) -> Operation:
        """Return the change from maps to features."""
        return Copy(self.arena.map(x), self.arena.map(out), 2)

    def load(self, value: Value, plain: Tensor, room: Room) -> Operation:
        """Return the copy of samples into a room."""
        return Pack(self.arena.map(room), at(plain), len(plain), 0)

    def save(self, value: Value, room: Room, plain: Tensor) -> Operation:
        """Return the copy out of a room."""
        return Pack(self.arena.map(room), at(plain), len(plain), 1)


class Single:
    """One sample alone: the lanes are positions, and features are positions of one channel."""

    def __init__(self) -> None:
        self.arena, self.samples = Arena(packed=False), 1

    def room(self, graph: Graph, value: Value) -> Room:
        """Return a new room."""
        return _line(1, value.channels) if value.flat else _line(value.channels, value.height * value.width)

    def product(self, layer: Fused, ins: list[Room], out: Room) -> None:
        """Add a product: a convolution's input is unfolded first, for each tap to lie at one distance."""
        if layer.output.flat:
            index = layer.offsets(1, [0])
            self.arena.step(lambda: self._linear(layer, index, ins, out), *ins, out)
            return
        k, s, height, width = layer.kernel, layer.stride, layer.output.height, layer.output.width
        every = height * width <= SMALL
        lines, rows = (k, height) if every else (min(k, s), height + (k - 1) // s)
        at_ = [(i, 0) if every else (i % s, i // s) for i in range(k)]
        taps = [((j * lines + line) * rows + down) * width for line, down in at_ for j in range(k)]
        wide = _line(1, k * lines * rows * width + WORDS)  # a last vector may reach beyond
        wide = ins[0] if (k, s, layer.padding) == (1, 1, 0) else wide
        offset = layer.offsets(wide.channel, taps)
        self.arena.slack = max(self.arena.slack, (layer.padding + 1) * (layer.inputs[0].width + 1) + 4 * WORDS)
        self.arena.step(lambda: self._convolution(layer, (lines, rows, width), wide, offset, ins, out), *ins, out)

    def pool(self, layer: Pool, x: Room, out: Room) -> Operation:
        """Return a pool."""
        value = layer.inputs[0]
        return _window(layer, value, layer.output, self._place(value, x), self._place(layer.output, out))

    def flatten(self, value: Value, x: Room, out: Room) -> Operation:
        """Return the change from maps to features."""
        return _window(COPY, value, value, self._place(value, x), (self._at(out), value.height * value.width))

    def load(self, value: Value, plain: Tensor, room: Room) -> Operation:
        """Return the copy of a sample into a room."""
        return _window(COPY, value, value, (at(plain), value.height * value.width), self._place(value, room))

    def save(self, value: Value, room: Room, plain: Tensor) -> Operation:
        """Return the copy out of a room."""
        return _window(COPY, value, value, self._place(value, room), (at(plain), value.height * value.width))

    def _at(self, room: Room) -> int:
        address: int = self.arena.map(room).data
        return address

    def _place(self, value: Value, room: Room) -> tuple[int, int]:
        """Return where a value begins, and its distance from channel to channel."""
        return self._at(room), 1 if value.flat else room.channel

    def _linear(self, layer: Fused, index: Tensor, ins: list[Room], out: Room) -> Linear:
        op = Linear(self._at(ins[0]), self._at(out), at(layer.row), at(index), at(layer.value), at(layer.bias))
        op.add = self._at(ins[1]) if len(ins) == 2 else None
        op.rows, op.relu, op.kept = len(layer.row) - 1, int(layer.relu), (layer, index)
        return op

    def _convolution(
        self, layer: Fused, sizes: tuple[int, int, int], wide: Room, offset: Tensor, ins: list[Room], out: Room
    ) -> Convolution:
        gather, x = _gather(self.arena, layer, offset, ins, out, 1), layer.inputs[0]
        gather.in_.width = wide.width
        mask = None if wide is ins[0] else _inside(layer, *sizes)
        where = (self._at(ins[0]), at(mask), ins[0].channel, wide.channel)
        own = (layer.kernel, layer.stride, layer.padding)
        op = Convolution(Unfold(*where, x.channels, x.height, x.width, *sizes, *own), gather)
        op.kept = (gather, mask)
        return op


def _inside(layer: Fused, lines: int, rows: int, columns: int) -> Tensor:
    """Return the mask of an Unfold: which of its elements lie inside the map."""
    x, k, s, p = layer.inputs[0], layer.kernel, layer.stride, layer.padding
    row = torch.arange(rows) * s + torch.arange(lines)[:, None] - p
    column = torch.arange(columns) * s + torch.arange(k)[:, None] - p
    inside = ((row >= 0) & (row < x.height))[:, :, None] & ((column >= 0) & (column < x.width))[:, None, None]
    return torch.cat([inside.flatten(), torch.zeros(WORDS, dtype=torch.bool)]).to(torch.int32).neg()


def _window(p: Pool, value: Value, to: Value, source: tuple[int | None, int], target: tuple[int | None, int]) -> Window:
    places = (source[0], target[0], source[1], target[1])
    sizes = (value.channels, value.height, value.width, to.height, to.width)
    return Window(*places, *sizes, *vars(p.window).values())


def _gather(arena: Arena, layer: Fused, offset: Tensor, ins: list[Room], out: Room, stride: int) -> Gather:
    op = Gather(arena.map(ins[0]), arena.map(out), at(layer.row), at(offset), at(layer.value), at(layer.bias))
    op.rows, op.height, op.width, op.stride_in, op.stride_out = out.channels, out.height, out.width, stride, 1
    op.relu, op.tap, op.kept = int(layer.relu), at(layer.tap), (layer, offset)
    if len(ins) == 2:
        op.add = pointer(arena.map(ins[1]))
    return op


def _line(channels: int, positions: int) -> Room:
    return _checked(Room(channels, 1, 1, -(-positions // WORDS)))


def _checked(room: Room) -> Room:
    if room.words >= 2**31:
        raise Unsupported("a map of more than 2^31 words")
    return room
