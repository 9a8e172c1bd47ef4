"""FedDST in NumPy float64, on the network of ``reference.py``; nothing here knows the package.

Bibikar et al. 2022, "Federated Dynamic Sparse Training", and what their public code does where the paper is silent:
layers' sparsities, and the order of the steps. Chance (batches) is given; ``margin`` is the narrowest decision.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from oracles import reference as ref
from oracles.reference import Array, State, Support

WEIGHTS = tuple(f"{layer}.weight" for layer in ref.LAYERS)


def erk_counts(shapes: Mapping[str, tuple[int, ...]], d: float) -> dict[str, int]:
    """Return ceil((1 - s_l) n_l), s_l = C (1 - sum(shape) / prod(shape)), C so that sum s_l n_l = (1 - d) sum n_l."""
    raw = {name: 1 - sum(shape) / math.prod(shape) for name, shape in shapes.items()}
    c = (1 - d) * sum(map(math.prod, shapes.values())) / sum(raw[n] * math.prod(shape) for n, shape in shapes.items())
    assert all(c * r <= 1 for r in raw.values()), "a layer would be empty"
    return {n: math.ceil(round((1 - c * raw[n]) * math.prod(shape), 6)) for n, shape in shapes.items()}


def ranked(values: Array, among: Sequence[int], k: int) -> tuple[list[int], float]:
    """Return the k flat positions of the largest magnitudes, the earlier of equals, and how much the last is ahead."""
    order = sorted(among, key=lambda i: (-abs(float(values.flat[i])), i))
    inside, outside = order[:k], order[k:]
    gap = abs(values.flat[inside[-1]]) - abs(values.flat[outside[0]]) if inside and outside else math.inf
    return inside, float(gap) if gap else math.inf  # of equals, it is the position that decides


def prune_and_grow(
    w: Array, mask: Support, g: Array, rest: int, count: int, anywhere: bool = False
) -> tuple[Array, Support, float]:
    """Return one layer's weights and mask afterwards, and the narrower of both decisions."""
    stay, gap = ranked(w, np.flatnonzero(mask).tolist(), rest)
    free = [i for i in range(w.size) if anywhere or i not in set(stay)]
    grown, other = ranked(g, free, count - len(stay))
    after, left = np.zeros(w.size, dtype=bool), np.zeros(w.size)
    left[stay] = w.reshape(-1)[stay]
    left[grown] = 0
    after[stay], after[grown] = True, True
    return left.reshape(w.shape), after.reshape(w.shape), min(gap, other)


@dataclass
class Dynamic:
    """A server's weights and mask, and what its clients do in rounds that move masks by the share ``z``."""

    state: State
    masks: dict[str, Support]
    density: float
    anywhere: bool = False
    margin: float = math.inf
    shapes: dict[str, tuple[int, ...]] = field(init=False)

    def __post_init__(self) -> None:
        self.shapes = {name: self.state[name].shape for name in WEIGHTS}

    def masked(self, state: State, masks: Mapping[str, Support]) -> State:
        return state | {name: state[name] * mask for name, mask in masks.items()}

    def client(self, a: ref.Answer, z: float, after: int, probe: Array) -> tuple[State, dict[str, Support]]:
        """Return a client's weights and masks, which move after so many steps, by the gradient of ``probe``."""
        state, masks = self.state, self.masks
        for step, index in enumerate(a.batches, start=1):
            state = self.masked(ref.descend(ref.Pass(state), a.x[index], a.y[index], a.lr, a.weight_decay), masks)
            if step == after:
                state, masks = self.moved(state, masks, z, a.x[probe], a.y[probe])
        return state, masks

    def moved(
        self, state: State, masks: dict[str, Support], z: float, x: Array, y: Array
    ) -> tuple[State, dict[str, Support]]:
        step = ref.Pass(state)
        grads = step.backward(ref.cross_entropy(step.forward(x), y)[1])
        full, rest = erk_counts(self.shapes, self.density), erk_counts(self.shapes, self.density * (1 - z))
        state, new = dict(state), {}
        for n in WEIGHTS:
            state[n], new[n], gap = prune_and_grow(state[n], masks[n], grads[n], rest[n], full[n], self.anywhere)
            self.margin = min(self.margin, gap)
        return state, new

    def round(self, answers: Sequence[ref.Answer], z: float, afters: Sequence[int], probes: Sequence[Array]) -> None:
        """Run a round: n_k-means over holders, then the largest of the union."""
        got = [self.client(a, z, after, probe) for a, after, probe in zip(answers, afters, probes, strict=True)]
        n = [len(a.y) for a in answers]
        state = ref.mean([one for one, _ in got], n)
        for name in WEIGHTS:
            holders = sum(k * masks[name].astype(float) for k, (_, masks) in zip(n, got, strict=True))
            total = sum(k * one[name] for k, (one, _) in zip(n, got, strict=True))
            mean = np.divide(total, holders, out=np.zeros_like(total), where=holders > 0)
            best, gap = ranked(mean, np.flatnonzero(holders).tolist(), erk_counts(self.shapes, self.density)[name])
            self.masks[name] = np.isin(np.arange(mean.size), best).reshape(mean.shape)
            self.margin = min(self.margin, gap)
            state[name] = mean * self.masks[name]
        self.state = state
