"""A round of honest clients before it is aggregated, for tests to change an answer of."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

from fedsieve.engine.federation import Federation
from fedsieve.engine.loop import rounds
from fedsieve.engine.round import Round, RoundMetrics
from fedsieve.engine.setup import open_run
from fedsieve.runs.recorder import row_of
from fedsieve.server.robust import Off
from fedsieve.types import Tree, rng
from fedsieve.wire import decode, encode
from methods_under_test import METHODS
from oracles.lies import Reply, changed
from tiny import TIMES, tiny_run

SENSING = {f"{name}, round 0": METHODS[name] for name in METHODS if "flash" in name}


SCENES = METHODS | SENSING


LIAR = 1
"""The second of the three that are asked."""


@dataclass(frozen=True)
class Scene:
    """A round of honest clients, before it is aggregated."""

    federation: Federation
    state: Any
    asked: dict[int, int]
    replies: dict[int, bytes]
    after: Any


@cache
def scene(name: str) -> Scene:
    """The first round of training, or the warm-up."""
    seen = dict[int, dict[int, bytes]]()

    def record(t: int, client: int, down: Tree, reply: Reply) -> Iterable[tuple[int, Tree]]:
        seen.setdefault(t, {})[client] = encode(reply)
        yield client, reply

    run_ = tiny_run(SCENES[name], rounds=2)
    federation = open_run(run_)
    every = [*rounds(federation, changed(record), last=1)]
    if name in SENSING:
        state, last = initial(federation), every[0]
    else:
        state, last = (every[-2].state if run_.first == 0 else initial(federation)), every[-1]
    asked = {client: run_.task.tier(client) for client in last.clients}
    return Scene(federation, state, asked, seen[last.t], last.state)


def initial(federation: Federation) -> Any:
    return federation.run.method.init(federation.model(), rng(federation.run.seed, "init"))


def aggregated(of: Scene, replies: Iterable[tuple[int, bytes]], bound: Any = None) -> tuple[Any, RoundMetrics]:
    """The next state and the tally of a round with these answers."""
    federation = replace(of.federation, run=replace(of.federation.run, bound=bound or Off()))
    checks, tally = federation.admission({"seconds"}), RoundMetrics()
    passed = partial(checks.admit, 1, of.state, of.asked)
    opened = lambda _, reply: decode(reply)  # noqa: E731
    return federation.run.method.aggregate(
        of.state, tally.collect(replies, opened, passed), federation.run.context(1)
    ), tally


def comparable(round: Round) -> dict[str, Any]:
    return row_of(round) | TIMES | {"bytes_up": 0, "refused": []}
