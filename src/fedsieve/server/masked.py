"""The server's state and step of a model that lives on random masks drawn from a seed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from torch import Tensor

from fedsieve.server.aggregate import Weighting, mean
from fedsieve.server.optimizer import ServerOptimizer
from fedsieve.sparse.masks import apply_mask, random_masks, scatter_values
from fedsieve.types import Mask, Params, ServerState, Tree, Update


@dataclass(frozen=True, kw_only=True)
class MaskedState(ServerState):
    """Server state of a model that lives on drawn masks, one a device class, the first holding all others."""

    seed: Tensor
    """int64 []: what the masks are drawn from."""
    counts: Tensor
    """int64 [tiers, layers]: how many weights each layer keeps."""
    stage: Tensor
    """int64 []: 1 before FLASH's sensitivities are known, 2 from then on."""

    @property
    def mask(self) -> Mask:
        """The mask of the server's model."""
        return self.mask_of(0)

    def support(self, params: Params) -> Mask:
        """Return the mask of the server's model, whatever the weights on it are."""
        return self.mask

    def mask_of(self, tier: int) -> Mask:
        """Return the mask of a device class."""
        return random_masks(int(self.seed), self.counts[tier], {name: self.params[name] for name in self.sparse})

    def mask_spec(self, tier: int) -> Tree:
        """Return what a client draws its mask from, seed and counts: some hundred bytes, whatever the model's size."""
        return {"seed": self.seed, "counts": self.counts[tier]}


def step_on_mask(
    state: MaskedState, updates: Iterable[Update], server: ServerOptimizer, weighting: Weighting
) -> MaskedState:
    """Return the state after the server's step towards the mean of the clients' values, on the mask."""
    target = scatter_values(mean(updates, weighting), state.mask)
    params, moments = server.step(state.params, target, state.moments)
    return replace(state, params=apply_mask(params, state.mask), moments=moments)
