"""The columns of a message that is decoded: where every tensor's numbers and bits stand, and the numbers unpacked."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedsieve.wire.known import Array, WireError
from fedsieve.wire.layout import BITS, DTYPES, OWN, OWN_BY_KIND
from fedsieve.wire.plan import Plan
from fedsieve.wire.streams import unpack


@dataclass(frozen=True, slots=True)
class Stream:
    """How it is packed, its bytes, and how many numbers it holds."""

    way: int
    data: memoryview
    count: int


@dataclass(frozen=True, slots=True)
class StreamSlice:
    """A tensor's numbers in a column: in a stream, from a place on."""

    stream: Stream
    start: int
    count: int


@dataclass(frozen=True, slots=True)
class PooledStream:
    """A stream of several tensors: which, and how many of its numbers each has."""

    stream: Stream
    members: list[tuple[int, int]]


class Columns:
    """The streams of every column. A pool is unpacked once, as a whole; one of a single tensor is its own stream."""

    def __init__(self, plan: Plan):
        self.plan, self.budget = plan, plan.budget
        self.own = OWN_BY_KIND if plan.by_kind else OWN
        self.parts: list[dict[int, StreamSlice]] = [{} for _ in plan.leaves]
        self.first_bit: list[int] = []
        self.pools: list[list[PooledStream]] = []
        self.open: dict[tuple[int, int], Array] = {}
        self.held = self.find()

    def find(self) -> Array:
        """Find every stream of every column, the pools first, and return the bits; nothing may follow them."""
        pools: list[dict[str, int]] = [{} for _ in range(BITS)]
        own: list[list[tuple[int, int]]] = [[] for _ in range(BITS)]
        pooled: list[list[tuple[int, str, int, int]]] = [[] for _ in range(BITS)]
        many = 0
        for i, leaf in enumerate(self.plan.leaves):
            self.first_bit.append(many)
            for at, count in leaf.columns():
                if at == BITS:
                    many += count
                elif count >= self.own:
                    own[at].append((i, count))
                elif count:
                    start = pools[at].get(leaf.pool, 0)
                    pooled[at].append((i, leaf.pool, start, count))
                    pools[at][leaf.pool] = start + count
        for at in range(BITS):
            streams = {kind: self.stream(count) for kind, count in pools[at].items()}
            members = {kind: [(i, count) for i, k, _, count in pooled[at] if k == kind] for kind in streams}
            self.pools.append([PooledStream(streams[kind], found) for kind, found in members.items() if len(found) > 1])
            for i, kind, start, count in pooled[at]:
                self.parts[i][at] = StreamSlice(streams[kind], start, count)
            for i, count in own[at]:
                self.parts[i][at] = StreamSlice(self.stream(count), 0, count)
        held = np.frombuffer(self.plan.take((many + 7) // 8), np.uint8)
        if many % 8 and held[-1] >> (many % 8):
            raise WireError("bits set beyond the last one")
        if self.plan.at != self.plan.end:
            raise WireError(f"{self.plan.end - self.plan.at} bytes after the end of the message")
        return held

    def stream(self, count: int) -> Stream:
        """Find the next stream."""
        size, way = divmod(self.plan.varint(), 4)
        return Stream(way, self.plan.take(size), count)

    def unpack(self, at: int) -> None:
        """Unpack the pools of a column."""
        for stream in (pool.stream for pool in self.pools[at]):
            self.budget.draw(stream.count * DTYPES[at].itemsize)
            self.open[at, id(stream)] = numbers = np.empty(stream.count, DTYPES[at])
            unpack(stream.way, stream.data, numbers, self.budget)

    def forget(self, at: int) -> None:
        """Forget the pools of a column, whose numbers nobody needs any more."""
        for stream in (pool.stream for pool in self.pools[at]):
            del self.open[at, id(stream)]
            self.budget.give(stream.count * DTYPES[at].itemsize)

    def take(self, i: int, at: int, into: Array | None = None) -> tuple[Array, int]:
        """Return the i-th tensor's numbers in a column, in ``into`` if it is given; and what was set aside for them."""
        part = self.parts[i].get(at)
        if part is None:
            return np.empty(0, DTYPES[at]), 0
        numbers, size = into.view(DTYPES[at]) if into is not None else None, 0
        if part.count < part.stream.count:
            return self.open[at, id(part.stream)][part.start : part.start + part.count], 0
        if numbers is None:
            size = part.count * DTYPES[at].itemsize
            self.budget.draw(size)
            numbers = np.empty(part.count, DTYPES[at])
        unpack(part.stream.way, part.stream.data, numbers, self.budget)
        return numbers, size

    def bits(self, i: int, part: slice) -> Array:
        """Return bits of the i-th tensor as booleans."""
        first, last = self.first_bit[i] + part.start, self.first_bit[i] + part.stop
        window = np.unpackbits(self.held[first // 8 : (last + 7) // 8], bitorder="little")
        return window[first % 8 : first % 8 + last - first].view(bool)
