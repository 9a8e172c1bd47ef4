"""Masks that are learnt: prune and regrow, by chance (DNR) or by gradients (FedDST).

Kundu et al. 2021 (DNR), in Babakniya et al. 2022 (FLASH), Sec. 2; Bibikar et al. 2022 (FedDST). Weights go and come in
units of output channels (``sparse.units``), by their norms.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from fedsieve.sparse import selection
from fedsieve.sparse.masks import topk_count
from fedsieve.sparse.units import spread, unit_keys, units_of
from fedsieve.types import Mask, Params, true_positions

GrowthShare: TypeAlias = Literal["mean", "sum"]
"""What a layer's share of the regrown weights is proportional to: the mean |w| of its non-zeros, or their sum."""
GrowthPool: TypeAlias = Literal["inactive", "all"]
"""Where a mask may grow: where it is not, or anywhere, at weights that it has as well."""


def prune_regrow(
    weights: Params, mask: Mask, p: float, share: GrowthShare, rng: torch.Generator, unit: int = 1
) -> tuple[Params, Mask]:
    """Return weights and mask after one step of DNR (Sec. 2): the number of units stays exactly what it was.

    Every layer loses its ``ceil(p * nnz)`` smallest (but never its last), the same total grows again where layers have
    large weights, at random positions, starting at 0.
    """
    support, total = dict[str, Tensor](), 0
    for name, own in mask.items():
        units = units_of(own, unit)
        nnz = int(units.count_nonzero())
        n = max(min(topk_count(p, nnz), nnz - 1), 0)
        keys = unit_keys(weights[name], unit).masked_fill(~units, -1)
        support[name], total = selection.largest(keys, nnz - n), total + n
    left = {name: weights[name] * spread(own, mask[name].shape, unit) for name, own in support.items()}
    room = {name: int((~own).count_nonzero()) for name, own in support.items()}
    shares = {name: _share(left[name], share) for name in mask}
    if not all(math.isfinite(value) for value in shares.values()):
        return weights, mask  # training has diverged: the weights will say so where they arrive
    growth = apportion(total, shares, room)
    grown = {name: own | _random(~own, growth[name], rng) for name, own in support.items()}
    return left, {name: spread(own, mask[name].shape, unit) for name, own in grown.items()}


def prune_grow(
    weights: Params,
    mask: Mask,
    gradients: Params,
    kept: Tensor,
    counts: Tensor,
    growth: GrowthPool = "inactive",
    unit: int = 1,
) -> tuple[Params, Mask]:
    """Return weights and mask after every layer kept its largest |w|, and grew where the gradient is largest, at 0.

    A layer keeps ``kept`` weights of its mask, and grows to ``counts`` (int64 [layers] both) by the largest |g| among
    all others, what it has just lost too; ties go to the lowest position. Where ``growth`` is "all", those that it
    keeps are ranked with them, and those of them that are taken start at 0 again: the layer then has fewer.
    """
    left, after = dict[str, Tensor](), dict[str, Tensor]()
    for (name, own), k, most in zip(mask.items(), kept.tolist(), counts.tolist(), strict=True):
        units = units_of(own, unit)
        support = selection.largest(
            unit_keys(weights[name], unit).masked_fill(~units, -1), min(k, int(units.count_nonzero()))
        )
        keys = unit_keys(gradients[name], unit)
        if growth == "inactive":
            keys = keys.masked_fill(support, -1)
        grown = selection.largest(keys, max(most - int(support.count_nonzero()), 0))
        left[name] = weights[name] * spread(support & ~grown, own.shape, unit)
        after[name] = spread(support | grown, own.shape, unit)
    return left, after


def apportion(total: int, shares: Mapping[str, float], room: Mapping[str, int]) -> dict[str, int]:
    """Return ``total`` cut into whole parts proportional to ``shares``, none above its ``room``.

    Largest remainders get the last units (ties to the first); a full part passes its surplus on.
    """
    parts = dict.fromkeys(shares, 0)
    while total > 0 and (free := {name: shares[name] for name in shares if parts[name] < room[name]}):
        if not sum(free.values()):
            free = dict.fromkeys(free, 1.0)
        exact = {name: total * value / sum(free.values()) for name, value in free.items()}
        whole = {name: math.floor(value) for name, value in exact.items()}
        for name in sorted(exact, key=lambda n: whole[n] - exact[n])[: total - sum(whole.values())]:
            whole[name] += 1
        for name, units in whole.items():
            units = min(units, room[name] - parts[name])
            parts[name], total = parts[name] + units, total - units
    return parts


def _share(w: Tensor, share: GrowthShare) -> float:
    magnitudes = w[w != 0].abs().double()
    return float(magnitudes.sum()) / (max(len(magnitudes), 1) if share == "mean" else 1)


def _random(free: Tensor, n: int, rng: torch.Generator) -> Tensor:
    positions = true_positions(free)
    sample = positions[torch.randperm(len(positions), generator=rng)[:n]]
    return torch.zeros_like(free).index_fill_(0, sample, True)
