"""HetLoRA: adapters of unequal ranks, by device class.

Cho et al. 2024, "Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models". A client of rank r gets
the first r rows of every A, and columns of every B, trains and sends those (truncation). The server pads them with
zeros, and takes the mean in which a client counts by the Frobenius norm of its update, the square root of the sum of
|B A|^2 over all layers (sparsity-weighted aggregation). The paper's pruning of ranks on the clients is left out: a
device class has its rank for good.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fedsieve.client.training import load_, params_of, train
from fedsieve.server.aggregate import tensors
from fedsieve.types import Device, InputError, Method, Params, RoundContext, ServerState, Tree, Update
from fedsieve.types.contract import Expected, Number, expect_weights


@dataclass(frozen=True)
class HetLoRA(Method[ServerState]):
    """Train adapters of unequal ranks: a device class has the first rows and columns of the largest ones."""

    ranks: tuple[int, ...] = (8, 4, 2)
    """One for each of ``task.tiers``, falling, the first that of the model's adapters."""

    def __post_init__(self) -> None:
        if not self.ranks or min(self.ranks) < 1 or [*self.ranks] != sorted({*self.ranks}, reverse=True):
            raise InputError(f"ranks must be at least 1, and fall from tier to tier, got {self.ranks}")

    @property
    def name(self) -> str:
        """What tables and figures call the method."""
        return "hetlora"

    @property
    def tiers(self) -> int:
        """How many device classes the method serves."""
        return len(self.ranks)

    def init(self, model: nn.Module, rng: torch.Generator) -> ServerState:
        """Start from the model, whose adapters have the first rank. Raises InputError for a model of others."""
        params = params_of(model)
        has = {value.shape[0] for name, value in params.items() if _axis(name) == 0}
        if has != {self.ranks[0]}:
            raise InputError(f"hetlora needs adapters of its first rank {self.ranks[0]}: the model has {has or 'none'}")
        return ServerState(params)

    def broadcast(self, state: ServerState, context: RoundContext) -> Tree:
        """Send a device class its number, and the model with its rank."""
        return {"tier": float(context.tier), "params": self._cut(state.params, context.tier)}

    def client(self, down: Tree, device: Device) -> Update:
        """Train on the first rows and columns, the others 0, which have no gradient, and send them."""
        sent: Any = down
        load_(device.model, {name: _padded(name, v, self.ranks[0]) for name, v in tensors(sent["params"]).items()})
        metrics, tier = train(device), int(sent["tier"])
        return Update({"tier": float(tier), **self._cut(params_of(device.model), tier)}, len(device.data), metrics)

    def expected(self, state: ServerState, context: RoundContext) -> Expected:
        """Expect the number of the device class, and the model with its rank."""
        return Expected({"tier": Number(float(context.tier)), **expect_weights(self._cut(state.params, context.tier))})

    def aggregate(self, state: ServerState, updates: Iterable[Update], context: RoundContext) -> ServerState:
        """Take the mean of the padded models."""
        sums, total = {name: v.double() * 0 for name, v in state.params.items()}, 0.0
        for update in updates:
            params = tensors({name: v for name, v in update.tree.items() if name != "tier"})
            total += (norm := _norm(params))
            for name, value in params.items():
                sums[name].add_(_padded(name, value, self.ranks[0]), alpha=norm)
        if not total:
            raise InputError("no client sent adapters other than zero: raise lr")
        return replace(state, params={name: (own / total).to(state.params[name].dtype) for name, own in sums.items()})

    def _cut(self, params: Params, tier: int) -> Params:
        """Return a model with a device class's rank."""
        rank = self.ranks[tier]
        return {n: v if (axis := _axis(n)) is None else v.narrow(axis, 0, rank).clone() for n, v in params.items()}


def _axis(name: str) -> int | None:
    """Return along which dimension of an adapter its rank lies: rows of A, columns of B; None of any other tensor."""
    return next(
        (axis for axis, mark in enumerate("AB") if f".lora_{mark}." in name or f"_embedding_{mark}" in name), None
    )


def _padded(name: str, value: Tensor, rank: int) -> Tensor:
    """Return an adapter's part with zeros up to a rank; any other tensor as it is."""
    if (axis := _axis(name)) is None:
        return value
    shape = (*value.shape[:axis], rank - value.shape[axis], *value.shape[axis + 1 :])
    return torch.cat([value, value.new_zeros(shape)], axis)


def _norm(params: Params) -> float:
    """Return the Frobenius norm of all BA together: |BA|^2 is the sum over (B^T B) * (A A^T)."""
    both = [(a, params[n.replace("lora_A", "lora_B").replace("_embedding_A", "_embedding_B")])
            for n, a in params.items() if _axis(n) == 0]  # fmt: skip
    pairs = [(a.double().flatten(1), b.double().flatten(1)) for a, b in both]  # convolutions' B is 1 x 1
    return math.sqrt(max(sum(float(((b.T @ b) * (a @ a.T)).sum()) for a, b in pairs), 0.0))
