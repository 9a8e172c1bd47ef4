"""The package's powerpropagation and SparseFedPP against the NumPy float64 derivation in ``reference_sparse.py``."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fedsieve.client.models import truncated_normal_
from fedsieve.client.training import params_of
from fedsieve.methods import SparseFedPP
from fedsieve.sparse.layers import powerprop_
from fedsieve.types import RoundContext, Sparse, rng
from oracles import reference as ref
from oracles import reference_sparse as sparse
from oracles.side_by_side import (
    FLOAT32_ROUNDING,
    SAMPLED,
    assert_equal,
    batch,
    float64,
    fresh,
    theta_state,
)
from oracles.watch import (
    NAMES,
    Watch,
)

pytestmark = pytest.mark.usefixtures("one_thread")


DRAW = 1
"""The seed of SparseFedPP's weights: one with which no top-k decision is narrow."""


@pytest.mark.parametrize("alpha", [1.0, 1.25, 2.0])
@pytest.mark.parametrize(("zeros", "emptied"), [(0.0, None), (0.3, None), (0.9, None), (0.3, "fc1"), (0.3, "fc2")])
def test_powerprop_gradient_equals_reference(alpha: float, zeros: float, emptied: str | None) -> None:
    """Every gradient of one batch, and exactly as many activations kept as the effective weight's density asks for."""
    state, (x, y) = theta_state(11, zeros), batch(11)
    if emptied:
        state[f"{emptied}.weight"] *= 0
    model = fresh()
    model.load_state_dict({name: torch.tensor(v, dtype=torch.float32) for name, v in state.items()}, strict=False)
    model = powerprop_(model, NAMES, alpha, True).train()
    loss_ = F.cross_entropy(model(torch.tensor(x, dtype=torch.float32)), torch.tensor(y))
    loss_.backward()
    step = sparse.PowerPass(state, alpha=alpha)
    value, g = ref.cross_entropy(step.forward(x), y)
    wanted = step.backward(g)
    assert loss_.item() == pytest.approx(value, abs=1e-6)
    found = {name: p.grad for name, p in model.named_parameters()}
    assert_equal(wanted, {name: v.numpy().astype(np.float64) for name, v in found.items() if v is not None}, "gradient")
    for layer in ref.LAYERS:
        kept = step.kept[layer]
        density: Any = model.get_submodule(layer).densities
        assert round(density[2] * kept.size) == (np.count_nonzero(kept) if zeros else kept.size)
        if alpha > 1:
            assert (wanted[f"{layer}.weight"][state[f"{layer}.weight"] == 0] == 0).all()
    assert step.margin > FLOAT32_ROUNDING


def test_the_truncated_normal_initialisation() -> None:
    """Std sqrt(1 / fan_in) after the cut at 2 std of sqrt(1 / fan_in) / 0.8796 (METHODS sec. 5); the rest stays."""
    plain, model = float64(params_of(fresh())), fresh()
    truncated_normal_(model, rng(1, "initialisation"))
    drawn = float64(params_of(model))
    for name in NAMES:
        w, std = drawn[name], math.sqrt(1 / drawn[name][0].size)
        assert np.abs(w).max() <= 2 * std / 0.8796 * (1 + 1e-6)
        assert np.sqrt((w**2).mean()) == pytest.approx(std, rel=4 / math.sqrt(2 * w.size))
    assert all(np.array_equal(drawn[name], plain[name]) for name in plain.keys() - set(NAMES))


def test_sparsefedpp_keeps_the_weights_that_a_model_starts_from() -> None:
    """``th`` is the root of the given weights, so that what is deployed before round 1 is the given model."""
    state = SparseFedPP(0.8).init(fresh(), rng(1, "init"))
    theta, given = float64(state.params), float64(params_of(fresh()))
    for name in NAMES:
        np.testing.assert_allclose(theta[name], sparse.root(given[name], 1.25), rtol=1e-6)
    assert_equal(sparse.SparseFedPP(theta, 0.8).deployed(), float64(SparseFedPP(0.8).deploy(state)), "round 0")
    assert_equal(given, float64(SparseFedPP(0.8).deploy(state)), "the given weights")


@pytest.mark.parametrize(
    ("sp", "alpha", "activations", "decay", "epochs"),
    [(0.8, 1.25, True, 0.0, 2), (0.9, 2.0, True, 0.05, 1), (0.7, 1.0, True, 0.0, 2), (0.8, 1.25, False, 0.0, 2)],
)
def test_sparsefedpp_equals_reference(
    sp: float, alpha: float, activations: bool, decay: float, epochs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three rounds: ``th`` and everything else on the server, the deployed weights, and exact numbers sent."""
    method = SparseFedPP(sp, a=alpha, activations="pruned" if activations else "all")
    watch, state = Watch(method, monkeypatch, decay, epochs), method.init(fresh(), rng(DRAW, "init"))
    server = sparse.SparseFedPP(float64(state.params), sp, alpha, activations=activations)
    total = sum(state.params[name].numel() for name in NAMES)
    for t, clients in enumerate(SAMPLED):
        updates = [watch.client(method.broadcast(state, RoundContext()), c, t) for c in clients]
        for u in updates:
            sent = [u.tree[name] for name in NAMES]
            assert sum(len(v.values) for v in sent if isinstance(v, Sparse)) == math.ceil(ref.density(sp) * total)
        state = method.aggregate(state, iter(updates), RoundContext())
        server.round([watch.seen[t, c].answer(c, t, decay) for c in clients])
        assert_equal(server.state, float64(state.params), f"round {t}")
        assert_equal(server.deployed(), float64(method.deploy(state)), f"round {t}, deployed")
        assert server.margin > FLOAT32_ROUNDING, "a top-k decision that rounding could turn: take another seed"
