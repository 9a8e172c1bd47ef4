"""What the server lets through to ``aggregate``: answers that an honest client could have sent.

A message that parses may still lie. Here are held against what the server knows: who was asked, how many examples each
client registered, what the method sends (``fedsieve.expected``), and how long updates are (``fedsieve.robust``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from fedsieve.engine.diagnostics import PARTS, SAVED, Diagnostics, checked, plain, readable
from fedsieve.engine.task import Federation
from fedsieve.expected import Expected, Norms, Unexpected, expected_of
from fedsieve.robust import Fixed, Multiple, Off, within
from fedsieve.sparsity import frozen
from fedsieve.types import Tree, Update
from fedsieve.wire import WireError

Letter: TypeAlias = Callable[[], Tree]
"""Open and read a client's letter, or raise what is wrong with it."""


@dataclass(frozen=True)
class Answer:
    """A client's answer that passed: its update, and what it tells of its training."""

    client: int
    update: Update
    diagnostics: Diagnostics
    warnings: tuple[str, ...]
    """What of the diagnostics does not count, a line each."""
    norms: Norms | None
    """How long the update is; None if that was not asked for, or it changes nothing."""


class Checks:
    """The checks of one run. What they remember from round to round are ``norms``, those of the last updates taken."""

    def __init__(self, federation: Federation, norms: Iterable[Norms] = (), columns: Collection[str] = ()):
        self.federation, self.norms, self.columns = federation, [*norms], columns
        self.frozen = frozen(federation.model())

    def passed(
        self,
        state: Any,
        asked: Mapping[int, int],
        answers: Iterable[tuple[int, Letter]],
        refuse: Callable[[int, str], None],
    ) -> Iterator[Answer]:
        """Yield the answers that pass, in their order; ``asked`` holds every client's device class.

        The others go to ``refuse``, with the reason. None of them leaves a trace.
        """
        sound = self._sound(state, asked, answers, refuse)
        limits, bound = (math.inf, math.inf), self.federation.run.bound
        if isinstance(bound, Fixed):
            limits = bound.norm, bound.statistics
        elif isinstance(bound, Multiple) and self.norms:
            limits = bound.limits(self.norms)
        elif isinstance(bound, Multiple):
            sound = iter(every := [*sound])
            limits = bound.first([answer.norms for answer in every if answer.norms is not None])
        for answer in sound:
            if answer.norms is not None and not within(answer.norms, limits):
                refuse(answer.client, _too_long(answer.norms, limits))
                continue
            self._remember(answer.norms)
            yield answer

    def _remember(self, norms: Norms | None) -> None:
        bound = self.federation.run.bound
        if isinstance(bound, Multiple) and norms is not None:
            self.norms = [*self.norms, norms][-bound.window :]

    def _sound(
        self,
        state: Any,
        asked: Mapping[int, int],
        answers: Iterable[tuple[int, Letter]],
        refuse: Callable[[int, str], None],
    ) -> Iterator[Answer]:
        """Yield the answers that are sound in themselves."""
        method, heard = self.federation.run.method, set[int]()
        expected = {tier: expected_of(method, state, tier) for tier in sorted({*asked.values()})}
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
        tree = expected.filled(tree, self.frozen)
        expected.check(tree)
        known = expected.metrics
        if known is not None and "masks" in self.federation.measure:
            known += SAVED
        diagnostics, warnings = checked(readable(told), known, self.columns)
        norms = None if isinstance(self.federation.run.bound, Off) else expected.norms(tree)
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


def _too_long(norms: Norms, limits: Norms) -> str:
    kind = int(norms[0] <= limits[0])
    what = "the norm of its running statistics" if kind else "its norm"
    return f"{what} {norms[kind]:.4g} is above the bound {limits[kind]:.4g}"


def _examples(n: object, registered: int) -> int:
    if not isinstance(n, float) or not n.is_integer():
        raise Unexpected("its number of examples is no whole number")
    if n < 1:
        raise Unexpected(f"an answer from {n:.6g} examples")
    if n > registered:
        raise Unexpected(f"an answer from {n:.6g} examples, where the client has {registered}")
    return int(n)
