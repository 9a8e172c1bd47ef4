"""The plan: what a message says it holds, read and checked before anything is unpacked or set aside.

And what encoder and decoder agree on: the head, the kinds of entries, and the columns.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsieve.types import Sparse, Tree
from fedsieve.wire.known import DIGEST, TYPES, Array, Budget, Known, WireError, allowed, array, padding
from fedsieve.wire.positions import ALL, CHANGES, GAPS, IN_UNITS, LAST_EDGE, MASK, RANKED
from fedsieve.wire.sharing import EACH, MOST_ROWS, Sharing
from fedsieve.wire.values import BF16, BF16_DISTANCE, BF16_UNSIGNED, DISTANCE, INT4, INT8, SIGNED, TYPED, UNSIGNED

MAGIC = b"FSV3"
HAS_MANIFEST, HAS_BASE, BY_KIND = 1, 2, 4
"""Flags: the digest of a manifest, or of a base and masks, follows; short columns are pooled by kinds of tensors."""

TREE, NUMBER, DENSE, SPARSE = range(4)
NEXT, ALIKE = 4, 8
"""Added to a kind: the name is the manifest's next one; type and shape are the manifest's."""

DEEPEST = 8
LONGEST, DIMENSIONS = 4096, 64
"""Bytes that a name may have, and dimensions that a tensor may have."""
OWN, OWN_BY_KIND = 4096, 512
"""From so many numbers on, a tensor's column is a stream of its own; shorter ones are pooled, all or kind by kind."""

COLUMNS = ("<u4", "<u4", "<i4", "<u2", "<u2", "<f4", "<f8", "<u2", "<u2", "<i8", "<i4", "<u2")
"""The columns: gaps, magnitudes, distances, bf16 ones of either, multiples, then one for every type but bool."""

GAP, MAGNITUDE, STEP, HALF, MULTIPLE, PLAIN = range(6)
BITS = len(COLUMNS)
"""The last column, of signs and booleans: a bit each, all tensors' in one row, lowest bit first."""

DTYPES = tuple(np.dtype(form) for form in COLUMNS)
NARROW = {HALF, MULTIPLE, PLAIN + TYPES.index(torch.uint8)}
"""Columns whose numbers have another size than the elements they stand for."""
COLUMN = {SIGNED: MAGNITUDE, UNSIGNED: MAGNITUDE, DISTANCE: STEP, BF16: HALF, BF16_UNSIGNED: HALF}
COLUMN |= {INT8: MULTIPLE, INT4: MULTIPLE, BF16_DISTANCE: HALF}
"""The column that each way of sending values fills, TYPED apart."""

BOOL = len(TYPES) - 1

Decoded = dict[str, "Tensor | Sparse | float | Tree"]

HEAD = len(MAGIC) + 1 + 2 * DIGEST
"""Bytes of a message's longest head: magic, flags, and the digests of the manifest and of the base."""


def base_of(data: bytes) -> bytes:
    """Return the digest of the base that a message's head names, unverified; empty where it names none."""
    flags = data[len(MAGIC)] if len(data) > len(MAGIC) else 0
    start = len(MAGIC) + 1 + DIGEST * bool(flags & HAS_MANIFEST)
    return data[start : start + DIGEST] if flags & HAS_BASE else b""


@dataclass(frozen=True, slots=True)
class Leaf:
    """A tensor as the plan tells it.

    ``way`` and ``mode`` of positions and values; how many elements (``count``), or ``units`` that rows share, have
    values; how many gaps or flips tell of them (``told``), and about which edge.
    """

    name: str
    kind: int
    dtype: int
    shape: tuple[int, ...]
    way: int
    mode: int
    count: int
    units: int
    told: int
    edge: int
    sharing: Sharing
    scale: float
    pool: str
    """Which pool the tensor's short columns stand in."""

    @property
    def numel(self) -> int:
        """The elements of the dense tensor."""
        return math.prod(self.shape)

    @property
    def unfolded(self) -> int:
        """The bytes of the tensor that comes out, as they are counted (``unfolded`` below)."""
        count = None if self.kind == DENSE else self.count
        by_element = self.way in (CHANGES, RANKED) or self.sharing.unit > 1
        return unfolded(self.numel, TYPES[self.dtype].itemsize, count, by_element)

    def columns(self) -> list[tuple[int, int]]:
        """Return the columns that the tensor fills, and with how many numbers each."""
        columns = [(column(self.mode, self.dtype), self.count)]
        if self.mode in (SIGNED, BF16):
            columns.append((BITS, self.count))
        if self.way in (GAPS, CHANGES, RANKED):
            columns.append((GAP, self.told))
        return columns


