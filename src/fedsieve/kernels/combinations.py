"""The tables of sums of channels with constants, for the native operation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedsieve.kernels.abi import FeatureMap, address
from fedsieve.kernels.token_ops import CombinationOp

AGAIN = 32
"""Numbers of a period that stand once more behind it: a vector is read from any place."""


@dataclass
class CombinationTable:
    """Which channels are added up, and what each is multiplied by at each place of a period."""

    table: Tensor
    """float32 [rows, period + AGAIN]; the last row is zeros."""
    source: Tensor
    """int32 [terms, channels]."""
    row: Tensor
    """int32 [terms, channels]: of the table."""
    period: int

    @classmethod
    def of(cls, source: Tensor, factor: Tensor) -> CombinationTable:
        """Return that of channels [terms, channels] and numbers [terms, channels, period]."""
        period = factor.shape[-1]
        rows, row = torch.unique(factor.flatten(0, 1), dim=0, return_inverse=True)
        table = torch.cat([rows, torch.zeros(1, period)])[:, torch.arange(period + AGAIN) % period].contiguous()
        return cls(table, source.int().contiguous(), row.view(source.shape).int().contiguous(), period)

    def transposed(self, channels: int) -> CombinationTable:
        """Return that of the gradients of the ``channels`` that were added up."""
        outer = self.source.shape[1]
        order = self.source.flatten().argsort(stable=True)
        into = self.source.flatten()[order].long()
        count = into.bincount(minlength=channels)
        slot = torch.arange(len(into)) - (count.cumsum(0) - count)[into]
        shape = max(1, int(count.max())), channels
        source, row = torch.zeros(shape, dtype=torch.int32), torch.full(shape, len(self.table) - 1, dtype=torch.int32)
        source[slot, into] = (order % outer).int()
        row[slot, into] = self.row.flatten()[order]
        return CombinationTable(self.table, source, row, self.period)

    def op(self, x: FeatureMap, out: FeatureMap) -> CombinationOp:
        """Return the operation."""
        op = CombinationOp(x, out, *map(address, self.tensors), length=self.period, stride=self.table.shape[1])
        op.terms = len(self.source)
        return op

    @property
    def tensors(self) -> list[Tensor]:
        """What the operation points to."""
        return [self.table, self.source, self.row]
