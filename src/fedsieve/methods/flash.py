"""FLASH: sense how much each layer needs, then train on one frozen mask; hetero-FLASH: nested masks.

Babakniya et al. 2022, "Federated Sparse Training: Lottery Aware Model Compression for Resource Constrained Edge",
Algorithm 1. Stage 1 (round 0): c_d clients learn a mask by DNR for E_d epochs from a common random one and answer with
its layer densities; the server averages them, re-calibrates them to the target (eq. 2), draws a fresh mask, and starts
from the initial weights on it. Stage 2 (rounds 1 to T): training on that mask; only values travel.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from fedsieve.client.training import epoch_ends, load_, params_of, train_on_mask
from fedsieve.server.aggregate import Average, MaskedState, ServerOptimizer, Weighting, mean, mean_over_holders
from fedsieve.sparse.masks import (
    ExcessRule,
    MaskDraw,
    apply_mask,
    draw_counts,
    gather_values,
    largest_on,
    masked_bytes,
    masks_from_spec,
    pack_bits,
    recalibrate,
    scatter_values,
    unpack_subset,
)
from fedsieve.sparse.policy import select_weights, uniform_densities
from fedsieve.sparse.regrowth import GrowthShare
from fedsieve.sparse.units import check_channels, check_unit, unit_count, units_of
from fedsieve.types import LATER, Device, InputError, Mask, Method, Params, RoundContext, Tree, Update
from fedsieve.types.contract import Expected, Number, Whole, expect_weights
from fedsieve.types.errors import check_interval


class _TwoStages(Method[MaskedState]):
    """What FLASH and hetero-FLASH share: the warm-up, and the messages of both stages."""

    c_d: int
    E_d: int
    p: float
    share: GrowthShare
    excess: ExcessRule
    draw: MaskDraw
    unit: int
    server: ServerOptimizer = Average()

    def __post_init__(self) -> None:
        if self.c_d < 1 or self.E_d < 2:
            raise InputError(
                f"the warm-up needs a c_d of 1 and an E_d of 2 at least (masks move between epochs), got {self.c_d} "
                f"and {self.E_d}"
            )
        check_interval("p", self.p, "[0, 1)")
        check_unit(self.unit)

    @property
    @abstractmethod
    def densities(self) -> tuple[float, ...]:
        """The densities of the device classes' masks, falling."""

    @property
    def target_density(self) -> float:
        """The share of the weights that the largest mask keeps."""
        return max(self.densities)

    @property
    def warm_up(self) -> int:
        """The clients of round 0."""
        return self.c_d

    def init(self, model: nn.Module, rng: torch.Generator) -> MaskedState:
        """Start stage 1: a common random mask of uniform density; the weights stay whole, to be masked anew (L1-2)."""
        params, names = params_of(model), select_weights(self.policy, model)
        check_channels(model, names, self.unit)
        seed, several = torch.randint(2**62, (), generator=rng), (uniform_densities(names, d) for d in self.densities)
        counts = torch.stack([draw_counts(self.draw, int(seed), layers, params, self.unit) for layers in several])
        drawn = {"seed": seed, "counts": counts, "stage": torch.tensor(1)}
        return MaskedState(params, self.server.init(params), names, **drawn, unit=self.unit)

    def broadcast(self, state: MaskedState, context: RoundContext) -> Tree:
        """Send the stage, the values on a device class's mask, and what the mask is drawn from."""
        tier = context.tier if self.tiers else 0
        return {"stage": float(state.stage), "tier": float(tier), **state.message(tier)}

    def client(self, down: Tree, device: Device) -> Update:
        """Answer with sensitivities (L4-8) or, trained on the frozen mask (L13-16), with values."""
        mask = masks_from_spec(down["mask"], device.model, select_weights(self.policy, device.model), self.unit)
        mask = unpack_subset(down["subset"], mask, self.unit) if "subset" in down else mask
        load_(device.model, scatter_values(down["params"], mask))
        if down["stage"] == 1:
            return _sensed(replace(device, epochs=self.E_d), mask, self.p, self.share, self.unit)
        metrics, _ = train_on_mask(device, mask)
        return Update(gather_values(params_of(device.model), mask), len(device.data), metrics)

    def stage2(self, state: MaskedState, updates: Iterable[Update]) -> MaskedState:
        """Return the state before round 1: a fresh mask of the sensed densities (eq. 2), smaller ones inside it."""
        sensed = mean(updates, "equal")["sensed"].tolist()
        sizes = {name: state.params[name].numel() for name in state.sparse}
        layers, counts, seed = dict(zip(sizes, sensed, strict=True)), list[Tensor](), state.seed + 1
        for i, d in enumerate(self.densities):
            larger, layers = layers, recalibrate(layers, sizes, d, self.excess)
            if i:  # nested, also where clipping left the larger mask short of its density
                layers = {name: min(v, larger[name]) for name, v in layers.items()}
            counts.append(draw_counts(self.draw, int(seed), layers, state.params, self.unit))
        masked = replace(state, seed=seed, counts=torch.stack(counts), stage=torch.tensor(2))
        return replace(masked, params=apply_mask(state.params, masked.mask))


