"""Masks: drawn from a seed, learnt by prune and regrow, trained on, and left out of the messages.

Babakniya et al. 2022 (FLASH), Sec. 2 (DNR), eq. 1 (mismatch), eq. 2 (re-calibration). A mask that is random, given
its seed and how many weights each layer keeps, need not travel: both sides draw it, and only values are sent.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from fedsieve.local import Training, mean_loss
from fedsieve.server import Step, Weighting, mean
from fedsieve.sparsity import count, scaled, top_within
from fedsieve.types import Device, InputError, Mask, Params, Tree, Update

Share: TypeAlias = Literal["mean", "sum"]
"""What a layer's share of the regrown weights is proportional to: the mean |w| of its non-zeros, or their sum."""
Excess: TypeAlias = Literal["redistribute", "clip"]
"""What becomes of a layer's density beyond 1: the other layers get it, or nobody."""


@dataclass(frozen=True)
class OnMask:
    """Server state of a model that lives on drawn masks, one a device class, the first holding all others."""

    params: Params
    seed: Tensor
    """int64 []: what the masks are drawn from."""
    counts: Tensor
    """int64 [tiers, layers]: how many weights each layer keeps."""
    stage: Tensor
    """int64 []: 1 before FLASH's sensitivities are known, 2 from then on."""
    moments: dict[str, Params] = field(default_factory=dict)
    sparse: tuple[str, ...] = ()

    @property
    def mask(self) -> Mask:
        """The mask of the server's model."""
        return self.of(0)

    def of(self, tier: int) -> Mask:
        """Return the mask of a device class."""
        return drawn(int(self.seed), self.counts[tier], {name: self.params[name] for name in self.sparse})

    def order(self, tier: int) -> Tree:
        """Return what a client draws its mask from: some hundred bytes, whatever the model's size."""
        return {"seed": self.seed, "counts": self.counts[tier]}


def drawn(seed: int, counts: Tensor, like: Mapping[str, Tensor]) -> Mask:
    """Return random masks, shaped like the tensors ``like``, of exactly ``counts`` [layers] weights; read only.

    Position i of a layer has as its score the i-th 64-bit output of Philox-4x64-10 under the key
    ``sha256("fedsieve/mask/SEED/NAME")[:16]`` (little-endian); the lowest scores are kept, ties to the lowest position.
    So every machine draws the same, and a smaller count gives a subset.
    """
    return _drawn(seed, tuple(counts.tolist()), tuple((name, tuple(v.shape)) for name, v in like.items()))


@lru_cache(maxsize=6)
def _drawn(seed: int, counts: tuple[int, ...], shapes: tuple[tuple[str, tuple[int, ...]], ...]) -> Mask:
    if len(counts) != len(shapes) or any(
        not 0 <= k <= math.prod(shape) for k, (_, shape) in zip(counts, shapes, strict=False)
    ):
        raise InputError(f"{len(counts)} counts {counts} do not fit the {len(shapes)} layers of the mask")
    return {name: _lowest(seed, name, k, shape) for k, (name, shape) in zip(counts, shapes, strict=True)}


def _lowest(seed: int, name: str, k: int, shape: tuple[int, ...]) -> Tensor:
    key = int.from_bytes(hashlib.sha256(f"fedsieve/mask/{seed}/{name}".encode()).digest()[:16], "little")
    scores = np.random.Philox(key=key).random_raw(math.prod(shape))
    if k == 0:
        return torch.zeros(shape, dtype=torch.bool)
    last = np.partition(scores, k - 1)[k - 1]
    kept = scores < last
    kept[np.flatnonzero(scores == last)[: k - int(kept.sum())]] = True
    return torch.from_numpy(kept).view(shape)


def counts_of(densities: Mapping[str, float], like: Mapping[str, Tensor]) -> Tensor:
    """Return int64 [layers], the ceil(d * numel) weights that each layer keeps: never none."""
    return torch.tensor([max(1, count(d, like[name].numel())) for name, d in densities.items()])


def calibrated(sensed: Mapping[str, float], sizes: Mapping[str, int], d: float, excess: Excess) -> dict[str, float]:
    """Return sensed layer densities scaled to the total density ``d`` (eq. 2), none above 1."""
    if excess == "redistribute":
        return scaled(sensed, sizes, d)
    r_f = d * sum(sizes.values()) / sum(sensed[name] * size for name, size in sizes.items())
    return {name: min(1.0, r_f * value) for name, value in sensed.items()}


def mismatch(a: Mask, b: Mask) -> float:
    """Return the Jaccard distance of two masks, summed over layers first (eq. 1)."""
    both = sum(int((a[name] & b[name]).sum()) for name in a)
    either = sum(int((a[name] | b[name]).sum()) for name in a)
    return 1 - both / either if either else 0.0


def prune_regrow(weights: Params, mask: Mask, p: float, share: Share, rng: torch.Generator) -> tuple[Params, Mask]:
    """Return weights and mask after one step of DNR (Sec. 2): the number of weights stays exactly what it was.

    Every layer loses its ``ceil(p * nnz)`` smallest (but never its last), the same total grows again where layers have
    large weights, at random positions, starting at 0.
    """
    kept, removed = dict[str, Tensor](), 0
    for name, own in mask.items():
        nnz = int(own.sum())
        gone = max(min(count(p, nnz), nnz - 1), 0)
        kept[name], removed = top_within(weights[name], own, nnz - gone), removed + gone
    left = {name: weights[name] * kept[name] for name in mask}
    room = {name: int((~own).sum()) for name, own in kept.items()}
    shares = {name: _share(left[name], share) for name in mask}
    if not all(math.isfinite(value) for value in shares.values()):
        return weights, mask  # training has diverged: the weights will say so where they arrive
    grown = apportioned(removed, shares, room)
    return left, {name: kept[name] | _random(~kept[name], grown[name], rng) for name in mask}


