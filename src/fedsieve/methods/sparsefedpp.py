"""SparseFedPP: powerpropagation makes weights sparse by themselves; backward keeps as much of the activations.

Guastella et al. 2024, "SparseFedPP: sparse federated learning for hardware-constrained edge-devices", on top of
Schwarz et al. 2021, "Powerpropagation: A sparsity inducing weight reparameterisation". What is trained, sent and
averaged is th, of which ``sign(th) |th|^a`` are the weights. After local training one magnitude cut over all layers
together; what every client cuts never comes back, since the gradient at 0 is 0.

Top-k is the baseline of its Fig. 1: dense local training, the same cut, zeros counting in the mean. SparseFedPP at
a = 1, with all activations, and from the same weights, is Top-k.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn

from fedsieve.client.training import load_, params_of, train
from fedsieve.server.aggregate import added, mean, tensors
from fedsieve.sparse.effective import powerprop_where_possible_, reset_thresholds_
from fedsieve.sparse.layers import powerprop_, powerprop_parameter, powerprop_weight
from fedsieve.sparse.masks import drop_zeros, global_top, to_sparse, topk_count
from fedsieve.sparse.policy import select_weights
from fedsieve.types import LATER, Device, Expected, InputError, Method, Params, RoundContext, ServerState, Tree, Update
from fedsieve.types.contract import expect_changes, expect_weights
from fedsieve.types.errors import check_interval


@dataclass(frozen=True)
class TopK(Method[ServerState]):
    """Clients train densely, then send the largest weights, or changes, of the whole model."""

    sparsity: float = 0.9
    deployment: Literal["aggregate", "pruned"] = "aggregate"
    """What is tested and shipped: the union of the clients' supports, or its top weights of the target density."""
    policy: str = "all"
    of: Literal["weights", "update"] = field(default="weights", metadata=LATER)
    """What is largest: weights, and others become 0; or the changes of them, and others stay (adapters need that)."""

    def __post_init__(self) -> None:
        check_interval("sparsity", self.sparsity, "[0, 1)")
        if self.of == "update" and (self.deployment != "aggregate" or isinstance(self, SparseFedPP)):
            raise InputError("of=update sends changes and prunes no weight: it is Top-k's, with deployment=aggregate")

    @property
    def target_density(self) -> float | None:
        """The share of the model's weights that a client keeps; None: it prunes none."""
        return 1 - self.sparsity if self.of == "weights" else None

    def weights(self, model: nn.Module) -> tuple[str, ...]:
        """Return the weights that are cut."""
        return select_weights(self.policy, model)

    def init(self, model: nn.Module, rng: torch.Generator) -> ServerState:
        """Start from the fresh model, dense: round 1 is."""
        return ServerState(params_of(model), sparse=self.weights(model))

    def broadcast(self, state: ServerState, context: RoundContext) -> Tree:
        """Send the global model: its zeros (what all clients pruned) need not travel."""
        return drop_zeros(state.params, state.sparse)

    def client(self, down: Tree, device: Device) -> Update:
        """Train, cut over all layers together, and send the survivors."""
        before = tensors(down)
        load_(device.model, before)
        metrics = train(device)
        values = params_of(device.model)
        if self.of == "update":
            values = {name: v - before[name] for name, v in values.items()}
        support = global_top(values, self.weights(device.model), 1 - self.sparsity)
        return Update(to_sparse(values, support), len(device.data), metrics)

    def expected(self, state: ServerState, context: RoundContext) -> Expected:
        """Expect the survivors, as many as the cut leaves of all layers together."""
        sizes = {name: state.params[name].numel() for name in state.sparse}
        expect = expect_weights if self.of == "weights" else expect_changes
        return Expected(expect(state.params, sizes), topk_count(1 - self.sparsity, sum(sizes.values())))

    def aggregate(self, state: ServerState, updates: Iterable[Update], context: RoundContext) -> ServerState:
        """Average; the union of the clients' supports survives."""
        average = mean(updates)
        return ServerState(average if self.of == "weights" else added(state.params, average), sparse=state.sparse)

    def deploy(self, state: ServerState) -> Params:
        """Ship the aggregate, the union of the clients' supports, or its top weights."""
        return self.effective(state.params, state) if self.deployment == "aggregate" else self.pruned(state)

    def pruned(self, state: ServerState) -> Params:
        """Return the aggregate cut to the target density, over all layers together."""
        support = global_top(state.params, state.sparse, 1 - self.sparsity)
        cut = state.params | {n: state.params[n] * mask for n, mask in support.items()}
        return self.effective(cut, state)

    def effective(self, params: Params, state: ServerState) -> Params:
        """Return the plain model's weights: what is trained, sent and averaged itself."""
        return params


@dataclass(frozen=True)
class SparseFedPP(TopK):
    """Powerpropagation, activations kept as sparse as the weights, and Top-k's one cut over the whole model."""

    sparsity: float = 0.95
    a: float = 1.25
    """The power; 1 is the plain layer."""
    activations: Literal["pruned", "cached", "all", "where_possible"] = "pruned"
    """What backward keeps of a layer's input: as large a share as its weight has non-zeros; the same, but of a
    convolution what reaches the threshold of each local training's first sparse step (the authors' code); or all.
    ``where_possible``: pruned, and every weight that the policy names is trained so, also where no layer multiplies its
    input by it, which is then kept whole."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_interval("a", self.a, "[1, 10]")

    def weights(self, model: nn.Module) -> tuple[str, ...]:
        """Return the weights that are cut: those that are trained by powerpropagation."""
        return select_weights(self.policy, model, products=self.activations != "where_possible")

    def prepare(self, model: nn.Module) -> nn.Module:
        """Clients train the policy's layers by powerpropagation."""
        if self.activations == "where_possible":
            return powerprop_where_possible_(model, self.weights(model), self.a)
        prune, cached = self.activations != "all", self.activations == "cached"
        return powerprop_(model, self.weights(model), self.a, prune, cached)

    def client(self, down: Tree, device: Device) -> Update:
        """Train by powerpropagation, cut over all layers together, and send the survivors."""
        reset_thresholds_(device.model)
        return super().client(down, device)

    def init(self, model: nn.Module, rng: torch.Generator) -> ServerState:
        """Start from the th of the model's weights, dense: round 1 is."""
        params, names = params_of(model), self.weights(model)
        return ServerState(params | {n: powerprop_parameter(params[n], self.a) for n in names}, sparse=names)

    def effective(self, params: Params, state: ServerState) -> Params:
        """Return the weights that th stands for."""
        return {n: powerprop_weight(v, self.a) if n in state.sparse else v for n, v in params.items()}
