"""An independent derivation of METHODS.md sections 5 and 6, in NumPy float64, on the network of ``reference.py``.

Powerpropagation (Schwarz et al. 2021) and SparseFedPP; DNR (Kundu et al. 2021), NST, PDST and FLASH (Babakniya et al.
2022, Algorithm 1, eqs. 1 and 2). Nothing here knows the package. Chance (drawn masks, the positions regrown, the order
of the batches) is no part of the arithmetic: it is always given. What METHODS.md leaves open, the rounding of shares
to whole weights, is stated as what an exact division would give, to be bounded against.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TypeAlias

import numpy as np

from oracles import reference as ref
from oracles.reference import Array, State, Support

Masks: TypeAlias = Mapping[str, Support]
"""Where weights may differ from zero, by the name of the tensor."""
Counts: TypeAlias = dict[str, int]


# ---------------------------------------------------------------- powerpropagation (METHODS sec. 5)


def effective(theta: Array, alpha: float) -> Array:
    """Return ``w = sign(th) * |th|^a``."""
    return np.sign(theta) * np.abs(theta) ** alpha


def root(w: Array, alpha: float) -> Array:
    """Return the ``th = sign(w) |w|^(1/a)`` whose effective weight is ``w``."""
    return np.sign(w) * np.abs(w) ** (1 / alpha)


def slope(theta: Array, alpha: float) -> Array:
    """Return ``dw/dth = a |th|^(a-1)``: 0 at 0 for a > 1, and 1 everywhere for a = 1."""
    if alpha == 1:
        return np.ones_like(theta)
    return np.where(theta == 0, 0.0, alpha * np.abs(theta) ** (alpha - 1))


def activation_density(w: Array, x: Array) -> Fraction:
    """Return the share of non-zeros in the effective weight, never below one element of the layer's input."""
    return max(Fraction(np.count_nonzero(w), w.size), Fraction(1, x.size))


@dataclass
class PowerPass(ref.Pass):
    """One batch's way through a network whose state holds ``th`` in the policy's layers."""

    alpha: float = 1.25
    layers: Sequence[str] = ref.LAYERS
    activations: bool = True
    """Whether grad_w sees the reduced input (SWAT's activation rule) or all of it."""
    margin: float = math.inf
    """The narrowest top-k decision so far."""

    def layer(self, name: str, x: Array) -> Array:
        """Run on the effective weight and the dense input; keep ``top(a, density of w)`` for grad_w."""
        if name not in self.layers:
            return super().layer(name, x)
        w, kept = effective(self.state[f"{name}.weight"], self.alpha), x
        if self.activations:
            support = ref.top(x, activation_density(w, x))
            self.margin = min(self.margin, ref.gap(x, support))
            kept = x * support
        self.used[name], self.kept[name], self.shapes[name] = w, kept, x.shape
        y = ref.apply(name, x, w)
        return y + ref.apply(name, kept, self.probe[name]) if name in self.probe else y

    def layer_back(self, name: str, g: Array, grads: State) -> Array:
        """Return grad_in from the effective weight; add the gradient by ``th``, which is grad_w times the slope."""
        grad_in = super().layer_back(name, g, grads)
        if name in self.layers:
            grads[f"{name}.weight"] *= slope(self.state[f"{name}.weight"], self.alpha)
        return grad_in


@dataclass
class SparseFedPP:
    """A server of ``th`` and the rule its clients follow (METHODS sec. 5)."""

    state: State
    sparsity: float
    alpha: float = 1.25
    layers: Sequence[str] = ref.LAYERS
    activations: bool = True
    margin: float = math.inf

    def client(self, a: ref.Answer) -> State:
        """Return what a client sends: trained with no weight cut, then one magnitude cut on ``th`` over all layers."""
        state = self.state
        for index in a.batches:
            step = PowerPass(state, alpha=self.alpha, layers=self.layers, activations=self.activations)
            state = ref.descend(step, a.x[index], a.y[index], a.lr, a.weight_decay)
            self.margin = min(self.margin, step.margin)
        sent, margin = ref.global_top(state, ref.density(self.sparsity), self.layers)
        self.margin = min(self.margin, margin)
        return sent

    def round(self, answers: Sequence[ref.Answer]) -> None:
        """Run one round; the server takes the mean of ``th`` by n_k and cuts nothing."""
        self.state = ref.mean([self.client(a) for a in answers], [len(a.y) for a in answers])

    def deployed(self) -> State:
        """Return the plain model of the aggregate: its effective weights."""
        names = [f"{layer}.weight" for layer in self.layers]
        return self.state | {name: effective(self.state[name], self.alpha) for name in names}


# ---------------------------------------------------------------- masks (METHODS sec. 6)


def masked(state: State, masks: Masks) -> State:
    """Return the state with every weight off its mask at zero."""
    return state | {name: state[name] * mask for name, mask in masks.items()}


def mismatch(one: Masks, other: Masks) -> float:
    """Return ``1 - sum |A and B| / sum |A or B|``, the sums over layers first (FLASH eq. 1)."""
    both = sum(int((one[name] & other[name]).sum()) for name in one)
    either = sum(int((one[name] | other[name]).sum()) for name in one)
    return 1 - both / either


