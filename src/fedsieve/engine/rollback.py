"""The last states of a run, and the way back to one of them when training has turned non-finite.

A model that one update has poisoned may still be finite: the next round's clients then train from it, and nothing
finite comes of that. So the way back leads to before the last round in which an update stood far out from the others',
and that update is left out when the round is run again. Where none does, nobody is blamed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any, TypeAlias

from torch import Tensor

from fedsieve.engine.cache import Digests
from fedsieve.types import InputError, unflatten
from fedsieve.types.contract import Norms

DEPTH = 3
"""How many snapshots are held: a run goes back by two rounds at most, and runs a third again."""
LIMIT = 2
"""How often a run goes back."""
FAR = 10.0
"""An update stands out if it changes the model so many times as much as the median of the others of its round."""

Memory: TypeAlias = dict[int, bytes]
"""What each client keeps to itself between rounds, encoded; it never crosses to the server's state."""


class DivergenceError(InputError):
    """A round left nothing finite to go on with."""


@dataclass(frozen=True)
class Exclusion:
    """An update that is left out of its round, and why."""

    round: int
    client: int
    reason: str


@dataclass(frozen=True)
class Rollbacks:
    """How often a run has gone back, and what it leaves out for that."""

    count: int = 0
    left_out: tuple[Exclusion, ...] = ()

    def of(self, t: int) -> tuple[Exclusion, ...]:
        """Return what is left out of round ``t``."""
        return tuple(one for one in self.left_out if one.round == t)

    def __str__(self) -> str:
        which = ", ".join(f"client {one.client}'s of round {one.round}" for one in self.left_out)
        return f"the run has gone back {('once', 'twice')[self.count - 1]}, and left out the longest updates: {which}"


@dataclass(frozen=True)
class Snapshot:
    """A run after round ``t``: all that the next round depends on."""

    t: int
    state: Any
    """The server's state; read from a checkpoint, its tensors by name (``types.flatten``)."""
    memory: Memory
    norms: tuple[Norms, ...] = ()
    """Those that the bound is taken from."""
    lengths: Mapping[int, Norms] | None = None
    """By client, what the updates that made this state changed; None: not known."""
    has: Mapping[int, Digests] = field(default_factory=dict)
    """What each client has of earlier broadcasts (``engine.cache``)."""


@dataclass(frozen=True)
class Checkpoint:
    """Where to go on: the last finished round, its state's tensors (see ``types.flatten``), the clients' memories."""

    t: int
    tensors: Mapping[str, Tensor]
    memory: Memory
    norms: tuple[Norms, ...] = ()
    lengths: Mapping[int, Norms] = field(default_factory=dict)
    rollbacks: Rollbacks = Rollbacks()
    has: Mapping[int, Digests] = field(default_factory=dict)
    earlier: tuple[Callable[[], Checkpoint], ...] = ()
    """What reads the rounds before, in their order, should the run have to go back."""

    def snapshot(self, template: Any) -> Snapshot:
        """Return the snapshot that this is, of a state like ``template``. Raises InputError on a misfit."""
        return Snapshot(self.t, unflatten(template, self.tensors), self.memory, self.norms, self.lengths, self.has)


class Snapshots:
    """The last snapshots of a run, the newest last; earlier ones are read when they are needed."""

    def __init__(self, readers: Iterable[Callable[[], Snapshot]], rollbacks: Rollbacks):
        self._readers, self.rollbacks = deque(readers, DEPTH), rollbacks

    def newest(self) -> Snapshot:
        """Return the snapshot that the run goes on from."""
        return self._readers[-1]()

    def add(self, snapshot: Snapshot) -> None:
        """Add the snapshot after a round."""
        self._readers.append(lambda: snapshot)

    def back(self, t: int, lengths: Mapping[int, Norms]) -> Snapshot | None:
        """Return where to go on after round ``t`` has diverged, whose updates had these ``lengths``.

        None if the run has gone back often enough, or no update stands out. What is left out is in ``returns``.
        """
        if self.rollbacks.count == LIMIT:
            return None
        after = Snapshot(t, None, {}, (), lengths)
        while self._readers and (base := self._readers[-1]()).t == after.t - 1:
            if outliers := find_outliers(after.lengths or {}):
                why = "it changed the model {:.3g} times as much as the others, and round {} came to nothing finite"
                more = (Exclusion(after.t, client, why.format(ratio, t)) for client, ratio in outliers.items())
                self.rollbacks = Rollbacks(self.rollbacks.count + 1, (*self.rollbacks.left_out, *more))
                return base
            after = base
            self._readers.pop()
        return None


def find_outliers(lengths: Mapping[int, Norms]) -> dict[int, float]:
    """Return the clients whose updates stand out, each with how many times as much as the others' it changes."""
    ratios = {client: max(_ratios(client, lengths), default=0.0) for client in lengths if len(lengths) > 1}
    return {client: ratio for client, ratio in ratios.items() if ratio > FAR}


def _ratios(client: int, lengths: Mapping[int, Norms]) -> list[float]:
    others = zip(*(norms for other, norms in lengths.items() if other != client), strict=True)
    pairs = [(own, median(theirs)) for own, theirs in zip(lengths[client], others, strict=True) if own]
    return [own / usual if usual else float("inf") for own, usual in pairs]
