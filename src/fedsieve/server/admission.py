"""Which answers the server admits to the mean: those that an honest client could have sent.

A message that parses may still lie. It is checked against what the server knows: whom it sent the model, how many
examples each client registered, what the method's clients send (``types.contract``), which metrics they report
(``server.diagnostics``), and how much an update may change (a ``Bound``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from statistics import median, median_low
from typing import Any, TypeAlias

from fedsieve.server.diagnostics import FIELDS, SAVED, Diagnostics, check_diagnostics, one_line, read_diagnostics
from fedsieve.types import InputError, Tree, Update
from fedsieve.types.contract import ContractError, Expected, Norms, norms_of
from fedsieve.wire import WireError

Decode: TypeAlias = Callable[[], Tree]
"""Decode a client's message, or raise what is wrong with it."""

Refuse: TypeAlias = Callable[[int, str], None]
"""Take note of a client whose answer is refused, and of the reason."""

NORMS = (
    "its norm",
    "the norm of its running statistics",
    "its largest change",
    "its largest running statistic's change",
)
FEW = 3
"""Of fewer updates one that lies may be the median."""

Limits: TypeAlias = tuple[float, ...]
"""Bounds on ``Norms``, as many as there are: the first two, or all."""


@dataclass(frozen=True)
class Off:
    """No bound on an update's norm."""


@dataclass(frozen=True)
class Fixed:
    """An update is refused if its weights change by more than ``norm``, or its running statistics by ``statistics``."""

    norm: float = 10.0
    """The largest Euclidean norm of a change of weights."""
    statistics: float = 1000.0
    """The largest Euclidean norm of a change of BatchNorm's running statistics."""

    def __post_init__(self) -> None:
        check_positive("bound.norm", self.norm)
        check_positive("bound.statistics", self.statistics)


@dataclass(frozen=True)
class Multiple:
    """An update is refused if a norm of it is above ``times`` the running median, that of the last ones taken.

    The norms are two, of weights and of running statistics, and each has its median. The first round has none
    before it: its bound is ``times`` the median of its own norms, the largest left out as long as they are above it.
    """

    times: float = 3.0
    """How many times the median a norm may be."""
    window: int = 100
    """How many updates the median is taken over."""

    def __post_init__(self) -> None:
        _check_running(self.times, self.window)

    def limits(self, norms: list[Norms]) -> Limits:
        """Return the bounds after updates of these norms."""
        weights, others, *_ = zip(*norms, strict=True)
        return self.times * median(weights), self.times * median(others)

    def first(self, norms: list[Norms]) -> Limits:
        """Return the bounds of a first round, whose updates have these norms."""
        while True:
            limit = self._first([one[0] for one in norms])
            limits = limit, self._first([one[1] for one in norms if one[0] <= limit])
            kept = [one for one in norms if within(one, limits)]
            if len(kept) == len(norms):
                return limits
            norms = kept

    def _first(self, norms: list[float]) -> float:
        rising = sorted(norms)
        limits = [self.times * median(rising[: k + 1]) for k in range(len(rising))]
        return next((limits[k] for k in reversed(range(len(rising))) if rising[k] <= limits[k]), math.inf)


