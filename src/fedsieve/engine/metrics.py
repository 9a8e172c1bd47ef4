"""What a round's answers add up to: bytes, work, metrics, and who was refused or lost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

from fedsieve.engine.admission import Answer, Letter
from fedsieve.types import Tree, Update
from fedsieve.types.contract import Norms
from fedsieve.wire import WireError, encode

Refuse: TypeAlias = Callable[[int, str], None]
Passed: TypeAlias = Callable[[Iterable[tuple[int, Letter]], Refuse], Iterable[Answer]]
"""``check.Checks.passed`` in one round: the answers that pass; the others go to a function, with the reason."""

Opened: TypeAlias = Callable[[int, bytes], Tree]
"""Open a client's letter, or raise WireError."""

NOBODY = -1
"""In place of a client where an engine brings what is no client's answer."""
LINES = 1000
"""How many refusals of one round are noted, and how many warnings."""


@dataclass(frozen=True)
class Refused:
    """An answer that the server did not take, and why."""

    client: int
    reason: str


@dataclass(frozen=True)
class Remark:
    """What a client tells of its training that does not count, and why: the first that does. Its update counts."""

    client: int
    reason: str


@dataclass(frozen=True)
class Lost:
    """What an engine brings of a client that did not answer: why. The round goes on without it."""

    reason: str


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
    warnings: list[Remark] = field(default_factory=list)
    kernels: Counter[str] = field(default_factory=Counter)
    why: str | None = None
    steps: int = 0
    seconds: float = 0.0
    lengths: dict[int, Norms] = field(default_factory=dict)
    """By client, what the updates that were taken change of the model, where that is known."""
    complete: bool = False
    """Whether the engine has brought all it has, and has not failed in the middle."""

    def read(self, answers: object, opened: Opened, passed: Passed) -> Iterator[Update]:
        """Yield every update that passes the checks; note the others. ``opened`` opens a client's letter."""
        for answer in passed(self._brought(answers, opened), self._refuse):
            update, work = answer.update, answer.diagnostics["work"]
            self._warn(answer.client, answer.warnings)
            self._note(answer.diagnostics["notes"])
            self.real += work.get("real", 0.0)
            self.dense += work.get("dense", 0.0)
            self.weight += update.n
            if answer.norms is not None:
                self.lengths[answer.client] = answer.norms
            for name, value in update.metrics.items():
                self.sums[name] = self.sums.get(name, 0.0) + value * update.n
                self.weights[name] = self.weights.get(name, 0.0) + update.n
            yield update

    def _brought(self, answers: object, opened: Opened) -> Iterator[tuple[int, Letter]]:
        """Count the bytes that an engine brings, and say what reads them; refuse what is no client's answer at all."""
        if not isinstance(answers, Iterable):
            self._refuse(NOBODY, f"the engine brought {type(answers).__name__} in place of answers")
            answers = ()
        for brought in answers:
            client, letter = brought if isinstance(brought, tuple | list) and len(brought) == 2 else (None, None)
            if type(client) is not int or abs(client) >= 2**63:
                self._refuse(NOBODY, "the engine brought what is no client's number with its letter")
                continue
            self.bytes_up += len(letter) if isinstance(letter, bytes) else 0
            yield client, partial(_tree, opened, client, letter)
        self.complete = True

    def _refuse(self, client: int, reason: str) -> None:
        one = Refused(client, reason)
        if len(self.refused) < LINES and one not in self.refused:
            self.refused.append(one)

    def _warn(self, client: int, reasons: Iterable[str]) -> None:
        for reason in reasons:
            if len(self.warnings) < LINES and all(reason != one.reason for one in self.warnings):
                self.warnings.append(Remark(client, reason))

    def _note(self, notes: Mapping[str, Any]) -> None:
        """Add a client's notes, if it has told any."""
        if not notes:
            return
        self.bytes_up -= len(encode({"notes": notes})) - len(encode({}))
        self.kernels["sparse" if notes["sparse"] else "dense"] += 1
        self.why = self.why or next(iter(notes["why"]), None)
        self.steps, self.seconds = self.steps + int(notes["steps"]), self.seconds + notes["seconds"]

    @property
    def metrics(self) -> dict[str, float]:
        """The clients' metrics, averaged by the numbers of examples of those who tell them."""
        return {name: value / self.weights[name] for name, value in self.sums.items()}


def _tree(opened: Opened, client: int, letter: object) -> Tree:
    """Return what a client's letter says. Raises WireError if there is none."""
    if isinstance(letter, Lost):
        raise WireError(str(letter.reason))
    if not isinstance(letter, bytes):
        raise WireError(f"the engine brought {type(letter).__name__} in place of its letter")
    return opened(client, letter)
