"""Updates that parse but lie: refused, named, and without a trace; and what honest clients send passes."""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from custom_methods import Silent
from engines import pickled
from fedsieve import InputError, Sparse, local
from fedsieve.engine import Exchange
from fedsieve.engine.federation import Federation
from fedsieve.engine.loop import rounds
from fedsieve.engine.rollback import Memory
from fedsieve.engine.round import RoundMetrics
from fedsieve.engine.setup import open_run
from fedsieve.server.robust import Fixed, Multiple, Off
from fedsieve.types import Tree
from fedsieve.types.contract import ContractError, Expected, Part, Whole, expect_weights, printable
from fedsieve.wire import decode, encode
from methods_under_test import METHODS
from oracles.lies import LIES, Reply, changed, poison, says
from scenes import LIAR, SCENES, SENSING, aggregated, comparable, scene
from tiny import same_state, tiny_run


def rest(tally: RoundMetrics) -> RoundMetrics:
    return replace(tally, bytes_up=0, refused=[])


@pytest.mark.parametrize("name", SCENES)
def test_honest_clients_pass(name: str) -> None:
    after, tally = aggregated(of := scene(name), of.replies.items())
    assert not tally.refused
    assert same_state(after, of.after)


LIARS = [name for name in SCENES if "," not in name.removesuffix(", round 0")]
PARTS = ["zerofl top_weights", "zerofl diff_of_top", "zerofl top_diff", "topk", "sparsefedpp", "dnr", "nst"]
VALUES = ["pdst", "flash", "hetero_flash"]
WHERE: dict[str, Iterable[str]] = {
    "flooded": PARTS,
    "one value too many": PARTS,
    "off the mask": VALUES,
    "one value off the mask": VALUES,
    "other tier": ["hetero_flash"],
    "negative variance": [name for name in LIARS if name not in (*SENSING, "private")],
    "swapped names": [name for name in LIARS if name not in SENSING],
    **{lie: SENSING for lie in LIES if lie.startswith("sensed")},
}
"""The methods that a lie is one for; others: all."""


@pytest.mark.parametrize(
    ("name", "lie"), [(name, lie) for name in LIARS for lie in LIES if name in WHERE.get(lie, LIARS)]
)
def test_a_lie_is_refused_and_leaves_no_trace(name: str, lie: str) -> None:
    of = scene(name)
    liar = [*of.replies][min(LIAR, len(of.replies) - 1)]
    reply = LIES[lie](decode(of.replies[liar]), of.state)
    replies = of.replies | {liar: encode(reply)}
    state, tally = aggregated(of, replies.items())
    wanted, without = aggregated(of, [(client, reply) for client, reply in replies.items() if client != liar])
    assert [refusal.client for refusal in tally.refused] == [liar]
    assert tally.refused[0].reason.isprintable()
    assert len(tally.refused[0].reason) <= 300
    assert same_state(state, wanted)
    assert rest(tally) == rest(without)
    assert tally.bytes_up - len(replies[liar]) == without.bytes_up


@pytest.mark.parametrize(
    ("lie", "reason"),
    [
        ("nan", "fc1.weight is not finite"),
        ("1e30", "fc1.weight is so large that its norm overflows"),
        ("no examples", "an answer from 0 examples"),
        ("1e12 examples", "an answer from 1e+12 examples, where the client has 40"),
        ("half an example", "its number of examples is no whole number"),
        ("one element", "fc1.weight has the shape [1], not [24, 72]"),
        ("other type", "fc1.weight is of torch.float64, not of torch.float32"),
        ("a number for a tensor", "fc1.weight is a number, not a tensor"),
        ("extra name", "'extra' is nothing that this method sends"),
        ("missing name", "fc1.weight is missing"),
        ("negative variance", "bn.running_var has values that cannot be"),
        ("extra part", "not a client's answer"),
    ],
)
def test_the_reason_says_what_is_wrong(lie: str, reason: str) -> None:
    of = scene("fedavg")
    liar = next(iter(of.replies))
    _, tally = aggregated(of, (of.replies | {liar: encode(LIES[lie](decode(of.replies[liar]), of.state))}).items())
    assert [refusal.reason for refusal in tally.refused] == [reason]


@pytest.mark.parametrize(
    ("name", "lie", "reason"),
    [
        ("zerofl top_weights", "one value too many", "fc1.weight has .* values, where .* are allowed|conv2.weight has"),
        ("topk", "one value too many", "values at positions of the client's choice, where .* are allowed"),
        ("nst", "flooded", "values at positions of the client's choice"),
        ("pdst", "off the mask", "has the shape"),
        ("hetero_flash", "other tier", "tier is not"),
        ("flash, round 0", "sensed everything", "sensed keeps .* weights, where .* are allowed"),
    ],
)
def test_the_reason_names_the_non_zeros(name: str, lie: str, reason: str) -> None:
    of = scene(name)
    liar = next(iter(of.replies))
    _, tally = aggregated(of, (of.replies | {liar: encode(LIES[lie](decode(of.replies[liar]), of.state))}).items())
    assert len(tally.refused) == 1
    assert re.search(reason, tally.refused[0].reason), tally.refused[0].reason


