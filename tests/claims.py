"""Short messages that claim much of a large model, of every way of positions and every mode of values."""

import struct
from functools import lru_cache

import numpy as np
import torch

from fedsieve.wire import Known, Manifest, WireError, decode
from fedsieve.wire.streams import BACK_ENDS, pack
from messages import message, varint

DENSE, SPARSE = 2, 3
ALL, MASK, GAPS, CHANGES, RANKED = range(5)
TYPED, SIGNED, UNSIGNED, DISTANCE, BF16, BF16_UNSIGNED, INT8, INT4, BF16_DISTANCE = range(9)
SIZES = {"4 k": (64, 64), "4 M": (2000, 2000), "11 M": (3400, 3300)}


@lru_cache(maxsize=1)
def of_one_tensor(size: str) -> Known:
    """A receiver who knows a model of one tensor, a base and a mask."""
    base = {"x": torch.randn(SIZES[size], generator=torch.Generator().manual_seed(0))}
    known = Known(Manifest.of(base), base, {"x": base["x"] > 0})
    assert known.digest
    return known


def zeros(count: int, dtype: str, back: str) -> bytes:
    """A stream of zeros, which packs to next to nothing."""
    way, data = pack(np.zeros(count, dtype), back)
    return varint(4 * len(data) + way) + data


def one(
    known: Known, back: str, kind: int, way: int, mode: int, count: int, changed: int, edge: int, unit: int = 1
) -> bytes:
    """A message of one tensor of the known shape, all of whose gaps, distances and magnitudes are 0."""
    told = b"" if way in (ALL, MASK) else varint(count)
    told += varint(unit) + varint(count // unit) if unit > 1 else b""
    told += varint(changed) if way in (CHANGES, RANKED) else b""
    told += varint(edge) if way == RANKED else b""
    scale = struct.pack("<f", 1.0) if mode in (INT8, INT4) else b""
    numel = known.base["x"].numel()  # type: ignore[union-attr]
    count = {ALL: numel, MASK: int(known.masks["x"].sum())}.get(way, count)
    form = {TYPED: "<f4", DISTANCE: "<i4", SIGNED: "<u4", UNSIGNED: "<u4"}.get(mode, "<u2")
    flips = {GAPS: count // unit, CHANGES: changed, RANKED: changed}.get(way, 0)
    streams = (zeros(flips, "<u4", back) if flips else b"") + (zeros(count, form, back) if count else b"")
    streams += bytes((count + 7) // 8) if mode in (SIGNED, BF16) else b""
    assert known.manifest
    plan = varint(1) + bytes([kind + 4 + 8, 8 * mode + way + 3 * (unit > 1)]) + told + scale
    return message(plan, streams, b"", 3, known.manifest.digest + known.digest)


def hostile(size: str, back_end: str = "") -> dict[str, bytes]:
    """Return messages of a few hundred bytes and a bit for each sign, by what they claim."""
    known, back = of_one_tensor(size), back_end or BACK_ENDS[len(size) % 2]
    n = known.base["x"].numel()  # type: ignore[union-attr]
    found = {}
    for kind in (DENSE, SPARSE):
        for way, mode, count, changed, edge in [
            (ALL, SIGNED, n, 0, 0), (ALL, BF16_DISTANCE, n, 0, 0), (ALL, TYPED, n, 0, 0),
            (MASK, SIGNED, n, 0, 0), (MASK, DISTANCE, n, 0, 0),
            (GAPS, SIGNED, n, 0, 0), (GAPS, INT8, n - 1, 0, 0), (GAPS, TYPED, n // 9, 0, 0), (GAPS, BF16, n // 2, 0, 0),
            (CHANGES, DISTANCE, n, n, 0), (CHANGES, SIGNED, 0, n, 0), (CHANGES, TYPED, n, 0, 0),
            (RANKED, DISTANCE, n, n, 2024), (RANKED, SIGNED, n, n, 0), (RANKED, TYPED, n, n, 2032),
            (RANKED, BF16_DISTANCE, n // 2, n // 2, 2035), (RANKED, UNSIGNED, n // 3, 0, 2040),
            (RANKED, INT4, n, n, 4095),
        ]:  # fmt: skip
            name = f"{'sparse' if kind == SPARSE else 'dense'}, way {way}, mode {mode}, {count} and {changed} at {edge}"
            found[name] = one(known, back, kind, way, mode, count, changed, edge)
        for way, mode, count, changed, edge, unit in [
            (GAPS, SIGNED, n, 0, 0, 2), (GAPS, TYPED, n // 16 * 8, 0, 0, 8), (CHANGES, DISTANCE, n, 0, 0, 2),
            (CHANGES, TYPED, n, n // 4, 0, 4), (RANKED, DISTANCE, n, 0, 2024, 2),
            (RANKED, SIGNED, n // 2, n // 4, 0, 2), (RANKED, BF16_DISTANCE, n // 8, 0, 2040, 8),
        ]:  # fmt: skip
            name = f"units of {unit}, {kind}, way {way}, mode {mode}, {count} and {changed} at {edge}"
            found[name] = one(known, back, kind, way, mode, count, changed, edge, unit)
    return found


def tried(data: bytes, known: Known) -> str:
    try:
        decode(data, known)
    except WireError as error:
        return str(error)
    return "taken"
