"""What encoder and decoder agree on: the head, the kinds of entries, the columns, and what bytes may claim."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedsieve.wire.known import TYPES, Known
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
COLUMN = {SIGNED: MAGNITUDE, UNSIGNED: MAGNITUDE, DISTANCE: STEP, BF16: HALF, BF16_UNSIGNED: HALF}
COLUMN |= {INT8: MULTIPLE, INT4: MULTIPLE, BF16_DISTANCE: HALF}
"""The column that each way of sending values fills, TYPED apart."""

BOOL = len(TYPES) - 1


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
