"""Masks: what is drawn, how many weights DNR moves, and what goes over the wire instead of them."""

import hashlib
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsieve import Run, Task, local, rounds
from fedsieve.client.cost import Cost
from fedsieve.client.models import MODELS
from fedsieve.client.training import params_of, train_on_mask
from fedsieve.methods import DNR, FLASH, NST, PDST, HeteroFLASH, SparseFedPP, TopK
from fedsieve.sparse.masks import (
    EmptyLayer,
    apply_mask,
    gather_values,
    layer_counts,
    masks_from_spec,
    mismatch,
    pack_bits,
    random_masks,
    recalibrate,
    scatter_values,
    unpack_bits,
)
from fedsieve.sparse.policy import select_weights
from fedsieve.sparse.regrowth import apportion, prune_regrow
from fedsieve.types import Device, InputError, RoundContext, Update, rng
from fedsieve.wire import decode, encode
from tiny import TinyNet, blobs, tiny_run

LIKE = {"a": torch.zeros(7, 5), "b": torch.zeros(3), "c": torch.zeros(4, 2, 3, 3)}


def test_a_mask_is_what_its_spec_says() -> None:
    mask = random_masks(11, torch.tensor([9, 0, 72]), LIKE)
    key = int.from_bytes(hashlib.sha256(b"fedsieve/mask/11/a").digest()[:16], "little")
    scores = [int(s) for s in np.random.Philox(key=key).random_raw(35)]
    kept = sorted(range(35), key=scores.__getitem__)[:9]
    assert mask["a"].flatten().nonzero().squeeze(1).tolist() == sorted(kept)
    assert not mask["b"].any()
    assert mask["c"].all()


def test_philox_gives_the_numbers_of_its_paper() -> None:
    """Salmon et al. 2011, known answers of Philox4x64-10: counter and key of zeros (NumPy counts up before a draw)."""
    raw = np.random.Philox(key=0, counter=2**256 - 1).random_raw(4)
    assert [f"{int(x):016x}" for x in raw] == [
        "16554d9eca36314c",
        "db20fe9d672d0fdc",
        "d7e772cee186176b",
        "7e68b68aec7ba23b",
    ]


def test_smaller_masks_of_the_same_seed_are_inside() -> None:
    large, small = random_masks(5, torch.tensor([20, 3, 50]), LIKE), random_masks(5, torch.tensor([11, 1, 49]), LIKE)
    assert all((small[n] <= large[n]).all() for n in LIKE)
    other = random_masks(6, torch.tensor([20, 3, 50]), LIKE)
    assert any((other[n] != large[n]).any() for n in LIKE)


@pytest.mark.parametrize("counts", [[9, 0], [36, 0, 0], [-1, 0, 0]])
def test_counts_that_do_not_fit_are_refused(counts: list[int]) -> None:
    with pytest.raises(InputError, match="do not fit"):
        random_masks(1, torch.tensor(counts), LIKE)


@pytest.mark.parametrize("order", [None, {}, {"seed": 1.0, "counts": torch.ones(3)}, {"seed": torch.ones(2)}])
def test_an_order_for_a_mask_that_is_none_is_refused(order: object) -> None:
    with pytest.raises(InputError, match="no order for a mask"):
        masks_from_spec(order, TinyNet(), ("fc1.weight",))


def test_only_values_travel_and_come_back_to_their_places() -> None:
    params = {name: torch.randn(v.shape) for name, v in LIKE.items()} | {"bias": torch.randn(4)}
    mask = random_masks(3, torch.tensor([9, 1, 20]), LIKE)
    sent = gather_values(params, mask)
    assert {name: len(v) for name, v in sent.items()} == {"a": 9, "b": 1, "c": 20, "bias": 4}
    back, wanted = scatter_values(sent, mask), apply_mask(params, mask)
    assert all(torch.equal(back[n], wanted[n]) for n in params)
    for wrong in ({"a": torch.ones(8)}, {"a": 1.0}, 3.0):
        with pytest.raises(InputError):
            scatter_values(wrong, mask)


