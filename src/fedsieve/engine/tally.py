"""What a round's answers add up to: bytes, work, metrics, and who was refused or lost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from fedsieve.engine.check import Answer
from fedsieve.types import Tree, Update
from fedsieve.wire import WireError, encode

Passed: TypeAlias = Callable[[Iterable[tuple[int, "Tree | WireError"]], Callable[[int, str], None]], Iterable[Answer]]
"""``check.Checks.passed`` in one round: the answers that pass; the others go to a function."""

Told: TypeAlias = Callable[[int, bytes], Tree]
"""Open a client's answer, or raise WireError."""


@dataclass(frozen=True)
class Refused:
    """An answer that the server did not take, and why."""

    client: int
    reason: str


@dataclass(frozen=True)
class Lost:
    """What an engine brings of a client that did not answer: why. The round goes on without it."""

    reason: str


@dataclass(frozen=True)
class Notes:
    """What a client tells about its training: measured, not sent for the method, and no part of the upload's bytes."""

    steps: int
    seconds: float
    sparse: bool
    why: str | None
    bytes: int


def _read_notes(told: Any) -> Notes:
    steps, seconds, sparse, why = int(told["steps"]), float(told["seconds"]), bool(told["sparse"]), [*told["why"]]
    return Notes(steps, seconds, sparse, why[0] if why else None, len(encode({"notes": told})) - len(encode({})))


@dataclass
class Tally:
    """What a round's answers added up to, counted while they stream by. Their notes are no part of the bytes."""

    bytes_up: int = 0
    real: float = 0.0
    dense: float = 0.0
    weight: float = 0.0
    weights: dict[str, float] = field(default_factory=dict)
    sums: dict[str, float] = field(default_factory=dict)
    refused: list[Refused] = field(default_factory=list)
    kernels: Counter[str] = field(default_factory=Counter)
    why: str | None = None
    steps: int = 0
    seconds: float = 0.0

    def read(self, answers: Iterable[tuple[int, bytes | Lost]], told: Told, passed: Passed) -> Iterator[Update]:
        """Yield every update that passes the checks; note the others. ``told`` opens a client's letter."""
        for answer in passed(self._decoded(answers, told), lambda *refusal: self.refused.append(Refused(*refusal))):
            update = answer.update
            self._note(_read_notes(answer.notes))
            self.real += answer.work["real"]
            self.dense += answer.work["dense"]
            self.weight += update.n
            for name, value in update.metrics.items():
                self.sums[name] = self.sums.get(name, 0.0) + value * update.n
                self.weights[name] = self.weights.get(name, 0.0) + update.n
            yield update

    def _decoded(
        self, answers: Iterable[tuple[int, bytes | Lost]], told: Told
    ) -> Iterator[tuple[int, Tree | WireError]]:
        """Count the bytes and open them, or say why that cannot be."""
        for client, reply in answers:
            found: Tree | WireError
            if isinstance(reply, Lost):
                yield client, WireError(reply.reason)
                continue
            self.bytes_up += len(reply)
            try:
                found = told(client, reply)
            except WireError as error:
                found = error
            yield client, found

    def _note(self, notes: Notes) -> None:
        self.bytes_up -= notes.bytes
        self.kernels["sparse" if notes.sparse else "dense"] += 1
        self.why = self.why or notes.why
        self.steps, self.seconds = self.steps + notes.steps, self.seconds + notes.seconds

    @property
    def metrics(self) -> dict[str, float]:
        """The clients' metrics, averaged by the numbers of examples of those who tell them."""
        return {name: value / self.weights[name] for name, value in self.sums.items()}