@dataclass(frozen=True)
class FLASH(_TwoStages):
    """Sense layer sensitivities on a few clients, then train on one frozen mask; only values travel."""

    density: float = 0.1
    c_d: int = 10
    """Clients of the warm-up."""
    E_d: int = 10
    """Their local epochs."""
    p: float = 0.25
    """DNR's first prune rate; it falls linearly to 0."""
    share: GrowthShare = "mean"
    """Where DNR grows weights: by the mean |w| of a layer's non-zeros (the authors' code), or their sum (the text)."""
    excess: ExcessRule = "redistribute"
    """A layer's density beyond 1 goes to the other layers, or is clipped off (the authors' code)."""
    weighting: Weighting = "samples"
    """How clients count in the mean: by their examples, or equally (the authors' code)."""
    policy: str = "flash"
    server: ServerOptimizer = Average()
    draw: MaskDraw = field(default="exact", metadata=LATER)
    """How many weights a layer of a mask keeps: its share, or as a coin for every weight says (the authors' code)."""
    unit: int = field(default=1, metadata=LATER)
    """How many successive output channels share the mask's pattern (``sparse.units``)."""

    def __post_init__(self) -> None:
        check_interval("density", self.density, "(0, 1]")
        super().__post_init__()

    @property
    def densities(self) -> tuple[float]:
        """The one mask's density."""
        return (self.density,)

    def expected(self, state: MaskedState, context: RoundContext) -> Expected:
        """Expect sensitivities, or the values on the mask."""
        if state.stage == 1:
            return _sensing(state)
        return Expected(expect_weights(state.values(0)))

    def aggregate(self, state: MaskedState, updates: Iterable[Update], context: RoundContext) -> MaskedState:
        """Draw the mask from the mean sensitivities (L9-10), or step towards the mean of the values (L17)."""
        if state.stage == 1:
            return self.stage2(state, updates)
        return state.step(updates, self.server, self.weighting)

    def paper_bytes(self, model: nn.Module) -> float:
        """Return four bytes for each value on the mask and outside the policy's layers (Table 3)."""
        return masked_bytes(model, select_weights(self.policy, model), self.density)


