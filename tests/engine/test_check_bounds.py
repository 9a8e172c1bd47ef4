"""Bounds on the norm of updates: fixed or a running multiple, what they remember, and how they are set."""

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from fedsieve import InputError, Run, Sparse, local
from fedsieve.engine.loop import rounds
from fedsieve.engine.rollback import Checkpoint
from fedsieve.engine.round import Round
from fedsieve.engine.setup import open_run
from fedsieve.methods import FedAvg
from fedsieve.recipes import apply_settings
from fedsieve.runs.execution import Execution
from fedsieve.runs.recorder import record_run
from fedsieve.server.robust import Bound, Fixed, Loose, Multiple, Off
from fedsieve.types import Params, Tree, flatten
from fedsieve.types.contract import Expected, Norms, Whole, expect_weights
from oracles.lies import Reply, changed, flipped
from scenes import comparable
from tiny import same_state, tiny_run


def shout(t: int, client: int, down: Tree, reply: Reply) -> Iterable[tuple[int, Tree]]:
    """Client 2 turns its change round and makes it ten times as long, in rounds 1, 3 and 4."""
    yield client, flipped(10)(down, reply) if client == 2 and t != 2 else reply


@pytest.mark.parametrize("bound", ["fixed", "multiple"])
@pytest.mark.slow
def test_a_long_update_is_above_the_bound(bound: str) -> None:
    run_ = tiny_run(FedAvg(), per_round=6, lr=0.02, lr_end=0.02)
    honest = [*rounds(open_run(replace(run_, bound=Multiple(1e6))), local())]
    limit = 3 * max(norms[0] for norms in honest[-1].norms)
    run_ = replace(run_, bound=Fixed(limit) if bound == "fixed" else Multiple(3.0))
    every = [*rounds(open_run(run_), changed(shout))]
    assert [[r.client for r in one.refused] for one in every] == [[2], [], [2], [2]]
    assert all(r.reason.startswith("its norm") for one in every for r in one.refused)


@pytest.mark.slow
def test_running_statistics_have_a_bound_of_their_own() -> None:
    def boast(t: int, client: int, down: Tree, reply: Reply) -> Iterable[tuple[int, Tree]]:
        reply["tree"]["bn.running_mean"] += 1e6 * (client == 2)
        yield client, reply

    for bound in (Fixed(1e6, 1e5), Multiple(10.0)):
        every = [*rounds(open_run(tiny_run(FedAvg(), per_round=6, bound=bound)), changed(boast))]
        assert [[r.client for r in one.refused] for one in every] == [[2]] * 4
        assert all(r.reason.startswith("the norm of its running statistics") for one in every for r in one.refused)


def test_the_norm_is_that_of_the_change() -> None:
    params = {"w": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "b": torch.tensor([1.0])}
    params |= {"bn.running_mean": torch.zeros(2), "bn.running_var": torch.ones(2)}
    statistics = {"bn.running_mean": torch.tensor([2.0, 2.0]), "bn.running_var": torch.tensor([3.0, 3.0])}
    expected = Expected(expect_weights(params, {"w": 2}))
    sent = Sparse(torch.tensor([4.0, 8.0]), torch.tensor([0, 3]), (2, 2))
    assert expected.norms({"w": sent, "b": torch.tensor([13.0]), **statistics}) == (13.0, 4.0, 12.0, 2.0)
    assert Expected({"s": Whole(torch.ones(2), counts=False)}).norms({"s": torch.zeros(2)}) is None


def pairs(*given: tuple[float, float]) -> list[Norms]:
    return [(weights, others, 0.0, 0.0) for weights, others in given]


def test_the_running_median_and_the_first_rounds() -> None:
    bound, inf = Multiple(times=2.0, window=3), float("inf")
    assert bound.limits(pairs((1.0, 10.0), (5.0, 20.0), (3.0, 60.0))) == (6.0, 40.0)
    assert bound.first([]) == (inf, inf)
    assert bound.first(pairs((1.0, 0.0))) == (2.0, 0.0)
    assert bound.first(pairs(*((norm, 1.0) for norm in (3.0, 1.0, 100.0, 2.0, 1e9)))) == (4.0, 2.0)
    assert bound.first(pairs(*((norm, 0.0) for norm in (0.0, 0.0, 5.0)))) == (0.0, 0.0)
    assert bound.first(pairs((2.0, 1.0), (1.0, 2.0), (3.0, 3.0), (2.0, 99.0), (99.0, 1.0))) == (4.0, 4.0)
    checks = open_run(tiny_run(FedAvg(), bound=bound)).admission()
    checks.norms = pairs((9.0, 0.0), (8.0, 0.0))
    for norms in (*pairs((1.0, 0.0)), None, *pairs((2.0, 0.0))):
        checks._remember(norms)
    assert checks.norms == pairs((8.0, 0.0), (1.0, 0.0), (2.0, 0.0))


def test_a_loose_bound_is_many_times_what_is_usual_and_never_below_the_model() -> None:
    bound, inf = Loose(times=10.0), float("inf")
    model = (8.0, 3.0, 0.5, 2.0)
    usual = [(4.0, 1.0, 0.2, 0.5), (5.0, 1.0, 0.3, 0.5), (6.0, 1.0, 0.4, 0.1)]
    assert bound.limits(usual, model) == (50.0, 10.0, 3.0, 5.0)
    assert bound.limits([(1e-6, 0.0, 1e-9, 0.0)] * 3, model) == (8.0, 3.0, 1.0, 2.0)
    assert bound.limits(usual[:2], model) == (80.0, inf, 10.0, inf)  # of two, one may lie
    assert bound.limits([], (0.0, 0.0, 0.0, 0.0)) == (10.0, inf, 10.0, inf)
    limits = (50.0, 10.0, 3.0, 5.0)
    assert bound.widened(limits, [(1e9, 1e9, 1e9, 1e9)]) == limits  # one alone
    assert bound.widened(limits, [(1e9, 30.0, 0.1, 1.0), (4.0, 1e9, 0.2, 1.0)]) == (50.0, 300.0, 3.0, 10.0)
    assert bound.widened(limits, [(7.0, 0.0, 0.0, 0.0), (1e9, 0.0, 0.0, 0.0), (6.0, 0.0, 0.0, 0.0)])[0] == 70.0


