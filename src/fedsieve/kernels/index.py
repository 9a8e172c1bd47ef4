"""The index of a sparse product: what training, inference and single operations share."""

from __future__ import annotations

from itertools import product
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedsieve.kernels.abi import WORDS, FeatureMap, GatherOp, MapPointer, ScatterOp, address
from fedsieve.kernels.library import native

Array: TypeAlias = npt.NDArray[Any]
SMALL = 8
"""The widest map whose border is worth leaving out of a 3x3 kernel's products."""


UNIT = 8
"""The most output channels that the kernels compute together."""


def shared_unit(mask: Tensor) -> int:
    """Return how many successive output channels of a mask [outer, ...] share their entries: UNIT, its half, or 1."""
    for unit in (UNIT, UNIT // 2):
        whole = len(mask) // unit * unit
        if not (mask.numel() and whole and torch.equal(mask[0], mask[unit - 1])):
            continue  # most masks differ here already
        groups, rest = mask[:whole].view(-1, unit, *mask.shape[1:]), mask[whole:]
        if bool((groups == groups[:, :1]).all()) and bool((rest == rest[:1]).all()):
            return unit
    return 1


class SparseIndex:
    """Where each entry of a sparse weight [outer, inner, kernel, kernel] finds its number in a map.

    ``row`` [outer + 1] says where each output channel's entries begin, ``offset`` [entries] where in the input each
    looks, ``value`` is the address of their numbers. ``back_row``, ``back_offset`` and ``back_value`` are the same of
    the input's gradient: by input channel, for each parity of the stride, where in the output's gradient an entry
    looks. Of 3x3 kernels on small maps, ``tap`` and ``back_tap`` say where each tap's entries begin, so that what lies
    beyond the border is left out. An output channel's entries look in the ``inner`` channels of its group.

    Where groups of ``unit`` output channels share their entries, ``row``, ``offset`` and ``tap`` are those of each
    group's first row; ``value`` is of all rows, one after another; and ``back_offset`` is of the same entries in the
    input's gradient, to which their products are added.
    """

    def __init__(self, outer: int, inner: int, kernel: int, stride: int, padding: int, capacity: int, groups: int = 1):
        self.outer, self.inner, self.kernel, self.stride, self.padding = outer, inner, kernel, stride, padding
        self.groups, self.channels = groups, inner * groups
        self.row = torch.empty(outer + 1, dtype=torch.int32)
        self.back_row = torch.empty(stride**2 * self.channels + 1, dtype=torch.int32)
        self.offset, self.back_offset = (torch.empty(capacity, dtype=torch.int32) for _ in range(2))
        self.unit = 1
        self.tap: Tensor | None = None
        self.back_tap: Tensor | None = None
        self.value: int | None = None
        self.back_value: int | None = None

    def fill(self, mask: Tensor, x: FeatureMap, packed: bool = False) -> None:
        """Index the entries of a boolean mask [outer, inner, kernel, kernel] in maps like ``x``, perhaps ``packed``."""
        self.place = x.channel, x.line, x.halo - self.padding
        self.unit = 1 if packed or self.groups > 1 else shared_unit(mask)
        if self.unit > 1:
            mask = mask[:: self.unit].contiguous()
            count = int(mask.count_nonzero())
            self.row = torch.empty(len(mask) + 1, dtype=torch.int32)
            self.offset, self.back_offset = (torch.empty(count, dtype=torch.int32) for _ in range(2))
            self.tap = torch.empty(len(mask) * self.kernel**2 + 1, dtype=torch.int32)
        elif (self.kernel, self.stride, self.padding) == (3, 1, 1) and x.width <= SMALL:
            self.tap, self.back_tap = (torch.empty(n * 9 + 1, dtype=torch.int32) for n in (self.outer, self.channels))
        sizes = len(mask), self.inner, self.kernel
        places = address(self.row), address(self.offset), address(self.tap)
        native().fs_entries(address(mask), *sizes, *self.place, *places)
        if self.groups > 1:
            first = self._first(torch.arange(self.outer)) * x.channel
            self.offset += first.repeat_interleave(self.row.long().diff()).int()

    def fill_values(
        self, values: Tensor, positions: Tensor, mask: Tensor, x: FeatureMap, packed: bool = False
    ) -> Tensor:
        """Index a mask with ``values`` at its sorted flat ``positions``; return which value each entry has."""
        self.fill(mask, x, packed)
        own = self.positions()
        order = torch.arange(len(own)) if torch.equal(own, positions) else torch.searchsorted(positions, own)
        self.entries = values[order]
        self.value = address(self.entries)
        return order

    def fill_taps(self, values: Tensor, positions: Tensor, channel: int, taps: list[int]) -> None:
        """Index ``values`` where channels lie ``channel`` words apart, and each tap at a distance of its own."""
        inner, tap = positions // self.kernel**2 % self.inner, positions % self.kernel**2
        outer = positions // (self.inner * self.kernel**2)
        self.offset = ((self._first(outer) + inner) * channel + torch.tensor(taps)[tap]).int()
        self.row[0] = 0
        self.row[1:] = outer.bincount(minlength=self.outer).cumsum(0)
        self.value = address(values)

    def _first(self, outer: Tensor) -> Tensor:
        """Return the first input channel of the groups of output channels."""
        return outer * self.groups // self.outer * self.inner

    def positions(self) -> Tensor:
        """Return the flat positions of the entries in the weight, int64 [entries]."""
        inner, line, column = self._looks()
        inner = inner % self.inner if self.groups > 1 else inner
        positions = inner * self.kernel**2 + line * self.kernel + column if self.kernel > 1 else inner
        row, group = self.row.numpy(), np.arange(self.outer) // self.unit
        outer = np.arange(self.outer).repeat(count := np.diff(row)[group])
        if self.unit > 1:  # each row has those of its group
            behind = np.arange(len(outer)) - (count.cumsum() - count).repeat(count)
            positions = positions[row[group].repeat(count) + behind]
        outer *= self.inner * self.kernel**2
        outer += positions
        return torch.from_numpy(outer)

    def _looks(self) -> tuple[Array, Array, Array]:
        """Return each offset's input channel, and the line and the column of its tap (int32).

        By numpy, whose division by one number is several times as fast as PyTorch's.
        """
        (channel, line, shift), offset = self.place, self.offset.numpy()
        inner = offset // channel
        rest = offset - inner * channel
        down = rest // line
        return inner, down - shift, (rest - down * line) // WORDS - shift

    def fill_scatter(self, into: FeatureMap) -> None:
        """Index the same shared entries in maps of the input's gradient like ``into``."""
        (inner, line, column), border = self._looks(), into.halo - self.padding
        offset = inner * into.channel + (line + border) * into.line + (column + border) * WORDS
        self.back_offset.copy_(torch.from_numpy(offset))

    def fill_back(self, g: FeatureMap, order: Tensor) -> None:
        """Index the same entries in maps of the output's gradient like ``g``; ``order`` tells which entry each is."""
        positions, area = self.positions(), self.kernel**2
        outer = positions // (self.inner * area)
        positions += (outer * (self.channels - self.inner) + self._first(outer)) * area  # as if without groups
        positions = positions.int()
        native().fs_transposed(
            address(positions), len(positions), self.channels, self.kernel, self.stride, self.padding, g.channel,
            g.line, g.halo, address(self.back_row), address(self.back_offset), address(order), address(self.back_tap),
        )  # fmt: skip

    def gather(self, x: FeatureMap, out: FeatureMap) -> GatherOp:
        """Return the forward product."""
        op = GatherOp(in_=x, out=out, rows=self.outer, height=out.height, width=out.width, stride_out=1)
        op.row, op.offset, op.value, op.tap = *map(address, (self.row, self.offset)), self.value, address(self.tap)
        op.stride_in, op.unit, op.kernel, op.padding = self.stride, self.unit, self.kernel, self.padding
        return op

    def scatter(self, g: FeatureMap, into: FeatureMap, more: bool = False) -> ScatterOp:
        """Return the input's gradient, by shared entries; ``more``: added to what stands there."""
        op = ScatterOp(self.gather(into, g), int(more))
        op.of.offset = address(self.back_offset)
        return op

    def parities(self, x: FeatureMap) -> list[tuple[int, int]]:
        """Return the parities of the stride that an input has positions of."""
        return list(product(range(min(self.stride, x.height)), range(min(self.stride, x.width))))

    def gather_back(self, g: FeatureMap, into: FeatureMap, parity: tuple[int, int], more: bool = False) -> GatherOp:
        """Return the input's gradient at the positions of one parity; ``more``: added to what stands there."""
        (top, left), s = parity, self.stride
        op = GatherOp(in_=g, out=into, rows=self.channels, stride_in=1, stride_out=s, top=top, left=left)
        op.row, op.offset = address(self.back_row, (top * s + left) * self.channels), address(self.back_offset)
        op.value, op.tap = self.back_value, address(self.back_tap)
        op.height, op.width = -(-(into.height - top) // s), -(-(into.width - left) // s)
        if more:
            op.add = MapPointer(into)
        return op
