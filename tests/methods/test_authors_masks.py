"""Masks as FLASH's public code has them: a coin for every weight, and smaller masks chosen anew in every round."""

import hashlib
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from engines import ENGINES
from fedsieve import local
from fedsieve.engine import Run
from fedsieve.engine.federation import described
from fedsieve.engine.loop import rounds
from fedsieve.engine.setup import open_run
from fedsieve.methods import FLASH, NST, PDST, HeteroFLASH
from fedsieve.runs.execution import Execution
from fedsieve.runs.record import read_rows
from fedsieve.runs.recorder import record_run
from fedsieve.sparse.masks import draw_counts, random_masks, unpack_subset
from fedsieve.sparse.policy import select_weights
from fedsieve.types import Device, InputError, RoundContext, Update, rng
from fedsieve.wire import decode, encode
from oracles.lies import changed
from tiny import TIMES, TinyNet, blobs, tiny_run

LIKE = {"a": torch.zeros(40, 50), "b": torch.zeros(30, 2, 5, 5)}
D = {"a": 0.3, "b": 0.05}
ANEW = HeteroFLASH((0.6, 0.4, 0.2), c_d=2, E_d=2, excess="clip", draw="bernoulli", subset="magnitude")


def coins(seed: int, name: str, numel: int, d: float) -> list[bool]:
    """Which weights a coin of probability d keeps: the numbers of Philox below d * 2^64, in whole numbers."""
    key = int.from_bytes(hashlib.sha256(f"fedsieve/mask/{seed}/{name}".encode()).digest()[:16], "little")
    return [int(score) < d * 2**64 for score in np.random.Philox(key=key).random_raw(numel)]


@pytest.mark.parametrize("seed", [1, 2**61])
def test_a_bernoulli_mask_keeps_what_every_coin_says(seed: int) -> None:
    mask = random_masks(seed, draw_counts("bernoulli", seed, D, LIKE), LIKE)
    for name, d in D.items():
        assert mask[name].flatten().tolist() == coins(seed, name, LIKE[name].numel(), d)


def test_bernoulli_counts_are_binomial() -> None:
    """Of 400 seeds: the mean within 5 standard errors, the variance within a fifth of n d (1 - d); no two layers alike.

    The standard error of the variance of 400 draws is about 7 % of it."""
    drawn = torch.stack([draw_counts("bernoulli", seed, D, LIKE) for seed in range(400)]).double()
    for i, (name, d) in enumerate(D.items()):
        n = LIKE[name].numel()
        variance = n * d * (1 - d)
        assert abs(float(drawn[:, i].mean()) - n * d) < 5 * math.sqrt(variance / 400)
        assert float(drawn[:, i].var()) == pytest.approx(variance, rel=0.2)
        assert (drawn[:, i] - n * d).abs().max() < 5 * math.sqrt(variance)
    assert abs(float(torch.corrcoef(drawn.T)[0, 1])) < 0.25


def test_a_coin_that_always_falls_on_one_side() -> None:
    assert draw_counts("bernoulli", 3, {"a": 1.0, "b": 0.0}, LIKE).tolist() == [2000, 1]  # no layer is empty
    assert draw_counts("exact", 3, D, LIKE).tolist() == [600, 75]


def test_smaller_bernoulli_masks_are_inside_larger_ones() -> None:
    masks = [random_masks(7, draw_counts("bernoulli", 7, {"a": d, "b": d}, LIKE), LIKE) for d in (0.5, 0.3, 0.1)]
    assert all((small[n] <= large[n]).all() for large, small in pairwise(masks) for n in LIKE)


def device(model: torch.nn.Module) -> Device:
    data = blobs().train.subset(torch.arange(32))
    return Device(model, data, data, 0.1, 1, 8, 0.0, 0.0, rng(0, "client", 1, 2))


