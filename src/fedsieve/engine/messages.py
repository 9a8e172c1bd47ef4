"""Letters between the server and its clients: sealed to run, round and client, answers against the model just sent.

Both sides know the plain model's manifest and, of an answer, the broadcast that it answers: its float32 tensors, by
their own names, are the base that values and positions are told from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

from torch import Tensor

from fedsieve.engine.experiment import Federation
from fedsieve.engine.fingerprint import fingerprint
from fedsieve.sparse.policy import frozen_names
from fedsieve.types import Sparse, Tree
from fedsieve.wire import TAG, Body, Envelope, Known, Manifest, compensate, decode, encode, finite, seal, unseal

UNSENT = "unsent:"
"""Before the name of a parameter in a client's memory: what rounding took from it, to be sent the next time."""


class Letters:
    """What a federation's processes write and read letters with."""

    def __init__(self, federation: Federation):
        model = federation.model()
        floats = {name: v for name, v in model.state_dict().items() if v.is_floating_point()}
        self.frozen = frozen_names(model)
        manifest = Manifest.of(floats)
        self.key = federation.key
        self.run, self.settings = federation.name, fingerprint(federation)
        self.plain = Known(manifest, finite=False, copies=federation.run.method.copies)
        self.values = federation.run.values

    def based(self, down: Tree) -> Known:
        """Return what both sides know of the answers to a broadcast."""
        return replace(self.plain, base=dict(_floats(down)))

    def envelope(self, t: int, client: int, direction: str, known: Known) -> Envelope:
        """Return what a letter is bound to; ``known`` is what its message is encoded against."""
        return Envelope(self.run, self.settings, t, client, direction, known.digest)

    def down(self, t: int, client: int, message: Body) -> bytes:
        """Return a broadcast's letter to one client."""
        return seal(message, self.envelope(t, client, "down", self.plain), self.key)

    def message(self, t: int, client: int, letter: bytes, last: Body | None = None) -> Body:
        """Return the message in a letter to a client: ``last`` itself if it is the same. Raises WireError."""
        return unseal(letter, self.envelope(t, client, "down", self.plain), self.key, last)

    def read(self, message: Body) -> Tree:
        """Return a broadcast's tree. Raises WireError."""
        return decode(message.data, self.plain)

    def up(self, t: int, client: int, told: Tree, known: Known) -> bytes:
        """Return a client's letter. One that is not finite keeps every bit: the server says what is wrong with it."""
        values = self.values if _finite(told) else "f32"
        return seal(Body(encode(told, known, values)), self.envelope(t, client, "up", known), self.key)

    def trained(self, tree: Tree) -> Tree:
        """Return what a client sends of its update: all but what is frozen, which the server has."""
        return {name: value for name, value in tree.items() if name not in self.frozen}

    def compensate(self, tree: Tree, memory: dict[str, Tensor]) -> Tree:
        """Return what a client sends of its update where values are rounded: with what was lost the last time.

        What this rounding loses goes to the client's ``memory``, under ``UNSENT`` before the parameter's name.
        """
        if self.values == "f32" or not _finite(tree):
            return tree
        tensors = {name: value for name, value in tree.items() if isinstance(value, Tensor | Sparse)}
        left = {name.removeprefix(UNSENT): v for name, v in memory.items() if name.startswith(UNSENT)}
        sent, left = compensate(tensors, left, self.values, self.plain)
        memory |= {UNSENT + name: value for name, value in left.items()}
        return {**tree, **sent}

    def answer(self, t: int, client: int, letter: bytes, known: Known) -> Tree:
        """Return what a client told. Raises WireError."""
        return decode(unseal(letter, self.envelope(t, client, "up", known), self.key).data, known)

    def round(
        self, t: int, tiers: Mapping[int, int], trees: Mapping[int, Tree]
    ) -> tuple[Outgoing, Callable[[int, bytes], Tree]]:
        """Return a round's letters, given each client's tier and each tier's broadcast, and what opens the answers."""
        messages = {tier: Body(encode(tree, self.plain)) for tier, tree in trees.items()}
        known = {tier: self.based(tree) for tier, tree in trees.items()}

        def told(client: int, letter: bytes) -> Tree:
            return self.answer(t, client, letter, known[tiers[client]])

        return Outgoing(self, t, {client: messages[tier] for client, tier in tiers.items()}), told


class Outgoing(Mapping[int, bytes]):
    """A round's letters by client, each sealed when it is asked for: the message itself is held once."""

    def __init__(self, letters: Letters, t: int, messages: Mapping[int, Body]):
        self.letters, self.t, self.messages = letters, t, messages

    @property
    def size(self) -> int:
        """The bytes of all letters."""
        return sum(len(message.data) + TAG for message in self.messages.values())

    def __getitem__(self, client: int) -> bytes:
        return self.letters.down(self.t, client, self.messages[client])

    def __iter__(self) -> Iterator[int]:
        return iter(self.messages)

    def __len__(self) -> int:
        return len(self.messages)


def _floats(tree: Tree) -> Iterator[tuple[str, Tensor | Sparse]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _floats(value)
        elif isinstance(value, Tensor | Sparse):
            yield name, value


def _finite(tree: Tree) -> bool:
    return all(finite(value.values if isinstance(value, Sparse) else value) for _, value in _floats(tree))
