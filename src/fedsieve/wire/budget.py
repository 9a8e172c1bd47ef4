"""What a message may claim: entries, bytes of tensors, and what decoding it may set aside at its worst moment."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from fedsieve.wire.known import Known, WireError

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