def densities(masks: Masks) -> dict[str, Fraction]:
    """Return the share of ones by layer, which is a client's answer in FLASH's stage 1."""
    return {name: Fraction(int(mask.sum()), mask.size) for name, mask in masks.items()}


def calibrated(
    mean: Mapping[str, Fraction], sizes: Mapping[str, int], d: Fraction, redistribute: bool = True
) -> dict[str, Fraction]:
    """Return ``d_l = dh_l * r_f`` with ``r_f = d * sum(k_l) / sum(dh_l * k_l)``, clipped at 1 (FLASH eq. 2).

    The excess of the clipped layers goes to the others by the same formula, applied to what is left of the total and
    to the layers not yet full, until none is over 1. Without ``redistribute`` it is lost, as with the authors.
    """
    full: set[str] = set()
    while True:
        rest = [name for name in mean if name not in full]
        left = d * sum(sizes.values()) - sum(sizes[name] for name in full)
        r_f = left / sum(mean[name] * sizes[name] for name in rest) if rest else Fraction(0)
        over = {name for name in rest if mean[name] * r_f > 1}
        if not over or not redistribute:
            return {name: Fraction(1) if name in full else min(Fraction(1), mean[name] * r_f) for name in mean}
        full |= over


def warmed_up(
    answers: Sequence[Mapping[str, Fraction]],
    sizes: Mapping[str, int],
    targets: Sequence[Fraction],
    redistribute: bool = True,
) -> list[dict[str, Fraction]]:
    """Return the layer densities after FLASH's stage 1: the unweighted mean of the clients', re-calibrated.

    Hetero-FLASH has falling targets: each smaller one re-calibrates the next larger one's densities (Sec. 4).
    """
    layers, found = {name: sum((a[name] for a in answers), Fraction(0)) / len(answers) for name in sizes}, []
    for d in targets:
        layers = calibrated(layers, sizes, d, redistribute)
        found.append(layers)
    return found


# ---------------------------------------------------------------- units of output channels


def units(masks: Masks, unit: int) -> dict[str, Support]:
    """Return which positions [groups, elements of a channel] each ``unit`` channels keep, all of them or none."""
    each = {name: mask.reshape(len(mask), -1) for name, mask in masks.items()}
    assert all((m[i] == m[i - i % unit]).all() for m in each.values() for i in range(len(m))), "a unit in parts"
    return {name: m[::unit] for name, m in each.items()}


def unit_norms(w: Array, unit: int) -> Array:
    """Return the norm of every unit's weights, of a smaller group the root mean square times sqrt(unit)."""
    groups = [w.reshape(len(w), -1)[i : i + unit] for i in range(0, len(w), unit)]
    return np.stack([np.sqrt(unit * (group**2).mean(0)) for group in groups])


# ---------------------------------------------------------------- DNR's prune and regrow


def prune_counts(masks: Masks, p: Fraction) -> Counts:
    """Return how many weights each layer loses: ``ceil(p * nnz)``, but never its last one."""
    nnz = {name: int(mask.sum()) for name, mask in masks.items()}
    return {name: max(0, min(math.ceil(p * n), n - 1)) for name, n in nnz.items()}


def pruned(weights: State, masks: Masks, p: Fraction, unit: int = 1) -> tuple[dict[str, Support], float]:
    """Return the masks without each layer's smallest ``|w|``, of equals the earlier kept, and the narrowest decision.

    Equals are regrown weights that no gradient has reached: exactly 0 in every precision. Units go by their norms.
    """
    if unit > 1:
        small, margin = pruned({n: unit_norms(weights[n], unit) for n in masks}, units(masks, unit), p)
        whole = {n: np.repeat(own, unit, 0)[: len(masks[n])] for n, own in small.items()}
        return {n: own.reshape(masks[n].shape) for n, own in whole.items()}, margin
    left, margin = {}, math.inf
    for name, n in prune_counts(masks, p).items():
        on, keep = np.flatnonzero(masks[name]), np.zeros(masks[name].size, dtype=bool)
        magnitude = np.abs(weights[name]).ravel()[on]
        kept = ref.top(magnitude, Fraction(len(on) - n, len(on)))
        keep[on[kept]] = True
        left[name] = keep.reshape(masks[name].shape)
        if n:
            last = magnitude[kept].min()
            margin = min(margin, float(last - magnitude[~kept].max()) or ref.nearest(magnitude, last))
    return left, margin


def shares(weights: State, left: Masks, by: str = "mean") -> dict[str, float]:
    """Return each layer's share of the regrowth: mean (or sum) ``|w|`` of its remaining non-zeros, normalised."""
    weight = {}
    for name, mask in left.items():
        magnitude = np.abs(weights[name][mask])
        magnitude = magnitude[magnitude > 0]
        weight[name] = float(magnitude.sum() / (max(1, len(magnitude)) if by == "mean" else 1))
    total = sum(weight.values())
    return {name: value / total for name, value in weight.items()}


