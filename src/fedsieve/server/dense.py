"""What methods share whose clients send whole models."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from fedsieve.client.training import params_of
from fedsieve.server.aggregate import ServerOptimizer, dense_bytes, mean
from fedsieve.types import Method, RoundContext, ServerState, Tree, Update
from fedsieve.types.contract import Expected, expect_weights


class DenseMethod(Method[ServerState]):
    """Whole models both ways; the server averages, or steps towards the average. A method of it writes ``client``."""

    server: ServerOptimizer
    """A field of the method's."""

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
