"""SWAT: sparse weights and activations in training, a dense gradient for dense master weights.

Raihan & Aamodt 2020, "Sparse Weight Activation Training". Central training is this method with one client.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn

from fedsieve.client.training import load_, params_of, train
from fedsieve.server.aggregate import dense_bytes, mean, tensors
from fedsieve.sparse.effective import Activations, reset_thresholds_, swat_where_possible_
from fedsieve.sparse.layers import swat_
from fedsieve.sparse.masks import keep_topk
from fedsieve.sparse.policy import erdos_renyi_kernel, select_weights, uniform_densities
from fedsieve.types import Device, InputError, Method, Params, RoundContext, ServerState, Tree, Update
from fedsieve.types.contract import Expected, expect_weights
from fedsieve.types.errors import check_interval
from fedsieve.types.method import LATER


@dataclass(frozen=True)
class Swat(Method[ServerState]):
    """Training computes with the top weights and activations of every layer; all weights are sent and averaged."""

    sparsity: float = 0.9
    policy: str = "swat"
    period: int = 1
    """Steps from one exact top-k to the next; the last threshold serves in between."""
    budget: Literal["uniform", "erk"] = "uniform"
    """How the density is shared among the layers: the same for each, or by Erdos-Renyi-kernel."""
    activations: Activations = field(default="always", metadata=LATER)
    """Which weights are sparse: of layers that cut their input too (``always``), or all that the policy names, inputs
    cut where a layer multiplies them itself (``where_possible``)."""

    def __post_init__(self) -> None:
        check_interval("sparsity", self.sparsity, "[0, 1)")
        if self.period < 1:
            raise InputError(f"period must be at least 1 step, got {self.period}")

    @property
    def target_density(self) -> float:
        """The share of a layer's weights that training computes with and that is shipped."""
        return 1 - self.sparsity

    def prepare(self, model: nn.Module) -> nn.Module:
        """Clients train the policy's layers by SWAT."""
        swat = swat_ if self.activations == "always" else swat_where_possible_
        return swat(model, self.densities(params_of(model), self.weights(model)), self.period)

    def weights(self, model: nn.Module) -> tuple[str, ...]:
        """Return the weights that are sparse."""
        return select_weights(self.policy, model, products=self.activations == "always")

    def init(self, model: nn.Module, rng: torch.Generator) -> ServerState:
        """Start from the fresh model."""
        return ServerState(params_of(model), sparse=self.weights(model))

    def broadcast(self, state: ServerState, context: RoundContext) -> Tree:
        """Send the dense master weights."""
        return state.params

    def client(self, down: Tree, device: Device) -> Update:
        """Train by SWAT, and send the dense master weights back."""
        load_(device.model, tensors(down))
        reset_thresholds_(device.model)
        metrics = train(device)
        return Update(params_of(device.model), len(device.data), metrics)

    def expected(self, state: ServerState, context: RoundContext) -> Expected:
        """Expect the dense master weights."""
        return Expected(expect_weights(state.params))

    def aggregate(self, state: ServerState, updates: Iterable[Update], context: RoundContext) -> ServerState:
        """Average the master weights."""
        return ServerState(mean(updates), sparse=state.sparse)

    def deploy(self, state: ServerState) -> Params:
        """Ship the top weights of every layer: the network that training computed with."""
        return keep_topk(state.params, self.densities(state.params, state.sparse))

    def paper_bytes(self, model: nn.Module) -> float:
        """Return the plain model's size."""
        return dense_bytes(params_of(model))

    def densities(self, params: Params, names: tuple[str, ...]) -> dict[str, float]:
        """Return every sparse layer's density."""
        if self.budget == "erk":
            return erdos_renyi_kernel(params, names, 1 - self.sparsity)
        return uniform_densities(names, 1 - self.sparsity)