@pytest.mark.parametrize("name", ["fedavg", "nst", "flash"])
def test_one_answer_a_client_and_none_of_others(name: str) -> None:
    of = scene(name)
    (a, first), *others = of.replies.items()
    stranger = next(client for client in range(6) if client not in of.asked)
    again = encode(LIES["half an example"](decode(first), of.state))
    state, tally = aggregated(of, [(a, first), (a, again), (stranger, first), (a, first), *others, (-1, first)])
    assert same_state(state, of.after)
    assert [(r.client, r.reason) for r in tally.refused] == [
        (a, "a second answer in one round"),  # a line once, however often it is so
        (stranger, "it was not asked in this round"),
        (-1, "it was not asked in this round"),
    ]
    state, tally = aggregated(of, [(a, b"torn"), (a, first), *others])
    assert [r.client for r in tally.refused] == [a, a]
    assert same_state(state, aggregated(of, others)[0])


NONSENSE: dict[str, Any] = {
    "None": None,
    "a number": 7,
    "an exception": ValueError,
    "an empty tuple": (),
    "a triple": (0, b"", b""),
    "text for a client": ("0", b""),
    "a truth for a client": (True, b""),
    "no client": (None, b""),
    "half a client": (0.5, b""),
    "a tensor for a client": (torch.zeros(3), b""),
    "a list for a client": ([0], b""),
    "a client beyond 64 bits": (10**5000, b""),
}
REPLIES = {"None": None, "text": "message", "an exception": ValueError("no"), "a class": KeyError, "a list": [b""]}


@pytest.mark.parametrize("name", ["fedavg", "nst", "flash"])
def test_what_an_engine_brings_that_is_no_answer_is_refused(name: str) -> None:
    of = scene(name)
    (a, first), *others = of.replies.items()
    wanted, without = aggregated(of, others)
    every: list[Any] = [*NONSENSE.values(), *others, (10**18, first), (-5, b"")]
    state, tally = aggregated(of, every)
    assert same_state(state, wanted)
    assert rest(tally) == rest(without)
    assert {r.client for r in tally.refused} == {-1, 10**18, -5}
    for reply in REPLIES.values():
        state, tally = aggregated(of, [(a, reply), *others])  # type: ignore[list-item]
        assert same_state(state, wanted)
        assert [r.client for r in tally.refused] == [a]
        assert tally.refused[0].reason.startswith("the engine brought")


@pytest.mark.parametrize("error", [MemoryError, RecursionError, KeyError, RuntimeError, OverflowError])
def test_whatever_reading_an_answer_raises_is_its_clients_refusal(error: type[Exception]) -> None:
    of = scene("fedavg")
    a, *others = of.replies

    def opened(client: int, reply: bytes) -> Tree:
        if client == a:
            raise error("x" * 1000 + "\n")
        return decode(reply)

    tally = RoundMetrics()
    passed = partial(of.federation.admission().admit, 1, of.state, of.asked)
    state = of.federation.run.method.aggregate(
        of.state, tally.collect(of.replies.items(), opened, passed), of.federation.run.context(1)
    )
    assert [r.client for r in tally.refused] == [a]
    assert len(tally.refused[0].reason) <= 300
    assert tally.refused[0].reason.isprintable()
    assert same_state(state, aggregated(of, [(client, of.replies[client]) for client in others])[0])


@pytest.mark.parametrize("brought", [[], (), None, 3, ValueError], ids=str)
@pytest.mark.slow
def test_an_engine_that_brings_nothing_ends_the_run_in_one_line(brought: Any) -> None:
    @contextmanager
    def engine(federation: Federation, memory: Memory) -> Iterator[Exchange]:
        yield lambda t, messages: brought

    for name in METHODS:
        with pytest.raises(InputError, match=r"round [01]: .*the engine brought"):
            next(rounds(open_run(tiny_run(METHODS[name])), engine))


def test_positions_are_checked_here_too() -> None:
    part = Expected({"w": Part(torch.zeros(2, 3), 3)})
    good = Sparse(torch.ones(2), torch.tensor([1, 4]), (2, 3))
    part.check({"w": good})
    for index in ([4, 1], [1, 1], [-1, 2], [1, 6], [1], [1, 2, 3]):
        with pytest.raises(ContractError, match="positions that are none of 6"):
            part.check({"w": replace(good, positions=torch.tensor(index))})
    with pytest.raises(ContractError, match="positions"):
        part.check({"w": replace(good, positions=torch.tensor([1.0, 4.0]))})


