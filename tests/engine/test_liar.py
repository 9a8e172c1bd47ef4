"""One client of four that lies about one weight, with the settings that a run has by itself: nothing comes of it."""

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import pytest
import torch

from custom_methods import Silent
from engines import pickled
from fedsieve import Run
from fedsieve.engine.loop import rounds
from fedsieve.engine.round import Round
from fedsieve.engine.setup import open_run
from fedsieve.methods import Private
from fedsieve.server.robust import Off
from fedsieve.types import RoundContext, Tree
from methods_under_test import KINDS, METHODS
from oracles.lies import Act, Reply, changed, largest, values_of
from tiny import same_state, tiny_run

pytestmark = pytest.mark.slow

NUMBERS = (1e3, 1e6, 1e18, 1e30)
UNSAID = "a method that does not say what it sends"
EVERY = METHODS | {UNSAID: Silent()}
OTHERS = [UNSAID, *(pytest.param(name, marks=pytest.mark.system) for name in METHODS if name not in KINDS)]


def four(name: str, **changes: Any) -> Run:
    return tiny_run(EVERY[name], per_round=4 if "hetero" not in name else 6, **changes)


def liar_of(run_: Run, t: int) -> int:
    """Another client every round, but one of each."""
    asked = run_.sample(t)
    return asked[t % len(asked)]


def lying(run_: Run, numbers: tuple[float, ...], entry: Callable[[Reply], str] = largest) -> Act:
    """One client a round has a weight changed to a number, another number every round."""

    def act(t: int, client: int, down: Tree, reply: Reply) -> Iterable[tuple[int, Tree]]:
        if client == liar_of(run_, t):
            values = values_of(reply["tree"][entry(reply["tree"]) if t else largest(reply["tree"])])
            values[len(values) // 2] = numbers[t % len(numbers)]
        yield client, reply

    return act


@cache
def silent(name: str) -> list[Round]:
    """The run in which the liars say nothing at all."""
    run_ = four(name)

    def act(t: int, client: int, down: Tree, reply: Reply) -> Iterable[tuple[int, Tree]]:
        if client != liar_of(run_, t):
            yield client, reply

    return [*rounds(open_run(run_), changed(act))]


def holds(name: str, act: Act, engine: Any = None) -> None:
    run_, without = four(name), silent(name)
    every = [*rounds(open_run(run_), changed(act, engine))]
    for a, b in zip(every, without, strict=True):
        assert [one.client for one in a.refused] == [liar_of(run_, a.t)]
        assert not b.refused
        assert same_state(a.state, b.state)
        assert a.norms == b.norms
    assert every[-1].accuracy == without[-1].accuracy


@pytest.mark.parametrize("name", KINDS)
def test_one_weight_is_refused_in_every_round(name: str) -> None:
    holds(name, lying(four(name), NUMBERS))


@pytest.mark.parametrize("name", ["fedavg", "nst"])
def test_and_so_it_is_if_the_largest_comes_first(name: str) -> None:
    holds(name, lying(four(name), NUMBERS[::-1]))


@pytest.mark.parametrize("name", OTHERS)
def test_and_so_it_is_with_every_other_method(name: str) -> None:
    holds(name, lying(four(name), NUMBERS))


@pytest.mark.parametrize("statistic", ["bn.running_mean", "bn.running_var"])
@pytest.mark.parametrize("name", ["fedavg", "nst", "hetero_flash"])
def test_one_running_statistic_is_refused_in_every_round(name: str, statistic: str) -> None:
    holds(name, lying(four(name), NUMBERS, lambda tree: statistic))


def test_a_control_variate_is_refused_in_every_round() -> None:
    """The server's would take the client's share of the lie, and give it to everybody."""
    holds("scaffold", lying(four("scaffold"), NUMBERS, lambda tree: "control:fc1.weight"))


def test_engines_agree_on_the_default() -> None:
    holds("nst", lying(four("nst"), NUMBERS), pickled())


@pytest.mark.parametrize("per_round", [1, 2])
def test_without_a_majority_the_model_itself_is_the_measure(per_round: int) -> None:
    run_ = tiny_run(EVERY["fedavg"], per_round=per_round)

    def act(t: int, client: int, down: Tree, reply: Reply) -> Iterable[tuple[int, Tree]]:
        if t == 2 and client == run_.sample(t)[0]:
            values_of(reply["tree"]["fc1.weight"])[0] = 1e4
        yield client, reply

    stream = rounds(open_run(run_), changed(act))
    next(stream)
    if per_round == 2:
        assert [one.client for one in next(stream).refused] == [run_.sample(2)[0]]


def test_off_is_off() -> None:
    run_ = four("fedavg", bound=Off(), rounds=1)
    (only,) = rounds(open_run(run_), changed(lying(run_, (1e6,))))
    assert not only.refused
    assert not only.norms


def test_a_private_answer_is_bounded_by_clip_and_noise_alone() -> None:
    """The bound depends on nobody's data, and honest noise stays well below it."""
    method = METHODS["private"]
    assert isinstance(method, Private)
    run_ = four("private")
    federation = open_run(run_)
    state = method.init(federation.model(), torch.Generator().manual_seed(0))
    expected = method.expected(state, RoundContext())
    base: dict[str, Any] = {name: entry.base for name, entry in expected.tree.items()}  # type: ignore[union-attr]
    numel = sum(v.numel() for v in base.values())
    for length, passes in ((method._longest(numel) * 0.999, True), (method._longest(numel) * 1.01, False)):
        direction = {name: torch.ones_like(v) * length / numel**0.5 for name, v in base.items()}
        reason = expected.rule({name: v + direction[name] for name, v in base.items()})  # type: ignore[misc]
        assert (reason is None) == passes
