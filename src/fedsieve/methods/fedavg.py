"""Dense federated averaging, and FedAdam, the same with an adaptive server.

McMahan et al. 2017, "Communication-Efficient Learning of Deep Networks from Decentralized Data", Algorithm 1.
Reddi et al. 2021, "Adaptive Federated Optimization", Algorithm 2.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from fedsieve.client.training import load_, params_of, train
from fedsieve.server.aggregate import Adam, Average, ServerOptimizer, dense_bytes, mean, tensors
from fedsieve.types import Device, Method, RoundContext, ServerState, Tree, Update
from fedsieve.types.contract import Expected, expect_weights


@dataclass(frozen=True)
class FedAvg(Method[ServerState]):
    """Dense local training; the server averages, or steps towards the average."""

    server: ServerOptimizer = Average()

    @property
    def name(self) -> str:
        """What tables and figures call the method."""
        return "fedavg" if isinstance(self.server, Average) else "fedadam"

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
        """Train, and send the whole model back."""
        load_(device.model, tensors(down))
        metrics = train(device)
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


def FedAdam(eta: float = 0.01, b1: float = 0.9, b2: float = 0.99, tau: float = 1e-3) -> FedAvg:
    """Dense local training; the server takes an Adam step along the mean update."""
    return FedAvg(server=Adam(eta, b1, b2, tau))
