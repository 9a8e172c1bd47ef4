"""Methods that are FedAvg but for one thing that a test wants."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fedsieve import Device, Method, ServerState, Update
from fedsieve.methods import FedAvg
from fedsieve.types import RoundContext, Tree


@dataclass(frozen=True)
class Silent(FedAvg):
    """FedAvg that does not say what its clients send."""

    name: str = "silent"

    def expected(self, state: ServerState, context: RoundContext) -> None:  # type: ignore[override]
        return None


@dataclass(frozen=True)
class Odd(Method[ServerState]):
    """FedAvg whose clients do what a test wants."""

    act: str
    inner: FedAvg = FedAvg()
    name: str = "odd"

    def init(self, model: nn.Module, rng: torch.Generator) -> ServerState:
        return self.inner.init(model, rng)

    def broadcast(self, state: ServerState, context: RoundContext) -> Tree:
        return {"tier": float(context.tier), "params": state.params}

    def client(self, down: Tree, device: Device) -> Update:
        params = down["params"]
        assert isinstance(params, dict)
        visits = device.memory.get("visits", torch.zeros(1)) + 1
        if self.act == "remember":
            device.memory["visits"] = visits
        update = self.inner.client(params, device)
        first: Tensor = next(iter(update.tree.values()))  # type: ignore[assignment]
        if self.act == "poison" and device.rng.initial_seed() % 2:
            first.view(-1)[0] = float("nan")
        if self.act == "poison all":
            first.view(-1)[0] = float("inf")
        if self.act == "die":
            import os

            os._exit(3)
        return replace(update, n=0 if self.act == "empty" else update.n, metrics={"visits": float(visits)})

    def aggregate(self, state: ServerState, updates: Iterable[Update], context: RoundContext) -> ServerState:
        return self.inner.aggregate(state, updates, context)
