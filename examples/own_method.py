"""A method of your own in one file: FedAvg whose uploads are random sparse changes (Konecny et al. 2016, Sec. 3).

Run it with: fedsieve run examples/own_method.py:digits -s method.density=0.1
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from fedsieve import Device, Expected, Method, Run, ServerState, Sparse, Update
from fedsieve.client.training import load_, params_of, train
from fedsieve.recipes.catalogue import PRESETS
from fedsieve.server.aggregate import added, mean, tensors
from fedsieve.types import RoundContext, Tree
from fedsieve.types.contract import expect_changes
from fedsieve.types.errors import check_interval


@dataclass(frozen=True)
class RandomMask(Method[ServerState]):
    """Clients send a random share of their changes, scaled so that the mean stays what it was."""

    density: float = 0.1

    def __post_init__(self) -> None:
        check_interval("density", self.density, "(0, 1]")

    def init(self, model: nn.Module, rng: torch.Generator) -> ServerState:
        """Start from the fresh model."""
        return ServerState(params_of(model))

    def broadcast(self, state: ServerState, context: RoundContext) -> Tree:
        """Send the whole model."""
        return state.params

    def client(self, down: Tree, device: Device) -> Update:
        """Train, and send a random share of every tensor's change."""
        before = tensors(down)
        load_(device.model, before)
        metrics = train(device)
        tree: dict[str, Sparse] = {}
        for name, after in params_of(device.model).items():
            support = torch.rand(after.shape, generator=device.rng) < self.density
            tree[name] = Sparse.of((after - before[name]) / self.density, support)
        return Update(tree, len(device.data), metrics)

    def expected(self, state: ServerState, context: RoundContext) -> Expected:
        """Expect some of every tensor's changes, and refuse what is anything else."""
        return Expected(expect_changes(state.params, {name: v.numel() for name, v in state.params.items()}))

    def aggregate(self, state: ServerState, updates: Iterable[Update], context: RoundContext) -> ServerState:
        """Add the mean change."""
        return ServerState(added(state.params, mean(updates)))


def digits() -> Run:
    """A tenth of the changes on the handwritten digits."""
    return PRESETS["digits"].run(RandomMask(density=0.1))