class Plan:
    """A cursor over the message that never reads past its end."""

    def __init__(self, data: bytes, known: Known):
        self.data, self.at, self.end, self.known = memoryview(data), 0, len(data), known
        self.budget, self.many = Budget(known, len(data)), 0
        self.last, self.leaves = -1, list[Leaf]()
        self.root = self.plan()

    def take(self, size: int) -> memoryview:
        """Return the next bytes."""
        if size > self.end - self.at:
            raise WireError(f"the message ends early: {size} bytes wanted at {self.at}, {self.end - self.at} left")
        self.at += size
        return self.data[self.at - size : self.at]

    def numbers(self, form: str) -> tuple[Any, ...]:
        """Return the next numbers, of a fixed size."""
        return struct.unpack(form, self.take(struct.calcsize(form)))

    def varint(self) -> int:
        """Return the next whole number."""
        number = 0
        for shift in range(0, 63, 7):
            group = self.take(1)[0]
            number |= (group & 127) << shift
            if group < 128:
                if shift and not group:
                    raise WireError("a number with more groups than it needs")
                return number
        raise WireError("a number beyond 2^63")

    def plan(self) -> Decoded:
        """Read the head and the plan: the tree, with leaves in the tensors' places. Checks what they claim to be."""
        self.head()
        length, pad = self.numbers("<II")
        if pad > self.end - self.at:
            raise WireError(f"{pad} bytes of padding announced, {self.end - self.at} left")
        if np.count_nonzero(np.frombuffer(self.data, np.uint8)[self.end - pad :]):
            raise WireError("padding that is not zero")
        self.end -= pad
        if length > self.end - self.at:
            raise WireError(f"a plan of {length} bytes announced, {self.end - self.at} left")
        whole, self.end = self.end, self.at + length
        tree = self.tree(1)
        if self.at != self.end:
            raise WireError(f"{self.end - self.at} bytes after the end of the plan")
        self.end = whole
        unfolded = sum(leaf.unfolded for leaf in self.leaves)
        if unfolded > allowed(self.known, len(self.data)):
            raise WireError(f"{unfolded} bytes of tensors announced in a message of {len(self.data)}")
        if pad != padding(self.known, len(self.data) - pad, unfolded, self.many):
            raise WireError(f"{pad} bytes of padding where others are due")
        return tree

    def head(self) -> None:
        """Read what stands before the plan."""
        magic = bytes(self.take(len(MAGIC)))
        if magic != MAGIC:
            old = "; an earlier FedSieve's" if magic in (b"FSV1", b"FSV2") else ""
            raise WireError(f"not a FedSieve message of version 3{old}")
        flags = self.take(1)[0]
        if flags >= 2 * BY_KIND:
            raise WireError(f"unknown flags {flags}")
        self.by_kind = bool(flags & BY_KIND)
        manifest = self.known.manifest
        if bool(flags & HAS_MANIFEST) != (manifest is not None):
            raise WireError(
                "the message is for a receiver who knows the model's manifest" if flags & 1 else "no manifest"
            )
        if manifest and bytes(self.take(DIGEST)) != manifest.digest:
            raise WireError("the message is about another model: its manifest differs")
        has_base = bool(self.known.base or self.known.masks)
        if bool(flags & HAS_BASE) != has_base:
            raise WireError("no base" if has_base else "the message is against a base that is not known here")
        if has_base and bytes(self.take(DIGEST)) != self.known.digest:
            raise WireError("the message is against another base or other masks")

    def tree(self, depth: int) -> Decoded:
        """Read a tree's entries."""
        if depth > DEEPEST:
            raise WireError(f"trees nest deeper than {DEEPEST}")
        tree: Decoded = {}
        many = self.varint()
        self.budget.enter(many)
        self.many += many
        for _ in range(many):
            head = self.take(1)[0]
            if head > SPARSE + NEXT + ALIKE:
                raise WireError(f"unknown kind {head}")
            name = self.name(bool(head & NEXT))
            if name in tree:
                raise WireError(f"the name {_quoted(name)} comes twice")
            kind = head & 3
            if kind in (TREE, NUMBER) and head & ALIKE:
                raise WireError("a tree or a number with a tensor's shape")
            if kind == TREE:
                tree[name] = self.tree(depth + 1)
            elif kind == NUMBER:
                tree[name] = value = float(self.numbers("<d")[0])
                if self.known.finite and not math.isfinite(value):
                    raise WireError("a number that is not finite")
            else:
                self.leaves.append(self.leaf(name, kind, bool(head & ALIKE)))
                tree[name] = self.leaves[-1]  # type: ignore[assignment]
        return tree

    def name(self, following: bool) -> str:
        """Read an entry's name."""
        entries = self.known.manifest.entries if self.known.manifest else ()
        place = self.last + 1 if following else self.varint() - 1
        if place >= len(entries):
            raise WireError(f"name {place} of a manifest of {len(entries)}")
        if place >= 0:
            self.last = place
            return entries[place][0]
        length = self.varint()
        if length > LONGEST:
            raise WireError(f"a name of {length} bytes, {LONGEST} are allowed")
        self.budget.draw(4 * length)
        try:
            return str(self.take(length), "utf-8")
        except UnicodeDecodeError:
            raise WireError("a name that is not UTF-8") from None

    def leaf(self, name: str, kind: int, alike: bool) -> Leaf:
        """Read a tensor's entry."""
        if alike:
            manifest = self.known.manifest
            if manifest is None or name not in manifest.place:
                raise WireError(f"the shape of {_quoted(name)} is not known")
            _, dtype, shape = manifest.entries[manifest.place[name]]
        else:
            dtype, dimensions = self.take(2)
            if dtype >= len(TYPES):
                raise WireError(f"unknown type {dtype}")
            if dimensions > DIMENSIONS:
                raise WireError(f"no tensor has {dimensions} dimensions")
            shape = tuple(self.varint() for _ in range(dimensions))
            if math.prod(max(size, 1) for size in shape) >= 2**63 // 8:
                raise WireError(f"no tensor has the shape {shape[:8]}")
        mode, way = divmod(self.take(1)[0], 8)
        if mode > BF16_DISTANCE:
            raise WireError(f"unknown mode {mode} of values")
        if mode != TYPED and TYPES[dtype] != torch.float32:
            raise WireError(f"values of {TYPES[dtype]} in a mode for float32")
        count, units, told, edge, sharing = self.positions(name, way, shape)
        way -= IN_UNITS * (sharing.unit > 1)
        scale = float(self.numbers("<f")[0]) if mode in (INT8, INT4) else 0.0
        if mode in (DISTANCE, BF16_DISTANCE):
            self.base(name, way, shape, count)
        pool = kind_of(self.known, name, shape) if self.by_kind else ""
        return Leaf(name, kind, dtype, shape, way, mode, count, units, told, edge, sharing, scale, pool)

    def positions(self, name: str, way: int, shape: tuple[int, ...]) -> tuple[int, int, int, int, Sharing]:
        """Return a leaf's ``count``, ``units``, ``told``, ``edge`` and ``sharing``."""
        numel = math.prod(shape)
        if way == ALL:
            return numel, numel, 0, 0, EACH
        if way == MASK:
            mask = self.known.masks.get(name)
            if mask is None or mask.numel() != numel:
                raise WireError(f"no mask of {_quoted(name)} is known")
            count = int(np.count_nonzero(array(mask)))
            return count, count, 0, 0, EACH
        count = units = self.varint()
        if count > numel:
            raise WireError(f"{count} positions announced in {numel} elements")
        sharing = EACH
        if way > RANKED:
            way, sharing, units = way - IN_UNITS, self.sharing(shape), self.varint()
            if units > sharing.units(numel):
                raise WireError(f"{units} units announced, {sharing.units(numel)} are there")
        if way == GAPS:
            return count, units, units, 0, sharing
        flips, base = self.varint(), self.known.words(name)
        if base is None or len(base) != numel:
            raise WireError(f"no base of {_quoted(name)} is known")
        if flips > sharing.units(numel):
            raise WireError(f"{flips} changes announced in {sharing.units(numel)} elements")
        edge = self.varint() if way == RANKED else 0
        if edge > LAST_EDGE:
            raise WireError(f"an edge at step {edge} of {LAST_EDGE}")
        return count, units, flips, edge, sharing

    def sharing(self, shape: tuple[int, ...]) -> Sharing:
        """Read how many successive rows share positions."""
        unit = self.varint()
        if not 2 <= unit <= MOST_ROWS or not math.prod(shape) or not shape:
            raise WireError(f"positions shared by {unit} rows of a tensor of shape {shape[:8]}")
        return Sharing(shape[0], unit)

    def base(self, name: str, way: int, shape: tuple[int, ...], count: int) -> tuple[Array, Array | None]:
        """Return the known values that distances count from, and a mask where only those on it count."""
        words, mask = self.known.words(name), self.known.masks.get(name)
        if words is not None and mask is not None and way == ALL and len(shape) == 1 and len(words) == mask.numel():
            on = array(mask)
            if np.count_nonzero(on) == count:
                return words, on
        if words is None or len(words) != math.prod(shape):
            raise WireError(f"no base of {_quoted(name)} is known")
        return words, None