@pytest.mark.parametrize("name", ["bn.running_var", "conv1.weight"])
def test_where_most_go_far_at_once_none_of_them_is_refused(name: str) -> None:
    run_ = tiny_run(FedAvg(), rounds=3, per_round=4)
    liar = run_.sample(3)[1]

    def grown(t: int, client: int, down: Tree, reply: Reply) -> Iterable[tuple[int, Tree]]:
        """In round 3 all change a thousand times as much as ever, and one a million times as much again."""
        factor = 0 if t < 3 else 1e9 if client == liar else 1e3
        reply["tree"][name] = reply["tree"][name] + 50 * factor
        yield client, reply

    every = [*rounds(open_run(run_), changed(grown))]
    assert [[r.client for r in one.refused] for one in every] == [[], [], [liar]]
    assert len(every[-1].norms) == 11


@pytest.mark.parametrize(("bound", "order"), [(Fixed(1.0), [2, 0, 1, 3]), (Loose(1.0), [0, 1, 3, 2])])
def test_only_under_a_loose_bound_is_an_answer_held_until_the_rounds_end(bound: Bound, order: list[int]) -> None:
    federation, seen = open_run(tiny_run(FedAvg(), bound=bound)), list[int]()
    state = FedAvg().init(federation.model(), torch.Generator())
    changes = {2: 1e3, 0: 0.0, 1: 0.0, 3: 0.0}
    messages = [(client, lambda by=by: {"tree": _moved(state.params, by), "n": 1.0}) for client, by in changes.items()]
    asked = dict.fromkeys(changes, 0)
    for answer in federation.admission().admit(1, state, asked, messages, lambda client, _: seen.append(client)):
        seen.append(answer.client)
    assert seen == order


def _moved(params: Params, by: float) -> Params:
    return params | {"fc1.bias": params["fc1.bias"] + by}


def test_a_client_alone_has_no_loose_bound() -> None:
    def grown(t: int, client: int, down: Tree, reply: Reply) -> Iterable[tuple[int, Tree]]:
        reply["tree"]["conv1.weight"] = reply["tree"]["conv1.weight"] + 1e4 * (t == 4)
        yield client, reply

    run_ = tiny_run(FedAvg(), per_round=1)
    with pytest.raises(InputError, match=r"round 4: no client's update could be taken .*raise bound.times"):
        [*rounds(open_run(run_), changed(grown))]
    alone = replace(run_, task=replace(run_.task, clients=1))
    assert [len(one.refused) for one in rounds(open_run(alone), changed(grown))] == [0, 0, 0, 0]


@pytest.mark.slow
def test_what_the_bound_remembers_survives_a_restart(tmp_path: Path) -> None:
    run_ = tiny_run(FedAvg(), rounds=5, per_round=6, lr=0.02, lr_end=0.02, bound=Multiple(2.0, window=8))

    def go(out: Path, **options: Any) -> list[Round]:
        return [*record_run(out, open_run(run_), changed(shout), "tests.tiny", Execution(**options))]

    whole = go(tmp_path / "whole")
    parts = go(tmp_path / "parts", until=1) + go(tmp_path / "parts", until=3, resume=True)
    parts += go(tmp_path / "parts", resume=True)
    assert [comparable(r) | {"refused": r.refused} for r in whole] == [
        comparable(r) | {"refused": r.refused} for r in parts
    ]
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
    start = Checkpoint(2, flatten(whole[1].state), whole[1].memory, whole[1].norms)
    resumed = [*rounds(federation, local(), start=start)]
    assert [r.refused for r in resumed] == [r.refused for r in whole[2:]]
    assert same_state(resumed[-1].state, whole[-1].state)


def test_the_bound_is_a_setting_like_any_other() -> None:
    run_: Run = tiny_run(FedAvg())
    assert apply_settings(run_, ["bound=fixed", "bound.norm=2.5"]).bound == Fixed(2.5)
    assert apply_settings(run_, ["bound=multiple", "bound.times=4", "bound.window=50"]).bound == Multiple(4.0, 50)
    assert apply_settings(run_, ["bound=off"]).bound == Off()
    assert run_.bound == Loose()
    assert apply_settings(run_, ["bound.times=50"]).bound == Loose(50.0)
    for setting, line in (("norm=0", "bound.norm must be positive"), ("norm=nan", "bound.norm must be positive")):
        with pytest.raises(InputError, match=line):
            apply_settings(run_, ["bound=fixed", f"bound.{setting}"])
    for setting, line in (("times=.5", "bound.times must lie"), ("window=0", "bound.window must be at least 1")):
        with pytest.raises(InputError, match=line):
            apply_settings(run_, ["bound=multiple", f"bound.{setting}"])
    with pytest.raises(InputError, match="bound must be one of off, fixed, multiple, loose, got '10'"):
        apply_settings(run_, ["bound=10"])


def test_a_bound_too_tight_says_so() -> None:
    with pytest.raises(InputError, match=r"its norm .* is above the bound 1e-06\); .*raise bound.norm"):
        next(rounds(open_run(tiny_run(FedAvg(), bound=Fixed(1e-6))), local()))