@dataclass(frozen=True)
class Loose:
    """An update is refused if it changes the model ``times`` as much as is usual, and by more than the model itself.

    That is so much that no honest client does it. It is held of norm and largest element, of weights and of running
    statistics: usual is the running median of each, that of the last updates taken. Before there are ``FEW`` of them,
    the bound is ``times`` the model itself, and running statistics, whose scale is the data's, have none. Where most
    of a round's updates are longer than ever, training went there, and none of them lies: see ``widened``.
    """

    times: float = 100.0
    """How many times the median a norm may be."""
    window: int = 100
    """How many updates the median is taken over."""

    def __post_init__(self) -> None:
        _check_running(self.times, self.window)

    def limits(self, norms: list[Norms], model: Norms) -> Limits:
        """Return the bounds after updates of these norms, for a model of those; a model of zeros counts as 1."""
        own = [max(1.0, norm) for norm in model]
        if len(norms) < FEW:
            return self.times * own[0], math.inf, self.times * own[2], math.inf
        usual = map(median, zip(*norms, strict=True))
        return tuple(max(self.times * middle, least) for middle, least in zip(usual, own, strict=True))

    def widened(self, limits: Limits, norms: list[Norms]) -> Limits:
        """Return a round's bounds, at least ``times`` the median of all its updates, of an even number the lower one.

        So half of them may lie. One update alone widens nothing.
        """
        if len(norms) < 2:
            return limits
        usual = map(median_low, zip(*norms, strict=True))
        return tuple(max(limit, self.times * middle) for limit, middle in zip(limits, usual, strict=True))


Bound: TypeAlias = Off | Fixed | Multiple | Loose


@dataclass(frozen=True)
class Answer:
    """A client's answer that is admitted: its update, and the diagnostics of its training."""

    client: int
    update: Update
    diagnostics: Diagnostics
    warnings: tuple[str, ...]
    """One line for each of the diagnostics that is left out."""
    norms: Norms | None
    """What the update changes; None if it changes no model, or privacy is accounted for the plain sum."""


class Admission:
    """The admission of one run's answers. Its state from round to round are ``norms``, those of the last updates."""

    def __init__(
        self,
        expected: Callable[[Any, int, int], Expected],
        bound: Bound,
        examples: Callable[[int], int],
        frozen: Collection[str] = (),
        *,
        private: bool = False,
        saved: bool = False,
        columns: Collection[str] = (),
        norms: Iterable[Norms] = (),
    ):
        """Set the rules.

        ``expected`` returns what clients send, of the state, the round and the device class; ``examples`` how many a
        client registered; ``frozen`` are the parameters that nobody sends.

        A ``private`` method accounts for the plain sum, so that no norm is looked at. ``saved`` allows the metrics of
        saved tensors; no metric may have the name of one of ``columns``.
        """
        self.expected, self.examples, self.frozen = expected, examples, frozenset(frozen)
        self.bound: Bound = Off() if private else bound
        self.private, self.extra, self.columns = private, SAVED if saved else (), columns
        self.norms = [*norms]

    def admit(
        self, t: int, state: Any, tiers: Mapping[int, int], messages: Iterable[tuple[int, Decode]], refuse: Refuse
    ) -> Iterator[Answer]:
        """Yield the answers of round t that are admitted; ``tiers`` holds the device class of every client in it.

        They come in their order; after them, under a Loose bound, those that are above it but not for this round. The
        others go to ``refuse``, with the reason. None of them leaves a trace.
        """
        limits, valid = self._limits(state, self._valid(t, state, tiers, messages, refuse))
        norms, long = list[Norms](), list[tuple[Answer, Norms]]()
        for answer in valid:
            norms += _norms([answer])
            if answer.norms is None or within(answer.norms, limits):
                self._remember(answer.norms)
                yield answer
            elif isinstance(self.bound, Loose):
                long.append((answer, answer.norms))
            else:
                refuse(answer.client, _too_long(answer.norms, limits))
        if isinstance(self.bound, Loose):
            limits = self.bound.widened(limits, norms)
        for answer, change in long:
            if within(change, limits):
                self._remember(change)
                yield answer
            else:
                refuse(answer.client, _too_long(change, limits))

    def _limits(self, state: Any, valid: Iterator[Answer]) -> tuple[Limits, Iterator[Answer]]:
        """Return the bounds of a round, and its answers: the bounds may depend on the first of them, or on all."""
        bound = self.bound
        if isinstance(bound, Off):
            return (), valid
        if isinstance(bound, Fixed):
            return (bound.norm, bound.statistics), valid
        if isinstance(bound, Loose):
            head = [*islice(valid, FEW)] if len(self.norms) < FEW else []
            return bound.limits([*self.norms, *_norms(head)], norms_of(state.params.items())), chain(head, valid)
        if self.norms:
            return bound.limits(self.norms), valid
        every = [*valid]
        return bound.first(_norms(every)), iter(every)

    def _remember(self, norms: Norms | None) -> None:
        if isinstance(self.bound, Multiple | Loose) and norms is not None:
            self.norms = [*self.norms, norms][-self.bound.window :]

    def _valid(
        self, t: int, state: Any, tiers: Mapping[int, int], messages: Iterable[tuple[int, Decode]], refuse: Refuse
    ) -> Iterator[Answer]:
        """Yield the answers that are valid whatever their length: of a client of the round, its first, as expected."""
        expected = {tier: self.expected(state, t, tier) for tier in sorted({*tiers.values()})}
        answered = set[int]()
        for client, decode in messages:
            if client not in tiers:
                refuse(client, "it was not asked in this round")
                continue
            if client in answered:
                refuse(client, "a second answer in one round")
                continue
            answered.add(client)
            try:
                answer = self._answer(client, decode(), expected[tiers[client]])
            except Exception as error:  # whatever it takes to read it: one client's answer never ends a run
                refuse(client, _reason(error))
                continue
            yield answer

    def _answer(self, client: int, message: Tree, expected: Expected) -> Answer:
        """Return a client's decoded message as a checked answer. Raises ContractError."""
        tree = message.get("tree")
        if not isinstance(tree, Mapping) or not message.keys() <= {"tree", "n", *FIELDS}:
            raise ContractError("not a client's answer")
        n = _examples(message.get("n"), self.examples(client))
        tree = expected.fill_frozen(tree, self.frozen)
        expected.check(tree)
        names = None if expected.metrics is None else (*expected.metrics, *self.extra)
        diagnostics, warnings = check_diagnostics(read_diagnostics(message), names, self.columns)
        norms = None if self.private else expected.norms(tree)
        return Answer(client, Update(tree, n, diagnostics["metrics"]), diagnostics, warnings, norms)


