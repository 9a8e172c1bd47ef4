"""The package's FedAvg, FedAdam, SWAT, ZeroFL and Top-k against the NumPy float64 derivation in ``reference.py``.

First the derivation by itself (its gradients by finite differences), then rounds of both side by side.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch

from fedsieve import methods
from fedsieve.engine import Run, Task
from fedsieve.server.aggregate import Adam, Average
from fedsieve.types import Device, Method, RoundContext, rng
from oracles import reference as ref
from oracles.side_by_side import (
    BATCH,
    EPOCHS,
    FLOAT32_ROUNDING,
    LR,
    ROUNDS,
    SAMPLED,
    SEED,
    SIZES,
    TOLERANCE,
    assert_equal,
    batches,
    chance,
    dataset,
    float64,
    fresh,
    random_state,
)

pytestmark = pytest.mark.usefixtures("one_thread")

# ---------------------------------------------------------------- the reference by itself


def loss_after(state: ref.State, probe: ref.State, swat: ref.Swat | None, x: ref.Array, y: np.ndarray) -> float:
    """Return the loss of a state and a probe."""
    return ref.cross_entropy(ref.Pass(state, swat, probe=probe).forward(x), y)[0]


def central_difference(
    name: str, at: int, state: ref.State, swat: ref.Swat | None, x: ref.Array, y: np.ndarray
) -> float:
    """Return the slope of the loss along one number of a state; for SWAT's weights, along the probe (``ref.Pass``)."""
    h, layer = 1e-6, name.removesuffix(".weight")
    side = []
    for sign in (h, -h):
        moved = np.zeros_like(state[name])
        moved.flat[at] = sign
        if layer in ref.LAYERS:
            side.append(loss_after(state, {layer: moved}, swat, x, y))
        else:
            side.append(loss_after(state | {name: state[name] + moved}, {}, swat, x, y))
    return (side[0] - side[1]) / (2 * h)


@pytest.mark.parametrize("side", [6, 7])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.8])
def test_reference_gradient_is_the_slope_of_the_loss(sparsity: float, side: int) -> None:
    """Dense: the true gradient. SWAT: that of the sparse forward pass, grad_w of a weight change seeing top(a, d)."""
    g = np.random.default_rng(side)
    state, x, y = random_state(1, side), g.normal(size=(5, 1, side, side)), g.integers(0, 3, 5)
    swat = ref.Swat(ref.density(sparsity), ref.LAYERS) if sparsity else None
    step = ref.Pass(state, swat)
    grads = step.backward(ref.cross_entropy(step.forward(x), y)[1])
    assert set(grads) == set(state) - set(ref.RUNNING)
    for name, grad in grads.items():
        where = g.choice(grad.size, min(grad.size, 12), replace=False)
        slope = [central_difference(name, at, state, swat, x, y) for at in where]
        np.testing.assert_allclose(grad.flat[where], slope, rtol=1e-5, atol=1e-8, err_msg=name)


def test_reference_gradient_reaches_weights_that_the_forward_pass_cut() -> None:
    g = np.random.default_rng(0)
    state, x, y = random_state(2), g.normal(size=(5, 1, 6, 6)), g.integers(0, 3, 5)
    step = ref.Pass(state, ref.Swat(ref.density(0.5), ref.LAYERS))
    grad = step.backward(ref.cross_entropy(step.forward(x), y)[1])["conv2.weight"]
    assert np.count_nonzero(step.used["conv2"]) == 108
    assert np.count_nonzero(grad[step.used["conv2"] == 0]) > 50


def test_reference_top_is_exact_and_prefers_the_earlier_of_equals() -> None:
    x = np.array([[1.0, -2.0, 2.0], [-2.0, 0.5, 3.0]])
    assert ref.top(x, Fraction(1, 2)).tolist() == [[False, True, True], [False, False, True]]
    assert ref.top(x, Fraction(1, 3)).tolist() == [[False, True, False], [False, False, True]]
    assert ref.top(x, Fraction(7, 20)).sum() == 3  # ceil(2.1)
    assert ref.density(0.9, 0.2) == Fraction(3, 10)
    assert ref.density(0.1, 0.2) == 1