def regrowth(total: int, share: Mapping[str, float], room: Mapping[str, int]) -> dict[str, float]:
    """Return how the total divides exactly: by share, a full layer's surplus going to the others by theirs."""
    full: set[str] = set()
    while True:
        rest = [name for name in share if name not in full]
        left, weight = total - sum(room[name] for name in full), sum(share[name] for name in rest)
        exact = {name: float(room[name]) if name in full else left * share[name] / weight for name in share}
        over = {name for name in rest if exact[name] > room[name]}
        if not over:
            return exact
        full |= over


# ---------------------------------------------------------------- training on a mask

Regrow: TypeAlias = Callable[[State, dict[str, Support], Counts], dict[str, Support]]
"""The chance of a mask update: from the weights, the masks left by pruning and the counts pruned, to the new masks."""


def update_steps(epochs: int, per_epoch: int) -> list[int]:
    """Return after how many local steps the mask is updated: at every epoch's end; in the middle of an only one.

    Not after the last step, where p is 0.
    """
    if epochs == 1:
        return [max(1, per_epoch // 2)][: per_epoch - 1]
    return [per_epoch * epoch for epoch in range(1, epochs)]


def prune_rate(p0: float, step: int, steps: int) -> Fraction:
    """Return ``p = p0 * (1 - step / steps)``, which is 0 after the last step."""
    return Fraction(str(p0)) * (1 - Fraction(step, steps))


@dataclass
class Learner:
    """One client's training on a mask, which is frozen (PDST) or learned by DNR (NST, FLASH's stage 1)."""

    state: State
    masks: dict[str, Support]
    p0: float = 0.25
    epochs: int = 1
    regrow: Regrow | None = None
    """Absent: the mask is frozen."""
    unit: int = 1
    margin: float = math.inf
    pruned: list[Counts] = field(default_factory=list)
    """How many weights each update took from each layer."""

    def train(self, a: ref.Answer) -> State:
        """Run SGD from the masked state; weights off the mask are zero after every step."""
        self.state, steps = masked(self.state, self.masks), len(a.batches)
        updates = update_steps(self.epochs, steps // self.epochs) if self.regrow else []
        for done, index in enumerate(a.batches, 1):
            step = ref.Pass(self.state)
            self.state = masked(ref.descend(step, a.x[index], a.y[index], a.lr, a.weight_decay), self.masks)
            if done in updates:
                self.update(prune_rate(self.p0, done, steps))
        return self.state

    def update(self, p: Fraction) -> None:
        """Prune, regrow the same total; what is regrown starts at 0."""
        assert self.regrow is not None
        self.pruned.append(counts := prune_counts(units(self.masks, self.unit), p))
        left, margin = pruned(self.state, self.masks, p, self.unit)
        self.margin = min(self.margin, margin)
        self.masks = self.regrow(self.state, left, counts)
        assert all(not (left[name] & ~self.masks[name]).any() for name in left)
        self.state = masked(self.state, left)


@dataclass
class NST:
    """Clients that learn a mask of their own and keep it from round to round; FedAvg, zeros counting.

    The first state is masked by one random mask, from which every client starts (METHODS sec. 6).
    """

    state: State
    masks: dict[int, dict[str, Support]]
    """Every client's, from its first round on."""
    p0: float = 0.25
    epochs: int = 1
    unit: int = 1
    margin: float = math.inf

    def round(self, answers: Mapping[int, ref.Answer], chance: Mapping[int, Regrow]) -> None:
        """Run one round over the sampled clients."""
        learners = {c: Learner(self.state, self.masks[c], self.p0, self.epochs, chance[c], self.unit) for c in answers}
        sent = [learners[c].train(a) for c, a in answers.items()]
        self.masks |= {c: learner.masks for c, learner in learners.items()}
        self.margin = min(self.margin, *(learner.margin for learner in learners.values()))
        self.state = ref.mean(sent, [len(a.y) for a in answers.values()])


def pdst_round(state: State, masks: dict[str, Support], answers: Sequence[ref.Answer], equal: bool = False) -> State:
    """Return the server's state after one round of PDST, and of FLASH's stage 2: frozen mask, mean by n_k.

    ``equal``: the plain mean, as in FLASH's own runs.
    """
    sent = [Learner(state, masks).train(a) for a in answers]
    return ref.mean(sent, [1 if equal else len(a.y) for a in answers])


def supported_mean(before: State, sent: Sequence[State], masks: Sequence[Masks]) -> State:
    """Return WFA: each element's plain mean over the clients that hold it; the old value where none does."""
    after = {}
    for name, old in before.items():
        held = [np.ones(old.shape, dtype=bool) if name not in m else m[name] for m in masks]
        total = np.sum([state[name] * on for state, on in zip(sent, held, strict=True)], axis=0)
        n = np.sum(held, axis=0)
        after[name] = np.where(n == 0, old, total / np.maximum(n, 1))
    return after


def hetero_round(state: State, masks: Sequence[dict[str, Support]], answers: Sequence[ref.Answer]) -> State:
    """Return the server's state after one round of hetero-FLASH: every client on its own mask, then WFA."""
    sent = [Learner(state, m).train(a) for m, a in zip(masks, answers, strict=True)]
    return supported_mean(state, sent, masks)