@dataclass(frozen=True)
class HeteroFLASH(_TwoStages):
    """FLASH for unequal devices: a mask for each device class, each inside the next larger one."""

    densities: tuple[float, ...] = (0.2, 0.15, 0.1)
    """One for each of ``task.tiers``, falling."""
    c_d: int = 10
    """Clients of the warm-up, which learn at the largest density: all are of the first tier."""
    E_d: int = 10
    p: float = 0.25
    share: GrowthShare = "mean"
    excess: ExcessRule = "redistribute"
    policy: str = "flash"
    draw: MaskDraw = field(default="exact", metadata=LATER)
    """How many weights a layer of a mask keeps: its share, or as a coin for every weight says (the authors' code)."""
    subset: Literal["random", "magnitude"] = field(default="random", metadata=LATER)
    """Which weights of the largest mask a smaller one keeps: random ones, for good, or in every round anew those of the
    server's largest magnitudes (the authors' code)."""
    unit: int = field(default=1, metadata=LATER)
    """How many successive output channels share the masks' pattern (``sparse.units``)."""

    def __post_init__(self) -> None:
        for d in self.densities:
            check_interval("densities", d, "(0, 1]")
        if not self.densities or any(a <= b for a, b in zip(self.densities, self.densities[1:], strict=False)):
            raise InputError(f"densities must fall from tier to tier, got {self.densities}")
        super().__post_init__()

    @property
    def name(self) -> str:
        """What tables and figures call the method."""
        return "hetero_flash"

    @property
    def tiers(self) -> int:
        """How many device classes the method serves."""
        return len(self.densities)

    def broadcast(self, state: MaskedState, context: RoundContext) -> Tree:
        """Send as FLASH does; of a mask chosen by magnitude also which units of the largest it keeps, a bit each."""
        if not self._chosen(state, context.tier):
            return super().broadcast(state, context)
        mask, message = self.mask_of(state, context.tier), super().broadcast(state, replace(context, tier=0))
        units = {n: (units_of(own, self.unit), units_of(state.mask[n], self.unit)) for n, own in mask.items()}
        subset = pack_bits({name: own[larger] for name, (own, larger) in units.items()})
        tier, values = float(context.tier), gather_values(state.params, mask)
        return {**message, "tier": tier, "subset": subset, "params": values}

    def client(self, down: Tree, device: Device) -> Update:
        """Answer with sensitivities or, trained on the mask of its class, with the class and values."""
        update = super().client(down, device)
        return update if down["stage"] == 1 else replace(update, tree={"tier": down["tier"], **update.tree})

    def expected(self, state: MaskedState, context: RoundContext) -> Expected:
        """Expect sensitivities, or the number of a device class and the values on its mask."""
        if state.stage == 1:
            return _sensing(state)
        values = gather_values(state.params, self.mask_of(state, context.tier))
        return Expected({"tier": Number(float(context.tier)), **expect_weights(values)})

    def aggregate(self, state: MaskedState, updates: Iterable[Update], context: RoundContext) -> MaskedState:
        """Draw the nested masks from the mean sensitivities, or take the mean where an element is held (WFA)."""
        if state.stage == 1:
            return self.stage2(state, updates)
        masks = [self.mask_of(state, tier) for tier in range(self.tiers)]
        return replace(state, params=mean_over_holders((_held(masks, u) for u in updates), state.params))

    def mask_of(self, state: MaskedState, tier: int) -> Mask:
        """Return the mask of a device class: drawn, or of the largest mask the weights of the largest magnitudes."""
        if not self._chosen(state, tier):
            return state.mask_of(tier)
        return largest_on(state.params, state.mask, state.counts[tier], self.unit)

    def _chosen(self, state: MaskedState, tier: int) -> bool:
        """Tell whether a device class's mask is chosen by magnitude."""
        return self.subset == "magnitude" and tier > 0 and int(state.stage) == 2


def _held(masks: Sequence[Mask], update: Update) -> tuple[Params, Mask]:
    """Return the model on a client's mask, and the mask, which is that of its class. Raises InputError."""
    tier = update.tree.get("tier")
    if not isinstance(tier, float) or tier not in range(len(masks)):
        raise InputError("an update of no device class")
    mask = masks[int(tier)]
    return scatter_values({name: v for name, v in update.tree.items() if name != "tier"}, mask), mask


def _sensed(device: Device, mask: Mapping[str, Tensor], p: float, share: GrowthShare, unit: int) -> Update:
    """Learn a mask by DNR, its rate falling from ``p`` to 0, and answer with its density, of units, in every layer."""
    epoch, steps = epoch_ends(device)
    rates = {step: p * (1 - step / steps) for step in range(epoch, steps, epoch)}
    metrics, mask = train_on_mask(device, dict(mask), rates, share, unit)
    units = [units_of(own, unit) for own in mask.values()]
    sensed = torch.tensor([int(own.sum()) / own.numel() for own in units], dtype=torch.float64)
    if not math.isfinite(metrics.get("loss", 0.0)):
        sensed.fill_(torch.nan)  # what a diverged training sensed is not to be taken
    return Update({"sensed": sensed}, len(device.data), metrics)


def _sensing(state: MaskedState) -> Expected:
    """Expect the density of every layer after DNR: no layer is empty, and in all they keep what they started with."""
    sizes = torch.tensor([unit_count(state.params[n].shape, state.unit) for n in state.sparse], dtype=torch.float64)
    rule = partial(_wrong_total, sizes, int(state.counts[0].sum()))
    return Expected({"sensed": Whole(1 / sizes, 1 / sizes, 1.0, counts=False)}, rule=rule)


def _wrong_total(sizes: Tensor, allowed: int, tree: Tree) -> str | None:
    """Return what is wrong with the number of units that sensitivities stand for, or None."""
    sensed = tree["sensed"]
    assert isinstance(sensed, Tensor)
    total = float(sensed @ sizes)
    return None if abs(total - allowed) < 0.5 else f"sensed keeps {total:.6g} weights, where {allowed} are allowed"
