"""What the server lets through to ``aggregate``: answers that an honest client could have sent.

A message that parses may still lie. Here are held against what the server knows: who was asked, how many examples each
client registered, what the method sends (``fedsieve.expected``), and how long updates are (``fedsieve.robust``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fedsieve.engine.task import Federation
from fedsieve.expected import Expected, Norms, Unexpected, expected_of, shown
from fedsieve.robust import Fixed, Multiple, Off, within
from fedsieve.sparsity import frozen
from fedsieve.types import Tree, Update
from fedsieve.wire import WireError

SAVED = ("saved_bytes", "saved_nonzero")
"""The metrics that clients add where masks are measured."""
LARGEST = 1e30
"""No metric and no count of work is larger: sums of them stay finite."""


@dataclass(frozen=True)
class Answer:
    """A client's answer that passed: its update, and what it tells of its work."""

    client: int
    update: Update
    work: Mapping[str, float]
    notes: Mapping[str, Any]
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
        answers: Iterable[tuple[int, Tree | WireError]],
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
        answers: Iterable[tuple[int, Tree | WireError]],
        refuse: Callable[[int, str], None],
    ) -> Iterator[Answer]:
        """Yield the answers that are sound in themselves."""
        method, heard = self.federation.run.method, set[int]()
        expected = {tier: expected_of(method, state, tier) for tier in sorted({*asked.values()})}
        for client, told in answers:
            try:
                if client not in asked:
                    raise Unexpected("it was not asked in this round")
                if client in heard:
                    raise Unexpected("a second answer in one round")
                heard.add(client)
                if isinstance(told, WireError):
                    raise told
                answer = self._answer(client, told, expected[asked[client]])
            except (Unexpected, WireError) as error:
                refuse(client, plain(str(error)))
                continue
            yield answer

    def _answer(self, client: int, told: Tree, expected: Expected) -> Answer:
        """Return a client's answer, checked. Raises Unexpected."""
        parts = {name: told.get(name) for name in ("tree", "metrics", "work", "notes")}
        trees = {name: part for name, part in parts.items() if isinstance(part, Mapping)}
        if told.keys() != {*parts, "n"} or len(trees) < len(parts):
            raise Unexpected("not a client's answer")
        n = _examples(told["n"], self.federation.examples(client))
        tree = expected.filled(trees["tree"], self.frozen)
        expected.check(tree)
        self._check_metrics(trees["metrics"], expected)
        _check_work(trees["work"])
        _check_notes(trees["notes"])
        norms = None if isinstance(self.federation.run.bound, Off) else expected.norms(tree)
        update = Update(tree, n, dict(trees["metrics"]))  # type: ignore[arg-type]
        return Answer(client, update, trees["work"], trees["notes"], norms)  # type: ignore[arg-type]

    def _check_metrics(self, metrics: Tree, expected: Expected) -> None:
        known = expected.metrics
        if known is not None and "masks" in self.federation.measure:
            known += SAVED
        for name, value in metrics.items():
            if known is not None and name not in known:
                raise Unexpected(f"{shown(name)} is no metric of this method")
            if name in self.columns:
                raise Unexpected(f"the metric {name} has the name of a column of rounds.jsonl: rename it")
            if not _number(value, -LARGEST):
                raise Unexpected(f"the metric {shown(name)} is no finite number")


def plain(reason: str) -> str:
    """Return a reason as it may be printed: a client's text in it is one line, cut short."""
    return "".join(c if c.isprintable() else "?" for c in reason[:300])


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


def _check_work(work: Tree) -> None:
    if work.keys() != {"real", "dense"} or not all(_number(value) for value in work.values()):
        raise Unexpected("its count of multiply-adds is none")


def _check_notes(notes: Tree) -> None:
    """Raise Unexpected unless the notes are numbers that can be, and one line of text at most."""
    steps, seconds, sparse, why = (notes.get(name) for name in ("steps", "seconds", "sparse", "why"))
    numbers = isinstance(steps, float) and _number(steps) and steps.is_integer() and _number(seconds)
    flag = isinstance(sparse, float) and sparse in (0.0, 1.0)
    reasons = [*why.items()] if isinstance(why, Mapping) else [("", None)]
    text = len(reasons) <= 1 and all(plain(line) == line and _number(value) for line, value in reasons)
    if len(notes) != 4 or not (numbers and flag and text):
        raise Unexpected("its notes on its training are none")


def _number(value: object, least: float = 0.0) -> bool:
    return isinstance(value, float) and least <= value <= LARGEST
