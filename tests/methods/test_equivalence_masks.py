"""The package's masks, cuts and means over supports against ``reference_sparse.py``, on drawn examples."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fedsieve.server.aggregate import mean_over_holders
from fedsieve.sparse.masks import (
    gather_values,
    global_top,
    layer_counts,
    mismatch,
    random_masks,
    recalibrate,
)
from fedsieve.sparse.regrowth import apportion, prune_regrow
from fedsieve.types import Mask, Params
from oracles import reference as ref
from oracles import reference_sparse as sparse

quick = settings(max_examples=40, deadline=None)
rates = st.integers(0, 20).map(lambda n: Fraction(n, 21))
SHAPES = st.lists(st.integers(1, 60), min_size=1, max_size=5)
seeds = st.integers(0, 2**31)


def layers(sizes: list[int], seed: int, zeros: float = 0.0) -> tuple[Params, Mask]:
    """Return weights of distinct magnitudes on random masks, at least one weight a layer; a share of them still 0."""
    g = np.random.default_rng(seed)
    weights, masks = {}, {}
    for i, size in enumerate(sizes):
        on = np.zeros(size, dtype=bool)
        on[g.permutation(size)[: g.integers(1, size + 1)]] = True
        scale = 10.0 ** g.integers(-2, 2)
        w = scale * (1 + g.permutation(size)) * g.choice([-1, 1], size) * (g.random(size) >= zeros)
        weights[f"l{i}"] = torch.tensor(w * on, dtype=torch.float32)
        masks[f"l{i}"] = torch.tensor(on)
    return weights, masks


def numpy_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    return {name: v.numpy() for name, v in tensors.items()}


def float64(tensors: Mapping[str, torch.Tensor]) -> ref.State:
    return {name: v.numpy().astype(np.float64) for name, v in tensors.items()}


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------- prune and regrow


@quick
@given(SHAPES, seeds, rates, st.sampled_from(["mean", "sum"]), st.sampled_from([0.0, 0.3]))
def test_prune_regrow_equals_reference(sizes: list[int], seed: int, p: Fraction, share: Any, zeros: float) -> None:
    """What is pruned, exactly; the total, exactly; each layer's regrowth within a unit of its exact share.

    A full layer's surplus is rounded again at every hand-over, of which there is at most one a layer.
    """
    weights, masks = layers(sizes, seed, zeros)
    now, own = float64(weights), numpy_of(masks)
    left, _ = sparse.pruned(now, own, p)
    after, grown = prune_regrow(weights, masks, float(p), share, generator(seed))
    total = sum(sparse.prune_counts(own, p).values())
    parts = {name: int(grown[name].sum()) - int(kept.sum()) for name, kept in left.items()}
    assert sum(parts.values()) == total
    for name, kept in left.items():
        assert not (kept & ~grown[name].numpy()).any(), "a weight was pruned that the reference keeps"
        np.testing.assert_array_equal(after[name].numpy(), now[name] * kept)  # kept untouched, the rest at 0
        assert 1 <= grown[name].sum() <= grown[name].numel()
    assume(any(now[name][kept].any() for name, kept in left.items()))
    by = sparse.shares(now, left, share)
    assume(all(by.values()))
    room = {name: int((~kept).sum()) for name, kept in left.items()}
    exact = sparse.regrowth(total, by, room)
    full = [name for name in by if exact[name] == room[name]]
    for name in parts:
        assert abs(parts[name] - exact[name]) < 1 + len(full) + 1e-9
    if not full:
        assert all(abs(parts[name] - exact[name]) < 1 for name in parts)


@quick
@given(SHAPES, seeds, rates)
def test_prune_regrow_leaves_its_arguments_and_depends_on_the_generator_alone(
    sizes: list[int], seed: int, p: Fraction
) -> None:
    weights, masks = layers(sizes, seed)
    before = {name: v.clone() for name, v in (weights | {f"{n} mask": m for n, m in masks.items()}).items()}
    one, other = (prune_regrow(weights, masks, float(p), "mean", generator(seed)) for _ in range(2))
    for found, again in zip(one, other, strict=True):
        assert all(torch.equal(found[name], again[name]) for name in masks)
    assert all(torch.equal(weights[name], before[name]) for name in masks)
    assert all(torch.equal(masks[name], before[f"{name} mask"]) for name in masks)


def test_prune_regrow_draws_other_positions_from_another_generator() -> None:
    """And from all zeros, those just pruned among them, evenly."""
    weights, masks = {"w": torch.arange(1.0, 201) * (torch.arange(200) < 100)}, {"w": torch.arange(200) < 100}
    times = torch.zeros(200)
    for seed in range(400):
        _, after = prune_regrow(weights, masks, 0.25, "mean", generator(seed))
        times += after["w"]
    assert (times[25:100] == 400).all()
    regrown = torch.cat([times[:25], times[100:]])  # 25 of 125 free positions each time: 80 of 400 expected, std 8
    assert regrown.min() > 40
    assert regrown.max() < 120
    assert abs(regrown[:25].mean() - 80) < 8


@quick
@given(
    st.integers(0, 80),
    st.dictionaries(st.sampled_from("abcde"), st.tuples(st.floats(0.01, 10), st.integers(0, 40)), min_size=1),
)
def test_apportionment_is_exact_in_total_and_close_in_parts(total: int, given_: dict[str, tuple[float, int]]) -> None:
    share, room = {name: s for name, (s, _) in given_.items()}, {name: r for name, (_, r) in given_.items()}
    total = min(total, sum(room.values()))
    parts, exact = apportion(total, share, room), sparse.regrowth(total, share, room)
    assert sum(parts.values()) == total
    full = [name for name in share if exact[name] >= room[name] - 1e-9]
    for name, part in parts.items():
        assert 0 <= part <= room[name]
        assert abs(part - exact[name]) < 1 + len(full) + 1e-9


# ---------------------------------------------------------------- drawn masks


LIKE = {"a": torch.zeros(7, 3, 2), "b": torch.zeros(40), "c": torch.zeros(40)}


@quick
@given(st.integers(0, 2**62), st.tuples(st.integers(0, 42), st.integers(0, 40), st.integers(0, 40)), st.data())
def test_drawn_masks_are_exact_nested_and_repeatable(seed: int, counts: tuple[int, ...], data: st.DataObject) -> None:
    fewer = [data.draw(st.integers(0, n)) for n in counts]
    large, again = (random_masks(seed, torch.tensor(counts), LIKE) for _ in range(2))
    small = random_masks(seed, torch.tensor(fewer), LIKE)
    for name, n, m in zip(LIKE, counts, fewer, strict=True):
        assert large[name].shape == LIKE[name].shape
        assert (int(large[name].sum()), int(small[name].sum())) == (n, m)
        assert not (small[name] & ~large[name]).any()
        assert torch.equal(large[name], again[name])
    alone = random_masks(seed, torch.tensor(counts[1:]), {"b": LIKE["b"], "c": LIKE["c"]})
    assert torch.equal(alone["c"], large["c"]), "a layer's mask depends on the other layers"


def test_drawn_masks_are_independent_between_layers_and_seeds_and_even() -> None:
    """Overlap of two independent masks of half a layer: a quarter, std .5 / sqrt(n) / 2 = .0022 of 12,800."""
    like, counts = {"a": torch.zeros(12_800), "b": torch.zeros(12_800)}, torch.tensor([6_400, 6_400])
    one, other = random_masks(5, counts, like), random_masks(6, counts, like)
    for x, y in ((one["a"], one["b"]), (one["a"], other["a"]), (one["b"], other["b"]), (one["b"], other["a"])):
        assert float((x & y).float().mean()) == pytest.approx(0.25, abs=0.015)
    assert float(one["a"][:6_400].float().mean()) == pytest.approx(0.5, abs=0.03)
    assert float((one["a"][1:] & one["a"][:-1]).float().mean()) == pytest.approx(0.25, abs=0.02)


# ---------------------------------------------------------------- re-calibration and mismatch


shares_and_sizes = st.lists(st.tuples(st.integers(1, 100), st.integers(1, 500)), min_size=1, max_size=6)


@quick
@given(shares_and_sizes, st.integers(1, 100), st.sampled_from(["redistribute", "clip"]))
def test_calibration_equals_reference(layers_: list[tuple[int, int]], percent: int, excess: Any) -> None:
    """To rounding; all in (0, 1]; the total is ``d`` where the excess is handed on, and at most ``d`` elsewhere."""
    mean = {f"l{i}": Fraction(h, 100) for i, (h, _) in enumerate(layers_)}
    sizes = {f"l{i}": k for i, (_, k) in enumerate(layers_)}
    d = Fraction(percent, 100)
    found = recalibrate({name: float(h) for name, h in mean.items()}, sizes, float(d), excess)
    wanted = sparse.calibrated(mean, sizes, d, excess == "redistribute")
    assert found == pytest.approx({name: float(h) for name, h in wanted.items()}, rel=1e-12)
    assert all(0 < h <= 1 for h in found.values())
    total, target = sum(found[name] * k for name, k in sizes.items()), float(d) * sum(sizes.values())
    assert total == pytest.approx(target) if excess == "redistribute" else total <= target * (1 + 1e-12)
    counts = layer_counts(found, {name: torch.zeros(k) for name, k in sizes.items()}).tolist()
    assert counts == [math.ceil(wanted[name] * k) for name, k in sizes.items()]
    assert all(1 <= n <= k for n, k in zip(counts, sizes.values(), strict=True))


@quick
@given(SHAPES, seeds, seeds)
def test_mismatch_equals_reference(sizes: list[int], one: int, other: int) -> None:
    a, b = layers(sizes, one)[1], layers(sizes, other)[1]
    assert mismatch(a, b) == sparse.mismatch(numpy_of(a), numpy_of(b)) == mismatch(b, a)
    assert mismatch(a, a) == 0


# ---------------------------------------------------------------- the server, and the global cut


@quick
@given(SHAPES, st.lists(seeds, min_size=1, max_size=4), st.booleans())
def test_mean_over_supports_equals_reference(sizes: list[int], clients: list[int], dense: bool) -> None:
    """Every element's plain mean over those who hold it, held zeros among them; what nobody holds keeps its value."""
    old = layers(sizes, 1)[0] | {"bias": torch.tensor([1.0, 2.0])}
    models: list[tuple[Params, Mask]] = []
    for seed in clients:
        weights, masks = layers(sizes, seed, zeros=0.3)
        if dense:
            masks = {name: m for name, m in masks.items() if name != "l0"}
        models.append((weights | {"bias": torch.tensor([float(seed % 7), -1.0])}, masks))
    found = mean_over_holders(iter(models), old)
    sent = [float64(w) for w, _ in models]
    wanted = sparse.supported_mean(float64(old), sent, [numpy_of(m) for _, m in models])
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name].numpy(), value, rtol=1e-6, atol=1e-7)
        nobody = ~np.any([m[name].numpy() if name in m else np.ones(value.shape, bool) for _, m in models], axis=0)
        np.testing.assert_array_equal(found[name].numpy()[nobody], old[name].numpy()[nobody])


@quick
@given(SHAPES, seeds, st.integers(1, 20))
@pytest.mark.filterwarnings("ignore:the global cut")
def test_global_cut_equals_reference(sizes: list[int], seed: int, twentieths: int) -> None:
    """Exactly ``ceil(d * total)`` over all layers together, of the largest."""
    g, total = np.random.default_rng(seed), sum(sizes)
    flat = np.split((1.0 + g.permutation(total)) * g.choice([-1, 1], total), np.cumsum(sizes)[:-1])
    params = {f"l{i}.weight": torch.tensor(v, dtype=torch.float32) for i, v in enumerate(flat)}
    d = Fraction(twentieths, 20)
    wanted, _ = ref.global_top(numpy_of(params), d, [f"l{i}" for i in range(len(sizes))])
    support = global_top(params, tuple(params), 1 - (1 - twentieths / 20))
    assert sum(int(s.sum()) for s in support.values()) == math.ceil(d * total)
    kept = {name: v[support[name]] for name, v in params.items()}
    assert all(torch.equal(gather_values(params, support)[name], kept[name]) for name in params)
    for name, s in support.items():
        np.testing.assert_array_equal(s.numpy(), wanted[name] != 0)
