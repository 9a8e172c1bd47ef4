"""What one operation needs to run alone on ordinary tensors: maps packed and unpacked, and lists made for them."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import product
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from fedsieve.kernels.checks import LARGEST, floats, integer, packed, size_after, support
from fedsieve.kernels.program import WORDS, Gather, Map, Operation, Pack, Program, at, native
from fedsieve.kernels.weights import SMALL
from fedsieve.types import InputError

Storage: TypeAlias = Literal["fp32", "bf16"]


@dataclass
class Work:
    """Maps for ``n`` samples, and what must live while the operations run."""

    n: int
    storage: Storage
    keep: list[object] = field(default_factory=list)

    def map(self, channels: int, height: int, width: int, halo: int = 0) -> Map:
        """Return a new map."""
        bf16 = packed(self.storage)
        shape = (channels, -(-self.n // (32 if bf16 else 16)), height + 2 * halo, width + 2 * halo, 16)
        memory = self.hold(torch.empty(shape, dtype=torch.int32))
        if memory.numel() > LARGEST:
            raise InputError(f"a map of {list(shape)} is larger than 2^31 words")
        return Map(at(memory), channels, shape[1], height, width, halo, bf16)

    def pack(self, x: Tensor, halo: int = 0) -> Map:
        """Return a tensor as a map."""
        channels, height, width = x.shape[1:]
        into = self.map(channels, height, width, halo)
        self.run(Pack(into, at(x), self.n, 0))
        return into

    def unpack(self, m: Map) -> Tensor:
        """Return a map as a tensor."""
        x = torch.empty(self.n, m.channels, m.height, m.width)
        self.run(Pack(m, at(x), self.n, 1))
        return x

    def hold(self, x: Tensor) -> Tensor:
        """Return a tensor, kept alive."""
        self.keep.append(x)
        return x

    def run(self, *ops: Operation) -> None:
        """Run operations, unless there are no samples."""
        if self.n:
            Program(list(ops)).run()


@dataclass(frozen=True)
class Lists:
    """A mask's entries by row: offsets in a map, flat positions in the weight, and where each tap's begin."""

    row: Tensor
    offset: Tensor
    index: Tensor
    tap: Tensor | None

    @classmethod
    def of(cls, mask: Tensor, place: tuple[int, int, int] | None = None, tapped: bool = False) -> Lists:
        """Make them for a map whose channels and lines lie so far apart, and that begins so many of them before."""
        outer, inner, k = mask.shape[0], mask.shape[1], mask.shape[2] if mask.dim() == 4 else 1
        row, tap = torch.empty(outer + 1, dtype=torch.int32), None
        offset, flat = torch.empty(2, int(mask.count_nonzero()), dtype=torch.int32)
        if tapped:
            tap = torch.empty(outer * k * k + 1, dtype=torch.int32)
        each = WORDS * k * k, WORDS * k, 0  # a map of k x k positions, laid out as the weight is
        for where, into in ((place or each, offset), (each, flat)):
            native().fs_entries(at(mask), outer, inner, k, *where, at(row), at(into), at(tap))
        rows = torch.arange(outer).repeat_interleave(row.diff().long())
        return cls(row, offset, rows * inner * k * k + flat // WORDS, tap)


class Product:
    """A convolution's weights and geometry, checked."""

    def __init__(self, mask: Tensor, values: Tensor | None, stride: int, padding: int, storage: Storage):
        packed(storage)
        self.mask = support("mask", mask, 4)
        self.outer, self.inner, self.kernel, _ = mask.shape
        self.stride = integer("stride", stride, 1, 2)
        self.padding = integer("padding", padding, 0, self.kernel - 1)
        self.index = self.mask.flatten().nonzero().squeeze(1)
        count = len(self.index)
        self.values = torch.zeros(count) if values is None else floats("values", values, count)

    def after(self, x: Tensor) -> tuple[int, int]:
        """Return the size of what an input gives."""
        height, width = (size_after("conv2d", n, self.kernel, self.stride, self.padding) for n in x.shape[2:])
        return height, width

    def gather(self, work: Work, x: Map, out: Map) -> tuple[Gather, Tensor]:
        """Return the operation, and which of the values each of its entries has."""
        place = x.channel, x.line, x.halo - self.padding
        lists = Lists.of(self.mask, place, self._tapped(x))
        order = torch.searchsorted(self.index, lists.index)
        op = Gather(in_=x, out=out, rows=self.outer, height=out.height, width=out.width, stride_in=self.stride)
        op.stride_out, op.row, op.offset, op.tap = 1, at(lists.row), at(lists.offset), at(lists.tap)
        op.value = at(work.hold(self.values[order]))
        work.keep.append(lists)
        return op, order

    def transposed(self, work: Work, grad: Map, out: Map) -> list[Gather]:
        """Return the operations of the input's gradient, one for each parity of the stride."""
        index, count, kinds = self.index.int(), len(self.index), self.stride**2
        row, offset, order = (torch.empty(n, dtype=torch.int32) for n in (kinds * self.inner + 1, count, count))
        tap = torch.empty(self.inner * self.kernel**2 + 1, dtype=torch.int32) if self._tapped(out) else None
        native().fs_transposed(
            at(index), count, self.inner, self.kernel, self.stride, self.padding,
            grad.channel, grad.line, grad.halo, at(row), at(offset), at(order), at(tap),
        )  # fmt: skip
        turned = self.values[order.long()]
        work.keep += [row, offset, tap, turned]
        ops = []
        for top, left in product(range(min(self.stride, out.height)), range(min(self.stride, out.width))):
            op = Gather(in_=grad, out=out, rows=self.inner, stride_in=1, stride_out=self.stride, top=top, left=left)
            op.row, op.offset = at(row, (top * self.stride + left) * self.inner), at(offset)
            op.value, op.tap = at(turned), at(tap)
            op.height, op.width = -(-(out.height - top) // self.stride), -(-(out.width - left) // self.stride)
            ops.append(op)
        return ops

    def _tapped(self, x: Map) -> bool:
        return (self.kernel, self.stride, self.padding) == (3, 1, 1) and x.width <= SMALL
