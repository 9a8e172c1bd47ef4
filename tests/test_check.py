"""Updates that parse but lie: refused, named, and without a trace; and what honest clients send passes."""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from conftest import TIMES, tiny_run
from fedsieve import InputError, Run, Sparse, local, pool
from fedsieve.engine.check import Checks
from fedsieve.engine.loop import Round, Start, rounds
from fedsieve.engine.tally import Tally
from fedsieve.engine.task import Federation, open_run
from fedsieve.expected import Expected, Part, Unexpected, Whole, shown, weights
from fedsieve.methods import FedAvg
from fedsieve.robust import Fixed, Multiple, Off
from fedsieve.settings import changed as set_
from fedsieve.store import Origin, keep, row
from fedsieve.types import Tree, flatten, rng
from fedsieve.wire import decode, encode
from lies import LIES, Told, changed, flipped, poison, says
from test_methods import METHODS

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

    def record(t: int, client: int, down: Tree, told: Told) -> Iterable[tuple[int, Tree]]:
        seen.setdefault(t, {})[client] = encode(told)
        yield client, told

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


def aggregated(of: Scene, replies: Iterable[tuple[int, bytes]], bound: Any = None) -> tuple[Any, Tally]:
    """The next state and the tally of a round with these answers."""
    federation = replace(of.federation, run=replace(of.federation.run, bound=bound or Off()))
    checks, tally = Checks(federation, columns={"seconds"}), Tally()
    passed = partial(checks.passed, of.state, of.asked)
    told = lambda _, reply: decode(reply)  # noqa: E731
    return federation.run.method.aggregate(of.state, tally.read(replies, told, passed)), tally


def same(a: Any, b: Any) -> bool:
    fa, fb = flatten(a), flatten(b)
    return fa.keys() == fb.keys() and all(torch.equal(fa[name], fb[name]) for name in fa)


def rest(tally: Tally) -> Tally:
    return replace(tally, bytes_up=0, refused=[])


@pytest.mark.parametrize("name", SCENES)
def test_honest_clients_pass(name: str) -> None:
    after, tally = aggregated(of := scene(name), of.replies.items())
    assert not tally.refused
    assert same(after, of.after)


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
    told = LIES[lie](decode(of.replies[liar]), of.state)
    replies = of.replies | {liar: encode(told)}
    state, tally = aggregated(of, replies.items())
    wanted, without = aggregated(of, [(client, reply) for client, reply in replies.items() if client != liar])
    assert [refusal.client for refusal in tally.refused] == [liar]
    assert tally.refused[0].reason.isprintable()
    assert len(tally.refused[0].reason) <= 300
    assert same(state, wanted)
    assert rest(tally) == rest(without)
    assert tally.bytes_up - len(replies[liar]) == without.bytes_up