def within(norms: Norms, limits: Limits) -> bool:
    """Tell whether no norm is above its bound."""
    return all(norm <= limit for norm, limit in zip(norms, limits, strict=False))


def _reason(error: Exception) -> str:
    """Return why an answer is refused, in one line."""
    if isinstance(error, ContractError | WireError):
        return one_line(str(error))
    if isinstance(error, MemoryError):
        return "there is not enough memory to read it"
    if isinstance(error, RecursionError):
        return "it is nested too deeply to read it"
    return one_line(f"it cannot be read ({type(error).__name__}: {error})")


def _norms(answers: Iterable[Answer]) -> list[Norms]:
    return [answer.norms for answer in answers if answer.norms is not None]


def _too_long(norms: Norms, limits: Limits) -> str:
    kind = next(i for i, limit in enumerate(limits) if norms[i] > limit)
    return f"{NORMS[kind]} {norms[kind]:.4g} is above the bound {limits[kind]:.4g}"


def _examples(n: object, registered: int) -> int:
    if not isinstance(n, float) or not n.is_integer():
        raise ContractError("its number of examples is no whole number")
    if n < 1:
        raise ContractError(f"an answer from {n:.6g} examples")
    if n > registered:
        raise ContractError(f"an answer from {n:.6g} examples, where the client has {registered}")
    return int(n)


def _check_running(times: float, window: int) -> None:
    if not 1 <= times <= 1e6:
        raise InputError(f"bound.times must lie in [1, 1e6], got {times}")
    if window < 1:
        raise InputError(f"bound.window must be at least 1, got {window}")


def check_positive(what: str, norm: float) -> None:
    """Raise InputError unless a bound on a norm is positive and finite."""
    if not 0 < norm <= 1e18:
        raise InputError(f"{what} must be positive and at most 1e18, got {norm}")
