"""The decoder: unpacks the streams that the plan tells of, and puts the tensors together."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from fedsieve.types import Sparse
from fedsieve.wire import layout
from fedsieve.wire.known import NOTHING, TYPES, Array, Known, WireError, array
from fedsieve.wire.layout import BITS, GAP, OWN, SPARSE
from fedsieve.wire.plan import Decoded, Leaf, Plan
from fedsieve.wire.positions import ALL, GAPS, MASK, from_flips, from_gaps
from fedsieve.wire.streams import unpacked
from fedsieve.wire.values import (
    BF16,
    BF16_DISTANCE,
    BF16_UNSIGNED,
    DISTANCE,
    INT4,
    INT8,
    SIGNED,
    TYPED,
    at_bf16_distance,
    at_distance,
    from_bf16,
    multiples,
    signed,
    to_bf16,
)


def decode(data: bytes, known: Known | None = None) -> Decoded:
    """Return the tree that ``encode`` was given, under the same ``known``.

    Raises WireError for anything that is not exactly a message. Without ``known``, NaN and infinities are let through,
    and the message may unfold to 1,024 times its bytes.
    """
    plan = Plan(data, known or NOTHING)
    return _filled(plan.root, _Columns(plan))


def _filled(tree: Decoded, columns: _Columns) -> Decoded:
    whole: Decoded = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            whole[name] = _filled(value, columns)
        else:
            whole[name] = _tensor(value, columns) if isinstance(value, Leaf) else value
    return whole


def _tensor(leaf: Leaf, columns: _Columns) -> Tensor | Sparse:
    index = _index(leaf, columns)
    values = _values(leaf, columns, index)
    if leaf.kind == SPARSE:
        index = np.arange(leaf.numel) if index is None else index
        return Sparse(values, torch.from_numpy(index), leaf.shape)
    if index is None:
        return values.view(leaf.shape)
    flat = array(values)
    dense = np.zeros(leaf.numel, flat.dtype)
    dense[index] = flat
    return torch.from_numpy(dense).view(values.dtype).view(leaf.shape)


def _index(leaf: Leaf, columns: _Columns) -> Array | None:
    if leaf.way == ALL:
        return None
    if leaf.way == MASK:
        index = columns.known.index(leaf.name)
        return None if index is None else index.copy()
    gaps = columns.take(GAP, leaf.count if leaf.way == GAPS else leaf.changed)
    index = from_gaps(gaps, leaf.numel)
    words = columns.known.words(leaf.name)
    return index if leaf.way == GAPS or words is None else from_flips(index, leaf.count, words, leaf.way)


def _values(leaf: Leaf, columns: _Columns, index: Array | None) -> Tensor:
    at = layout.column(leaf.mode, leaf.dtype)
    if at == BITS:
        return torch.from_numpy(columns.bits(leaf.count))
    numbers = columns.take(at, leaf.count)
    if leaf.mode == TYPED:
        return _checked(columns.known, leaf, _of_type(leaf.dtype, numbers))
    signs = columns.bits(leaf.count) if leaf.mode in (SIGNED, BF16) else np.zeros(1, bool)
    if leaf.mode in (INT8, INT4):
        words = multiples(numbers, leaf.scale, leaf.mode)
    elif leaf.mode in (DISTANCE, BF16_DISTANCE):
        base = columns.plan.base(leaf.name, leaf.way, leaf.shape)
        base = base if index is None else base[index]
        near = leaf.mode == DISTANCE
        words = at_distance(numbers, base) if near else from_bf16(at_bf16_distance(numbers, to_bf16(base)))
    elif leaf.mode in (BF16, BF16_UNSIGNED):
        words = from_bf16(signed(numbers, signs))
    else:
        words = signed(numbers, signs)
    return _checked(columns.known, leaf, torch.from_numpy(words.view(np.float32)))


def _checked(known: Known, leaf: Leaf, values: Tensor) -> Tensor:
    """Let values pass that are finite: quickly if their sum is."""
    if not known.finite or not values.is_floating_point() or math.isfinite(float(values.sum())):
        return values
    if not bool(torch.isfinite(values).all()):
        raise WireError(f"{leaf.name} is not finite")
    return values


def _of_type(dtype: int, numbers: Array) -> Tensor:
    if TYPES[dtype] == torch.uint8:
        if len(numbers) and numbers.max() > 255:
            raise WireError("a byte beyond 255")
        return torch.from_numpy(numbers.astype(np.uint8))
    if TYPES[dtype] in (torch.float16, torch.bfloat16):
        return torch.from_numpy(numbers.view(np.int16)).view(TYPES[dtype])
    return torch.from_numpy(numbers)


class _Columns:
    """The streams of every column, unpacked when they are asked for, in the plan's order."""

    def __init__(self, plan: Plan):
        self.plan, self.known, self.at_bit = plan, plan.known, 0
        self.found, self.held = self.find()
        self.pools: list[Array | None] = [None] * BITS
        self.used, self.next = [0] * BITS, [1] * BITS

    def find(self) -> tuple[list[list[tuple[int, memoryview, int]]], Array]:
        """Find every stream of every column, the pooled one first, and the bits; nothing may follow them."""
        pooled = [0] * (BITS + 1)
        owned: list[list[int]] = [[] for _ in range(BITS)]
        for leaf in self.plan.leaves:
            for at, count in leaf.columns():
                if at == BITS or count < OWN:
                    pooled[at] += count
                else:
                    owned[at].append(count)
        found: list[list[tuple[int, memoryview, int]]] = []
        for at in range(BITS):
            found.append([])
            for count in [pooled[at], *owned[at]]:
                if count:
                    size, way = divmod(self.plan.varint(), 4)
                    found[at].append((way, self.plan.take(size), count))
                else:
                    found[at].append((0, memoryview(b""), 0))
        held = np.frombuffer(self.plan.take((pooled[BITS] + 7) // 8), np.uint8)
        if pooled[BITS] % 8 and held[-1] >> (pooled[BITS] % 8):
            raise WireError("bits set beyond the last one")
        if self.plan.at != self.plan.end:
            raise WireError(f"{self.plan.end - self.plan.at} bytes after the end of the message")
        return found, held

    def take(self, at: int, count: int) -> Array:
        """Return the next tensor's numbers in a column."""
        if count >= OWN:
            self.next[at] += 1
            way, data, found = self.found[at][self.next[at] - 1]
            return unpacked(way, data, found, layout.DTYPES[at])
        pool = self.pools[at]
        if pool is None:
            way, data, found = self.found[at][0]
            pool = self.pools[at] = unpacked(way, data, found, layout.DTYPES[at])
        self.used[at] += count
        return pool[self.used[at] - count : self.used[at]].copy()

    def bits(self, count: int) -> Array:
        """Return the next bits."""
        first, self.at_bit = self.at_bit, self.at_bit + count
        window = np.unpackbits(self.held[first // 8 : (self.at_bit + 7) // 8], bitorder="little")
        return window[first % 8 : first % 8 + count].view(bool)
