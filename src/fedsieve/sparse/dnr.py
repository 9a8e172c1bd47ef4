"""DNR: prune and regrow, and layer densities re-calibrated to a total (Babakniya et al. 2022, Sec. 2, eq. 2)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from fedsieve.sparse.policy import scale_densities
from fedsieve.sparse.topk import top_within, topk_count
from fedsieve.types import Mask, Params

GrowthShare: TypeAlias = Literal["mean", "sum"]


"""What a layer's share of the regrown weights is proportional to: the mean |w| of its non-zeros, or their sum."""


ExcessRule: TypeAlias = Literal["redistribute", "clip"]


"""What becomes of a layer's density beyond 1: the other layers get it, or nobody."""


def recalibrate(
    sensed: Mapping[str, float], sizes: Mapping[str, int], d: float, excess: ExcessRule
) -> dict[str, float]:
    """Return sensed layer densities scaled to the total density ``d`` (eq. 2), none above 1."""
    if excess == "redistribute":
        return scale_densities(sensed, sizes, d)
    r_f = d * sum(sizes.values()) / sum(sensed[name] * size for name, size in sizes.items())
    return {name: min(1.0, r_f * value) for name, value in sensed.items()}


def prune_regrow(
    weights: Params, mask: Mask, p: float, share: GrowthShare, rng: torch.Generator
) -> tuple[Params, Mask]:
    """Return weights and mask after one step of DNR (Sec. 2): the number of weights stays exactly what it was.

    Every layer loses its ``ceil(p * nnz)`` smallest (but never its last), the same total grows again where layers have
    large weights, at random positions, starting at 0.
    """
    kept, removed = dict[str, Tensor](), 0
    for name, own in mask.items():
        nnz = int(own.sum())
        gone = max(min(topk_count(p, nnz), nnz - 1), 0)
        kept[name], removed = top_within(weights[name], own, nnz - gone), removed + gone
    left = {name: weights[name] * kept[name] for name in mask}
    room = {name: int((~own).sum()) for name, own in kept.items()}
    shares = {name: _share(left[name], share) for name in mask}
    if not all(math.isfinite(value) for value in shares.values()):
        return weights, mask  # training has diverged: the weights will say so where they arrive
    grown = apportion(removed, shares, room)
    return left, {name: kept[name] | _random(~kept[name], grown[name], rng) for name in mask}


def apportion(total: int, shares: Mapping[str, float], room: Mapping[str, int]) -> dict[str, int]:
    """Return ``total`` cut into whole parts proportional to ``shares``, none above its ``room``.

    Largest remainders get the last units (ties to the first); a full part passes its surplus on.
    """
    parts = dict.fromkeys(shares, 0)
    while total > 0 and (free := {name: shares[name] for name in shares if parts[name] < room[name]}):
        if not sum(free.values()):
            free = dict.fromkeys(free, 1.0)
        exact = {name: total * value / sum(free.values()) for name, value in free.items()}
        given = {name: math.floor(value) for name, value in exact.items()}
        for name in sorted(exact, key=lambda n: given[n] - exact[n])[: total - sum(given.values())]:
            given[name] += 1
        for name, units in given.items():
            units = min(units, room[name] - parts[name])
            parts[name], total = parts[name] + units, total - units
    return parts


def _share(w: Tensor, share: GrowthShare) -> float:
    magnitudes = w[w != 0].abs().double()
    return float(magnitudes.sum()) / (max(len(magnitudes), 1) if share == "mean" else 1)


def _random(free: Tensor, n: int, rng: torch.Generator) -> Tensor:
    positions = free.reshape(-1).nonzero().squeeze(1)
    chosen = positions[torch.randperm(len(positions), generator=rng)[:n]]
    return torch.zeros(free.numel(), dtype=torch.bool).index_fill_(0, chosen, True).view(free.shape)
