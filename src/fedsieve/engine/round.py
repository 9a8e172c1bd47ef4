"""The results of a round: what its answers add up to, who was refused or failed, and all that is reported of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any, TypeAlias

from fedsieve.engine.cache import Digests
from fedsieve.engine.rollback import Exclusion, Memory, Rollbacks
from fedsieve.server.admission import Answer, Decode, Refuse
from fedsieve.sparse.csr import csr_bytes
from fedsieve.types import Mask, Params, Tree, Update
from fedsieve.types.contract import Norms
from fedsieve.wire import WireError, encode

Admit: TypeAlias = Callable[[Iterable[tuple[int, Decode]], Refuse], Iterable[Answer]]
"""``Admission.admit`` in one round: the answers that are admitted; the others go to a function, with the reason."""

DecodeReply: TypeAlias = Callable[[int, bytes], Tree]
"""Decode a client's reply, or raise WireError."""

NO_CLIENT = -1
"""In place of a client where an engine brings what is no client's reply."""
LINES = 1000
"""How many refusals of one round are noted, and how many warnings."""


@dataclass(frozen=True)
class ClientReason:
    """Why a client's answer is not admitted, or why what it reports of its training does not count; its update does."""

    client: int
    reason: str


@dataclass(frozen=True)
class Failure:
    """What an engine brings of a client that did not answer: why. The round goes on without it."""

    reason: str


@dataclass
class RoundMetrics:
    """What a round's answers add up to, counted while they stream by. Their notes are no part of the bytes."""

    whole: int | None = None
    """The bytes of a whole model that is sent as plain float32, where that is known."""
    frozen: Collection[str] = ()
    """The parameters that nobody sends."""
    bytes_up: int = 0
    csr: list[int] = field(default_factory=list)
    """The bytes of every upload that is admitted, as the papers count them (``sparse.csr``)."""
    real: float = 0.0
    dense: float = 0.0
    weight: float = 0.0
    weights: dict[str, float] = field(default_factory=dict)
    sums: dict[str, float] = field(default_factory=dict)
    refused: list[ClientReason] = field(default_factory=list)
    warnings: list[ClientReason] = field(default_factory=list)
    kernels: Counter[str] = field(default_factory=Counter)
    why: str | None = None
    steps: int = 0
    seconds: float = 0.0
    admitted: set[int] = field(default_factory=set)
    """The clients whose replies are admitted."""
    lengths: dict[int, Norms] = field(default_factory=dict)
    """By client, what the admitted updates change of the model, where that is known."""
    complete: bool = False
    """Whether the engine has brought all it has, and has not failed in the middle."""

    def collect(self, replies: object, decode: DecodeReply, admit: Admit) -> Iterator[Update]:
        """Yield every update that is admitted; count it, and note the others. ``decode`` reads a client's reply."""
        for answer in admit(self._messages(replies, decode), self._refuse):
            update, work = answer.update, answer.diagnostics["work"]
            self.admitted.add(answer.client)
            self._warn(answer.client, answer.warnings)
            self._count_notes(answer.diagnostics["notes"])
            self.real += work.get("real", 0.0)
            self.dense += work.get("dense", 0.0)
            self.weight += update.n
            counted = {name: update.tree[name] for name in update.tree.keys() - {*self.frozen}}
            self.csr.append(csr_bytes(counted, self.whole))
            if answer.norms is not None:
                self.lengths[answer.client] = answer.norms
            for name, value in update.metrics.items():
                self.sums[name] = self.sums.get(name, 0.0) + value * update.n
                self.weights[name] = self.weights.get(name, 0.0) + update.n
            yield update

    def _messages(self, replies: object, decode: DecodeReply) -> Iterator[tuple[int, Decode]]:
        """Count the bytes that an engine brings, and yield what decodes them; refuse what is no client's reply."""
        if not isinstance(replies, Iterable):
            self._refuse(NO_CLIENT, f"the engine brought {type(replies).__name__} in place of answers")
            replies = ()
        for pair in replies:
            client, reply = pair if isinstance(pair, tuple | list) and len(pair) == 2 else (None, None)
            if type(client) is not int or abs(client) >= 2**63:
                self._refuse(NO_CLIENT, "the engine brought what is no client's number with its message")
                continue
            self.bytes_up += len(reply) if isinstance(reply, bytes) else 0
            yield client, partial(_tree, decode, client, reply)
        self.complete = True

    def _refuse(self, client: int, reason: str) -> None:
        one = ClientReason(client, reason)
        if len(self.refused) < LINES and one not in self.refused:
            self.refused.append(one)

    def _warn(self, client: int, reasons: Iterable[str]) -> None:
        for reason in reasons:
            if len(self.warnings) < LINES and all(reason != one.reason for one in self.warnings):
                self.warnings.append(ClientReason(client, reason))

    def _count_notes(self, notes: Mapping[str, Any]) -> None:
        """Add a client's notes, which may be empty, and take their bytes off the round's."""
        if not notes:
            return
        self.bytes_up -= len(encode({"notes": notes})) - len(encode({}))
        self.kernels["sparse" if notes["sparse"] else "dense"] += 1
        self.why = self.why or next(iter(notes["why"]), None)
        self.steps, self.seconds = self.steps + int(notes["steps"]), self.seconds + notes["seconds"]

    @property
    def csr_bytes_up(self) -> float | None:
        """The mean bytes of one upload as CSR; None where none is admitted."""
        return sum(self.csr) / len(self.csr) if self.csr else None

    @property
    def metrics(self) -> dict[str, float]:
        """The clients' metrics, averaged by the numbers of examples of those who report them."""
        return {name: value / self.weights[name] for name, value in self.sums.items()}