def _quoted(name: str) -> str:
    """Return a name for an error's text, cut short."""
    return repr(name if len(name) <= 60 else name[:60] + "…")


def column(mode: int, kind: int) -> int:
    """Return the column of values sent in a mode, of a type given by its place."""
    return COLUMN[mode] if mode != TYPED else BITS if kind == BOOL else PLAIN + kind


def kind_of(known: Known, name: str, shape: Sequence[int]) -> str:
    """Return what tensors have in common that are pooled: the last part of their names, and if they are vectors."""
    return f"{known.dimensions(name, shape) < 2} {name.rsplit('.', 1)[-1]}"


def unfolded(numel: int, size: int, count: int | None, ordered: bool) -> int:
    """Return the bytes that a tensor of elements of ``size`` bytes counts as: all, or those at ``count`` positions.

    Positions are 8 bytes each, or a byte for every element where that is less; a tensor whose elements must be put in
    order counts as a byte for every element at least.
    """
    if count is None:
        return numel * size
    return max(count * size + min(8 * count, numel), numel * ordered)


def varint(number: int) -> bytes:
    """Return a number in groups of seven bits, the lowest first, each but the last with the highest bit set."""
    groups = bytearray()
    while number >= 128:
        groups.append(number & 127 | 128)
        number >>= 7
    groups.append(number)
    return bytes(groups)
