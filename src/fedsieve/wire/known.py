"""What the receiver of a message knows already, and therefore is not sent, and what a message may claim beside it.

See docs/reference/wire.md. A message may claim so many entries and bytes of tensors, and decoding it may set aside so
much at its worst moment.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedsieve.types import Sparse

Array: TypeAlias = npt.NDArray[Any]
TYPES = (
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
)
"""The types of tensors that can be sent; a message names them by their place here."""

DIGEST = 16
"""Bytes of a manifest's or a base's digest in a message."""

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


class WireError(ValueError):
    """The bytes are not exactly one message."""


def array(values: Tensor) -> Array:
    """Return a tensor's elements, flat: their own memory, and the bits as int16 where numpy has no such type."""
    values = values.detach().cpu().contiguous()
    return (values.view(torch.int16) if values.dtype == torch.bfloat16 else values).numpy().reshape(-1)


@dataclass(frozen=True)
class Manifest:
    """A model's tensors in order: name, place of the type in ``TYPES``, and shape of each."""

    entries: tuple[tuple[str, int, tuple[int, ...]], ...]

    @classmethod
    def of(cls, tree: Mapping[str, Any]) -> Manifest:
        """Return the manifest of a flat tree's tensors; what is no tensor is passed over."""
        entries = []
        for name, value in tree.items():
            values = value.values if isinstance(value, Sparse) else value
            if isinstance(values, Tensor):
                entries.append((name, TYPES.index(values.dtype), tuple(value.shape)))
        return cls(tuple(entries))

    @cached_property
    def place(self) -> dict[str, int]:
        """Each name's place."""
        return {name: i for i, (name, _, _) in enumerate(self.entries)}

    @cached_property
    def digest(self) -> bytes:
        """The first bytes of a SHA-256 over all entries."""
        parts = []
        for name, kind, shape in self.entries:
            text = name.encode()
            parts.append(struct.pack(f"<I{len(text)}sBB{len(shape)}Q", len(text), text, kind, len(shape), *shape))
        return hashlib.sha256(b"fedsieve manifest\0" + b"".join(parts)).digest()[:DIGEST]

    @cached_property
    def size(self) -> int:
        """The bytes of the dense model."""
        return sum(math.prod(shape) * TYPES[kind].itemsize for _, kind, shape in self.entries)


@dataclass(frozen=True)
class Known:
    """What the receiver knows, and what it accepts.

    ``manifest``: the model's names, types and shapes; their digest travels instead. ``base``: float32 tensors that
    both sides hold, as a rule the model last exchanged; positions and values go as changes against it where that is
    smaller. ``masks``: boolean supports that both sides hold or draw from a seed; they cost nothing. ``finite``: NaN
    and infinities are refused. ``copies``: how many models a message may stand for; ``unfolds``: how many bytes beyond
    these each byte of it justifies (``allowed``).
    """

    manifest: Manifest | None = None
    base: Mapping[str, Tensor | Sparse] = field(default_factory=dict)
    masks: Mapping[str, Tensor] = field(default_factory=dict)
    finite: bool = True
    copies: float = 1.0
    unfolds: int = 0
    orders: dict[str, tuple[tuple[int, ...], Any]] = field(default_factory=dict, init=False, repr=False, compare=False)
    """What ``positions.ranking_of`` keeps from one message to the next."""
    _flat: dict[str, Array] = field(default_factory=dict, init=False, repr=False, compare=False)
    _index: dict[str, Array] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name, mask in self.masks.items():
            value = self.base.get(name)
            numel = math.prod(value.shape) if isinstance(value, Tensor | Sparse) else mask.numel()
            if mask.dtype != torch.bool or mask.numel() != numel:
                raise ValueError(f"the mask of {name} must be boolean, an element for each of its {numel}")

    @cached_property
    def digest(self) -> bytes:
        """The first bytes of a SHA-256 over the base and the masks, by name."""
        whole = hashlib.sha256(b"fedsieve base\0")
        for name in sorted(self.base):
            _update_digest(whole, name, self.words(name))
        for name in sorted(self.masks):
            _update_digest(whole, name, np.packbits(array(self.masks[name])))
        return whole.digest()[:DIGEST]

    def dimensions(self, name: str, shape: Sequence[int]) -> int:
        """Return how many dimensions the tensor has that values belong to: on a mask they are a vector."""
        place = self.manifest.place.get(name) if self.manifest else None
        return max(len(shape), len(self.manifest.entries[place][2]) if self.manifest and place is not None else 0)

    def words(self, name: str) -> Array | None:
        """Return the bits (uint32) of the base's float32 tensor of that name, dense and flat; None if there is none."""
        if name not in self._flat:
            value = self.base.get(name)
            values = value.values if isinstance(value, Sparse) else value
            if value is None or not isinstance(values, Tensor) or values.dtype != torch.float32:
                return None
            self._flat[name] = array(value.dense() if isinstance(value, Sparse) else value).view(np.uint32)
        return self._flat[name]

    def index(self, name: str) -> Array | None:
        """Return the positions of the mask of that name; None if there is none."""
        if name not in self._index:
            if name not in self.masks:
                return None
            self._index[name] = np.flatnonzero(array(self.masks[name]))
        return self._index[name]


def _update_digest(whole: Any, name: str, content: Array | None) -> None:
    text = name.encode()
    size = 0 if content is None else content.nbytes
    whole.update(struct.pack("<IQ", len(text), size) + text)
    if content is not None:
        whole.update(content.data)


NOTHING = Known(finite=False)
"""What a receiver without any context knows and accepts."""


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