def test_reference_threshold_serves_between_refreshes() -> None:
    select = ref.Selector(Fraction(1, 2), period=3)
    assert select(np.array([4.0, 3.0, 2.0, 1.0])).tolist() == [True, True, False, False]  # threshold 3
    assert select(np.array([4.0, 3.0, 3.5, -3.0])).tolist() == [True, True, True, True]
    assert select(np.array([1.0, 2.0])).tolist() == [False, False]
    assert select(np.array([1.0, 2.0])).tolist() == [False, True]  # refreshed


def test_reference_learning_rate_falls_by_a_constant_factor() -> None:
    rates = [ref.learning_rate(t, 2, 0.4, 0.1) for t in range(3)]
    assert rates == pytest.approx([0.4, 0.2, 0.1])


def test_reference_running_statistics() -> None:
    """Momentum .1; the running variance takes the unbiased one: [1, 3] has mean 2 and unbiased variance 2."""
    state = random_state(3) | {"bn.running_mean": np.zeros(6), "bn.running_var": np.ones(6)}
    step = ref.Pass(state)
    step.norm(np.tile(np.array([1.0, 3.0])[:, None, None, None], (1, 6, 1, 1)))
    np.testing.assert_allclose(step.running["bn.running_mean"], 0.2)
    np.testing.assert_allclose(step.running["bn.running_var"], 0.9 + 0.2)


# ---------------------------------------------------------------- both side by side


@dataclass(frozen=True)
class Case:
    """One method of the package and what it is to the reference."""

    name: str
    method: Method[Any]
    rule: dict[str, Any] = field(default_factory=dict)
    """Fields of ``ref.Federation``."""
    eta: float | None = None
    """FedAdam's, where the server is one."""
    weight_decay: float = 0.0
    lr_offset: int = 0


INNER = ("conv1", "conv2", "fc1")
PATTERN = ",".join(INNER)


def adam(eta: float) -> Adam:
    return Adam(eta, 0.9, 0.99, 1e-3)


def zerofl(
    upload: str, r_mask: float, period: int = 1, sp: float = 0.8, eta: float | None = None, wd: float = 0
) -> Case:
    name = f"zerofl-{upload}-{sp}-{r_mask}-{period}" + ("-adam" if eta else "") + ("-decay" if wd else "")
    step = adam(eta) if eta else Average()
    method = methods.ZeroFL(sp, r_mask, upload, policy=PATTERN, period=period, server=step)
    rule = {"upload": upload, "sparsity": sp, "r_mask": r_mask, "layers": INNER, "swat": True, "period": period}
    return Case(name, method, rule, eta, wd)


def swat(policy: str, layers: tuple[str, ...], sp: float, period: int = 1) -> Case:
    rule = {"sparsity": sp, "layers": layers, "swat": True, "period": period}
    return Case(f"swat-{policy}-{sp}-{period}", methods.Swat(sp, policy=policy, period=period), rule)


def topk(sp: float) -> Case:
    rule = {"upload": "global", "sparsity": sp, "layers": ref.LAYERS}
    return Case(f"topk-{sp}", methods.TopK(sp, policy="all"), rule, lr_offset=1)


