"""A second decoder, written from docs/reference/wire.md alone: plain Python, slow, and nothing of fedsieve in it.

It takes what is a message and does not refuse what is none. Tensors come out as ``(type, shape, positions, values)``:
positions of those that are sparse, else None; float values as their bits.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import zstandard
from pcodec import wrapped

FORMS = ("<u4", "<u4", "<i4", "<u2", "<u2", "<f4", "<f8", "<u2", "<u2", "<i8", "<i4", "<u2")
FLOAT32, UINT8, BOOL = 0, 6, 7
Shape = tuple[int, ...]


@dataclass
class Known:
    """What the receiver knows: (name, type, shape) of the manifest; the bits of the base's tensors; masks as bits."""

    manifest: list[tuple[str, int, Shape]] = field(default_factory=list)
    base: dict[str, list[int]] = field(default_factory=dict)
    masks: dict[str, list[bool]] = field(default_factory=dict)

    def digests(self) -> tuple[bytes, bytes]:
        """Of the manifest, and of the base and the masks."""
        manifest, base = b"fedsieve manifest\0", b"fedsieve base\0"
        for name, kind, shape in self.manifest:
            text = name.encode()
            manifest += (
                struct.pack("<I", len(text)) + text + bytes([kind, len(shape)]) + struct.pack(f"<{len(shape)}Q", *shape)
            )
        bits = {n: np.packbits(np.array(m)).tobytes() for n, m in self.masks.items()}
        for held in ({n: struct.pack(f"<{len(v)}I", *v) for n, v in self.base.items()}, bits):
            for name in sorted(held):
                base += struct.pack("<IQ", len(name.encode()), len(held[name])) + name.encode() + held[name]
        return hashlib.sha256(manifest).digest()[:16], hashlib.sha256(base).digest()[:16]

    def entry(self, name: str) -> tuple[int, Shape] | None:
        """A tensor's type and shape in the manifest."""
        return next(((kind, shape) for own, kind, shape in self.manifest if own == name), None)


class Reader:
    """The bytes of a message from first to last."""

    def __init__(self, data: bytes):
        self.data, self.at = data, 0

    def take(self, size: int) -> bytes:
        self.at += size
        return self.data[self.at - size : self.at]

    def varint(self) -> int:
        number = shift = 0
        while True:
            group = self.take(1)[0]
            number |= (group & 127) << shift
            if group < 128:
                return number
            shift += 7


@dataclass
class Leaf:
    """A tensor of the plan."""

    name: str
    sparse: bool
    dtype: int
    shape: Shape
    mode: int
    way: int
    count: int
    told: int
    units: int
    unit: int
    edge: int
    scale: float
    pool: str
    own: int

    def columns(self) -> Iterator[tuple[int, int]]:
        """Which columns it fills, with how many numbers; 12 stands for bits."""
        by_mode = {1: 1, 2: 1, 3: 2, 4: 3, 5: 3, 6: 4, 7: 4, 8: 3}
        yield by_mode.get(self.mode, 12 if self.dtype == BOOL else 5 + self.dtype), self.count
        if self.mode in (1, 4):
            yield 12, self.count
        if self.way >= 2:
            yield 0, self.told


def decode(data: bytes, known: Known | None = None) -> dict[str, Any]:
    """Return the tree of a message."""
    known = known or Known()
    assert data[:4] == b"FSV3"
    flags, at, digests = data[4], 5, known.digests()
    for bit in (0, 1):
        if flags >> bit & 1:
            assert data[at : at + 16] == digests[bit]
            at += 16
    length, padding = struct.unpack_from("<II", data, at)
    plan = Reader(data[at + 8 : at + 8 + length])
    leaves: list[Leaf] = []
    root = tree(plan, known, bool(flags & 4), leaves, [-1])
    streams = Reader(data[at + 8 + length : len(data) - padding])
    numbers = columns(streams, leaves)
    for leaf in leaves:
        values = {}
        for column, many in leaf.columns():
            source = numbers[column, leaf.pool if many < leaf.own and column < 12 else None]
            values[column] = [next(source) for _ in range(many)]
        place(root, leaf, tensor(leaf, values, known))
    return root


def place(root: dict[str, Any], leaf: Leaf, value: Any) -> None:
    """Put a tensor where the plan has its leaf."""
    for name, held in root.items():
        if held is leaf:
            root[name] = value
        elif isinstance(held, dict):
            place(held, leaf, value)


