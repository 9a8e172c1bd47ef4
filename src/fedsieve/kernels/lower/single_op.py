"""What one operation needs to run alone on ordinary tensors: maps packed and unpacked, and an index made for them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from fedsieve.kernels.abi import FeatureMap, GatherOp, Operation, PackOp, address
from fedsieve.kernels.checks import LARGEST, boolean_mask, floats, integer, is_bf16, size_after
from fedsieve.kernels.lower.index import SparseIndex
from fedsieve.kernels.program import Program
from fedsieve.types import InputError

Storage: TypeAlias = Literal["fp32", "bf16"]


@dataclass
class SingleOp:
    """Maps for ``n`` samples, and what must live while the operations run."""

    n: int
    storage: Storage
    keep: list[object] = field(default_factory=list)

    def map(self, channels: int, height: int, width: int, halo: int = 0) -> FeatureMap:
        """Return a new map."""
        blocks = max(1, -(-self.n // (32 if is_bf16(self.storage) else 16)))
        new = FeatureMap(None, channels, blocks, height, width, halo, is_bf16(self.storage))
        if new.words > LARGEST:
            raise InputError(f"a map of {[channels, blocks, height, width]} is larger than 2^31 words")
        new.data = address(self.hold(torch.empty(new.words, dtype=torch.int32)))
        return new

    def pack(self, x: Tensor, halo: int = 0) -> FeatureMap:
        """Return a tensor as a map."""
        channels, height, width = x.shape[1:]
        into = self.map(channels, height, width, halo)
        self.run(PackOp(into, address(x), self.n, 0))
        return into

    def unpack(self, m: FeatureMap) -> Tensor:
        """Return a map as a tensor."""
        x = torch.empty(self.n, m.channels, m.height, m.width)
        self.run(PackOp(m, address(x), self.n, 1))
        return x

    def hold(self, x: Tensor) -> Tensor:
        """Return a tensor, kept alive."""
        self.keep.append(x)
        return x

    def run(self, *ops: Operation) -> None:
        """Run operations, unless there are no samples."""
        if self.n:
            Program(list(ops)).run()


class SingleProduct:
    """A convolution's weights and geometry, checked."""

    def __init__(self, mask: Tensor, values: Tensor | None, stride: int, padding: int, storage: Storage):
        is_bf16(storage)
        self.mask = boolean_mask("mask", mask, 4)
        self.outer, self.inner, self.kernel, _ = mask.shape
        self.stride = integer("stride", stride, 1, 2)
        self.padding = integer("padding", padding, 0, self.kernel - 1)
        self.positions = self.mask.flatten().nonzero().squeeze(1)
        count = len(self.positions)
        self.values = torch.zeros(count) if values is None else floats("values", values, count)
        self.index = SparseIndex(self.outer, self.inner, self.kernel, self.stride, self.padding, count)

    def size_of(self, x: Tensor) -> tuple[int, int]:
        """Return the height and width of an input's output."""
        height, width = (size_after("conv2d", n, self.kernel, self.stride, self.padding) for n in x.shape[2:])
        return height, width

    def gather(self, x: FeatureMap, out: FeatureMap) -> GatherOp:
        """Return the forward product; ``order`` then tells which of the values each of its entries has."""
        self.order = self.index.fill_values(self.values, self.positions, self.mask, x)
        return self.index.gather(x, out)

    def gather_back(self, g: FeatureMap, into: FeatureMap) -> list[GatherOp]:
        """Return the operations of the input's gradient, one for each parity of the stride."""
        x = FeatureMap(None, into.channels, into.blocks, into.height, into.width, self.padding)
        self.gather(x, g)
        order = torch.empty(len(self.order), dtype=torch.int32)
        self.index.fill_back(g, order)
        self.back_entries = self.index.entries[order.long()]
        self.index.back_value = address(self.back_entries)
        return [self.index.gather_back(g, into, parity) for parity in self.index.parities(into)]