@pytest.mark.parametrize(
    ("lie", "reason"),
    [
        ("nan", "fc1.weight is not finite"),
        ("1e30", "fc1.weight is too large: its norm overflows"),
        ("no examples", "an answer from 0 examples"),
        ("1e12 examples", "an answer from 1e+12 examples, where the client has 40"),
        ("half an example", "its number of examples is no whole number"),
        ("one element", "fc1.weight has the shape [1], not [24, 72]"),
        ("other type", "fc1.weight is of torch.float64, not of torch.float32"),
        ("a number for a tensor", "fc1.weight is a number, not a tensor"),
        ("extra name", "'extra' is nothing that this method sends"),
        ("missing name", "fc1.weight is missing"),
        ("extra metric", "'accuracy_of_others' is no metric of this method"),
        ("nan metric", "the metric 'loss' is no finite number"),
        ("negative variance", "bn.running_var has values that cannot be"),
        ("nan work", "its count of multiply-adds is none"),
        ("half a step", "its notes on its training are none"),
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
    assert same(state, of.after)
    assert [(r.client, r.reason) for r in tally.refused] == [
        (a, "a second answer in one round"),
        (stranger, "it was not asked in this round"),
        (a, "a second answer in one round"),
        (-1, "it was not asked in this round"),
    ]
    state, tally = aggregated(of, [(a, b"torn"), (a, first), *others])
    assert [r.client for r in tally.refused] == [a, a]
    assert same(state, aggregated(of, others)[0])


def test_positions_are_checked_here_too() -> None:
    part = Expected({"w": Part(torch.zeros(2, 3), 3)})
    good = Sparse(torch.ones(2), torch.tensor([1, 4]), (2, 3))
    part.check({"w": good})
    for index in ([4, 1], [1, 1], [-1, 2], [1, 6], [1], [1, 2, 3]):
        with pytest.raises(Unexpected, match="positions that are none of 6"):
            part.check({"w": replace(good, index=torch.tensor(index))})
    with pytest.raises(Unexpected, match="positions"):
        part.check({"w": replace(good, index=torch.tensor([1.0, 4.0]))})


def test_a_variance_may_shrink_to_nothing_but_not_below() -> None:
    params = {"bn.running_var": torch.tensor([1.5, 2.0])}
    assert isinstance(weights(params)["bn.running_var"], Whole)
    Expected(weights(params)).check({"bn.running_var": torch.zeros(2)})
    with pytest.raises(Unexpected, match="cannot be"):
        Expected(weights(params)).check({"bn.running_var": torch.tensor([-1e-9, 1.0])})


def test_what_a_client_calls_things_is_shown_as_one_short_line() -> None:
    assert shown("ab") == "'ab'"
    assert shown("a\n\x1b") == "'a??'"
    assert len(shown("x" * 1000)) <= 62


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


def lying(t: int, client: int, down: Tree, told: Told) -> Iterable[tuple[int, Tree]]:
    """In every round but the second, client 2 lies: not finite, or huge."""
    if client == 2 and t != 2:
        told = poison(float("nan") if t % 2 else 1e30)(told, None)
    yield client, told


def silent(t: int, client: int, down: Tree, told: Told) -> Iterable[tuple[int, Tree]]:
    if client != 2 or t == 2:
        yield client, told


def told(round: Round) -> dict[str, Any]:
    return row(round) | TIMES | {"bytes_up": 0, "refused": []}


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("name", TOLD)
def test_a_run_with_a_liar_is_a_run_without_that_client(name: str, bound: str) -> None:
    run_ = tiny_run(METHODS[name], rounds=3, per_round=6, bound=BOUNDS[bound])
    with_liar = [*rounds(open_run(run_), changed(lying))]
    without = [*rounds(open_run(run_), changed(silent))]
    for a, b in zip(with_liar, without, strict=True):
        liars = [2] if a.t != 2 and 2 in a.clients else []
        assert [refusal.client for refusal in a.refused] == liars
        assert not b.refused
        assert same(a.state, b.state)
        assert all(torch.equal(v, b.model[n]) for n, v in a.model.items())
        assert told(a) == told(b)
        assert a.memory == b.memory
        assert a.norms == b.norms
        if not liars:
            assert a.bytes_up == b.bytes_up


def test_engines_agree_about_a_liar() -> None:
    run_ = tiny_run(METHODS["nst"], rounds=2, per_round=6, bound=Multiple(3.0))
    a, b = ([*rounds(open_run(run_), changed(lying, engine))] for engine in (local(), pool(2)))
    assert [told(x) | {"refused": x.refused} for x in a] == [told(x) | {"refused": x.refused} for x in b]
    assert all(same(x.state, y.state) and x.norms == y.norms for x, y in zip(a, b, strict=True))


def test_if_all_lie_the_run_ends_and_says_why() -> None:
    def all_lie(t: int, client: int, down: Tree, told: Told) -> Iterable[tuple[int, Tree]]:
        yield client, says("n", 1e12)(told, None)

    for name in METHODS:
        with pytest.raises(InputError, match=r"no client's update could be taken \(client .: an answer from 1e\+12"):
            next(rounds(open_run(tiny_run(METHODS[name])), changed(all_lie)))


def shout(t: int, client: int, down: Tree, told: Told) -> Iterable[tuple[int, Tree]]:
    """Client 2 turns its change round and makes it ten times as long, in rounds 1, 3 and 4."""
    yield client, flipped(10)(down, told) if client == 2 and t != 2 else told


@pytest.mark.parametrize("bound", ["fixed", "multiple"])
def test_a_long_update_is_above_the_bound(bound: str) -> None:
    run_ = tiny_run(FedAvg(), per_round=6, lr=0.02, lr_end=0.02)
    honest = [*rounds(open_run(replace(run_, bound=Multiple(1e6))), local())]
    limit = 3 * max(weights for weights, _ in honest[-1].norms)
    run_ = replace(run_, bound=Fixed(limit) if bound == "fixed" else Multiple(3.0))
    every = [*rounds(open_run(run_), changed(shout))]
    assert [[r.client for r in one.refused] for one in every] == [[2], [], [2], [2]]
    assert all(r.reason.startswith("its norm") for one in every for r in one.refused)


def test_running_statistics_have_a_bound_of_their_own() -> None:
    def boast(t: int, client: int, down: Tree, told: Told) -> Iterable[tuple[int, Tree]]:
        told["tree"]["bn.running_mean"] += 1e6 * (client == 2)
        yield client, told

    for bound in (Fixed(1e6, 1e5), Multiple(10.0)):
        every = [*rounds(open_run(tiny_run(FedAvg(), per_round=6, bound=bound)), changed(boast))]
        assert [[r.client for r in one.refused] for one in every] == [[2]] * 4
        assert all(r.reason.startswith("the norm of its running statistics") for one in every for r in one.refused)


def test_the_norm_is_that_of_the_change() -> None:
    params = {"w": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "b": torch.tensor([1.0])}
    params |= {"bn.running_mean": torch.zeros(2), "bn.running_var": torch.ones(2)}
    statistics = {"bn.running_mean": torch.tensor([2.0, 2.0]), "bn.running_var": torch.tensor([3.0, 3.0])}
    expected = Expected(weights(params, {"w": 2}))
    sent = Sparse(torch.tensor([4.0, 8.0]), torch.tensor([0, 3]), (2, 2))
    assert expected.norms({"w": sent, "b": torch.tensor([13.0]), **statistics}) == (13.0, 4.0)
    assert Expected({"s": Whole(torch.ones(2), counts=False)}).norms({"s": torch.zeros(2)}) is None


def test_the_running_median_and_the_first_rounds() -> None:
    bound = Multiple(times=2.0, window=3)
    assert bound.limits([(1.0, 10.0), (5.0, 20.0), (3.0, 60.0)]) == (6.0, 40.0)
    assert bound.first([]) == (float("inf"), float("inf"))
    assert bound.first([(1.0, 0.0)]) == (2.0, 0.0)
    assert bound.first([(norm, 1.0) for norm in (3.0, 1.0, 100.0, 2.0, 1e9)]) == (4.0, 2.0)
    assert bound.first([(norm, 0.0) for norm in (0.0, 0.0, 5.0)]) == (0.0, 0.0)
    assert bound.first([(2.0, 1.0), (1.0, 2.0), (3.0, 3.0), (2.0, 99.0), (99.0, 1.0)]) == (4.0, 4.0)
    checks = Checks(open_run(tiny_run(FedAvg(), bound=bound)), [(9.0, 0.0), (8.0, 0.0)])
    for norms in ((1.0, 0.0), None, (2.0, 0.0)):
        checks._remember(norms)
    assert checks.norms == [(8.0, 0.0), (1.0, 0.0), (2.0, 0.0)]


def test_what_the_bound_remembers_survives_a_restart(tmp_path: Path) -> None:
    run_ = tiny_run(FedAvg(), rounds=5, per_round=6, lr=0.02, lr_end=0.02, bound=Multiple(2.0, window=8))

    def go(out: Path, **options: Any) -> list[Round]:
        return [*keep(out, open_run(run_), changed(shout), Origin("tests.tiny"), **options)]

    whole = go(tmp_path / "whole")
    parts = go(tmp_path / "parts", until=1) + go(tmp_path / "parts", until=3, resume=True)
    parts += go(tmp_path / "parts", resume=True)
    assert [told(r) | {"refused": r.refused} for r in whole] == [told(r) | {"refused": r.refused} for r in parts]
    assert [len(r.norms) for r in whole] == [5, 8, 8, 8, 8]
    assert [r.norms for r in whole] == [r.norms for r in parts]
    models = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "parts")]
    assert models[0] == models[1]
    with safe_open(tmp_path / "whole/checkpoints/000005.safetensors", "pt") as file:
        assert [tuple(pair) for pair in file.get_tensor("norms").tolist()] == [*whole[-1].norms]
    refused = [json.loads(line)["refused"] for line in (tmp_path / "whole/rounds.jsonl").read_text().splitlines()]
    assert [[r["client"] for r in one] for one in refused] == [[2], [], [2], [2], [2]]
    assert "is above the bound" in refused[0][0]["reason"]


