"""Which answers the server admits to the mean: those that an honest client could have sent.

A message that parses may still lie. It is checked against what the server knows: whom it sent the model, how many
examples each client registered, what the method's clients send (``types.contract``), and how much an update may change
(a ``Bound`` of ``server.robust``).

What a client reports of its training beside its update, its diagnostics (metrics, multiply-adds, notes), costs no
update. ``read_diagnostics`` brings it into the form that the server reads, on either side: a client sends what it
returns, and the server reads through it what arrives. What is no number is NaN there; the server leaves it out and says
so.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from typing import Any, TypeAlias

from fedsieve.server.robust import FEW, Bound, Fixed, Limits, Loose, Multiple, Off, within
from fedsieve.types import Tree, Update
from fedsieve.types.contract import ContractError, Expected, Norms, NotFinite, norms_of, printable
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
FIELDS = ("metrics", "work", "notes")
LOSS = ("nonfinite_step", "bf16")
"""Notes of a training whose loss was not finite: the first such step, from 1; whether products were in bfloat16."""
SAVED = ("saved_bytes", "saved_nonzero")
"""The metrics that clients add where masks are measured."""
LARGEST = 1e30
"""No metric and no count of work is larger: sums of them stay finite."""
METRICS = 100
"""How many metrics of one client are read."""
AHEAD = 8
"""How many answers may have been read, and wait for those before them."""
REASON, NAME = 300, 60
"""Characters of a reason, and of a metric's name, that are read."""

Diagnostics: TypeAlias = dict[str, dict[str, Any]]
"""``metrics`` by name; ``work``, the multiply-adds ``real`` and ``dense``; ``notes``: ``steps``, ``seconds``, whether
training was ``sparse``, and ``why`` not, a tree whose only name is the reason; ``LOSS`` where that was not finite. Work
and notes may be empty."""


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
        saved_tensors: bool = False,
        columns: Collection[str] = (),
    ):
        """Set the rules.

        ``expected`` returns what clients send, of the state, the round and the device class; ``examples`` how many a
        client registered; ``frozen`` are the parameters that nobody sends.

        A ``private`` method accounts for the plain sum, so that no norm is looked at. ``saved_tensors`` allows
        their metrics; no metric may have the name of one of ``columns``.
        """
        self.expected, self.examples, self.frozen = expected, examples, frozenset(frozen)
        self.bound: Bound = Off() if private else bound
        self.private, self.extra, self.columns = private, SAVED if saved_tensors else (), columns
        self.norms = list[Norms]()
        self.threads: Executor | None = None
        """What reads answers while others are waited for; None: each is read when its turn has come."""
        self.remedies: Callable[[], str] = str
        """What may help a client whose training has diverged, in one line."""

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
        first = self._first(tiers, messages, refuse)
        several = ((client, partial(self._answer, client, decode, expected[tiers[client]])) for client, decode in first)
        for client, read in several if self.threads is None else _ahead(several, self.threads):
            try:
                answer = read()
            except Exception as error:  # whatever it takes to read it: one client's answer never ends a run
                refuse(client, _reason(error))
                continue
            yield answer

    def _first(
        self, tiers: Mapping[int, int], messages: Iterable[tuple[int, Decode]], refuse: Refuse
    ) -> Iterator[tuple[int, Decode]]:
        """Yield the first message of every client of the round."""
        answered = set[int]()
        for client, decode in messages:
            if client not in tiers:
                refuse(client, "it was not asked in this round")
            elif client in answered:
                refuse(client, "a second answer in one round")
            else:
                answered.add(client)
                yield client, decode

    def _answer(self, client: int, decode: Decode, expected: Expected) -> Answer:
        """Return a client's message as a checked answer. Raises what is wrong with it."""
        message = decode()
        tree = message.get("tree")
        if not isinstance(tree, Mapping) or not message.keys() <= {"tree", "n", *FIELDS}:
            raise ContractError("not a client's answer")
        n = _examples(message.get("n"), self.examples(client))
        tree = expected.fill_frozen(tree, self.frozen)
        diagnostics = read_diagnostics(message)
        since = _since(diagnostics["notes"])
        try:
            expected.check(tree)
        except NotFinite as error:
            cure = self.remedies()
            raise NotFinite(f"{error}{since and ', its loss ' + since}{cure and ': ' + cure}") from None
        if since:
            diagnostics["metrics"].pop("loss", None)
        names = None if expected.metrics is None else (*expected.metrics, *self.extra)
        diagnostics, warnings = check_diagnostics(diagnostics, names, self.columns)
        if since:
            warnings = (f"its loss, {since}, is left out: {self.remedies()}", *warnings)
        norms = None if self.private else expected.norms(tree)
        return Answer(client, Update(tree, n, diagnostics["metrics"]), diagnostics, warnings, norms)


