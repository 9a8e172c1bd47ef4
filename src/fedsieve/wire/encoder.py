"""The encoder: tries what the receiver knows, tensor by tensor, and keeps the smallest."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping
from functools import partial

import numpy as np
import torch
from torch import Tensor

from fedsieve.types import Sparse, Tree
from fedsieve.wire import plan
from fedsieve.wire.known import NOTHING, TYPES, Array, Known, WireError, array, padding
from fedsieve.wire.plan import ALIKE, DENSE, GAP, NEXT, NUMBER, OWN, OWN_BY_KIND, SPARSE, TREE, varint
from fedsieve.wire.positions import ALL, CHANGES, GAPS, IN_UNITS, MASK, RANKED, edge_of, gaps_of, ranking_of
from fedsieve.wire.sharing import Sharing, find_sharing
from fedsieve.wire.streams import Packing, Stream, back_ends, pack
from fedsieve.wire.values import (
    BF16,
    BF16_DISTANCE,
    BF16_UNSIGNED,
    DISTANCE,
    LOSSY,
    SIGNED,
    TYPED,
    UNSIGNED,
    bf16_distance,
    distance,
    magnitudes,
    negative,
    quantised,
    to_bf16,
)

FEW, SAMPLE = 256, 1024
"""Fewer values are not worth a trial; of more, so many are tried."""


def encode(tree: Tree, known: Known | None = None, values: str = "f32", back_end: str = "") -> bytes:
    """Return the message for a tree of tensors, sparse tensors and numbers.

    ``known`` is what the receiver knows. ``values`` rounds float32: ``bf16`` all; ``int8`` and ``int4`` tensors of two
    dimensions and more, the others to bf16. ``back_end``: pcodec or zstd, as a rule the better one that is installed.
    """
    if values not in LOSSY:
        raise WireError(f"values go as {', '.join(LOSSY)}, not as {values!r}")
    installed = back_ends()
    if not installed or (back_end and back_end not in installed):
        raise WireError(f"{back_end or 'pcodec or zstandard'} is not installed here")
    with Packing(torch.get_num_threads()) as packing:
        writer = _Writer(known or NOTHING, LOSSY[values], back_end or installed[0], packing)
        writer.tree(tree, 1)
        return writer.message()


class _Writer:
    """The plan so far, and the columns of numbers: short ones to be pooled, long ones packed already."""

    def __init__(self, known: Known, lossy: int, back: str, packing: Packing):
        self.known, self.lossy, self.back, self.packing = known, lossy, back, packing
        self.place = known.manifest.place if known.manifest else {}
        self.plan, self.last, self.unfolded, self.many = bytearray(), -1, 0, 0
        self.kind = ""
        self.columns: list[list[tuple[str, Array, Stream | None]]] = [[] for _ in plan.COLUMNS]
        """Of every column the tensors' kinds and numbers, or the stream of those that have one of their own."""
        self.bits: list[Array] = []

    def message(self) -> bytes:
        known, flags, head = self.known, 0, b""
        if known.manifest:
            flags, head = plan.HAS_MANIFEST, known.manifest.digest
        if known.base or known.masks:
            flags, head = flags | plan.HAS_BASE, head + known.digest
        together, by_kind = self.streams(False), self.streams(True)
        if sum(map(len, by_kind)) < sum(map(len, together)):
            flags, together = flags | plan.BY_KIND, by_kind
        parts = [plan.MAGIC, bytes([flags]), head, b"", bytes(self.plan), *together]
        if self.bits:
            parts.append(np.packbits(np.concatenate(self.bits), bitorder="little").tobytes())
            self.bits.clear()
        pad = padding(known, sum(map(len, parts)) + 8, self.unfolded, self.many)
        parts[3] = struct.pack("<II", len(self.plan), pad)
        return b"".join([*parts, bytes(pad)])

    def streams(self, by_kind: bool) -> list[bytes]:
        """Return every column's streams: its pools, one or one a kind, then the tensors' own."""
        streams = []
        for at, column in enumerate(self.columns):
            pools: dict[str, list[Array]] = {}
            own = []
            for kind, numbers, stream in column:
                if stream or (by_kind and len(numbers) >= OWN_BY_KIND):
                    own.append(stream() if stream else self.stream(at, numbers))
                else:
                    pools.setdefault(kind if by_kind else "", []).append(numbers)
            streams += [self.stream(at, np.concatenate(pool)) for pool in pools.values()] + own
        return streams

    def stream(self, at: int, numbers: Array) -> bytes:
        way, data = pack(numbers, self.back, at >= plan.PLAIN)
        return varint(4 * len(data) + way) + data

    def put(self, at: int, numbers: Array, stream: bytes = b"") -> None:
        """Add to a column, the stream if it is packed already."""
        numbers = numbers.astype(plan.DTYPES[at], copy=False)
        if len(numbers) >= OWN:
            later = (lambda: stream) if stream else self.packing.begin(partial(self.stream, at), numbers)
            self.columns[at].append((self.kind, np.zeros(0, plan.DTYPES[at]), later))
        elif len(numbers):
            self.columns[at].append((self.kind, numbers, None))

    def tree(self, tree: Tree, depth: int) -> None:
        if depth > plan.DEEPEST:
            raise WireError(f"trees nest at most {plan.DEEPEST} deep")
        self.plan += varint(len(tree))
        self.many += len(tree)
        for name, value in tree.items():
            if isinstance(value, Mapping):
                self.head(TREE, name)
                self.tree(value, depth + 1)
            elif isinstance(value, Sparse):
                self.sparse(name, value)
            elif isinstance(value, Tensor):
                self.dense(name, value)
            else:
                self.head(NUMBER, name)
                self.plan += struct.pack("<d", value)

    def head(self, kind: int, name: str, dtype: torch.dtype | None = None, shape: tuple[int, ...] = ()) -> None:
        place, text = self.place.get(name, -1), name.encode()
        if len(text) > plan.LONGEST or len(shape) > plan.DIMENSIONS:
            raise WireError(f"a name of {len(text)} bytes or a tensor of {len(shape)} dimensions cannot be sent")
        alike = False
        if dtype is not None:
            if dtype not in TYPES:
                raise WireError(f"tensors of {dtype} cannot be sent")
            manifest = self.known.manifest
            alike = place >= 0 and manifest is not None and manifest.entries[place][1:] == (TYPES.index(dtype), shape)
        following = place >= 0 and place == self.last + 1
        self.plan.append(kind + NEXT * following + ALIKE * alike)
        if not following:
            self.plan += varint(place + 1) if place >= 0 else varint(0) + varint(len(text)) + text
        if place >= 0:
            self.last = place
        self.kind = plan.kind_of(self.known, name, shape)
        if dtype is not None and not alike:
            self.plan += bytes([TYPES.index(dtype), len(shape)]) + b"".join(map(varint, shape))

    def dense(self, name: str, value: Tensor) -> None:
        """Add a tensor: every element, or those that are not +0.0 where many are."""
        shape = tuple(value.shape)
        self.head(DENSE, name, value.dtype, shape)
        self.unfolded += plan.unfolded(value.numel(), value.element_size(), None, False)
        flat = array(value)
        if value.dtype != torch.float32:
            self.plan.append(8 * TYPED + ALL)
            self.typed(TYPES.index(value.dtype), flat)
            return
        words = flat.view(np.uint32)
        index, base = self.known.index(name), self.known.words(name)
        base = base if base is not None and len(base) == len(words) else None
        lossy = self.lossy_for(shape, name)
        zeros = len(words) - np.count_nonzero(words)
        if len(words) < 64 or 16 * zeros < len(words) or len(words) >= 2**32:
            if value.dim() == 1 and index is not None and len(index) == len(words):
                known = self.known.words(name)
                base = known[index] if known is not None else None
            self.floats(words, base, ALL, b"", lossy)
            return
        if index is not None and self.known.masks[name].numel() == len(words):
            inside = words[index]
            if np.count_nonzero(inside) == len(words) - zeros:
                self.floats(inside, None if base is None else base[index], MASK, b"", lossy)
                return
        way, fields, index = self.positions(name, np.flatnonzero(words), shape, base, True)
        self.floats(words[index], None if base is None else base[index], way, fields, lossy)

    def sparse(self, name: str, value: Sparse) -> None:
        """Add a sparse tensor."""
        shape, index, numel = tuple(value.shape), value.index.detach().cpu().numpy(), math.prod(value.shape)
        if len(index) and (index[0] < 0 or index[-1] >= numel or (index[1:] <= index[:-1]).any()):
            raise WireError(f"positions must rise strictly and lie below {numel}")
        if len(index) != value.values.numel():
            raise WireError(f"{value.values.numel()} values at {len(index)} positions")
        self.head(SPARSE, name, value.values.dtype, shape)
        base, mask = self.known.words(name), self.known.index(name)
        base = base if base is not None and len(base) == numel else None
        if len(index) == numel:
            how = ALL, b""
        elif mask is not None and self.known.masks[name].numel() == numel and np.array_equal(mask, index):
            how = MASK, b""
        else:
            how = self.positions(name, index, shape, base)[:2]
        ordered = how[0] > GAPS
        self.unfolded += plan.unfolded(numel, value.values.element_size(), len(index), ordered)
        flat = array(value.values)
        if value.values.dtype == torch.float32:
            here = None if base is None else base[index]
            self.floats(flat.view(np.uint32), here, *how, self.lossy_for(shape, name))
        else:
            self.plan += bytes([8 * TYPED + how[0]]) + how[1]
            self.typed(TYPES.index(value.values.dtype), flat)

    def lossy_for(self, shape: tuple[int, ...], name: str) -> int:
        """Return what float32 values are rounded to; values alone, on a mask, count as the weight they belong to."""
        return BF16 if self.lossy and self.known.dimensions(name, shape) < 2 else self.lossy

    def positions(
        self, name: str, index: Array, shape: tuple[int, ...], base: Array | None, fill: bool = False
    ) -> tuple[int, bytes, Array]:
        """Add positions in the smallest way; return the way, what the plan says of it, and the positions.

        ``fill``: some may be added, whose values are zeros, where rows then share them.
        """
        if len(index) and index[-1] >= 2**32:
            raise WireError("positions beyond 2^32 cannot be sent")
        sharing, units, index = find_sharing(index, shape, fill)
        ways = [] if base is None else [*self.changes(name, units, base, sharing)]
        if not ways or 2 * min(len(numbers) for numbers, _, _ in ways) > len(units):
            ways.append((gaps_of(units), GAPS, b""))
        streams = [self.stream(GAP, numbers) if len(ways) > 1 else b"" for numbers, _, _ in ways]
        stream, (numbers, way, fields) = min(zip(streams, ways, strict=True), key=lambda it: len(it[0]) + len(it[1][2]))
        self.put(GAP, numbers, stream)
        if sharing.unit > 1:
            way, fields = way + IN_UNITS, varint(sharing.unit) + varint(len(units)) + fields
        return way, varint(len(index)) + fields, index

    def changes(self, name: str, index: Array, base: Array, sharing: Sharing) -> Iterator[tuple[Array, int, bytes]]:
        """Yield the ways to tell positions by the base: the flips' gaps, the way, and what the plan says of it."""
        base = base if sharing.unit == 1 else sharing.largest(base)
        sparse = np.count_nonzero(base) < 0.9 * len(base)
        support = ranking_of(self.known, name, None, sharing=sharing) if sparse else None
        if support is not None:
            flips = support.flips(index, support.many)
            yield gaps_of(flips), CHANGES, varint(len(flips))
        edge = edge_of(base, len(index))
        sizes = ranking_of(self.known, name, edge, sharing=sharing)
        if sizes is not None:
            flips = sizes.flips(index, min(len(index), sizes.many))
            yield gaps_of(flips), RANKED, varint(len(flips)) + varint(edge)

    def floats(self, words: Array, base: Array | None, way: int, fields: bytes, lossy: int) -> None:
        """Add float32 values, and what the plan says of positions and values."""
        mode = lossy or _smallest(words, base, self.back)
        scale = b""
        near: Array | None = None
        if mode == BF16 and base is not None:
            near = self.near(to_bf16(words), to_bf16(base))
            mode = BF16 if near is None else BF16_DISTANCE
        if mode in (SIGNED, BF16):
            signed = words if mode == SIGNED else to_bf16(words)
            signs = negative(signed)
            if signs.any():
                self.bits.append(signs)
            else:
                mode = UNSIGNED if mode == SIGNED else BF16_UNSIGNED
            numbers = magnitudes(words) if signed is words else signed & np.uint16(0x7FFF)
        elif mode == DISTANCE and base is not None:
            numbers = distance(words, base)
        elif near is not None:
            numbers = near
        elif mode == TYPED:
            numbers = words.view(np.float32)
        else:
            number, numbers = quantised(words, mode)
            scale = struct.pack("<f", number)
        self.plan += bytes([8 * mode + way]) + fields + scale
        self.put(plan.column(mode, 0), numbers)

    def near(self, halves: Array, base: Array) -> Array | None:
        """Return bf16 values' distances from the base's, where some of them are smaller so than on their own."""
        steps, step = bf16_distance(halves, base), max(1, len(halves) // SAMPLE)
        some, alone = (np.ascontiguousarray(x[::step][:SAMPLE]) for x in (steps, halves & np.uint16(0x7FFF)))
        sizes = [len(pack(x, self.back)[1]) for x in (some, alone)]
        return steps if sizes[0] < sizes[1] + len(some) // 8 else None

    def typed(self, kind: int, flat: Array) -> None:
        """Add the values of another type than float32."""
        if kind == plan.BOOL:
            self.bits.append(flat.view(bool))
        else:
            at = plan.PLAIN + kind
            same = flat.itemsize == plan.DTYPES[at].itemsize
            self.put(at, flat.view(plan.DTYPES[at]) if same else flat.astype(plan.DTYPES[at]))


def _smallest(words: Array, base: Array | None, back: str) -> int:
    """Return the lossless mode that makes float32 values smallest, judged by some of them."""
    if len(words) < FEW:
        if base is None or not len(words):
            return SIGNED
        steps = np.abs(distance(words, base).astype(np.float64))
        span = magnitudes(words)
        plain = min(24.0, math.log2(int(span.max()) - int(span.min()) + 1))
        return DISTANCE if np.log2(steps + 1).mean() + 2 < plain else SIGNED
    step = max(1, len(words) // SAMPLE)
    some = np.ascontiguousarray(words[::step][:SAMPLE])
    if base is not None and np.array_equal(some, base[::step][:SAMPLE]):
        return DISTANCE
    sizes = {
        SIGNED: len(pack(magnitudes(some), back)[1]) + (len(some) // 8) * bool(negative(some).any()),
        TYPED: len(pack(some.view(np.float32), back, True)[1]),
    }
    if base is not None:
        sizes[DISTANCE] = len(pack(distance(some, base[::step][:SAMPLE]), back)[1])
    return min(sizes, key=lambda mode: sizes[mode])