def test_without_its_memory_the_bound_would_be_another() -> None:
    run_ = tiny_run(FedAvg(), per_round=6, bound=Multiple(1.0))
    federation = open_run(run_)
    whole = [*rounds(federation, local())]
    start = Start(2, flatten(whole[1].state), whole[1].memory, whole[1].norms)
    resumed = [*rounds(federation, local(), start=start)]
    assert [r.refused for r in resumed] == [r.refused for r in whole[2:]]
    assert same(resumed[-1].state, whole[-1].state)


@dataclass(frozen=True)
class Silent:
    """FedAvg that does not say what its clients send."""

    inner: FedAvg = FedAvg()
    name: str = "silent"

    def __getattr__(self, name: str) -> Any:
        if name in ("expected", "tiers", "warm_up") or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.inner, name)


def test_a_method_that_does_not_say_what_it_sends_is_held_to_the_model() -> None:
    of = scene("fedavg")
    silent = replace(of, federation=replace(of.federation, run=replace(of.federation.run, method=Silent())))
    assert same(aggregated(silent, of.replies.items())[0], of.after)
    liar = next(iter(of.replies))
    passes = ("other kind", "extra metric", "negative variance")
    for name, lie in LIES.items():
        told = lie(decode(of.replies[liar]), of.state)
        if told is NotImplemented or name in passes:
            continue
        _, tally = aggregated(silent, (of.replies | {liar: encode(told)}).items())
        assert [refusal.client for refusal in tally.refused] == [liar], name
    with pytest.raises(InputError, match="bound=fixed needs to know what silent's clients send"):
        open_run(replace(silent.federation.run, bound=Fixed(1.0)))


def test_the_bound_is_a_setting_like_any_other() -> None:
    run_: Run = tiny_run(FedAvg())
    assert set_(run_, ["bound=fixed", "bound.norm=2.5"]).bound == Fixed(2.5)
    assert set_(run_, ["bound=multiple", "bound.times=4", "bound.window=50"]).bound == Multiple(4.0, 50)
    assert set_(run_, ["bound=off"]) == run_
    for setting, line in (("norm=0", "bound.norm must be positive"), ("norm=nan", "bound.norm must be positive")):
        with pytest.raises(InputError, match=line):
            set_(run_, ["bound=fixed", f"bound.{setting}"])
    for setting, line in (("times=.5", "bound.times must lie"), ("window=0", "bound.window must be at least 1")):
        with pytest.raises(InputError, match=line):
            set_(run_, ["bound=multiple", f"bound.{setting}"])
    with pytest.raises(InputError, match="bound must be one of off, fixed, multiple, got '10'"):
        set_(run_, ["bound=10"])


def test_a_bound_too_tight_says_so() -> None:
    with pytest.raises(InputError, match=r"its norm .* is above the bound 1e-06\); .*raise bound.norm"):
        next(rounds(open_run(tiny_run(FedAvg(), bound=Fixed(1e-6))), local()))