def tree(plan: Reader, known: Known, by_kind: bool, leaves: list[Leaf], last: list[int]) -> dict[str, Any]:
    """Read a tree of the plan; ``last`` holds the place of the last name that stood in the manifest."""
    found: dict[str, Any] = {}
    for _ in range(plan.varint()):
        head = plan.take(1)[0]
        number = last[0] + 1 if head & 4 else plan.varint() - 1
        if number >= 0:
            last[0], name = number, known.manifest[number][0]
        else:
            name = plan.take(plan.varint()).decode()
        if head & 3 == 0:
            found[name] = tree(plan, known, by_kind, leaves, last)
        elif head & 3 == 1:
            found[name] = struct.unpack("<d", plan.take(8))[0]
        else:
            found[name] = leaf(plan, known, by_kind, name, head)
            leaves.append(found[name])
    return found


def leaf(plan: Reader, known: Known, by_kind: bool, name: str, head: int) -> Leaf:
    entry = known.entry(name)
    if head & 8:
        assert entry is not None
        dtype, shape = entry
    else:
        dtype, dimensions = plan.take(2)
        shape = tuple(plan.varint() for _ in range(dimensions))
    mode, way = divmod(plan.take(1)[0], 8)
    count = math.prod(shape) if way == 0 else sum(known.masks[name]) if way == 1 else plan.varint()
    unit, units = (plan.varint(), plan.varint()) if way > 4 else (1, count)
    way -= 3 * (way > 4)
    told = plan.varint() if way >= 3 else units
    edge = plan.varint() if way == 4 else 0
    scale = struct.unpack("<f", plan.take(4))[0] if mode in (6, 7) else 0.0
    vector = max(len(shape), len(entry[1]) if entry else 0) < 2
    pool, own = (f"{vector} {name.split('.')[-1]}", 512) if by_kind else ("", 4096)
    return Leaf(name, head & 3 == 3, dtype, shape, mode, way, count, told, units, unit, edge, scale, pool, own)


def columns(data: Reader, leaves: list[Leaf]) -> dict[tuple[int, str | None], Iterator[Any]]:
    """The numbers of every column's pools (by name) and own streams (None), one after the other, and the bits."""
    found: dict[tuple[int, str | None], Iterator[Any]] = {}
    for column, form in enumerate(FORMS):
        pools: dict[str, int] = {}
        own = []
        for one in leaves:
            for at, many in one.columns():
                if at == column and many >= one.own:
                    own.append(many)
                elif at == column and many:
                    pools[one.pool] = pools.get(one.pool, 0) + many
        for pool, many in pools.items():
            found[column, pool] = iter(stream(data, many, np.dtype(form)))
        found[column, None] = iter([number for many in own for number in stream(data, many, np.dtype(form))])
        for one in leaves:
            found.setdefault((column, one.pool), iter([]))
    found[12, None] = iter([byte >> i & 1 for byte in data.take(len(data.data)) for i in range(8)])
    return found