def apportioned(total: int, shares: Mapping[str, float], room: Mapping[str, int]) -> dict[str, int]:
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


def _share(w: Tensor, share: Share) -> float:
    magnitudes = w[w != 0].abs().double()
    return float(magnitudes.sum()) / (max(len(magnitudes), 1) if share == "mean" else 1)


def _random(free: Tensor, n: int, rng: torch.Generator) -> Tensor:
    positions = free.reshape(-1).nonzero().squeeze(1)
    chosen = positions[torch.randperm(len(positions), generator=rng)[:n]]
    return torch.zeros(free.numel(), dtype=torch.bool).index_fill_(0, chosen, True).view(free.shape)


def learn(
    device: Device, mask: Mask, rates: Mapping[int, float] | None = None, share: Share = "mean"
) -> tuple[dict[str, float], Mask]:
    """Train ``device.model`` on a mask; after step s, prune and regrow at the rate ``rates[s]``.

    Without rates the mask is frozen. Returns the metrics and the mask at the end.
    """
    _declare_(device.model, mask)
    training, losses = Training(device, mask), list[Tensor]()
    for step, loss in enumerate(training, start=1):
        losses.append(loss)
        if rates and rates.get(step):
            training.steps.write_()
            mask = _moved(device, mask, rates[step], share)
            training.steps.put_(mask)
    return mean_loss(losses), mask


def _moved(device: Device, mask: Mask, p: float, share: Share) -> Mask:
    """Return the mask after a step of DNR on the model's weights, which are left on both masks."""
    weights = {name: device.model.get_parameter(name) for name in mask}
    now = {name: w.detach().cpu() for name, w in weights.items()}
    left, after = prune_regrow(now, mask, p, share, device.rng)
    with torch.no_grad():
        for name, w in weights.items():
            w.copy_(left[name])
    _declare_(device.model, after)
    return after


def epoch_ends(device: Device) -> tuple[int, int]:
    """Return the steps of one local epoch, and of the whole local training."""
    steps = -(-len(device.data) // device.batch)
    return steps, steps * device.epochs


def _declare_(model: nn.Module, mask: Mask) -> None:
    """Tell ``local.Work`` what share of its products each layer on a mask needs."""
    for name, own in mask.items():
        d = int(own.sum()) / max(own.numel(), 1)
        layer: Any = model.get_submodule(name.rpartition(".")[0])
        layer.densities = (d, d, d)


def values(params: Params, mask: Mask) -> Params:
    """Return the parameters with every tensor on a mask reduced to its values there, [nnz], by position."""
    return {name: v[mask[name]] if name in mask else v for name, v in params.items()}


def spread(tree: object, mask: Mask) -> Params:
    """Return the parameters whose ``values`` a tree holds. Raises InputError if they do not fit the mask."""
    if not isinstance(tree, Mapping):
        raise InputError("the message holds no parameters")
    params = dict[str, Tensor]()
    for name, v in tree.items():
        own = mask.get(name)
        if not isinstance(v, Tensor) or (own is not None and v.shape != (int(own.sum()),)):
            raise InputError(f"the message does not fit the mask at {name}")
        params[name] = v if own is None else torch.zeros(own.shape, dtype=v.dtype).masked_scatter_(own, v)
    return params


def projected(params: Params, mask: Mask) -> Params:
    """Return the parameters, zero off the mask."""
    return {name: v * mask[name] if name in mask else v for name, v in params.items()}


def stepped(state: OnMask, updates: Iterable[Update], server: Step, weighting: Weighting) -> OnMask:
    """Return the state after the server's step towards the mean of the clients' values, on the mask."""
    target = spread(mean(updates, weighting), state.mask)
    params, moments = server.step(state.params, target, state.moments)
    return replace(state, params=projected(params, state.mask), moments=moments)


def received(order: object, model: nn.Module, names: tuple[str, ...]) -> Mask:
    """Return the mask that the server's ``OnMask.order`` asks a client to draw. Raises InputError."""
    seed, counts = (order.get("seed"), order.get("counts")) if isinstance(order, Mapping) else (None, None)
    if not isinstance(seed, Tensor) or not isinstance(counts, Tensor) or seed.numel() != 1 or counts.dim() != 1:
        raise InputError("the message holds no order for a mask")
    return drawn(int(seed), counts, {name: model.get_parameter(name) for name in names})


def values_bytes(model: nn.Module, names: tuple[str, ...], d: float) -> float:
    """Return four bytes for each parameter, of which the named tensors keep the share ``d`` (FLASH, Table 3)."""
    return 4.0 * sum(v.numel() * (d if name in names else 1.0) for name, v in model.named_parameters())


def packed(mask: Mask) -> dict[str, Tensor]:
    """Return every mask as its bits, uint8 [ceil(numel / 8)], the lowest position in the highest bit."""
    return {name: torch.from_numpy(np.packbits(own.reshape(-1).numpy())) for name, own in mask.items()}


def unpacked(bits: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> Mask:
    """Return the masks that ``packed`` packed, shaped like the tensors ``like``."""
    found = {name: np.unpackbits(bits[name].numpy(), count=v.numel()).astype(bool) for name, v in like.items()}
    return {name: torch.from_numpy(own).view(like[name].shape) for name, own in found.items()}