@pytest.mark.parametrize("method", [PDST(0.3, draw="bernoulli"), NST(0.3, draw="bernoulli", p=0.0)])
def test_both_sides_draw_a_bernoulli_mask_and_only_its_spec_travels(method: Any) -> None:
    state = method.init(TinyNet(), rng(5, "init"))
    down = decode(encode(method.broadcast(state, RoundContext())))
    spec: Any = down["mask"]
    assert {name: (v.dtype, v.numel()) for name, v in spec.items()} == {
        "seed": (torch.int64, 1),
        "counts": (torch.int64, 3),
    }
    model = TinyNet()
    up = method.client(down, device(model)).tree
    for name in select_weights("flash", TinyNet()):
        weight = state.params[name]
        kept = torch.tensor(coins(int(state.seed), name, weight.numel(), 0.3)).view(weight.shape)
        assert torch.equal(state.mask[name], kept)
        assert torch.equal(model.get_parameter(name) != 0, kept)
        sent: Any = up[name]
        assert len(sent.values if isinstance(method, NST) else sent) == int(kept.sum())


def test_flash_draws_its_second_mask_by_coins_too() -> None:
    method = FLASH(0.2, c_d=2, excess="clip", draw="bernoulli")
    first = method.init(TinyNet(), rng(0, "init"))
    sensed = torch.tensor([0.9, 0.1, 0.3], dtype=torch.float64)
    second = method.aggregate(first, [Update({"sensed": sensed}, 1)], RoundContext())
    names = select_weights("flash", TinyNet())
    sizes = [first.params[name].numel() for name in names]
    scale = 0.2 * sum(sizes) / sum(d * n for d, n in zip(sensed.tolist(), sizes, strict=True))
    for name, d in zip(names, sensed.tolist(), strict=True):
        kept = coins(int(first.seed) + 1, name, first.params[name].numel(), min(1.0, d * scale))
        assert second.mask[name].flatten().tolist() == kept


def test_a_coin_for_each_clients_own_mask_is_refused() -> None:
    with pytest.raises(InputError, match="draw=bernoulli needs first_mask=common"):
        NST(draw="bernoulli", first_mask="independent")


@pytest.mark.parametrize("method", [NST(0.3, draw="bernoulli"), FLASH(0.3, c_d=2, E_d=2, draw="bernoulli")])
def test_runs_on_bernoulli_masks_refuse_nobody(method: Any) -> None:
    assert not any(r.refused for r in rounds(open_run(tiny_run(method, rounds=2)), local()))


def by_hand(weights: Tensor, whole: Tensor, k: int) -> Tensor:
    """The k positions of the largest |w| on a mask, ties to the lowest position."""
    flat, on = weights.flatten().tolist(), whole.flatten().nonzero().flatten().tolist()
    best = sorted(on, key=lambda i: (-abs(flat[i]), i))[:k]
    kept = torch.zeros(weights.numel(), dtype=torch.bool)
    kept[best] = True
    return kept.view(weights.shape)


def test_hetero_masks_by_magnitude_are_inside_the_largest_and_change_from_round_to_round() -> None:
    seen = list[tuple[int, int, dict[str, Any], dict[str, Any]]]()

    def watch(t: int, client: int, down: Any, reply: Any) -> Any:
        seen.append((t, run.tiers(t, [client])[client], down, reply))
        yield client, reply

    run = tiny_run(ANEW)
    every = [*rounds(open_run(run), changed(watch))]
    assert not any(r.refused for r in every)
    states = {r.t: r.state for r in every}
    masks: dict[tuple[int, int], dict[str, Tensor]] = {}
    for t, tier, down, reply in seen:
        if t == 0:
            assert "subset" not in down
            continue
        state = states[t - 1]
        for (name, whole), k in zip(state.mask.items(), state.counts[tier].tolist(), strict=True):
            kept = whole if tier == 0 else by_hand(state.params[name], whole, k)
            masks.setdefault((t, tier), {})[name] = kept
            assert torch.equal(down["params"][name], state.params[name][kept])  # the server sends the values there
            assert reply["tree"][name].shape == (k,)  # and gets values back, no positions
            assert not (kept & ~whole).any()
            if tier:
                bits = np.unpackbits(down["subset"][name].numpy(), count=int(whole.sum()))
                assert bits.tolist() == kept[whole].int().tolist()
        assert int(down["mask"]["counts"].sum()) == int(state.counts[0].sum())
    for t in (2, 3, 4):
        assert all(torch.equal(masks[t, 0][n], masks[1, 0][n]) for n in masks[1, 0])
        for tier in (1, 2):
            assert any(not torch.equal(masks[t, tier][n], masks[t - 1, tier][n]) for n in masks[t, tier])
        assert all((masks[t, 2][n] <= masks[t, 1][n]).all() for n in masks[t, 2])