def cases() -> Iterator[Case]:
    yield Case("fedavg", methods.FedAvg())
    yield Case("fedavg-decay", methods.FedAvg(), weight_decay=0.05)
    yield Case("fedadam", methods.FedAvg(server=adam(0.01)), eta=0.01)
    for period in (1, 3):
        yield swat("swat", ("conv2", "fc1", "fc2"), 0.8, period)
    yield swat("conv?,fc1", INNER, 0.7)  # 0.3 * 540 is 162, where binary rounding gives 163
    for upload in ("full", "top_weights", "diff_of_top", "top_diff"):
        for r_mask in (0.0, 0.2):
            for period in (1, 3):
                yield zerofl(upload, r_mask, period)
    for upload in ("top_weights", "top_diff"):
        yield zerofl(upload, 0.2, eta=0.02)
    yield zerofl("diff_of_top", 0.1, sp=0.9, wd=0.05)
    yield zerofl("top_diff", 0.9)  # q stops at 1
    for sp in (0.8, 0.9):
        yield topk(sp)


CASES = {case.name: case for case in cases()}


@cache
def reference_rounds(name: str) -> list[tuple[ref.State, ref.State, float]]:
    """Return the reference's server state, its deployed model and the narrowest decision so far, round by round."""
    case, done = CASES[name], []
    data = [(d.x.numpy().astype(np.float64), d.y.numpy()) for d in dataset()]
    server_adam = ref.Adam(case.eta) if case.eta else None
    federation = ref.Federation(float64(fresh().state_dict()), adam=server_adam, **case.rule)
    for t, clients in enumerate(SAMPLED):
        lr = ref.learning_rate(t + case.lr_offset, ROUNDS, *LR)
        orders = [batches(SIZES[c], chance(t, c)) for c in clients]
        federation.round(
            [ref.Answer(*data[c], order, lr, case.weight_decay) for c, order in zip(clients, orders, strict=True)]
        )
        done.append((federation.state, federation.deployed(), federation.margin))
    return done


def package_rounds(case: Case) -> Iterator[tuple[ref.State, ref.State]]:
    """Yield the package's server state and deployed model after every round; one resident model serves every client."""
    data, method = dataset(), case.method
    task, (lr, lr_end) = Task("digits_net", "digits", len(SIZES)), LR
    schedule = Run(method, task, ROUNDS, len(SAMPLED[0]), lr=lr, lr_end=lr_end, lr_offset=case.lr_offset)
    resident = method.prepare(fresh())
    state = method.init(fresh(), rng(SEED, "init"))
    for t, clients in enumerate(SAMPLED):
        down, updates = method.broadcast(state, RoundContext()), []
        for c in clients:
            device = Device(
                model=resident,
                data=data[c],
                validation=data[c].subset(torch.arange(0)),
                lr=schedule.lr_at(t + 1),
                epochs=EPOCHS,
                batch=BATCH,
                momentum=0.0,
                weight_decay=case.weight_decay,
                rng=chance(t, c),
            )
            updates.append(method.client(down, device))
        state = method.aggregate(state, iter(updates), RoundContext())
        yield float64(state.params), float64(method.deploy(state))


@pytest.mark.parametrize("name", CASES)
def test_package_equals_reference(name: str) -> None:
    """Every parameter and running statistic of the server, and the deployed model, after every round."""
    rounds = zip(reference_rounds(name), package_rounds(CASES[name]), strict=True)
    for t, ((state, shipped, margin), (params, deployed)) in enumerate(rounds):
        assert_equal(state, params, f"round {t}")
        assert_equal(shipped, deployed, f"round {t}, deployed")
        assert margin > FLOAT32_ROUNDING, "a top-k decision that rounding could turn: take another seed"


@pytest.mark.slow
def test_no_two_cases_are_the_same_to_the_reference() -> None:
    """What the cases vary must show, far above the tolerance; but ``full`` has no use for r_mask, and q = 1 is full."""
    final = {name: reference_rounds(name)[-1][0] for name in CASES}
    for name in ("zerofl-full-0.8-0.2-1", "zerofl-full-0.8-0.2-3", "zerofl-top_diff-0.8-0.9-1"):
        del final[name]
    for one, other in combinations(final, 2):
        difference = max(np.abs(final[one][name] - final[other][name]).max() for name in final[one])
        assert difference > 100 * TOLERANCE, (one, other)
