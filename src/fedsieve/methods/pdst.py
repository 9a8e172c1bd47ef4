"""PDST: pre-defined sparse training, on one random mask that never changes.

The baseline of Babakniya et al. 2022, "Federated Sparse Training: Lottery Aware Model Compression for Resource
Constrained Edge", Sec. 5.1: every layer of the policy keeps the same density. Both sides draw the mask from its seed,
so that only values travel.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from fedsieve.client.training import load_, params_of, train_on_mask
from fedsieve.server.aggregate import Average, MaskedState, ServerOptimizer, Weighting
from fedsieve.sparse.masks import (
    MaskDraw,
    apply_mask,
    draw_counts,
    gather_values,
    masked_bytes,
    masks_from_spec,
    scatter_values,
)
from fedsieve.sparse.policy import select_weights, uniform_densities
from fedsieve.sparse.units import check_channels, check_unit
from fedsieve.types import LATER, Device, Method, RoundContext, Tree, Update
from fedsieve.types.contract import Expected, expect_weights
from fedsieve.types.errors import check_interval


@dataclass(frozen=True)
class PDST(Method[MaskedState]):
    """Clients train on one frozen random mask of uniform density, and only values travel."""

    density: float = 0.1
    policy: str = "flash"
    weighting: Weighting = "samples"
    """How clients count in the mean: by their examples, or equally (the authors' code)."""
    server: ServerOptimizer = Average()
    draw: MaskDraw = field(default="exact", metadata=LATER)
    """How many weights a layer of the mask keeps: its share, or as a coin for every weight says (the authors' code)."""
    unit: int = field(default=1, metadata=LATER)
    """How many successive output channels share the mask's pattern (``sparse.units``)."""

    def __post_init__(self) -> None:
        check_interval("density", self.density, "(0, 1]")
        check_unit(self.unit)

    @property
    def target_density(self) -> float:
        """The share of a layer's weights that the mask keeps."""
        return self.density

    def init(self, model: nn.Module, rng: torch.Generator) -> MaskedState:
        """Draw the mask, and keep the fresh model's weights on it."""
        params, names = params_of(model), select_weights(self.policy, model)
        check_channels(model, names, self.unit)
        seed = torch.randint(2**62, (), generator=rng)
        counts = draw_counts(self.draw, int(seed), uniform_densities(names, self.density), params, self.unit)[None]
        drawn = {"seed": seed, "counts": counts, "stage": torch.tensor(2)}
        state = MaskedState(params, self.server.init(params), names, **drawn, unit=self.unit)
        return replace(state, params=apply_mask(params, state.mask))

    def broadcast(self, state: MaskedState, context: RoundContext) -> Tree:
        """Send the values on the mask, and what it is drawn from."""
        return state.message(0)

    def client(self, down: Tree, device: Device) -> Update:
        """Train on the mask, and send its values back."""
        mask = masks_from_spec(down["mask"], device.model, select_weights(self.policy, device.model), self.unit)
        load_(device.model, scatter_values(down["params"], mask))
        metrics, _ = train_on_mask(device, mask)
        return Update(gather_values(params_of(device.model), mask), len(device.data), metrics)

    def expected(self, state: MaskedState, context: RoundContext) -> Expected:
        """Expect the values on the mask."""
        return Expected(expect_weights(state.values(0)))

    def aggregate(self, state: MaskedState, updates: Iterable[Update], context: RoundContext) -> MaskedState:
        """Take the server's step towards the mean of the values, on the mask."""
        return state.step(updates, self.server, self.weighting)

    def paper_bytes(self, model: nn.Module) -> float:
        """Return four bytes for each value on the mask and outside the policy's layers (FLASH, Table 3)."""
        return masked_bytes(model, select_weights(self.policy, model), self.density)
