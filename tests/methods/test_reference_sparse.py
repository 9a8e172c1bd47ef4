"""The derivation in ``reference_sparse.py`` by itself: gradients by finite differences, numbers by hand."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from oracles import reference as ref
from oracles import reference_sparse as sparse
from oracles.side_by_side import batch, random_state, theta_state

pytestmark = pytest.mark.usefixtures("one_thread")


# ---------------------------------------------------------------- the reference by itself: powerpropagation


def loss(state: ref.State, alpha: float, x: ref.Array, y: np.ndarray, probe: ref.State | None = None) -> float:
    return ref.cross_entropy(sparse.PowerPass(state, probe=probe or {}, alpha=alpha).forward(x), y)[0]


def spike(like: ref.Array, at: int, value: float) -> ref.Array:
    moved = np.zeros_like(like)
    moved.flat[at] = value
    return moved


@pytest.mark.parametrize("alpha", [1.0, 1.25, 2.0])
def test_reference_gradient_by_theta_is_the_slope_of_the_loss(alpha: float) -> None:
    """No weight is zero, so no activation is dropped and the gradient is the true one."""
    g, state, (x, y), h = np.random.default_rng(4), theta_state(4), batch(4), 1e-6
    step = sparse.PowerPass(state, alpha=alpha)
    grads = step.backward(ref.cross_entropy(step.forward(x), y)[1])
    for name, grad in grads.items():
        where = g.choice(grad.size, min(grad.size, 10), replace=False)
        ends = [[loss(state | {name: state[name] + spike(grad, at, e)}, alpha, x, y) for e in (h, -h)] for at in where]
        slope = [(up - down) / (2 * h) for up, down in ends]
        np.testing.assert_allclose(grad.flat[where], slope, rtol=2e-5, atol=1e-8, err_msg=name)


@pytest.mark.parametrize("alpha", [1.0, 1.25])
def test_reference_weight_gradient_is_that_of_the_reduced_input(alpha: float) -> None:
    """With zeros in ``th``: the slope along a weight change that sees only the kept input, times dw/dth."""
    g, state, (x, y), h = np.random.default_rng(5), theta_state(5, zeros=0.7), batch(5), 1e-6
    step = sparse.PowerPass(state, alpha=alpha)
    grads = step.backward(ref.cross_entropy(step.forward(x), y)[1])
    for layer in ref.LAYERS:
        theta, grad = state[f"{layer}.weight"], grads[f"{layer}.weight"]
        kept = np.count_nonzero(step.kept[layer])
        assert kept <= -(-np.count_nonzero(theta) * step.kept[layer].size // theta.size)
        for at in g.choice(grad.size, 10, replace=False):
            up, down = (loss(state, alpha, x, y, {layer: spike(grad, at, e)}) for e in (h, -h))
            wanted = (up - down) / (2 * h) * sparse.slope(theta, alpha).flat[at]
            assert grad.flat[at] == pytest.approx(wanted, rel=2e-5, abs=1e-8), layer


def test_reference_zeros_stay_zero_only_above_alpha_one() -> None:
    state, (x, y) = theta_state(6, zeros=0.5), batch(6)
    for alpha, stay in ((1.0, False), (1.25, True), (2.0, True)):
        after = ref.descend(sparse.PowerPass(state, alpha=alpha), x, y, 0.1, 0.01)
        zero = state["fc1.weight"] == 0
        assert zero.sum() > 200
        assert (after["fc1.weight"][zero] == 0).all() == stay
        assert np.abs(after["fc1.weight"] - state["fc1.weight"]).max() > 1e-3


def test_reference_power_by_hand() -> None:
    theta = np.array([-4.0, 0.0, 9.0])
    np.testing.assert_allclose(sparse.effective(theta, 1.5), [-8, 0, 27])
    np.testing.assert_allclose(sparse.slope(theta, 1.5), [3, 0, 4.5])
    np.testing.assert_array_equal(sparse.slope(theta, 1.0), [1, 1, 1])
    np.testing.assert_allclose(sparse.root(np.array([-8.0, 0.0, 27.0]), 1.5), theta)


def test_reference_activations_never_vanish() -> None:
    """A layer that a global cut emptied keeps one element of its input."""
    state, (x, y) = theta_state(7) | {"fc1.weight": np.zeros((10, 54))}, batch(7)
    step = sparse.PowerPass(state)
    step.backward(ref.cross_entropy(step.forward(x), y)[1])
    assert np.count_nonzero(step.kept["fc1"]) == 1
    assert sparse.activation_density(np.zeros(8), np.zeros((5, 4))) == Fraction(1, 20)


def test_reference_sparsefedpp_sends_exactly_the_density() -> None:
    server = sparse.SparseFedPP(theta_state(8), 0.9)
    x, y = batch(8, 8)
    sent = server.client(ref.Answer(x, y, [np.arange(4), np.arange(4, 8)], 0.1))
    assert sum(np.count_nonzero(sent[f"{layer}.weight"]) for layer in ref.LAYERS) == 83  # ceil(.1 * 822)
    assert np.count_nonzero(sent["conv1.bias"]) == 4


# ---------------------------------------------------------------- the reference by itself: masks


def mask(*rows: str) -> sparse.Support:
    return np.array([[c == "1" for c in row] for row in rows])


def test_reference_mismatch_sums_over_layers_first() -> None:
    one = {"a": mask("1100"), "b": mask("10000000")}
    other = {"a": mask("0110"), "b": mask("10000000")}
    assert sparse.mismatch(one, other) == pytest.approx(1 - 2 / 4)  # by layer it would be 1 - (1/3 + 1) / 2
    assert sparse.mismatch(one, one) == 0


def shares_of(**values: str) -> dict[str, Fraction]:
    return {name: Fraction(value) for name, value in values.items()}


def test_reference_calibration_by_hand() -> None:
    sizes, r_f = {"a": 10, "b": 100, "c": 1000}, Fraction("55.5") / 124
    plain = sparse.calibrated(shares_of(a=".4", b=".2", c=".1"), sizes, Fraction(".05"))
    assert plain == {"a": Fraction(".4") * r_f, "b": Fraction(".2") * r_f, "c": Fraction(".1") * r_f}
    mean = shares_of(a=".9", b=".5", c=".05")
    clipped = sparse.calibrated(mean, sizes, Fraction(".2"), redistribute=False)
    assert clipped == {"a": 1, "b": 1, "c": Fraction(".05") * 222 / 109}
    assert sparse.calibrated(mean, sizes, Fraction(".2")) == {"a": 1, "b": 1, "c": Fraction(".112")}


def test_reference_calibration_hands_the_excess_on_until_nothing_overflows() -> None:
    """By eq. 2 alone b would get .43 * 188.7 / 104.3 < 1; what a cannot hold makes it overflow in turn."""
    mean, sizes = shares_of(a=".8", b=".43", c=".02"), {"a": 100, "b": 10, "c": 1000}
    once = sparse.calibrated(mean, sizes, Fraction(".17"), redistribute=False)
    assert once["a"] == 1
    assert once["b"] < 1
    chain = sparse.calibrated(mean, sizes, Fraction(".17"))
    assert chain == {"a": 1, "b": 1, "c": Fraction("78.7") / 1000}


def test_reference_warm_up_mean_is_unweighted() -> None:
    answers = [shares_of(a=".2", b=".1"), shares_of(a=".4", b=".3")]
    large, small = sparse.warmed_up(answers, {"a": 10, "b": 30}, [Fraction(".1"), Fraction(".05")])
    assert large == {"a": Fraction(".3") * 4 / 9, "b": Fraction(".2") * 4 / 9}
    assert small == {name: value / 2 for name, value in large.items()}


def test_reference_prune_by_hand() -> None:
    masks = {"a": mask("1111100000"), "b": mask("1000"), "c": mask("1100")}
    weights = {
        "a": np.array([[0.5, -0.1, 0.3, -0.9, 0.2, 0, 0, 0, 0, 0]]),
        "b": np.array([[0.01, 0, 0, 0]]),
        "c": np.array([[0.8, -0.4, 0, 0]]),
    }
    p = Fraction(1, 4)
    assert sparse.prune_counts(masks, p) == {"a": 2, "b": 0, "c": 1}  # ceil(1.25), the last one stays, ceil(.5)
    left, margin = sparse.pruned(weights, masks, p)
    np.testing.assert_array_equal(left["a"], mask("1011000000"))
    np.testing.assert_array_equal(left["c"], mask("1000"))
    assert margin == pytest.approx(0.1)
    by_mean = sparse.shares(weights, left)
    assert by_mean == pytest.approx(
        {"a": 1.7 / 3 / (1.7 / 3 + 0.81), "b": 0.01 / (1.7 / 3 + 0.81), "c": 0.8 / (1.7 / 3 + 0.81)}
    )
    assert sparse.shares(weights, left, "sum") == pytest.approx({"a": 1.7 / 2.51, "b": 0.01 / 2.51, "c": 0.8 / 2.51})
    assert sparse.prune_counts(masks, Fraction(0)) == {"a": 0, "b": 0, "c": 0}


def test_reference_shares_ignore_weights_that_are_still_zero() -> None:
    left = {"a": mask("1110"), "b": mask("1100")}
    weights = {"a": np.array([[0.4, 0.0, 0.2, 0.0]]), "b": np.array([[0.1, -0.1, 0.0, 0.0]])}
    assert sparse.shares(weights, left) == pytest.approx({"a": 0.75, "b": 0.25})


def test_reference_regrowth_passes_the_surplus_on() -> None:
    share, room = {"a": 0.6, "b": 0.3, "c": 0.1}, {"a": 3, "b": 4, "c": 50}
    assert sparse.regrowth(4, share, room) == pytest.approx({"a": 2.4, "b": 1.2, "c": 0.4})
    assert sparse.regrowth(6, share, room) == pytest.approx({"a": 3, "b": 2.25, "c": 0.75})
    assert sparse.regrowth(12, share, room) == pytest.approx({"a": 3, "b": 4, "c": 5})
    assert sparse.regrowth(57, share, room) == pytest.approx(room)


def test_reference_mask_updates_fall_in_the_middle_of_an_only_epoch() -> None:
    assert sparse.update_steps(1, 5) == [2]
    assert sparse.update_steps(1, 2) == [1]
    assert sparse.update_steps(1, 1) == []
    assert sparse.update_steps(3, 4) == [4, 8]
    assert sparse.prune_rate(0.25, 2, 5) == Fraction(3, 20)
    assert sparse.prune_rate(0.25, 12, 12) == 0


def test_reference_mean_over_supports_by_hand() -> None:
    before = {"w": np.array([[7.0, 8.0, 9.0, 1.0]]), "b": np.array([0.0])}
    sent = [
        {"w": np.array([[1.0, 2.0, 0.0, 0.0]]), "b": np.array([1.0])},
        {"w": np.array([[3.0, 0, 0, 0]]), "b": np.array([2.0])},
    ]
    masks = [{"w": mask("1101")}, {"w": mask("1000")}]
    after = sparse.supported_mean(before, sent, masks)
    np.testing.assert_allclose(after["w"], [[2, 2, 9, 0]])
    np.testing.assert_allclose(after["b"], [1.5])


def some_masks(seed: int, d: float = 0.4) -> dict[str, sparse.Support]:
    g, state = np.random.default_rng(seed), random_state(seed)
    names = [f"{layer}.weight" for layer in ref.LAYERS]
    return {name: ref.top(g.random(state[name].shape), Fraction(str(d))) for name in names}


def last_zeros(weights: ref.State, left: dict[str, sparse.Support], counts: sparse.Counts) -> dict[str, sparse.Support]:
    """Regrow in each layer as many as it lost, at the last zeros."""
    grown = {}
    for name, kept in left.items():
        flat = kept.ravel().copy()
        flat[np.flatnonzero(~flat)[kept.size - kept.sum() - counts[name] :]] = True
        grown[name] = flat.reshape(kept.shape)
    return grown


def test_reference_learner_keeps_the_density_and_trains_what_it_regrew() -> None:
    masks, (x, y) = some_masks(9), batch(9, 8)
    answer = ref.Answer(x, y, [np.arange(i, i + 2) for i in range(0, 8, 2)], 0.1)
    frozen, learned = sparse.Learner(random_state(9), masks), sparse.Learner(random_state(9), masks, regrow=last_zeros)
    frozen.train(answer)
    learned.train(answer)
    assert frozen.masks is masks
    for name, m in masks.items():
        assert not frozen.state[name][~m].any()
        assert learned.masks[name].sum() == m.sum()
        assert learned.pruned[0][name] == -(-m.sum() // 8)  # p = .25 * (1 - 2 / 4)
        assert not learned.state[name][~learned.masks[name]].any()
    new = learned.masks["fc1.weight"] & ~masks["fc1.weight"]
    assert 0 < np.abs(learned.state["fc1.weight"][new]).max() < 0.1


def test_reference_hetero_round_keeps_what_nobody_holds() -> None:
    state, (x, y) = random_state(10), batch(10, 8)
    state = sparse.masked(state, some_masks(10, 0.6))
    small = {name: ref.top(state[name], Fraction(1, 5)) for name in some_masks(10)}
    answers = [ref.Answer(x[:4], y[:4], [np.arange(4)], 0.1), ref.Answer(x[4:], y[4:], [np.arange(4)], 0.1)]
    after = sparse.hetero_round(state, [small, small], answers)
    for name, m in small.items():
        np.testing.assert_array_equal(after[name][~m], state[name][~m])
        assert np.abs(after[name] - state[name])[m].max() > 1e-4
