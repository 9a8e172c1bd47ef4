"""What the receiver of a message knows already, and therefore is not sent: see docs/reference/wire.md."""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Mapping, Sequence
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
    these each byte of it justifies (``budget``).
    """

    manifest: Manifest | None = None
    base: Mapping[str, Tensor | Sparse] = field(default_factory=dict)
    masks: Mapping[str, Tensor] = field(default_factory=dict)
    finite: bool = True
    copies: float = 1.0
    unfolds: int = 0
    orders: dict[str, tuple[int, Any]] = field(default_factory=dict, init=False, repr=False, compare=False)
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