def test_masks_are_remembered_as_bits() -> None:
    mask = random_masks(3, torch.tensor([9, 1, 20]), LIKE)
    bits = pack_bits(mask)
    assert {name: v.numel() for name, v in bits.items()} == {"a": 5, "b": 1, "c": 9}
    assert all(torch.equal(unpack_bits(bits, LIKE)[n], mask[n]) for n in mask)


def test_mismatch_sums_layers_first() -> None:
    a = {"x": torch.tensor([True, True, False]), "y": torch.tensor([True, False, False, False])}
    b = {"x": torch.tensor([True, False, False]), "y": torch.tensor([False, True, True, False])}
    assert mismatch(a, b) == 1 - 1 / 5
    assert mismatch(a, a) == 0
    none = {"x": torch.zeros(3, dtype=torch.bool)}
    assert mismatch(none, none) == 0


def test_calibration_reaches_the_target_or_clips() -> None:
    sizes = {"a": 100, "b": 900}
    assert recalibrate({"a": 0.4, "b": 0.1}, sizes, 0.1, "clip") == pytest.approx({"a": 0.4 / 1.3, "b": 0.1 / 1.3})
    clipped = recalibrate({"a": 1.0, "b": 0.05}, sizes, 0.3, "clip")
    assert clipped == {"a": 1.0, "b": pytest.approx(0.05 * 300 / 145)}
    assert recalibrate({"a": 1.0, "b": 0.05}, sizes, 0.3, "redistribute") == {
        "a": 1.0,
        "b": pytest.approx(200 / 900),
    }


def test_pruning_takes_the_smallest_and_growth_starts_at_zero() -> None:
    weights = {"a": torch.tensor([0.5, -0.1, 0.2, 9.0]), "b": torch.tensor([3.0, 0.0, 0.0, 0.0, 0.0])}
    mask = {"a": torch.tensor([True, True, True, False]), "b": torch.tensor([True, False, False, False, False])}
    left, new = prune_regrow(weights, mask, 0.3, "mean", rng(0, "test"))
    assert left["a"].tolist() == pytest.approx([0.5, 0, 0.2, 0])  # ceil(.3 * 3) = 1 of a; never the last of b
    assert left["b"].tolist() == [3, 0, 0, 0, 0]
    # shares: a .35, b 3: the one that grows goes to b
    assert (int(new["a"].sum()), int(new["b"].sum())) == (2, 2)


@given(
    st.integers(0, 500),
    st.lists(st.tuples(st.floats(0, 10), st.integers(0, 200)), min_size=1, max_size=6),
)
@settings(deadline=None, max_examples=200)
def test_parts_add_up_and_fit(total: int, layers: list[tuple[float, int]]) -> None:
    shares = {str(i): share for i, (share, _) in enumerate(layers)}
    room = {str(i): free for i, (_, free) in enumerate(layers)}
    parts = apportion(total, shares, room)
    assert sum(parts.values()) == min(total, sum(room.values()))
    assert all(0 <= parts[n] <= room[n] for n in parts)


def test_dnr_keeps_the_number_of_weights_at_every_step() -> None:
    found: list[int] = []

    class Watched(NST):
        def rates(self, device: Device) -> dict[int, float]:
            return dict.fromkeys(range(1, 6), 0.25)

        def aggregate(self, state: Any, updates: Any, context: RoundContext) -> Any:
            kept = list(updates)
            found.extend(sum(len(u.tree[n].index) for n in state.sparse) for u in kept)
            return super().aggregate(state, kept, context)

    list(rounds(tiny_run(Watched(density=0.3)), local()))
    params = params_of(TinyNet())
    wanted = sum(int(layer_counts({n: 0.3}, params)[0]) for n in select_weights("flash", TinyNet()))
    assert found == [wanted] * 12