def _ahead(
    several: Iterable[tuple[int, Callable[[], Answer]]], threads: Executor
) -> Iterator[tuple[int, Callable[[], Answer]]]:
    """Yield what gives each answer, in their order; it is at work in ``threads`` while later messages come in."""
    waiting = deque[tuple[int, Callable[[], Answer]]]()
    for client, read in several:
        waiting.append((client, threads.submit(read).result))
        if len(waiting) > AHEAD:
            yield waiting.popleft()
    yield from waiting


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


def _since(notes: Mapping[str, Any]) -> str:
    """Return what a client's notes say of a loss that was not finite; "" if it was."""
    if not (step := notes.get("nonfinite_step")):
        return ""
    reduced = " in bfloat16 (--precision fp32 has more digits)" if notes["bf16"] else ""
    return f"NaN or infinite from step {step:.0f} of {notes['steps']:.0f} on{reduced}"


def _examples(n: object, registered: int) -> int:
    if not isinstance(n, float) or not n.is_integer():
        raise ContractError("its number of examples is no whole number")
    if n < 1:
        raise ContractError(f"an answer from {n:.6g} examples")
    if n > registered:
        raise ContractError(f"an answer from {n:.6g} examples, where the client has {registered}")
    return int(n)


def read_diagnostics(message: Mapping[str, Any]) -> Diagnostics:
    """Return a client's diagnostics in the form that the server reads, whatever they are."""
    return {
        "metrics": _metrics(message.get("metrics")),
        "work": _work(message.get("work")),
        "notes": _notes(message.get("notes")),
    }


def one_line(text: str, length: int = REASON) -> str:
    """Return a text as it may be printed: one line of so many characters at most."""
    return "".join(c if c.isprintable() else "?" for c in text[:length])


def check_diagnostics(
    diagnostics: Diagnostics, known: tuple[str, ...] | None, columns: Collection[str]
) -> tuple[Diagnostics, tuple[str, ...]]:
    """Return readable diagnostics without what does not count, and a line on each of those.

    ``known`` are the metrics that the method names (None: any), ``columns`` the names that a metric must not have.
    """
    lines, metrics = list[str](), dict[str, float]()
    for name, value in islice(diagnostics["metrics"].items(), METRICS):
        if why := _unfit(name, value, known, columns):
            lines.append(f"its metric {printable(name)} {why}")
        else:
            metrics[name] = value
    if len(diagnostics["metrics"]) > METRICS:
        lines.append(f"it reports more than {METRICS} metrics: the others are left out")
    if not diagnostics["work"]:
        lines.append("its count of multiply-adds is none, and is left out of the sum")
    if not diagnostics["notes"]:
        lines.append("its notes on its training are none: steps and seconds are those of the others")
    return {**diagnostics, "metrics": metrics}, tuple(lines)


def _unfit(name: str, value: float, known: tuple[str, ...] | None, columns: Collection[str]) -> str:
    """Return why a metric is left out; "" if it is not."""
    if name in columns:
        return "has the name of a column of rounds.jsonl and is left out: rename it"
    if known is not None and name not in known:
        named = *(metric for metric in known if metric not in SAVED), name
        return f"is none that the method names, and is left out: let expected return Expected(..., metrics={named})"
    return "is no finite number, and is left out" if math.isnan(value) else ""


def _metrics(value: object) -> dict[str, float]:
    """Return metrics by their names, one more than are read at most."""
    if not isinstance(value, Mapping):
        return {}
    return {one_line(str(name), NAME): _number(one, -LARGEST) for name, one in islice(value.items(), METRICS + 1)}


def _work(value: object) -> dict[str, float]:
    """Return the multiply-adds, real and dense; nothing if one of them is no number."""
    work = {name: _number(value.get(name)) for name in ("real", "dense")} if isinstance(value, Mapping) else {}
    return {} if any(map(math.isnan, work.values())) else work


def _notes(value: object) -> dict[str, Any]:
    """Return the notes, their reason cut short; nothing if a number among them is none."""
    if not isinstance(value, Mapping):
        return {}
    names = ("steps", "seconds", "sparse", *(LOSS if LOSS[0] in value else ()))
    numbers = {name: _number(value.get(name)) for name in names}
    flags, whole = (numbers["sparse"], numbers.get("bf16", 0)), (numbers["steps"], numbers.get("nonfinite_step", 1.0))
    if any(map(math.isnan, numbers.values())) or not {*flags} <= {0, 1} or not all(map(float.is_integer, whole)):
        return {}
    why = value.get("why")
    return {**numbers, "why": {one_line(line): 1.0 for line in islice(why, 1)} if isinstance(why, Mapping) else {}}


def _number(value: Any, least: float = 0.0) -> float:
    """Return a number, whatever holds it; NaN where there is none, or not from ``least`` to ``LARGEST``."""
    if isinstance(value, str | bytes):
        return math.nan
    try:
        number = float(value)
    except Exception:  # whatever a number of somebody's own raises
        return math.nan
    return number if least <= number <= LARGEST else math.nan
