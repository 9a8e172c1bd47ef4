"""FedDST: one sparse model whose mask clients move by prune and grow, and the server by what they send.

Bibikar et al. 2022, "Federated Dynamic Sparse Training: Computing Less, Communicating Less, Yet Learning Better". The
first mask is the fresh model's largest weights, layer by layer, or a random one. Clients train on the mask they get;
those of the rounds s = t - 1 = 1, 1 + interval, ... < end prune it, after an epoch, from the density d to (1 - z) d,
z = alpha / 2 (1 + cos(pi s / end)), and grow it back by the gradients of one batch. The server takes, of every weight,
the mean over those who hold it, by n_k, and keeps of each layer the largest of all that anybody holds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fedsieve.client.gradients import gradient
from fedsieve.client.training import epoch_ends, load_, params_of, train_on_masks
from fedsieve.server.aggregate import LearnedMaskState, tensors
from fedsieve.sparse.masks import (
    InitialMask,
    apply_mask,
    initial_mask,
    layer_counts,
    masked_bytes,
    misplaced,
    supports,
    to_sparse,
    wrong_units,
)
from fedsieve.sparse.policy import density_within, erdos_renyi_sparsity, select_weights, uniform_densities
from fedsieve.sparse.regrowth import GrowthPool, prune_grow
from fedsieve.sparse.units import check_channels, check_unit, unit_count
from fedsieve.types import LATER, Device, InputError, Mask, Method, Params, RoundContext, Tree, Update
from fedsieve.types.contract import Expected, expect_weights
from fedsieve.types.errors import check_interval


@dataclass(frozen=True)
class FedDST(Method[LearnedMaskState]):
    """Train on a mask that clients move now and then, where weights are small and gradients large."""

    density: float = 0.2
    of: Literal["policy", "all"] = "policy"
    """What the density is a share of: the weights of the policy's layers, or all parameters, the dense ones too."""
    alpha: float = 0.5
    """The share of a mask that moves at first; it falls along a cosine."""
    interval: int = 10
    """The rounds from one move of masks to the next."""
    end: float = 0.5
    """Up to what share of the run's rounds masks move."""
    adjust_epoch: int = 0
    """The local epoch after which they do; 0: the last (what grows then is sent as 0)."""
    first_mask: InitialMask = "magnitude"
    """Of each layer the fresh model's largest weights, or random ones."""
    budget: Literal["erk", "uniform"] = "erk"
    """How the density is shared among the layers: by FedDST's Erdos-Renyi-kernel, or the same for each."""
    growth: GrowthPool = "inactive"
    """Where masks grow: where they are not, or anywhere (the authors' code), at weights that they have, too."""
    squared: bool = False
    """Whether z is multiplied by alpha once more (the authors' code)."""
    policy: str = "all"
    unit: int = field(default=1, metadata=LATER)
    """How many successive output channels share the mask's pattern (``sparse.units``)."""

    def __post_init__(self) -> None:
        check_unit(self.unit)
        for name, value in (("density", self.density), ("end", self.end)):
            check_interval(name, value, "(0, 1]")
        check_interval("alpha", self.alpha, "[0, 1)")
        if self.interval < 1 or self.adjust_epoch < 0:
            raise InputError(f"interval must be 1 or more, adjust_epoch 0, got {self.interval}, {self.adjust_epoch}")

    @property
    def target_density(self) -> float:
        """The share of the weights that the mask keeps."""
        return self.density

    def check_run(self, run: Any) -> None:
        """Raise InputError if clients have too few epochs to move their masks after."""
        if self.adjust_epoch > run.epochs:
            raise InputError(
                f"method.adjust_epoch is {self.adjust_epoch} but clients train {run.epochs} epochs: lower it"
            )

    def rate(self, t: int, rounds: int) -> float:
        """Return the share of a mask that moves in round t; 0 where none does."""
        s, end = t - 1, self.end * rounds
        if (s - 1) % self.interval or not s < end:
            return 0.0
        z = self.alpha / 2 * (1 + math.cos(math.pi * s / end))
        return self.alpha * z if self.squared else z

    def counts(self, model: nn.Module, pruned: float = 0.0) -> Tensor:
        """Return int64 [layers], how many units layers keep, of masks of which the share ``pruned`` is gone."""
        names = select_weights(self.policy, model)
        like = {name: model.get_parameter(name) for name in names}
        d = (density_within(model, names, self.density) if self.of == "all" else self.density) * (1 - pruned)
        layers = erdos_renyi_sparsity(like, names, d) if self.budget == "erk" else uniform_densities(names, d)
        return layer_counts(layers, like, self.unit)

    def init(self, model: nn.Module, rng: torch.Generator) -> LearnedMaskState:
        """Choose the first mask, and keep the fresh model's weights on it."""
        params, names, counts = params_of(model), select_weights(self.policy, model), self.counts(model)
        check_channels(model, names, self.unit)
        mask = initial_mask(self.first_mask, params, names, counts, rng, self.unit)
        return LearnedMaskState(apply_mask(params, mask), sparse=names, mask=mask, counts=counts, unit=self.unit)

    def broadcast(self, state: LearnedMaskState, context: RoundContext) -> Tree:
        """Send the weights on the mask, and their positions: a client may not have been asked since it moved."""
        return to_sparse(state.params, state.mask)

    def client(self, down: Tree, device: Device) -> Update:
        """Train on the mask, move it if the round is one of those, and send the weights on it."""
        mask = supports(down, select_weights(self.policy, device.model))
        load_(device.model, tensors(down))
        epoch, steps = epoch_ends(device)
        moves = {epoch * self.adjust_epoch or steps: partial(self._moved, device)}
        metrics, mask = train_on_masks(device, mask, moves if self.rate(device.round, device.rounds) else {})
        return Update(to_sparse(params_of(device.model), mask), len(device.data), metrics)

    def _moved(self, device: Device, weights: Params, mask: Mask) -> tuple[Params, Mask]:
        """Return what is left of the weights on a mask that moves by the gradients of one batch, and that mask."""
        g = gradient(device, torch.randperm(len(device.data), generator=device.rng)[: device.batch])
        numbers = self.counts(device.model, self.rate(device.round, device.rounds))
        return prune_grow(weights, mask, g, numbers, self.counts(device.model), self.growth, self.unit)

    def expected(self, state: LearnedMaskState, context: RoundContext) -> Expected:
        """Expect as many weights of each layer as it may have; on the server's mask, in rounds that do not move it."""
        most = {name: k * self.unit for name, k in zip(state.mask, state.counts.tolist(), strict=True)}
        moves, units = self.rate(context.round, context.rounds), int(state.counts.sum())
        on_units = partial(wrong_units, self.unit, state.sparse, units) if self.unit > 1 else None
        return Expected(expect_weights(state.params, most), rule=on_units if moves else partial(misplaced, state.mask))

    def aggregate(self, state: LearnedMaskState, updates: Iterable[Update], context: RoundContext) -> LearnedMaskState:
        """Average every weight over those who hold it, and keep of each layer the largest that anybody holds."""
        return state.step(updates)

    def paper_bytes(self, model: nn.Module) -> float:
        """Return four bytes for each value on the mask and outside the policy's layers; a mask costs a bit for each."""
        names, counts = select_weights(self.policy, model), self.counts(model).tolist()
        like = [model.get_parameter(name) for name in names]
        kept = sum(k * v.numel() / unit_count(v.shape, self.unit) for k, v in zip(counts, like, strict=True))
        return masked_bytes(model, names, kept / sum(v.numel() for v in like))