def test_work_follows_a_mask_that_moves() -> None:
    """One client, two steps, the mask moving between them: each step is counted at its own layer densities."""
    model, data = TinyNet(), blobs().train.subset(torch.arange(32))
    device = Device(model, data, data, 0.1, 1, 16, 0, 0, rng(0, "x"))
    names = select_weights("flash", model)
    like = {name: model.get_parameter(name) for name in names}
    work = Cost(model)
    before = dict(random_masks(1, layer_counts(dict.fromkeys(names, 0.2), like), like))
    _, after = train_on_mask(device, before, {1: 0.5})
    products = {"conv1.weight": 2 * 36 * 4 * 2 * 9, "conv2.weight": 3 * 9 * 8 * 4 * 9, "fc1.weight": 3 * 72 * 24}
    wanted = sum(16 * products[n] * float(mask[n].double().mean()) for mask in (before, after) for n in names)
    assert any(int(before[n].sum()) != int(after[n].sum()) for n in names)
    assert work.products.real == pytest.approx(wanted + 2 * 16 * 3 * 24 * 3)


@pytest.mark.parametrize("method", [NST(0.3), FLASH(0.3, c_d=3, E_d=2)], ids=["nst", "flash"])
def test_training_that_diverges_ends_in_one_line(method: Any) -> None:
    with pytest.raises(InputError, match=r": lower lr \(now 100000\) or clip gradients"):
        list(rounds(tiny_run(method, lr=1e5, lr_end=1e5), local()))


def test_no_drawn_mask_is_empty() -> None:
    assert layer_counts({"a": 1e-9, "b": 1e-9}, LIKE).tolist() == [1, 1]


def test_the_mask_of_central_dnr_is_the_clients_own() -> None:
    central = replace(tiny_run(DNR(0.3)), task=Task(TinyNet, blobs, 1), per_round=1)
    for round in rounds(central, local()):
        own = {n: decode(round.memory[0])[n] for n in round.state.sparse}
        like = {n: round.state.params[n] for n in own}
        assert all(torch.equal(unpack_bits(own, like)[n], round.state.mask[n]) for n in own)  # type: ignore[arg-type]


def test_a_tier_that_no_round_would_sample_is_refused() -> None:
    with pytest.raises(InputError, match=r"per_round 1 gives tier 1 \(a share of 0.4\) no client"):
        Run(HeteroFLASH(c_d=2), Task(TinyNet, blobs, 20, tiers=(0.4, 0.3, 0.3)), 3, 1)


def test_clients_of_nst_start_from_one_mask_and_keep_their_own() -> None:
    """All alike while masks do not move; with prune and regrow every client's differs."""
    for p, different in ((0.0, 1), (0.25, 6)):
        final = list(rounds(tiny_run(NST(density=0.3, p=p), rounds=6), local()))[-1]
        assert len(final.memory) == 6
        assert len(set(final.memory.values())) == different


def test_nst_serves_the_common_mask_before_the_first_round() -> None:
    state = NST(density=0.3).init(TinyNet(), rng(0, "init"))
    assert state.counts.tolist() == [int(own.sum()) for own in state.mask.values()]
    assert all(torch.equal(state.params[n] != 0, own) for n, own in state.mask.items())
    dense = NST(density=0.3, first_mask="independent").init(TinyNet(), rng(0, "init"))
    assert all(own.all() for own in dense.mask.values())


def test_when_nst_learns() -> None:
    device = Device(TinyNet(), blobs().train, blobs().test, 0.1, 1, 32, 0, 0, rng(0, "x"), round=3, rounds=10)
    assert NST(p=0.25).rates(device) == {4: 0.25 * (1 - 4 / 8)}  # 240 examples: 8 steps, one epoch
    assert NST(p=0.2).rates(replace(device, epochs=3)) == pytest.approx({8: 0.2 * 2 / 3, 16: 0.2 / 3})
    assert NST(p=0.2, decay="run").rates(device) == pytest.approx({8: 0.2 * 0.7})
    assert NST(p=0.2, decay="run").rates(replace(device, round=10)) == pytest.approx({8: 0})


