"""Messages between the server and its clients: sealed to run, round and client, replies against the model just sent.

Both sides know the plain model's manifest and, of a reply, the broadcast that it answers: its float32 tensors, by
their own names, are the base that values and positions are encoded against.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from fedsieve.engine.federation import Federation, fingerprint
from fedsieve.sparse.policy import frozen_names
from fedsieve.types import Sparse, Tree
from fedsieve.wire import (
    TAG,
    Body,
    Envelope,
    Known,
    Manifest,
    compensate,
    decode,
    encode,
    finite,
    order_ahead,
    seal,
    unseal,
)

UNSENT = "unsent:"
"""Before the name of a parameter in a client's memory: what rounding took from it, to be sent the next time."""


class Messages:
    """What a federation's processes encode, seal, unseal and decode messages with."""

    def __init__(self, federation: Federation):
        model = federation.model()
        floats = {name: v for name, v in model.state_dict().items() if v.is_floating_point()}
        self.frozen = frozen_names(model)
        self.key = federation.key
        self.run, self.settings = federation.name, fingerprint(federation)
        self.plain = Known(Manifest.of(floats), finite=False, copies=federation.run.method.copies)
        self.values = federation.run.values

    def known(self, broadcast: Tree) -> Known:
        """Return what both sides know of the replies to a broadcast."""
        return replace(self.plain, base=dict(_floats(broadcast)))

    def envelope(self, t: int, client: int, direction: str, known: Known) -> Envelope:
        """Return what a message is sealed to; ``known`` is what it is encoded against."""
        return Envelope(self.run, self.settings, t, client, direction, known.digest)

    def broadcast(self, t: int, tiers: Mapping[int, int], trees: Mapping[int, Tree]) -> RoundMessages:
        """Return a round's messages, of each client's tier and each tier's tree, and what decodes the replies."""
        bodies = {tier: Body(encode(tree, self.plain)) for tier, tree in trees.items()}
        known = {tier: self.known(tree) for tier, tree in trees.items()}
        return RoundMessages(self, t, tiers, bodies, known)

    def unseal_broadcast(self, t: int, client: int, message: bytes, last: Body | None = None) -> Body:
        """Return the encoded broadcast in a message: ``last`` itself if it is the same. Raises WireError."""
        return unseal(message, self.envelope(t, client, "down", self.plain), self.key, last)

    def decode_broadcast(self, body: Body) -> Tree:
        """Return a broadcast's tree. Raises WireError."""
        return decode(body.data, self.plain)

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
        self._body: Body | None = None
        self._tree, self._known = dict[str, Any](), messages.plain
        self.ahead: Executor | None = None
        """What does ahead, while clients train, what a reply's encoding begins with."""

    def open(self, t: int, client: int, message: bytes) -> tuple[Tree, Known]:
        """Return a message's tree, to be read only, and what both sides know of a reply to it. Raises WireError."""
        with self._lock:
            body = self.messages.unseal_broadcast(t, client, message, self._body)
            if body is not self._body:
                self._body, self._tree = body, dict(self.messages.decode_broadcast(body))
                last, self._known = self._known, self.messages.known(self._tree)
                if self.ahead:
                    self.ahead.submit(order_ahead, self._known, last)
            return self._tree, self._known


@dataclass(frozen=True, eq=False)
class RoundMessages(Mapping[int, bytes]):
    """A round's messages by client, each sealed when it is asked for: the encoded tree is held once a tier."""

    messages: Messages
    t: int
    tiers: Mapping[int, int]
    """The device class of every client of the round."""
    bodies: Mapping[int, Body]
    """Each class's encoded tree."""
    known: Mapping[int, Known]
    """What both sides know of each class's replies."""

    @property
    def size(self) -> int:
        """The bytes of all messages."""
        return sum(len(self.bodies[tier].data) + TAG for tier in self.tiers.values())

    def __getitem__(self, client: int) -> bytes:
        envelope = self.messages.envelope(self.t, client, "down", self.messages.plain)
        return seal(self.bodies[self.tiers[client]], envelope, self.messages.key)

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
