"""What encoder and decoder agree on: the head, the kinds of entries, the columns, and what bytes may claim.

A message may claim so many entries and bytes of tensors, and decoding it may set aside so much at its worst moment.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from fedsieve.wire.known import TYPES, Known, WireError
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


UNFOLDS = 1024
"""Bytes of tensors that a byte of a message justifies, where the receiver knows no manifest."""
TENSORS, DECODING = 1.5, 2.0
"""Dense models that tensors may come to, and that decoding may set aside at its worst moment, of a manifest's."""
FEW, MANY, APART = 64, 4096, 4096
"""Entries beside a manifest's; without one so many, and one more for every APART bytes of a message."""
ENTRY = 64
"""Bytes of tensors that every entry may have beside the model's: seeds, counts, numbers of one element."""
LEAST = 1 << 15
"""Bytes that decoding may set aside in any case: it works on blocks, of small models too."""
BLOCKS, SMALLEST, LARGEST = 512, 1 << 7, 1 << 16
"""Numbers are treated in blocks: a budget's 512th, within these bounds."""
WORK = 40
"""Bytes that are set aside for every number of a block: five times int64."""


def max_entries(known: Known, size: int) -> int:
    """Return how many entries a message of ``size`` bytes may have: trees, numbers and tensors."""
    own = _of_model(known)
    return own if own and not known.unfolds else own + MANY + size // APART


def _of_model(known: Known) -> int:
    """Return how many entries a model justifies; 0 where there is no manifest."""
    return 2 * len(known.manifest.entries) + FEW if known.manifest else 0


def allowed(known: Known, size: int) -> int:
    """Return how many bytes of tensors a message of ``size`` bytes may unfold to."""
    if known.manifest is None:
        return UNFOLDS * size
    return int(TENSORS * known.copies * known.manifest.size) + ENTRY * _of_model(known) + known.unfolds * size


def padding(known: Known, size: int, unfolded: int, many: int) -> int:
    """Return how many zero bytes a message of ``size`` bytes needs at its end to justify its tensors and its entries.

    Raises WireError where no number would do.
    """
    per = UNFOLDS if known.manifest is None else known.unfolds
    beyond, more = unfolded - allowed(known, size), many - max_entries(known, size)
    if not per and max(beyond, more) > 0:
        what = f"{unfolded} bytes of tensors" if beyond > 0 else f"{many} entries"
        raise WireError(f"{what}, more than {known.copies:g} times the model justifies")
    pad = max(0, -(-beyond // per)) if per else 0
    return max(pad, APART * (many - max_entries(known, 0)) - size) if more > 0 else pad


class Budget:
    """The bytes that decoding one message may set aside: every array draws from it before it is there.

    What is set aside for a while is ``lent``. ``block``: how many numbers are treated at once.
    """

    def __init__(self, known: Known, size: int):
        model = known.copies * known.manifest.size if known.manifest else 0
        more = 2 * known.unfolds * size if known.manifest else 4 * UNFOLDS * size
        self.most = self.left = max(int(DECODING * model), LEAST) + more
        self.block = min(max(self.most // BLOCKS & -8, SMALLEST), LARGEST)
        self.entries = max_entries(known, size)

    def enter(self, many: int) -> None:
        """Draw so many entries. Raises WireError where there are no more."""
        if many > self.entries:
            raise WireError(f"{many} entries announced, {self.entries} more are allowed")
        self.entries -= many

    def draw(self, size: int) -> None:
        """Draw so many bytes. Raises WireError where there are no more."""
        if size > self.left:
            raise WireError(f"more than the {self.most} bytes would be set aside that decoding may take")
        self.left -= size

    def give(self, size: int) -> None:
        """Give back bytes of what is no longer there."""
        self.left += size

    @contextmanager
    def lent(self, size: int) -> Iterator[None]:
        """Draw bytes and, after the block, give them back."""
        self.draw(size)
        try:
            yield
        finally:
            self.give(size)

    @contextmanager
    def at_work(self, count: int) -> Iterator[range]:
        """Yield where the blocks of ``count`` numbers begin, with what treating one sets aside."""
        with self.lent(WORK * min(self.block, count)):
            yield range(0, count, self.block)