def test_flash_starts_stage_2_from_whole_weights_not_from_masked_ones() -> None:
    method, plain = FLASH(density=0.2, c_d=3), TinyNet()
    first = method.init(plain, rng(0, "init"))
    names = select_weights("flash", plain)
    sensed = [torch.tensor([1.0, 0.1, 0.4], dtype=torch.float64), torch.tensor([0.8, 0.3, 0.2], dtype=torch.float64)]
    second = method.aggregate(first, [Update({"sensed": s}, n) for n, s in enumerate(sensed, 1)], RoundContext())
    fresh, mask = params_of(plain), second.mask
    for name in names:
        assert torch.equal(second.params[name], fresh[name] * mask[name])
        assert not torch.equal(mask[name], first.mask[name])
        assert second.params[name].count_nonzero() == mask[name].sum()  # no weight is a masked one's zero
    sizes = {name: fresh[name].numel() for name in names}
    mean = dict(zip(names, [0.9, 0.2, 0.3], strict=True))  # unweighted
    wanted = layer_counts(recalibrate(mean, sizes, 0.2, "redistribute"), fresh)
    assert second.counts[0].tolist() == wanted.tolist()
    assert int(second.stage) == 2


@pytest.mark.slow
def test_the_mask_of_flash_never_changes_and_that_of_nst_does() -> None:
    for method, same in ((FLASH(0.3, c_d=3, E_d=2), True), (PDST(0.3), True), (NST(0.3), False)):
        federation = tiny_run(method, rounds=5)
        rows = list(rounds(federation, local(), measure=("masks",)))
        changes = [r.measures["mismatch"] for r in rows if r.t >= 1][1 if rows[0].t == 1 else 0 :]
        assert all((change == 0) == same for change in changes)


def test_hetero_flash_nests_its_masks_and_counts_who_holds_what() -> None:
    method = HeteroFLASH(densities=(0.6, 0.4, 0.2), c_d=2, E_d=2)
    final = list(rounds(tiny_run(method), local()))[-1]
    masks = [final.state.mask_of(tier) for tier in range(3)]
    for large, small in pairwise(masks):
        assert all((small[n] <= large[n]).all() for n in large)
    total = sum(own.numel() for own in masks[0].values())
    for d, mask in zip(method.densities, masks, strict=True):
        assert sum(int(own.sum()) for own in mask.values()) == pytest.approx(d * total, abs=3)


def test_clipping_keeps_masks_nested() -> None:
    """Sensed densities that no honest warm-up gives: what is clipped off the first mask is no room for the second."""
    method = HeteroFLASH(densities=(0.9, 0.8), excess="clip", c_d=1)
    sensed = torch.tensor([0.9, 0.9, 0.01], dtype=torch.float64)
    state = method.aggregate(method.init(TinyNet(), rng(0, "init")), [Update({"sensed": sensed}, 1)], RoundContext())
    assert (state.counts[1] <= state.counts[0]).all()
    assert recalibrate({"a": 1.0, "b": 0.01}, {"a": 10, "b": 990}, 0.5, "clip")["b"] > 0.01


