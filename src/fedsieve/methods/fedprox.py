"""FedProx: federated averaging whose clients are drawn back to the model that they were sent.

Li et al. 2020, "Federated Optimization in Heterogeneous Networks", Algorithm 2: every client minimises its own loss and
``mu / 2 |w - w_t|^2``, so that ``mu (w - w_t)`` is added to the gradients of every step.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import nn

from fedsieve.client.training import load_, params_of, train
from fedsieve.server.aggregate import Average, ServerOptimizer, dense_bytes, mean, tensors
from fedsieve.types import Correction, Device, Method, RoundContext, ServerState, Tree, Update
from fedsieve.types.contract import Expected, expect_weights
from fedsieve.types.errors import check_interval


@dataclass(frozen=True)
class FedProx(Method[ServerState]):
    """Dense local training with a proximal term; the server averages, or steps towards the average."""

    mu: float = 0.01
    """The weight of the proximal term; 0 is FedAvg."""
    server: ServerOptimizer = Average()

    def __post_init__(self) -> None:
        check_interval("mu", self.mu, "[0, 1e6]")

    @property
    def target_density(self) -> float:
        """Every weight is kept."""
        return 1.0

    def init(self, model: nn.Module, rng: torch.Generator) -> ServerState:
        """Start from the fresh model."""
        params = params_of(model)
        return ServerState(params, self.server.init(params))

    def broadcast(self, state: ServerState, context: RoundContext) -> Tree:
        """Send the whole model."""
        return state.params

    def client(self, down: Tree, device: Device) -> Update:
        """Train near the model that was sent, and send the whole model back."""
        load_(device.model, tensors(down))
        metrics = train(replace(device, correction=Correction(mu=self.mu) if self.mu else None))
        return Update(params_of(device.model), len(device.data), metrics)

    def expected(self, state: ServerState, context: RoundContext) -> Expected:
        """Expect the whole model."""
        return Expected(expect_weights(state.params))

    def aggregate(self, state: ServerState, updates: Iterable[Update], context: RoundContext) -> ServerState:
        """Take the server's step towards the mean of the clients' models."""
        params, moments = self.server.step(state.params, mean(updates), state.moments)
        return ServerState(params, moments)

    def paper_bytes(self, model: nn.Module) -> float:
        """Return the plain model's size."""
        return dense_bytes(params_of(model))
