"""Messages between the server and its clients: sealed to run, round and client, replies against the model just sent.

Both sides know the plain model's manifest and, of a reply, the broadcast that it answers: its float32 tensors, by
their own names, are the base that values and positions are encoded against.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace

from torch import Tensor

from fedsieve.engine.cache import CacheEntry, Digests, Parts, join, without
from fedsieve.engine.federation import Federation, fingerprint
from fedsieve.sparse.policy import floats_of, frozen_names
from fedsieve.types import Sparse, Tree
from fedsieve.wire import (
    HEAD,
    TAG,
    Body,
    Envelope,
    Known,
    Manifest,
    base_of,
    compensate,
    decode,
    encode,
    finite,
    order_ahead,
    seal,
    unseal,
)

WHOLE = False, False
"""The parts that a message leaves out which leaves out none."""
UNSENT = "unsent:"
"""Before the name of a parameter in a client's memory: what rounding took from it, to be sent the next time."""


class Messages:
    """What a federation's processes encode, seal, unseal and decode messages with."""

    def __init__(self, federation: Federation):
        model = federation.model()
        floats = {name: v.detach() for name, v in floats_of(model).items()}
        self.frozen = frozen_names(model)
        self.key = federation.key
        self.run, self.settings = federation.name, fingerprint(federation)
        self.plain = Known(Manifest.of(floats), finite=False, copies=federation.run.method.copies)
        self.values, self.cache = federation.run.values, federation.cache

    def known(self, broadcast: Tree) -> Known:
        """Return what both sides know of the replies to a broadcast, from which the frozen weights are missing."""
        return replace(self.plain, base={name: v for name, v in _floats(broadcast) if name not in self.frozen})

    def envelope(self, t: int, client: int, direction: str, known: Known) -> Envelope:
        """Return what a message is sealed to; ``known`` is what it is encoded against."""
        return Envelope(self.run, self.settings, t, client, direction, known.digest)

    def broadcast(
        self, t: int, tiers: Mapping[int, int], trees: Mapping[int, Tree], has: Mapping[int, Digests] | None = None
    ) -> RoundMessages:
        """Return a round's messages, of each client's tier and each tier's tree, and what decodes the replies.

        ``has``: what clients have of earlier broadcasts, which they are not sent again.
        """
        entries = {tier: self._cached(tree) for tier, tree in trees.items()}
        parts = {client: entries[tier].parts((has or {}).get(client, (b"", b""))) for client, tier in tiers.items()}
        known = {tier: self.known(tree) for tier, tree in trees.items()}
        return RoundMessages(self, t, tiers, trees, entries, parts, known)

    def _cached(self, tree: Tree) -> CacheEntry:
        """Return the entry of a broadcast's tree, and keep it."""
        return self.cache.put(CacheEntry.of(tree, self.frozen, self.plain))

    def unseal_broadcast(self, t: int, client: int, message: bytes, last: Body | None = None) -> Body:
        """Return the encoded broadcast in a message: ``last`` itself if it is the same.

        Raises WireError; CacheMiss if it leaves out what this process does not have.
        """
        known = self._known_of(message[TAG : TAG + HEAD])[1]
        return unseal(message, self.envelope(t, client, "down", known), self.key, last)

    def decode_broadcast(self, body: Body) -> Tree:
        """Return a broadcast's tree, whole, and keep of it what later ones leave out. Raises WireError."""
        weights, known = self._known_of(body.data)
        tree = join(decode(body.data, known), weights)
        self._cached(tree)
        return tree

    def _known_of(self, data: bytes) -> tuple[Tree, Known]:
        """Return the frozen weights that a broadcast leaves out, and what it is encoded against. Raises CacheMiss."""
        if not (digest := base_of(data)):
            return {}, self.plain
        entry, parts = self.cache.find(digest)
        return entry.weights if parts[0] else {}, entry.known(parts)

    def encode_reply(self, t: int, client: int, tree: Tree, known: Known) -> bytes:
        """Return a client's reply, sealed. One that is not finite keeps every bit: the server says what is wrong."""
        values = self.values if _finite(tree) else "f32"
        return seal(Body(encode(tree, known, values)), self.envelope(t, client, "up", known), self.key)

    def decode_reply(self, t: int, client: int, reply: bytes, known: Known) -> Tree:
        """Return the tree of a client's reply. Raises WireError."""
        return decode(unseal(reply, self.envelope(t, client, "up", known), self.key).data, known)

    def without_frozen(self, tree: Tree) -> Tree:
        """Return what a client sends of its update: all but what is frozen, which the server has."""
        return {name: value for name, value in tree.items() if name not in self.frozen}

    def compensate(self, tree: Tree, memory: dict[str, Tensor]) -> Tree:
        """Return what a client sends of its update where values are rounded: with what was lost the last time.

        What this rounding loses goes to the client's ``memory``, under ``UNSENT`` before the parameter's name.
        """
        if self.values == "f32" or not _finite(tree):
            return tree
        tensors = {name: value for name, value in tree.items() if isinstance(value, Tensor | Sparse)}
        residual = {name.removeprefix(UNSENT): v for name, v in memory.items() if name.startswith(UNSENT)}
        compensated, residual = compensate(tensors, residual, self.values, self.plain)
        memory |= {UNSENT + name: value for name, value in residual.items()}
        return {**tree, **compensated}