def stream(data: Reader, many: int, form: np.dtype[Any]) -> list[Any]:
    """Unpack a stream."""
    length, packing = divmod(data.varint(), 4)
    body, signed = data.take(length), form.kind == "i"
    if packing == 0:
        return list(np.frombuffer(body, form).tolist()) if form.kind != "f" else list(np.frombuffer(body, form))
    if packing == 3:
        return list(body)
    if packing == 1:
        file, at = wrapped.FileDecompressor.new(body)
        out = np.empty(many, form)
        chunk, read = file.chunk_decompressor(body[at:], f"{form.kind}{8 * form.itemsize}")
        at, pages = at + read, max(1, min(8, many // 1024), many // 65536)
        for page in np.array_split(out, pages):
            at += chunk.read_page_into(body[at:], len(page), page)[1]
        return list(out) if form.kind == "f" else list(out.tolist())
    planes, at = [], 4 * form.itemsize
    for size in struct.unpack_from(f"<{form.itemsize}I", body):
        planes.append(zstandard.ZstdDecompressor().decompress(body[at : at + size]))
        at += size
    whole = [int.from_bytes(bytes(parts), "little") for parts in zip(*planes, strict=True)]
    if form.kind == "f":
        return list(np.array(whole, f"<u{form.itemsize}").view(form))
    return [n >> 1 ^ -(n & 1) for n in whole] if signed else whole


def positions(one: Leaf, gaps: list[int], known: Known) -> list[int]:
    """The elements that a tensor has."""
    numel = math.prod(one.shape)
    if one.way == 0:
        return list(range(numel))
    if one.way == 1:
        return [i for i, held in enumerate(known.masks[one.name]) if held]
    places, at = [], -1
    for gap in gaps:
        at += gap + 1
        places.append(at)
    inner = numel // one.shape[0] if one.unit > 1 else 0
    members = [[i] for i in range(numel)]
    if one.unit > 1:
        groups = range(-(-one.shape[0] // one.unit))
        channels = [range(one.unit * g, min(one.unit * (g + 1), one.shape[0])) for g in groups]
        members = [[r * inner + j for r in own] for own in channels for j in range(inner)]
    if one.way == 2:
        return sorted(i for place in places for i in members[place])
    numel = len(members)
    sizes = [max(known.base[one.name][i] & 0x7FFFFFFF for i in own) for own in members]
    if one.way == 3:
        likely = [i for i in range(numel) if sizes[i]]
        foreseen = len(likely)
    else:
        steps = [size >> 19 for size in sizes]
        likely = [i for i in range(numel) if sizes[i] and steps[i] >= one.edge - 8]
        likely.sort(key=lambda i: (max(0, one.edge + 16 - steps[i]), i))
        foreseen = min(one.units, len(likely))
    order = likely + sorted({*range(numel)} - {*likely})
    changed = {*places}
    kept = [i for place, i in enumerate(order) if (place < foreseen) != (place in changed)]
    return sorted(i for unit in kept for i in members[unit])


def ordered(u: int) -> int:
    """The order map: bits of a float32 to a signed whole number; ``unordered`` undoes it."""
    return u if u < 2**31 else ~(u & 0x7FFFFFFF)


def unordered(o: int) -> int:
    return o if o >= 0 else ~o | 0x80000000


def wrap(number: int, bits: int) -> int:
    """A number modulo 2^bits, with its sign."""
    half = 1 << bits - 1
    return (number + half) % (2 * half) - half


def half_of(u: int) -> int:
    """The bfloat16 nearest to a finite float32, even where two are."""
    return (u + 0x7FFF + (u >> 16 & 1)) >> 16


def tensor(one: Leaf, columns: dict[int, list[Any]], known: Known) -> Any:
    """Put a tensor together."""
    at = positions(one, columns.get(0, []), known)
    first = next(iter(columns))
    numbers, signs = columns[first], columns.get(12, [])
    base = known.base.get(one.name, [])
    if len(one.shape) == 1 and one.way == 0 and sum(known.masks.get(one.name, [])) == len(at) and base:
        base = [u for u, held in zip(base, known.masks[one.name], strict=True) if held]
    values: list[Any] = numbers
    if one.mode in (1, 4):
        shift = 31 if one.mode == 1 else 15
        values = [n | sign << shift for n, sign in zip(numbers, signs, strict=True)]
    elif one.mode == 3:
        values = [unordered(wrap(ordered(base[i]) + n, 32)) for i, n in zip(at, numbers, strict=True)]
    elif one.mode == 8:
        halves = [half_of(base[i]) for i in at]
        steps = [n >> 1 ^ -(n & 1) for n in numbers]
        reached = [wrap((h if h < 2**15 else ~(h & 0x7FFF)) + s, 16) for h, s in zip(halves, steps, strict=True)]
        values = [o if o >= 0 else ~o | 0x8000 for o in reached]
    elif one.mode in (6, 7):
        whole = [n >> 1 ^ -(n & 1) for n in numbers]
        values = [bits_of(np.float32(n) * np.float32(one.scale)) for n in whole]
    elif one.mode == 0 and one.dtype == FLOAT32:
        values = [bits_of(n) for n in numbers]
    if one.mode in (4, 5, 8):
        values = [half << 16 for half in values]
    if one.sparse or one.way == 0:
        return one.dtype, one.shape, at if one.sparse else None, values
    dense = dict(zip(at, values, strict=True))
    return one.dtype, one.shape, None, [dense.get(i, 0) for i in range(math.prod(one.shape))]


def bits_of(value: Any) -> int:
    """The bits of a float32."""
    return int(np.asarray(value, "<f4").view("<u4"))
