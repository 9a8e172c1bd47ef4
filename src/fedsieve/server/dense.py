"""What methods share whose clients send whole models."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from fedsieve.client.training import params_of
from fedsieve.server.aggregate import ServerOptimizer, dense_bytes, mean
from fedsieve.types import Method, Params, RoundContext, ServerState, Tree, Update
from fedsieve.types.contract import Expected, expect_weights
from fedsieve.types.method import S


class DenseMethod(Method[S]):
    """Whole models both ways; the server averages, or steps towards the average. A method of it writes ``client``."""

    server: ServerOptimizer
    """A field of the method's."""

    @property
    def target_density(self) -> float:
        """Every weight is kept."""
        return 1.0

    def init(self, model: nn.Module, rng: torch.Generator) -> Any:
        """Start from the fresh model: a ``ServerState``, unless the method keeps more."""
        params = params_of(model)
        return ServerState(params, self.server.init(params))

    def broadcast(self, state: S, context: RoundContext) -> Tree:
        """Send the whole model."""
        return state.params

    def expected(self, state: S, context: RoundContext) -> Expected:
        """Expect the whole model."""
        return Expected(expect_weights(state.params))

    def aggregate(self, state: S, updates: Iterable[Update], context: RoundContext) -> S:
        """Take the server's step towards the mean of the clients' models."""
        return self.stepped(state, mean(updates))

    def stepped(self, state: S, average: Params) -> S:
        """Return the state after the server's step towards a model."""
        params, moments = self.server.step(state.params, average, state.moments)
        return replace(state, params=params, moments=moments)

    def paper_bytes(self, model: nn.Module) -> float:
        """Return the plain model's size."""
        return dense_bytes(params_of(model))