def test_a_variance_may_shrink_to_nothing_but_not_below() -> None:
    params = {"bn.running_var": torch.tensor([1.5, 2.0])}
    assert isinstance(expect_weights(params)["bn.running_var"], Whole)
    Expected(expect_weights(params)).check({"bn.running_var": torch.zeros(2)})
    with pytest.raises(ContractError, match="cannot be"):
        Expected(expect_weights(params)).check({"bn.running_var": torch.tensor([-1e-9, 1.0])})


def test_what_a_client_calls_things_is_shown_as_one_short_line() -> None:
    assert printable("ab") == "'ab'"
    assert printable("a\n\x1b") == "'a??'"
    assert len(printable("x" * 1000)) <= 62


BOUNDS = {"off": Off(), "fixed": Fixed(100.0), "multiple": Multiple(3.0)}
TOLD = [
    "fedavg",
    "zerofl top_weights",
    "zerofl top_diff",
    "topk",
    "sparsefedpp",
    "nst",
    "pdst",
    "flash",
    "hetero_flash",
]


def lying(t: int, client: int, down: Tree, reply: Reply) -> Iterable[tuple[int, Tree]]:
    """In every round but the second, client 2 lies: not finite, or huge."""
    if client == 2 and t != 2:
        reply = poison(float("nan") if t % 2 else 1e30)(reply, None)
    yield client, reply


def silent(t: int, client: int, down: Tree, reply: Reply) -> Iterable[tuple[int, Tree]]:
    if client != 2 or t == 2:
        yield client, reply


@pytest.mark.parametrize(
    ("name", "bound"),
    [
        pytest.param(name, bound, marks=[pytest.mark.system] * (bound != "multiple" and name not in ("fedavg", "nst")))
        for name in TOLD
        for bound in BOUNDS
    ],
)
@pytest.mark.slow
def test_a_run_with_a_liar_is_a_run_without_that_client(name: str, bound: str) -> None:
    run_ = tiny_run(METHODS[name], rounds=3, per_round=6, bound=BOUNDS[bound])
    with_liar = [*rounds(open_run(run_), changed(lying))]
    without = [*rounds(open_run(run_), changed(silent))]
    for a, b in zip(with_liar, without, strict=True):
        liars = [2] if a.t != 2 and 2 in a.clients else []
        assert [refusal.client for refusal in a.refused] == liars
        assert not b.refused
        assert same_state(a.state, b.state)
        assert all(torch.equal(v, b.model[n]) for n, v in a.model.items())
        assert comparable(a) == comparable(b)
        assert a.memory == b.memory
        assert a.norms == b.norms
        if not liars:
            assert a.bytes_up == b.bytes_up


def test_engines_agree_about_a_liar() -> None:
    run_ = tiny_run(METHODS["nst"], rounds=2, per_round=6, bound=Multiple(3.0))
    a, b = ([*rounds(open_run(run_), changed(lying, engine))] for engine in (local(), pickled()))
    assert [comparable(x) | {"refused": x.refused} for x in a] == [comparable(x) | {"refused": x.refused} for x in b]
    assert all(same_state(x.state, y.state) and x.norms == y.norms for x, y in zip(a, b, strict=True))


@pytest.mark.slow
def test_if_all_lie_the_run_ends_and_says_why() -> None:
    def all_lie(t: int, client: int, down: Tree, reply: Reply) -> Iterable[tuple[int, Tree]]:
        yield client, says("n", 1e12)(reply, None)

    for name in METHODS:
        with pytest.raises(InputError, match=r"no client's update could be taken \(client .: an answer from 1e\+12"):
            next(rounds(open_run(tiny_run(METHODS[name])), changed(all_lie)))


def test_a_method_that_does_not_say_what_it_sends_is_held_to_the_model() -> None:
    of = scene("fedavg")
    silent = replace(of, federation=replace(of.federation, run=replace(of.federation.run, method=Silent())))
    assert same_state(aggregated(silent, of.replies.items())[0], of.after)
    liar = next(iter(of.replies))
    passes = ("other kind", "negative variance")
    for name, lie in LIES.items():
        reply = lie(decode(of.replies[liar]), of.state)
        if reply is NotImplemented or name in passes:
            continue
        _, tally = aggregated(silent, (of.replies | {liar: encode(reply)}).items())
        assert [refusal.client for refusal in tally.refused] == [liar], name
    with pytest.raises(InputError, match="bound=fixed needs to know what silent's clients send"):
        open_run(replace(silent.federation.run, bound=Fixed(1.0)))
