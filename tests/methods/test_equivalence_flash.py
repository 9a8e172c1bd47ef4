"""The package's PDST, FLASH and hetero-FLASH against the NumPy float64 derivation in ``reference_sparse.py``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from fedsieve.client.training import params_of
from fedsieve.methods import FLASH, PDST, HeteroFLASH
from fedsieve.types import RoundContext, Update, rng
from oracles import reference_sparse as sparse
from oracles.side_by_side import (
    FLOAT32_ROUNDING,
    SAMPLED,
    SEED,
    assert_equal,
    float64,
    fresh,
)
from oracles.watch import (
    INNER,
    PATTERN,
    Watch,
    counts,
    numpy_masks,
    replay,
    uniform_counts,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("decay", "epochs", "weighting", "unit"),
    [(0.0, 2, "samples", 1), (0.05, 1, "samples", 1), (0.0, 1, "equal", 1), (0.05, 1, "samples", 4)],
)
def test_pdst_equals_reference(
    decay: float, epochs: int, weighting: Any, unit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = PDST(0.3, policy=PATTERN, weighting=weighting, unit=unit)
    watch, state = Watch(method, monkeypatch, decay, epochs), method.init(fresh(), rng(SEED, "init"))
    server, mask_ = float64(state.params), numpy_masks(state.mask)
    assert counts(mask_, unit) == uniform_counts(server, "0.3", unit)
    assert_equal(sparse.masked(float64(params_of(fresh())), mask_), server, "init")
    for t, clients in enumerate(SAMPLED):
        updates = [watch.client(method.broadcast(state, RoundContext()), c, t) for c in clients]
        state = method.aggregate(state, iter(updates), RoundContext())
        answers = [watch.seen[t, c].answer(c, t, decay) for c in clients]
        server = sparse.pdst_round(server, mask_, answers, equal=weighting == "equal")
        assert_equal(server, float64(state.params), f"round {t}")
        assert_equal(server, float64(method.deploy(state)), f"round {t}, deployed")
    assert sparse.mismatch(mask_, numpy_masks(state.mask)) == 0


def warm_up(
    watch: Watch, state: Any, clients: tuple[int, ...], epochs: int, share: str, unit: int = 1
) -> tuple[Any, list[dict[str, Fraction]]]:
    """Run stage 1 on both sides; return the package's state of stage 2 and the reference's clients' densities."""
    updates = [watch.client(watch.method.broadcast(state, RoundContext()), c, -1) for c in clients]
    start, mask_, answers = float64(state.params), numpy_masks(state.mask), []
    for c in clients:
        done = list[bool]()
        seen = watch.seen[-1, c]
        learner = sparse.Learner(start, mask_, 0.25, epochs, replay(seen, share, done, unit), unit)
        learner.train(seen.answer(c, -1))
        assert learner.margin > FLOAT32_ROUNDING, "a pruning that rounding could turn: take another seed"
        assert len(done) == len(seen.updates) == epochs - 1
        answers.append(sparse.densities(sparse.units(learner.masks, unit)))
    return watch.method.aggregate(state, iter(updates), RoundContext()), answers


def assert_drawn(found: sparse.Masks, wanted: Mapping[str, Fraction], unit: int = 1) -> None:
    """Compare the numbers of weights, or units, exactly: ceil(d_l * k_l), as every density here is rounded."""
    sizes = {name: own.size for name, own in sparse.units(found, unit).items()}
    assert counts(found, unit) == {name: math.ceil(d * sizes[name]) for name, d in wanted.items()}