def test_an_element_is_the_mean_over_the_clients_whose_mask_of_the_round_holds_it() -> None:
    method = replace(ANEW, densities=(0.6, 0.2))
    first = method.init(TinyNet(), rng(0, "init"))
    sensed = torch.tensor([0.6, 0.6, 0.6], dtype=torch.float64)
    state = method.aggregate(first, [Update({"sensed": sensed}, 1)], RoundContext())
    counts = dict(zip(state.mask, state.counts[1].tolist(), strict=True))
    masks = [state.mask, {n: by_hand(state.params[n], own, counts[n]) for n, own in state.mask.items()}]
    updates = []
    for tier, step in ((0, 1.0), (1, 3.0)):
        values = {n: v[masks[tier][n]] if n in masks[tier] else v for n, v in state.params.items()}
        updates.append(Update({"tier": float(tier), **{n: v + step for n, v in values.items()}}, 1 + tier))
    after = method.aggregate(state, updates, RoundContext(1))
    for name, large in masks[0].items():
        wanted = state.params[name] + large + masks[1][name].float()  # 1, or (1 + 3) / 2 where both hold it
        assert torch.allclose(after.params[name], wanted, atol=1e-6)
    assert torch.allclose(after.params["fc2.bias"], state.params["fc2.bias"] + 2, atol=1e-6)


WHOLE = {"a": torch.tensor([True, False, True, True] * 3), "b": torch.tensor([[True, False], [False, False]])}


@pytest.mark.parametrize(
    "bits",
    [
        None,
        {"a": torch.zeros(2, dtype=torch.uint8)},
        {"a": torch.zeros(1, dtype=torch.uint8), "b": torch.zeros(1, dtype=torch.uint8)},
        {"a": torch.zeros(2), "b": torch.zeros(1, dtype=torch.uint8)},
        {"a": 1.0, "b": torch.zeros(1, dtype=torch.uint8)},
    ],
)
def test_bits_that_are_no_part_of_the_mask_are_refused(bits: object) -> None:
    with pytest.raises(InputError, match=r"no part of its mask|does not fit the mask at a"):
        unpack_subset(bits, WHOLE)


def test_a_part_of_a_mask_comes_back() -> None:
    """Of nine positions the first, third and ninth; of one position none."""
    bits = {"a": torch.tensor([0b10100000, 0b10000000], dtype=torch.uint8), "b": torch.tensor([0], dtype=torch.uint8)}
    kept = unpack_subset(bits, WHOLE)
    assert kept["a"].nonzero().flatten().tolist() == [0, 3, 11]
    assert not kept["b"].any()


def result(out: Path) -> tuple[bytes, list[dict[str, object]]]:
    return (out / "model.safetensors").read_bytes(), [row | TIMES for row in read_rows(out)]


def anew() -> Run:
    run = tiny_run(ANEW)
    return replace(run, task=replace(run.task, tier_by="round"))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.system] if "pool" in name else []) for name in ENGINES]
)
def test_masks_anew_are_the_same_in_every_engine_though_interrupted(name: str, tmp_path: Path) -> None:
    [*record_run(tmp_path / "whole", open_run(anew()), local(), "tests.tiny")]
    for execution in (Execution(until=2), Execution(resume=True)):
        [*record_run(tmp_path / "other", open_run(anew()), ENGINES[name](), "tests.tiny", execution)]
    assert result(tmp_path / "other") == result(tmp_path / "whole")


def test_what_is_the_papers_is_described_as_before() -> None:
    """A directory of a run without these settings is still the same run."""
    for method in (PDST(), NST(), FLASH(c_d=2), HeteroFLASH(c_d=2)):
        run = described(tiny_run(method))
        assert not {"lr_rounds", "lr_milestones", "norm_weight_decay"} & run.keys()
        assert not {"draw", "subset"} & run["method"].keys()
        assert not {"input_mean", "input_std", "tier_by"} & run["task"].keys()
