"""Top-k after local training: the baseline that prunes what dense training made.

The baseline of Guastella et al. 2024, "SparseFedPP: sparse federated learning for hardware-constrained edge-devices",
Fig. 1: dense local training, one magnitude cut over all layers together, the pruned weights are sent and averaged,
zeros counting.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from fedsieve.client.training import load_, params_of, train
from fedsieve.server.aggregate import ServerState, mean, tensors
from fedsieve.server.contract import Expected, weights
from fedsieve.sparse.policy import check_share, policy
from fedsieve.sparse.topk import count, global_top, non_zeros, on_support
from fedsieve.types import Device, Params, Tree, Update


@dataclass(frozen=True)
class TopK:
    """Clients train densely, then send the largest weights of the whole model."""

    sparsity: float = 0.9
    deployment: Literal["aggregate", "pruned"] = "aggregate"
    """What is tested and shipped: the union of the clients' supports, or its top weights of the target density."""
    policy: str = "all"

    def __post_init__(self) -> None:
        check_share("sparsity", self.sparsity, zero=True)

    @property
    def name(self) -> str:
        """What tables and figures call the method."""
        return "topk"

    @property
    def target_density(self) -> float:
        """The share of the model's weights that a client keeps."""
        return 1 - self.sparsity

    def prepare(self, model: nn.Module) -> nn.Module:
        """Clients train the plain model."""
        return model

    def init(self, model: nn.Module, rng: torch.Generator) -> ServerState:
        """Start from the fresh model, dense: round 1 is."""
        return ServerState(params_of(model), sparse=policy(self.policy, model))

    def broadcast(self, state: ServerState, tier: int) -> Tree:
        """Send the global model: its zeros (what all clients pruned) need not travel."""
        return non_zeros(state.params, state.sparse)

    def client(self, down: Tree, device: Device) -> Update:
        """Train densely, cut, and send the survivors."""
        load_(device.model, tensors(down))
        metrics = train(device)
        after = params_of(device.model)
        support = global_top(after, policy(self.policy, device.model), 1 - self.sparsity)
        return Update(on_support(after, support), len(device.data), metrics)

    def expected(self, state: ServerState, tier: int) -> Expected:
        """Expect the survivors, as many as the cut leaves of all layers together."""
        sizes = {name: state.params[name].numel() for name in state.sparse}
        return Expected(weights(state.params, sizes), count(1 - self.sparsity, sum(sizes.values())))

    def aggregate(self, state: ServerState, updates: Iterable[Update]) -> ServerState:
        """Average; the union of the clients' supports survives."""
        return ServerState(mean(updates), sparse=state.sparse)

    def deploy(self, state: ServerState) -> Params:
        """Ship the aggregate, the union of the clients' supports, or its top weights."""
        return state.params if self.deployment == "aggregate" else self.pruned(state)

    def pruned(self, state: ServerState) -> Params:
        """Return the aggregate cut to the target density, over all layers together."""
        support = global_top(state.params, state.sparse, 1 - self.sparsity)
        return state.params | {n: state.params[n] * kept for n, kept in support.items()}

    def paper_bytes(self, model: nn.Module) -> None:
        """The paper prints no formula for this baseline."""
        return