class Inbox:
    """Opens clients' messages, by any thread: a broadcast that several of them are sent is decoded once."""

    def __init__(self, messages: Messages):
        self.messages, self._lock = messages, threading.Lock()
        self._t, self._known = -1, messages.plain
        self._opened = dict[bytes, tuple[Body, Tree, Known]]()
        """Of one round the broadcasts opened, by the digests of what they are encoded against."""
        self.ahead: Executor | None = None
        """What does ahead, while clients train, what a reply's encoding begins with."""

    def open(self, t: int, client: int, message: bytes) -> tuple[Tree, Known]:
        """Return a message's tree, to be read only, and what both sides know of a reply to it. Raises WireError."""
        with self._lock:
            digest = base_of(message[TAG : TAG + HEAD])
            before, tree, known = self._opened.get(digest, (None, {}, self._known))
            body = self.messages.unseal_broadcast(t, client, message, before)
            if body is not before:
                tree = dict(self.messages.decode_broadcast(body))
                last, known = self._known, self.messages.known(tree)
                if self.ahead:
                    self.ahead.submit(order_ahead, known, last)
                if t != self._t:
                    self._opened.clear()
                self._t, self._known, self._opened[digest] = t, known, (body, tree, known)
            return tree, known


@dataclass(frozen=True, eq=False)
class RoundMessages(Mapping[int, bytes]):
    """A round's messages by client, each sealed when it is asked for.

    A tier's tree is encoded once for all clients that have the same of it.
    """

    messages: Messages
    t: int
    tiers: Mapping[int, int]
    """The device class of every client of the round."""
    trees: Mapping[int, Tree]
    """Each class's broadcast."""
    entries: Mapping[int, CacheEntry]
    """What clients keep of each class's broadcast."""
    parts: Mapping[int, Parts]
    """What of its entry each client has, and is not sent."""
    known: Mapping[int, Known]
    """What both sides know of each class's replies."""
    again: Counter[int] = field(default_factory=Counter)
    """How often each client was sent the whole in this round, since it no longer had what was left out."""
    bodies: dict[tuple[int, Parts], Body] = field(default_factory=dict)
    """Each class's encoded tree, without those parts."""

    @property
    def size(self) -> int:
        """The bytes of all messages."""
        sizes = [len(self._body(client, parts).data) + TAG for client, parts in self.parts.items()]
        again = [many * (len(self._body(client, WHOLE).data) + TAG) for client, many in self.again.items()]
        return sum(sizes) + sum(again)

    def __getitem__(self, client: int) -> bytes:
        parts = self.parts[client]
        known = self.entries[self.tiers[client]].known(parts)
        envelope = self.messages.envelope(self.t, client, "down", known)
        return seal(self._body(client, parts), envelope, self.messages.key)

    def whole(self, client: int, counts: bool) -> RoundMessages:
        """Return one client's message alone, with nothing left out; if it ``counts``, the size grows by it."""
        self.again[client] += counts
        return replace(self, tiers={client: self.tiers[client]}, parts={client: WHOLE})

    def digests(self, client: int) -> Digests:
        """Return what a client has after this round."""
        return self.entries[self.tiers[client]].digests

    def _body(self, client: int, parts: Parts) -> Body:
        tier = self.tiers[client]
        if (tier, parts) not in self.bodies:
            entry, tree = self.entries[tier], self.trees[tier]
            tree = without(tree, entry.weights) if parts[0] else tree
            self.bodies[tier, parts] = Body(encode(tree, entry.known(parts)))
        return self.bodies[tier, parts]

    def __iter__(self) -> Iterator[int]:
        return iter(self.tiers)

    def __len__(self) -> int:
        return len(self.tiers)

    def read_ahead(self, last: Mapping[int, Known]) -> None:
        """Do what the decoding of replies begins with, of which each class's ``last`` round needed the like."""
        for tier in self.known.keys() & last.keys():
            order_ahead(self.known[tier], last[tier])

    def decode_reply(self, client: int, reply: bytes) -> Tree:
        """Return the tree of a client's reply to this broadcast. Raises WireError, KeyError for another client."""
        return self.messages.decode_reply(self.t, client, reply, self.known[self.tiers[client]])


def _floats(tree: Tree) -> Iterator[tuple[str, Tensor | Sparse]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _floats(value)
        elif isinstance(value, Tensor | Sparse):
            yield name, value


def _finite(tree: Tree) -> bool:
    return all(finite(value.values if isinstance(value, Sparse) else value) for _, value in _floats(tree))
