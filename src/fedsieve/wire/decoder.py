"""The decoder: puts together the tensors that the plan tells of, out of columns, within the message's budget."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedsieve.types import Sparse
from fedsieve.wire.known import NOTHING, TYPES, Array, Known, WireError, array
from fedsieve.wire.plan import BITS, BOOL, DENSE, DTYPES, GAP, NARROW, OWN, OWN_BY_KIND, Decoded, Leaf, Plan, column
from fedsieve.wire.positions import ALL, GAPS, MASK, RANKED, from_gaps, parts, positions_of, ranking_of, scatter
from fedsieve.wire.streams import unpack
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


@dataclass(frozen=True, slots=True)
class Stream:
    """How it is packed, its bytes, how many numbers it holds, and which tensors have how many of them."""

    way: int
    data: memoryview
    count: int
    members: list[tuple[int, int]]


class Columns:
    """The streams of every column. A pool is unpacked once, as a whole; one of a single tensor is its own stream."""

    def __init__(self, plan: Plan):
        self.plan, self.budget = plan, plan.budget
        self.own = OWN_BY_KIND if plan.by_kind else OWN
        self.parts: list[dict[int, tuple[Stream, int, int]]] = [{} for _ in plan.leaves]
        """Of every tensor its numbers in each column: in which stream, from where on, and how many."""
        self.first_bit: list[int] = []
        self.pools: list[list[Stream]] = []
        """Of every column the streams of several tensors."""
        self.open: dict[tuple[int, int], Array] = {}
        self.bitmap = self.find()

    def find(self) -> Array:
        """Find every stream of every column, the pools first, and return the bits; nothing may follow them."""
        pools: list[dict[str, list[tuple[int, int]]]] = [{} for _ in range(BITS)]
        own: list[list[tuple[int, int]]] = [[] for _ in range(BITS)]
        many = 0
        for i, leaf in enumerate(self.plan.leaves):
            self.first_bit.append(many)
            for at, count in leaf.columns():
                if at == BITS:
                    many += count
                elif count >= self.own:
                    own[at].append((i, count))
                elif count:
                    pools[at].setdefault(leaf.pool, []).append((i, count))
        for at in range(BITS):
            streams = [self.stream(at, members) for members in pools[at].values()]
            self.pools.append([stream for stream in streams if len(stream.members) > 1])
            for member in own[at]:
                self.stream(at, [member])
        bitmap = np.frombuffer(self.plan.take((many + 7) // 8), np.uint8)
        if many % 8 and bitmap[-1] >> (many % 8):
            raise WireError("bits set beyond the last one")
        if self.plan.at != self.plan.end:
            raise WireError(f"{self.plan.end - self.plan.at} bytes after the end of the message")
        return bitmap

    def stream(self, at: int, members: list[tuple[int, int]]) -> Stream:
        """Find the next stream, and where in it the numbers of each of its tensors begin."""
        size, way = divmod(self.plan.varint(), 4)
        stream, start = Stream(way, self.plan.take(size), sum(count for _, count in members), members), 0
        for i, count in members:
            self.parts[i][at], start = (stream, start, count), start + count
        return stream

    def unpack(self, at: int) -> None:
        """Unpack the pools of a column."""
        for stream in self.pools[at]:
            self.budget.draw(stream.count * DTYPES[at].itemsize)
            self.open[at, id(stream)] = numbers = np.empty(stream.count, DTYPES[at])
            unpack(stream.way, stream.data, numbers, self.budget)

    def forget(self, at: int) -> None:
        """Forget the pools of a column, whose numbers nobody needs any more."""
        for stream in self.pools[at]:
            del self.open[at, id(stream)]
            self.budget.give(stream.count * DTYPES[at].itemsize)

    def take(self, i: int, at: int, into: Array | None = None) -> tuple[Array, int]:
        """Return the i-th tensor's numbers in a column, in ``into`` if it is given; and what was set aside for them."""
        part = self.parts[i].get(at)
        if part is None:
            return np.empty(0, DTYPES[at]), 0
        stream, start, count = part
        if count < stream.count:
            return self.open[at, id(stream)][start : start + count], 0
        size = 0 if into is not None else count * DTYPES[at].itemsize
        self.budget.draw(size)
        numbers = np.empty(count, DTYPES[at]) if into is None else into.view(DTYPES[at])
        unpack(stream.way, stream.data, numbers, self.budget)
        return numbers, size

    def bits(self, i: int, part: slice) -> Array:
        """Return bits of the i-th tensor as booleans."""
        first, last = self.first_bit[i] + part.start, self.first_bit[i] + part.stop
        window = np.unpackbits(self.bitmap[first // 8 : (last + 7) // 8], bitorder="little")
        return window[first % 8 : first % 8 + last - first].view(bool)


NUMPY_TYPES = tuple(map(np.dtype, ("<f4", "<f8", "<i2", "<i2", "<i8", "<i4", "u1", "?")))
"""As what a tensor of each of ``TYPES`` is made: the bits of what numpy does not know, or does not tell apart."""
UNSIGNED = np.zeros(1, bool)


def decode(data: bytes, known: Known | None = None) -> Decoded:
    """Return the tree that ``encode`` was given, under the same ``known``.

    Raises WireError for anything that is not exactly a message, or that would set aside more than it may (``budget``):
    with a manifest, twice the model. Without ``known``, NaN and infinities are let through, and tensors may come to
    1,024 times the message.
    """
    plan = Plan(data, known or NOTHING)
    return _filled(plan.root, iter(_Decoder(plan).tensors()))


def _filled(tree: Decoded, tensors: Iterator[Tensor | Sparse]) -> Decoded:
    """Return the plan's tree with tensors, in the plan's order, in the places of its leaves."""
    return {
        name: _filled(value, tensors)
        if isinstance(value, dict)
        else next(tensors)
        if isinstance(value, Leaf)
        else value
        for name, value in tree.items()
    }


class _Decoder:
    """Makes the tensors of a plan: first where all of them have values, then the values, of the largest tensor first.

    So gaps are gone before there are values, and streams are unpacked while little else is set aside.
    """

    def __init__(self, plan: Plan):
        self.plan, self.known, self.budget, self.block = plan, plan.known, plan.budget, plan.budget.block
        self.columns = Columns(plan)

    def tensors(self) -> list[Tensor | Sparse]:
        """Return all tensors."""
        leaves, tensors = self.plan.leaves, dict[int, Tensor | Sparse]()
        self.columns.unpack(GAP)
        positions = [self.positions(i, leaf) for i, leaf in enumerate(leaves)]
        self.columns.forget(GAP)
        for at in range(GAP + 1, BITS):
            if at in NARROW:
                self.columns.unpack(at)
                continue
            for pool in self.columns.pools[at]:
                tensors.update(self.pooled(at, pool, positions))
        left = [i for i in range(len(leaves)) if i not in tensors]
        for i in sorted(left, key=lambda i: -leaves[i].count * NUMPY_TYPES[leaves[i].dtype].itemsize):
            tensors[i] = self.own(i, leaves[i], positions[i])
            positions[i] = None
        return [tensors[i] for i in range(len(leaves))]

    def pooled(self, at: int, pool: Stream, positions: list[Array | None]) -> Iterator[tuple[int, Tensor | Sparse]]:
        """Yield a pool's tensors, all in one array: unpacked at its end, each moves to its place in turn."""
        leaves, form = self.plan.leaves, DTYPES[at]
        sizes = {i: leaves[i].numel if leaves[i].kind == DENSE else count for i, count in pool.members}
        total = sum(sizes.values())
        self.budget.draw(total * form.itemsize)
        array = np.empty(total, form)
        source, place = total - pool.count, 0
        unpack(pool.way, pool.data, array[source:], self.budget)
        for i, count in pool.members:
            numbers, whole = array[source : source + count], array[place : place + sizes[i]]
            source, place = source + count, place + sizes[i]
            yield i, self.placed(i, leaves[i], positions[i], numbers, whole)
            positions[i] = None

    def own(self, i: int, leaf: Leaf, positions: Array | None) -> Tensor | Sparse:
        """Return a tensor of streams of its own, or whose numbers are narrower than its elements."""
        at, dtype = column(leaf.mode, leaf.dtype), NUMPY_TYPES[leaf.dtype]
        size = leaf.numel if leaf.kind == DENSE else leaf.count
        self.budget.draw(size * dtype.itemsize)
        whole = np.empty(size, dtype)
        values = whole[size - leaf.count :]
        if at == BITS:
            return self.placed(i, leaf, positions, values, whole)
        numbers, size = self.columns.take(i, at, None if at in NARROW else values)
        tensor = self.placed(i, leaf, positions, numbers, whole)
        self.budget.give(size)
        return tensor

    def placed(self, i: int, leaf: Leaf, positions: Array | None, numbers: Array, whole: Array) -> Tensor | Sparse:
        """Return a tensor in ``whole``, made of its column's numbers, which may stand in the same memory."""
        dtype = NUMPY_TYPES[leaf.dtype]
        whole = whole.view(dtype)
        values = numbers.view(dtype) if numbers.dtype.itemsize == dtype.itemsize else whole[len(whole) - leaf.count :]
        self.convert(i, leaf, positions, numbers, values)
        where = positions if leaf.kind == DENSE else None
        if where is not None or values.ctypes.data != whole.ctypes.data:
            with self.budget.at_work(len(whole)):
                scatter(values, whole, where, self.block)
        if where is not None:
            self.budget.give(where.nbytes)
        tensor = torch.from_numpy(whole).view(TYPES[leaf.dtype])
        if self.known.finite and tensor.is_floating_point() and not finite(tensor):
            raise WireError(f"{leaf.name} is not finite")
        if leaf.kind == DENSE:
            return tensor.view(leaf.shape)
        positions = self.everywhere(leaf.numel) if positions is None else positions
        return Sparse(tensor, torch.from_numpy(positions), leaf.shape)

    def everywhere(self, numel: int) -> Array:
        """Return the positions of all elements, as bits."""
        self.budget.draw((numel + 7) // 8)
        bits = np.full((numel + 7) // 8, 255, np.uint8)
        if numel % 8:
            bits[-1] = (1 << numel % 8) - 1
        return bits

    def positions(self, i: int, leaf: Leaf) -> Array | None:
        """Return where a tensor has values, as ``Sparse.positions`` has it; None: everywhere."""
        if leaf.way == ALL:
            return None
        if leaf.way == MASK:
            return self.positions_of(array(self.known.masks[leaf.name]), leaf.count)
        gaps, size = self.columns.take(i, GAP)
        if leaf.way == GAPS and leaf.sharing.unit == 1 and 8 * leaf.count <= leaf.numel:
            self.budget.draw(8 * leaf.count)
            positions = np.empty(leaf.count, np.int64)
            with self.budget.at_work(leaf.count):
                for part, index in from_gaps(gaps, leaf.numel, self.block):
                    positions[part] = index
        else:
            with self.budget.lent(leaf.numel):
                positions = self.positions_of(self.mask_of_elements(leaf, gaps), leaf.count)
        self.budget.give(size)
        return positions

    def positions_of(self, mask: Array, count: int) -> Array:
        """Return where a mask is true, within the budget."""
        self.budget.draw(min(8 * count, (len(mask) + 7) // 8))
        return positions_of(mask, count, self.block)

    def mask_of_elements(self, leaf: Leaf, gaps: Array) -> Array:
        """Return a mask of the elements that gaps tell of, each or in units that rows share."""
        if leaf.sharing.unit == 1:
            return self.mask(leaf, gaps, leaf.numel)
        units = leaf.sharing.units(leaf.numel)
        with self.budget.lent(units):
            mask = leaf.sharing.spread(self.mask(leaf, gaps, units), leaf.numel)
        if (count := int(np.count_nonzero(mask))) != leaf.count:
            raise WireError(f"{leaf.count} positions announced, {count} found")
        return mask

    def mask(self, leaf: Leaf, gaps: Array, numel: int) -> Array:
        """Return a mask, of ``numel`` elements or units, of what gaps tell of, by themselves or as flips."""
        if leaf.way == GAPS:
            mask = np.zeros(numel, bool)
            with self.budget.at_work(len(gaps)):
                for _, index in from_gaps(gaps, numel, self.block):
                    mask[index] = True
            return mask
        edge = leaf.edge if leaf.way == RANKED else None
        order = ranking_of(self.known, leaf.name, edge, self.budget, leaf.sharing)
        if order is None:
            raise WireError(f"too many elements of {leaf.name!r} above the edge at step {leaf.edge}")
        mask = order.first(leaf.units if leaf.way == RANKED else order.many)
        with self.budget.at_work(len(gaps)):
            for _, places in from_gaps(gaps, numel, self.block):
                mask[order.elements(places)] ^= True
        if (count := int(np.count_nonzero(mask))) != leaf.units:
            raise WireError(f"{leaf.units} positions announced, {count} found")
        return mask

    def convert(self, i: int, leaf: Leaf, positions: Array | None, numbers: Array, values: Array) -> None:
        """Make values of a column's numbers: in ``values``, which may be the numbers themselves."""
        if leaf.mode != TYPED:
            with self.budget.at_work(leaf.numel):
                words = values.view(np.uint32)
                for part, base in self.bases(leaf, positions):
                    words[part] = self.words(i, leaf, numbers[part], part, base)
        elif leaf.dtype == BOOL or numbers.dtype.itemsize != values.dtype.itemsize:
            with self.budget.at_work(leaf.count):
                for part, _ in parts(None, leaf.count, self.block):
                    if leaf.dtype != BOOL and numbers[part].max() > 255:
                        raise WireError("a byte beyond 255")
                    values[part] = self.columns.bits(i, part) if leaf.dtype == BOOL else numbers[part]

    def bases(self, leaf: Leaf, positions: Array | None) -> Iterable[tuple[slice, Array]]:
        """Yield a tensor's values block by block, and what of the base distances count from."""
        if leaf.mode not in (DISTANCE, BF16_DISTANCE):
            return ((part, UNSIGNED) for part, _ in parts(None, leaf.count, self.block))
        words, mask = self.plan.base(leaf.name, leaf.way, leaf.shape, leaf.count)
        where = positions if mask is None else positions_of(mask, leaf.count, self.block)
        return ((part, words[elements]) for part, elements in parts(where, len(words), self.block))

    def words(self, i: int, leaf: Leaf, numbers: Array, part: slice, base: Array) -> Array:
        """Return the float32 bits (uint32) of a block of values."""
        if leaf.mode in (INT8, INT4):
            return multiples(numbers, leaf.scale, leaf.mode)
        if leaf.mode == DISTANCE:
            return at_distance(numbers, base)
        if leaf.mode == BF16_DISTANCE:
            return from_bf16(at_bf16_distance(numbers, to_bf16(base)))
        signs = self.columns.bits(i, part) if leaf.mode in (SIGNED, BF16) else UNSIGNED
        words = signed(numbers, signs)
        return from_bf16(words) if leaf.mode in (BF16, BF16_UNSIGNED) else words