@pytest.mark.parametrize(
    ("share", "excess", "d", "unit"),
    [("mean", "redistribute", "0.3", 1), ("sum", "clip", "0.3", 1), ("mean", "redistribute", "0.3", 4)],
)
def test_flash_equals_reference(share: Any, excess: Any, d: str, unit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stage 1: every client's pruning and its layer densities, the re-calibrated counts. Stage 2: three rounds."""
    method = FLASH(float(d), c_d=3, E_d=4, share=share, excess=excess, policy=PATTERN, unit=unit)
    watch, state = Watch(method, monkeypatch), method.init(fresh(), rng(SEED, "init"))
    initial, first = float64(params_of(fresh())), numpy_masks(state.mask)
    assert counts(first, unit) == uniform_counts(initial, d, unit)
    state, answers = warm_up(watch, state, (0, 2, 3), 4, share, unit)
    sizes = {name: initial[name].size for name in INNER}
    (wanted,) = sparse.warmed_up(answers, sizes, [Fraction(d)], excess == "redistribute")
    mask_ = numpy_masks(state.mask)
    assert_drawn(mask_, wanted, unit)
    assert sparse.mismatch(first, mask_) > 0.3, "the mask is drawn afresh"
    server = float64(state.params)
    assert_equal(sparse.masked(initial, mask_), server, "the initial weights on the new mask")
    for t, clients in enumerate(SAMPLED):
        updates = [watch.client(method.broadcast(state, RoundContext()), c, t) for c in clients]
        state = method.aggregate(state, iter(updates), RoundContext())
        server = sparse.pdst_round(server, mask_, [watch.seen[t, c].answer(c, t) for c in clients])
        assert_equal(server, float64(state.params), f"round {t}")
    assert sparse.mismatch(mask_, numpy_masks(state.mask)) == 0
    assert not any(watch.seen[t, c].updates for t, clients in enumerate(SAMPLED) for c in clients)


@pytest.mark.parametrize("excess", ["redistribute", "clip"])
def test_flash_takes_sensitivities_alike_and_recalibrates_them(excess: Any) -> None:
    """Answers made up, from unequal numbers of examples: by eq. 2 conv2 overflows, fc1 gets its excess or not."""
    method = FLASH(0.6, c_d=3, excess=excess, policy=PATTERN)
    state = method.init(fresh(), rng(SEED, "init"))
    told = [
        (Fraction("0.5"), Fraction("0.1"), 13),
        (Fraction("0.75"), Fraction("0.125"), 10),
        (Fraction(1), Fraction("0.2"), 5),
    ]
    updates = [Update({"sensed": torch.tensor([float(a), float(b)], dtype=torch.float64)}, n) for a, b, n in told]
    found = numpy_masks(method.aggregate(state, iter(updates), RoundContext()).mask)
    answers = [dict(zip(INNER, (a, b), strict=True)) for a, b, _ in told]
    sizes = {name: state.params[name].numel() for name in INNER}
    (wanted,) = sparse.warmed_up(answers, sizes, [Fraction("0.6")], excess == "redistribute")
    assert wanted["conv2.weight"] == 1
    assert_drawn(found, wanted)
    assert (sum(counts(found).values()) == math.ceil(0.6 * sum(sizes.values()))) == (excess == "redistribute")


TIERS = (1, 0, 2, 2)
"""The device class of each client; the last round has none of the first."""


@pytest.mark.parametrize("unit", [1, 4])
def test_hetero_flash_equals_reference(unit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    targets = ("0.5", "0.3", "0.1")
    method = HeteroFLASH(tuple(map(float, targets)), c_d=2, E_d=3, policy=PATTERN, unit=unit)
    watch, state = Watch(method, monkeypatch), method.init(fresh(), rng(SEED, "init"))
    initial = float64(params_of(fresh()))
    state, answers = warm_up(watch, state, (1, 3), 3, "mean", unit)
    sizes = {name: initial[name].size for name in INNER}
    found = [numpy_masks(state.mask_of(tier)) for tier in range(3)]
    for own, wanted in zip(found, sparse.warmed_up(answers, sizes, [Fraction(d) for d in targets]), strict=True):
        assert_drawn(own, wanted, unit)
    for large, small in pairwise(found):
        assert not any((small[name] & ~large[name]).any() for name in INNER), "not nested"
    server = float64(state.params)
    assert_equal(sparse.masked(initial, found[0]), server, "the initial weights on the largest mask")
    for t, clients in enumerate(SAMPLED):
        updates = [watch.client(method.broadcast(state, RoundContext(tier=TIERS[c])), c, t) for c in clients]
        state, before = method.aggregate(state, iter(updates), RoundContext()), server
        answers_ = [watch.seen[t, c].answer(c, t) for c in clients]
        server = sparse.hetero_round(server, [found[TIERS[c]] for c in clients], answers_)
        assert_equal(server, float64(state.params), f"round {t}")
    only_largest = found[0]["fc1.weight"] & ~found[1]["fc1.weight"]
    np.testing.assert_array_equal(server["fc1.weight"][only_largest], before["fc1.weight"][only_largest])
