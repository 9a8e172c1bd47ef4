"""Positions that successive rows of a tensor share, as a mask in units of output channels has them: found by looking.

Row r of a tensor [rows, ...] is what stands at index r of the first dimension. Where rows ``g * unit`` to
``g * unit + unit - 1`` (the last group may have fewer) have the same positions for every g, these are told once a
group: as those of a tensor of units, one for each group and element of a row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fedsieve.wire.known import Array
from fedsieve.wire.values import magnitudes

MOST_ROWS = 128
"""So many rows share positions at most."""
FILLED = 1.25
"""With zeros among them positions come to so many times as many at most."""
LOOKS = 8
"""At so many pairs of rows it is looked whether they have much the same positions."""


class Sharing(NamedTuple):
    """How many rows a tensor has, and how many successive ones share positions; by default each element is alone."""

    rows: int = 0
    unit: int = 1

    def units(self, numel: int) -> int:
        """Return how many units a tensor of so many elements has."""
        return numel if self.unit == 1 else -(-self.rows // self.unit) * (numel // self.rows)

    def largest(self, words: Array) -> Array:
        """Return the bits of every unit's largest magnitude [units], of the tensor's float32 bits (uint32)."""
        each = words.reshape(self.rows, -1)
        result = magnitudes(each[:: self.unit])
        for first in range(1, self.unit):
            some = magnitudes(each[first :: self.unit])
            np.maximum(result[: len(some)], some, out=result[: len(some)])
        return result.reshape(-1)

    def spread(self, mask: Array, numel: int) -> Array:
        """Return the mask of the elements of a mask of units."""
        groups = mask.reshape(-1, numel // self.rows)
        whole = np.empty((self.rows, groups.shape[1]), bool)
        for first in range(min(self.unit, self.rows)):
            part = whole[first :: self.unit]
            part[:] = groups[: len(part)]
        return whole.reshape(-1)


EACH = Sharing()


def find_sharing(index: Array, shape: Sequence[int], fill: bool = False) -> tuple[Sharing, Array, Array]:
    """Return how rows of a tensor share positions, the positions of units, and those of elements (int64, ascending).

    Tried are 2, 4, 8 ... rows. ``fill``: positions may be added, whose values are zeros, where that is estimated to
    take half of the bits. A vector has no rows. Where neighbouring rows differ, as in a mask of single weights, some
    looks tell.
    """
    rows, numel, n = shape[0] if len(shape) > 1 else 0, math.prod(shape), len(index)
    if rows < 2 or not n or not _alike(index, rows, numel // rows, fill):
        return EACH, index, index
    mask = np.zeros(numel, bool)
    mask[index] = True
    kept, unit, alone = mask.reshape(rows, -1), 1, numel * _entropy(n / numel)
    bits, total = alone, n
    while len(kept) > 1 and unit < MOST_ROWS:
        both = kept[::2].copy()
        both[: len(kept) // 2] |= kept[1::2]
        in_groups = np.count_nonzero(both, axis=1)
        members = int(in_groups @ np.minimum(2 * unit, rows - 2 * unit * np.arange(len(both))))
        least = both.size * _entropy(int(in_groups.sum()) / both.size) + members * _entropy(1 - n / members)
        if members > n and (not fill or members > FILLED * n or least >= bits):
            break
        kept, unit, bits, total = both, 2 * unit, least, members
    if unit > 1 and total > n and 2 * bits > alone:
        return find_sharing(index, shape)
    if unit == 1:
        return EACH, index, index
    sharing, flat = Sharing(rows, unit), kept.reshape(-1)
    return sharing, np.flatnonzero(flat), np.flatnonzero(sharing.spread(flat, numel)) if fill else index


def _alike(index: Array, rows: int, inner: int, fill: bool) -> bool:
    """Tell whether a row with positions and the one beside it have the same ones; with ``fill``, some such half the
    same.
    """
    starts = [int(index[0]) // inner & ~1]
    if fill:
        starts += [int(at) // inner & ~1 for at in index[:: len(index) // LOOKS + 1]]
    alike = 0
    for first in starts:
        ends = np.searchsorted(index, [(first + i) * inner for i in range(3)])
        one, other = index[ends[0] : ends[1]] - first * inner, index[ends[1] : ends[2]] - (first + 1) * inner
        if not fill:
            return np.array_equal(one, other)
        alike += 2 * len(np.intersect1d(one, other, assume_unique=True)) > max(len(one), len(other))
    return 2 * alike > len(starts)


def _entropy(p: float) -> float:
    """Return the bits that telling takes of one of many things whether it is of a share ``p`` of them."""
    return 0.0 if p <= 0 or p >= 1 else -p * math.log2(p) - (1 - p) * math.log2(1 - p)