def _tree(decode: DecodeReply, client: int, reply: object) -> Tree:
    """Return a client's decoded reply. Raises WireError if there is none."""
    if isinstance(reply, Failure):
        raise WireError(str(reply.reason))
    if not isinstance(reply, bytes):
        raise WireError(f"the engine brought {type(reply).__name__} in place of its message")
    return decode(client, reply)


@dataclass(frozen=True)
class Round:
    """The results of one round. Bytes are summed over its clients; ``bytes_dense_*`` are the dense model's.

    Dense training knows no warm-up: in round 0 what it would cost is nothing.
    """

    t: int
    clients: tuple[int, ...]
    state: Any
    model: Params
    """The deployed model."""
    accuracy: float | None
    """On the test set; None in rounds without a test."""
    accuracy_validation: float | None
    """On what all clients hold out; None without a test, or where nothing is held out."""
    scores: Mapping[str, float | None]
    """The task's further metrics by name, on the test set and, with the suffix ``_validation``, on what is held out."""
    density: float
    """The share of non-zeros among the weights of two or more dimensions."""
    density_of_policy: float | None
    """The share of non-zeros among the weights that the method makes sparse; None where it makes none."""
    density_of_all: float
    """The share of non-zeros among all parameters, those that no policy reaches, biases and norms included."""
    metrics: Mapping[str, float]
    bytes_up: int
    bytes_down: int
    bytes_dense_up: int
    bytes_dense_down: int
    multiply_adds: float
    multiply_adds_dense: float
    kernels: Mapping[str, int]
    """How many clients trained by the kernels (``sparse``), and how many by PyTorch (``dense``)."""
    dense_because: str | None
    """Why a client's training was dense, where that was not asked for."""
    steps: int
    """The clients' training steps."""
    ms_per_step: float | None
    """Milliseconds a training step took a client, on average, with what goes before and after its steps."""
    seconds: float
    """Wall-clock of the round, its test set aside."""
    cpu_seconds: float
    """What of it this process computed: of a round of one process less than ``seconds`` if the machine was busy."""
    refused: tuple[ClientReason, ...]
    """Whose answers the server did not admit, and why."""
    warnings: tuple[ClientReason, ...]
    """What clients report of their training that does not count."""
    memory: Memory
    csr_bytes_up: float | None = None
    """The mean bytes of one upload as the papers count it (``sparse.csr``)."""
    norms: tuple[Norms, ...] = ()
    """The norms that the next round's bound is taken from."""
    lengths: Mapping[int, Norms] = field(default_factory=dict)
    """By client, what the admitted updates change of the model, where that is known."""
    has: Mapping[int, Digests] = field(default_factory=dict)
    """What each client has of the broadcasts so far (``engine.cache``)."""
    rollbacks: Rollbacks = Rollbacks()
    """How often the run has gone back, and what it leaves out for that."""
    measures: Mapping[str, Any] = field(default_factory=dict)
    """Further columns, where they were asked for."""
    positions: Mask = field(default_factory=dict)
    """Where each layer has its top weights, in the rounds that keep it."""

    @property
    def left_out(self) -> tuple[Exclusion, ...]:
        """The updates that were left out of this round when the run went back to it."""
        return self.rollbacks.of(self.t)


COLUMNS = {"round", "left_out", *(f.name for f in fields(Round))}
"""The names that no metric may have."""
