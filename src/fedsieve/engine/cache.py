"""What a client keeps of a broadcast, so that no later one brings it again: frozen weights, and where masks are true.

Both sides make the same ``CacheEntry`` of the same broadcast. The server notes what each client has (``Digests``), and
encodes the next message against it, whose head bears its digest. A client that no longer has it says so (``LOST``) and
is sent the whole in the same round.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fedsieve.types import Sparse, Tree
from fedsieve.wire import Known, WireError, decode, encode

Digests: TypeAlias = tuple[bytes, bytes]
"""Of the frozen weights and of the masks that a client has; empty: it has none."""
Parts: TypeAlias = tuple[bool, bool]
"""Which of both, frozen weights and masks, a message leaves out."""


LACKS, LOST = b"fedsieve: lacks", b"fedsieve: lost"
"""What stands for the reply to a message that leaves out too much, so that the whole is sent: the process that is the
client for this round lacks it, where one process is many clients; or the client has lost it, whose bytes then count."""
ENTRIES = 4
"""Entries that a process keeps: of the last rounds, or of one round's device classes."""


class CacheMiss(WireError):
    """A message leaves out what this client does not have, or no longer."""


@dataclass(frozen=True, eq=False)
class CacheEntry:
    """What a client keeps of one broadcast."""

    weights: Tree
    """The broadcast's tree with its frozen weights alone."""
    masks: Mapping[str, Tensor]
    """Where each of its sparse tensors has values, boolean."""
    plain: Known
    """What the receiver of any broadcast knows."""

    @classmethod
    def of(cls, tree: Tree, frozen: Set[str], plain: Known) -> CacheEntry:
        """Return the entry of a broadcast's tree, where the parameters ``frozen`` are those of the plain model."""
        return cls(_select(tree, frozen), dict(_supports(tree)), plain)

    def shared_with(self, other: CacheEntry) -> CacheEntry:
        """Return another entry if this is like it; else this one, with the weights of the other if they are alike."""
        if self is other or not same(flat(self.weights), flat(other.weights)):
            return self
        return other if same(self.masks, other.masks) else replace(self, weights=other.weights)

    @cached_property
    def digests(self) -> Digests:
        """The digests of the weights and of the masks."""
        return (
            self.known((True, False)).digest if self.weights else b"",
            self.known((False, True)).digest if self.masks else b"",
        )

    def parts(self, has: Digests) -> Parts:
        """Return what of it a client has."""
        weights, masks = self.digests
        return bool(weights) and weights == has[0], bool(masks) and masks == has[1]

    @cached_property
    def _known(self) -> dict[Parts, Known]:
        return {(False, False): self.plain}

    def known(self, parts: Parts) -> Known:
        """Return what is known of the next message to a client that has these parts."""
        if parts not in self._known:
            base, masks = flat(self.weights) if parts[0] else {}, self.masks if parts[1] else {}
            self._known[parts] = replace(self.plain, base=base, masks=masks)
        return self._known[parts]

    def find(self, digest: bytes) -> Parts | None:
        """Return the parts that a message with this digest in its head leaves out; None: it is of another entry."""
        weights, masks = map(bool, self.digests)
        choices = ((weights, False), (False, masks), (weights, masks))
        return next((parts for parts in choices if any(parts) and self.known(parts).digest == digest), None)

    def to_bytes(self) -> bytes:
        """Return it as a client may keep it in a file."""
        return encode({"weights": self.weights, "masks": self.masks})

    @classmethod
    def from_bytes(cls, data: bytes, plain: Known) -> CacheEntry:
        """Return what ``to_bytes`` made bytes of. Raises WireError."""
        tree: Any = decode(data)
        return cls(tree["weights"], tree["masks"], plain)


class Cache:
    """The entries of the last broadcasts that this process has sent or been sent, for all of its threads."""

    def __init__(self) -> None:
        self._lock, self._entries = threading.Lock(), deque[CacheEntry]((), ENTRIES)

    def __reduce__(self) -> Any:
        return Cache, ()  # another process has its own

    @property
    def newest(self) -> CacheEntry | None:
        """The entry of the last broadcast; None before there is one."""
        return self._entries[-1] if self._entries else None

    def put(self, entry: CacheEntry) -> CacheEntry:
        """Keep an entry as the newest, and return it, or the one like it that is there, of the same memory."""
        with self._lock:
            for other in self._entries:
                entry = entry.shared_with(other)
            if entry in self._entries:
                self._entries.remove(entry)
            if entry.weights or entry.masks:
                self._entries.append(entry)
            return entry

    def find(self, digest: bytes) -> tuple[CacheEntry, Parts]:
        """Return what a message with this digest in its head leaves out. Raises CacheMiss."""
        with self._lock:
            for entry in reversed(self._entries):
                if parts := entry.find(digest):
                    return entry, parts
        raise CacheMiss("the message leaves out frozen weights or masks that this client does not have")


def without(tree: Tree, weights: Tree) -> Tree:
    """Return a broadcast's tree without the frozen weights of its entry."""
    result = dict[str, Any]()
    for name, value in tree.items():
        own = weights.get(name)
        if isinstance(value, Mapping):
            result[name] = without(value, own if isinstance(own, Mapping) else {})
        elif own is None:
            result[name] = value
    return result


def join(tree: Tree, weights: Tree) -> dict[str, Any]:
    """Return the tree that ``without`` left frozen weights out of."""
    result: dict[str, Any] = {**tree}
    for name, value in weights.items():
        own = result.get(name, {})
        result[name] = join(own, value) if isinstance(value, Mapping) and isinstance(own, Mapping) else value
    return result


def flat(tree: Tree, prefix: str = "") -> dict[str, Tensor]:
    """Return a tree's tensors by their paths."""
    tensors = dict[str, Tensor]()
    for name, value in tree.items():
        if isinstance(value, Mapping):
            tensors |= flat(value, f"{prefix}{name}/")
        elif isinstance(value, Tensor):
            tensors[prefix + name] = value
    return tensors


def _select(tree: Tree, names: Set[str]) -> dict[str, Any]:
    """Return a tree's float32 tensors of these names, where they stand."""
    result = dict[str, Any]()
    for name, value in tree.items():
        if isinstance(value, Mapping):
            if inside := _select(value, names):
                result[name] = inside
        elif isinstance(value, Tensor) and name in names and value.dtype == torch.float32:
            result[name] = value
    return result


def _supports(tree: Tree) -> Iterator[tuple[str, Tensor]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _supports(value)
        elif isinstance(value, Sparse):
            yield name, value.support


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Tell whether tensors by name are alike."""
    return a.keys() == b.keys() and all(v is b[name] or torch.equal(v, b[name]) for name, v in a.items())
