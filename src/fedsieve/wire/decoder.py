"""The decoder: unpacks the streams that the plan tells of, and puts the tensors together."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from fedsieve.types import Sparse
from fedsieve.wire import layout
from fedsieve.wire.known import NOTHING, TYPES, Array, Known, WireError, array
from fedsieve.wire.layout import BITS, GAP, OWN, OWN_BY_KIND, SPARSE
from fedsieve.wire.plan import Decoded, Leaf, Plan
from fedsieve.wire.positions import ALL, CHANGES, GAPS, MASK, RANKED, from_gaps, order_of
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
    finite,
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
    gaps = columns.take(GAP, leaf.count if leaf.way == GAPS else leaf.changed, leaf.pool)
    index = from_gaps(gaps, leaf.numel)
    if leaf.way == GAPS:
        return index
    order = order_of(columns.known, leaf.name, leaf.edge if leaf.way == RANKED else None)
    if order is None:
        raise WireError(f"too many elements of {leaf.name!r} above the edge at step {leaf.edge}")
    found = order.from_flips(index, len(order.likely) if leaf.way == CHANGES else min(leaf.count, len(order.likely)))
    if len(found) != leaf.count:
        raise WireError(f"{leaf.count} positions announced, {len(found)} found")
    return found


def _values(leaf: Leaf, columns: _Columns, index: Array | None) -> Tensor:
    at = layout.column(leaf.mode, leaf.dtype)
    if at == BITS:
        return torch.from_numpy(columns.bits(leaf.count))
    numbers = columns.take(at, leaf.count, leaf.pool)
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
    """Let values pass that are finite, where they must be."""
    if known.finite and values.is_floating_point() and not finite(values):
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


Stream: TypeAlias = tuple[int, memoryview, int]
"""How it is packed, its bytes, and how many numbers it holds."""


class _Columns:
    """The streams of every column, unpacked when they are asked for, in the plan's order."""

    def __init__(self, plan: Plan):
        self.plan, self.known, self.at_bit = plan, plan.known, 0
        self.own = OWN_BY_KIND if plan.by_kind else OWN
        self.pools: list[dict[str, Stream]] = []
        self.owned: list[Iterator[Stream]] = []
        self.held = self.find()
        self.open: dict[tuple[int, str], Array] = {}

    def find(self) -> Array:
        """Find every stream of every column, the pools first, and return the bits; nothing may follow them."""
        pools: list[dict[str, int]] = [{} for _ in range(BITS)]
        owned: list[list[int]] = [[] for _ in range(BITS)]
        many = 0
        for leaf in self.plan.leaves:
            for at, count in leaf.columns():
                if at == BITS:
                    many += count
                elif count >= self.own:
                    owned[at].append(count)
                elif count:
                    pools[at][leaf.pool] = pools[at].get(leaf.pool, 0) + count
        for at in range(BITS):
            self.pools.append({kind: self.stream(count) for kind, count in pools[at].items()})
            self.owned.append(iter([self.stream(count) for count in owned[at]]))
        held = np.frombuffer(self.plan.take((many + 7) // 8), np.uint8)
        if many % 8 and held[-1] >> (many % 8):
            raise WireError("bits set beyond the last one")
        if self.plan.at != self.plan.end:
            raise WireError(f"{self.plan.end - self.plan.at} bytes after the end of the message")
        return held

    def stream(self, count: int) -> Stream:
        """Find the next stream."""
        size, way = divmod(self.plan.varint(), 4)
        return way, self.plan.take(size), count

    def take(self, at: int, count: int, pool: str) -> Array:
        """Return the next tensor's numbers in a column."""
        if count >= self.own:
            return unpacked(*next(self.owned[at]), layout.DTYPES[at])
        if not count:
            return np.zeros(0, layout.DTYPES[at])
        if (at, pool) not in self.open:
            self.open[at, pool] = unpacked(*self.pools[at][pool], layout.DTYPES[at])
        numbers = self.open[at, pool]
        self.open[at, pool] = numbers[count:]
        return numbers[:count].copy()

    def bits(self, count: int) -> Array:
        """Return the next bits."""
        first, self.at_bit = self.at_bit, self.at_bit + count
        window = np.unpackbits(self.held[first // 8 : (self.at_bit + 7) // 8], bitorder="little")
        return window[first % 8 : first % 8 + count].view(bool)