def test_a_warm_up_takes_its_clients_from_the_first_tier() -> None:
    run_ = Run(HeteroFLASH(c_d=4), Task(TinyNet, blobs, 20, tiers=(0.4, 0.3, 0.3)), 3, 10)
    assert (run_.method.warm_up, run_.first, len(run_.sample(0))) == (4, 0, 4)
    assert max(run_.sample(0)) < 8
    assert run_.lr_at(0) == run_.lr_at(1) == run_.lr == replace(run_, lr_offset=1).lr_at(0)


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda: PDST(density=0), r"density must lie in \(0, 1\], got 0"),
        (lambda: NST(density=1.1), r"density must lie in \(0, 1\], got 1.1"),
        (lambda: FLASH(density=float("nan")), r"density must lie in \(0, 1\]"),
        (lambda: HeteroFLASH(densities=(0.2, 1.5)), r"densities must lie in \(0, 1\], got 1.5"),
        (lambda: HeteroFLASH(densities=(0.1, 0.2)), "densities must fall from tier to tier"),
        (lambda: HeteroFLASH(densities=()), "densities must fall"),
        (lambda: FLASH(c_d=0), "a c_d of 1 and an E_d of 2 at least"),
        (lambda: FLASH(p=1.0), r"p must lie in \[0, 1\)"),
        (lambda: NST(p=-0.1), r"p must lie in \[0, 1\)"),
        (lambda: SparseFedPP(a=0.5), r"a must lie in \[1, 10\]"),
        (lambda: SparseFedPP(sparsity=1.0), r"sparsity must lie in \[0, 1\)"),
        (lambda: Run(HeteroFLASH(), Task(TinyNet, blobs, 6), 1, 1), "serves 3 device classes but task.tiers names 1"),
        (lambda: Run(FLASH(), Task(TinyNet, blobs, 6), 1, 1), "warms up on 10 clients but only 6 are there"),
    ],
)
def test_impossible_settings_are_refused(make: Any, line: str) -> None:
    with pytest.raises(InputError, match=line):
        make()


def test_a_policy_that_matches_nothing_is_refused() -> None:
    with pytest.raises(InputError, match=r"policy 'convolution\*' matches no layer; the layers are conv1"):
        list(rounds(tiny_run(PDST(policy="convolution*")), local()))


@pytest.mark.filterwarnings("default")
def test_a_cut_that_empties_a_layer_is_named() -> None:
    with pytest.warns(EmptyLayer, match=r"at density 0.002 empties conv2.weight"):
        list(rounds(tiny_run(SparseFedPP(sparsity=0.998), rounds=2), local()))


@pytest.mark.slow
@pytest.mark.parametrize(("d", "factor"), [(0.1, 9.8), (0.05, 19.4)])
@pytest.mark.parametrize("kind", [PDST, FLASH])
def test_both_directions_of_resnet18_weigh_a_tenth_and_a_twentieth(kind: Any, d: float, factor: float) -> None:
    plain = MODELS["resnet18"](3, 10)
    method = kind(density=d)
    state = method.init(plain, rng(0, "init"))
    dense = {"tree": params_of(plain), "n": 1.0, "metrics": {"loss": 0.0}, "work": {"real": 0.0, "dense": 0.0}}
    down = method.broadcast(state, RoundContext())
    up = dense | {"tree": gather_values(state.params, state.mask)}
    assert len(encode(params_of(plain))) / len(encode(down)) >= factor
    assert len(encode(dense)) / len(encode(up)) >= factor


def test_the_papers_savings() -> None:
    """FLASH, Table 3: 9.8, 19.5, and 14.6 on FEMNIST, from the paper's own formula."""
    for model, d, printed in (("resnet18", 0.1, 9.88), ("resnet18", 0.05, 19.51), ("leaf_cnn", 0.05, 14.58)):
        plain = MODELS[model](3 if model == "resnet18" else 1, 10 if model == "resnet18" else 62)
        dense = 4 * sum(w.numel() for w in plain.parameters())
        assert dense / FLASH(density=d).paper_bytes(plain) == pytest.approx(printed, abs=0.005)


def test_sparsefedpp_at_a_1_with_all_activations_is_top_k() -> None:
    twin, topk = SparseFedPP(0.7, a=1.0, activations="all"), TopK(0.7)
    state = topk.init(TinyNet(), rng(0, "init"))
    device = Device(TinyNet(), blobs().train, blobs().test, 0.1, 1, 16, 0, 0, rng(0, "client"))
    one = topk.client(topk.broadcast(state, RoundContext()), device)
    plain = replace(device, model=twin.prepare(TinyNet()), rng=rng(0, "client"))
    other = twin.client(twin.broadcast(state, RoundContext()), plain)
    assert encode(one.tree) == encode(other.tree)
