"""What the server lets through to ``aggregate``: answers that an honest client could have sent.

A message that parses may still lie. Here are held against what the server knows: who was asked, how many examples each
client registered, what the method sends (``types.contract``), and how long updates are (``server.robust``).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, TypeAlias

from fedsieve.engine.diagnostics import PARTS, SAVED, Diagnostics, checked, plain, readable
from fedsieve.engine.experiment import Federation
from fedsieve.server.robust import FEW, Fixed, Limits, Loose, Multiple, Off, within
from fedsieve.sparse.policy import frozen_names
from fedsieve.types import Tree, Update
from fedsieve.types.contract import Expected, Norms, Unexpected, norms_of
from fedsieve.types.method import expected_of
from fedsieve.wire import WireError

Letter: TypeAlias = Callable[[], Tree]
"""Open and read a client's letter, or raise what is wrong with it."""

NORMS = (
    "its norm",
    "the norm of its running statistics",
    "its largest change",
    "its largest running statistic's change",
)


@dataclass(frozen=True)
class Answer:
    """A client's answer that passed: its update, and what it tells of its training."""

    client: int
    update: Update
    diagnostics: Diagnostics
    warnings: tuple[str, ...]
    """What of the diagnostics does not count, a line each."""
    norms: Norms | None
    """How long the update is; None if it changes nothing, or what is private depends on its length."""


class Checks:
    """The checks of one run. What they remember from round to round are ``norms``, those of the last updates taken."""

    def __init__(self, federation: Federation, norms: Iterable[Norms] = (), columns: Collection[str] = ()):
        self.federation, self.norms, self.columns = federation, [*norms], columns
        self.frozen = frozen_names(federation.model())
        self.accounted = federation.run.private  # for the plain sum, whatever its answers are
        alone = federation.run.task.clients == 1 and isinstance(federation.run.bound, Loose)  # nobody to guard from it
        self.bound = Off() if self.accounted or alone else federation.run.bound

    def passed(
        self,
        t: int,
        state: Any,
        asked: Mapping[int, int],
        answers: Iterable[tuple[int, Letter]],
        refuse: Callable[[int, str], None],
    ) -> Iterator[Answer]:
        """Yield the answers of round t that pass; ``asked`` holds every client's device class.

        They come in their order, after them those that are longer than is usual, but not for this round. The others go
        to ``refuse``, with the reason. None of them leaves a trace.
        """
        limits, sound = self._limits(state, self._sound(t, state, asked, answers, refuse))
        norms, long = list[Norms](), list[tuple[Answer, Norms]]()
        for answer in sound:
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
        for answer, lengths in long:
            if within(lengths, limits):
                self._remember(lengths)
                yield answer
            else:
                refuse(answer.client, _too_long(lengths, limits))

    def _limits(self, state: Any, sound: Iterator[Answer]) -> tuple[Limits, Iterator[Answer]]:
        """Return the bounds of a round, and its answers, of which they may depend on the first, or on all."""
        bound = self.bound
        if isinstance(bound, Off):
            return (), sound
        if isinstance(bound, Fixed):
            return (bound.norm, bound.statistics), sound
        if isinstance(bound, Loose):
            head = [*islice(sound, FEW)] if len(self.norms) < FEW else []
            return bound.limits([*self.norms, *_norms(head)], norms_of(state.params.items())), chain(head, sound)
        if self.norms:
            return bound.limits(self.norms), sound
        every = [*sound]
        return bound.first(_norms(every)), iter(every)

    def _remember(self, norms: Norms | None) -> None:
        if isinstance(self.bound, Multiple | Loose) and norms is not None:
            self.norms = [*self.norms, norms][-self.bound.window :]

    def _sound(
        self,
        t: int,
        state: Any,
        asked: Mapping[int, int],
        answers: Iterable[tuple[int, Letter]],
        refuse: Callable[[int, str], None],
    ) -> Iterator[Answer]:
        """Yield the answers that are sound in themselves."""
        run, heard = self.federation.run, set[int]()
        expected = {tier: expected_of(run.method, state, run.context(t, tier)) for tier in sorted({*asked.values()})}
        for client, letter in answers:
            if client not in asked:
                refuse(client, "it was not asked in this round")
                continue
            if client in heard:
                refuse(client, "a second answer in one round")
                continue
            heard.add(client)
            try:
                answer = self._answer(client, letter(), expected[asked[client]])
            except Exception as error:  # whatever it takes to read it: one client's answer never ends a run
                refuse(client, _reason(error))
                continue
            yield answer

    def _answer(self, client: int, told: Tree, expected: Expected) -> Answer:
        """Return a client's answer, checked. Raises Unexpected."""
        tree = told.get("tree")
        if not isinstance(tree, Mapping) or not told.keys() <= {"tree", "n", *PARTS}:
            raise Unexpected("not a client's answer")
        n = _examples(told.get("n"), self.federation.examples(client))
        tree = expected.fill_frozen(tree, self.frozen)
        expected.check(tree)
        known = expected.metrics
        if known is not None and "masks" in self.federation.measure:
            known += SAVED
        diagnostics, warnings = checked(readable(told), known, self.columns)
        norms = None if self.accounted else expected.norms(tree)
        return Answer(client, Update(tree, n, diagnostics["metrics"]), diagnostics, warnings, norms)


def _reason(error: Exception) -> str:
    """Return why an answer is refused, in one line."""
    if isinstance(error, Unexpected | WireError):
        return plain(str(error))
    if isinstance(error, MemoryError):
        return "there is not enough memory to read it"
    if isinstance(error, RecursionError):
        return "it is nested too deeply to read it"
    return plain(f"it cannot be read ({type(error).__name__}: {error})")


def _norms(answers: Iterable[Answer]) -> list[Norms]:
    return [answer.norms for answer in answers if answer.norms is not None]


def _too_long(norms: Norms, limits: Limits) -> str:
    kind = next(i for i, limit in enumerate(limits) if norms[i] > limit)
    return f"{NORMS[kind]} {norms[kind]:.4g} is above the bound {limits[kind]:.4g}"


def _examples(n: object, registered: int) -> int:
    if not isinstance(n, float) or not n.is_integer():
        raise Unexpected("its number of examples is no whole number")
    if n < 1:
        raise Unexpected(f"an answer from {n:.6g} examples")
    if n > registered:
        raise Unexpected(f"an answer from {n:.6g} examples, where the client has {registered}")
    return int(n)
