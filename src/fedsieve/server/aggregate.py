"""The server's arithmetic: a mean over a stream of answers, then a step (FedAvg's or FedAdam's).

McMahan et al. 2017 (FedAvg); Reddi et al. 2021, Algorithm 2 (FedAdam).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from fedsieve.types import InputError, Mask, Params, Sparse, Tree, Update
from fedsieve.types.contract import is_statistic

Weighting: TypeAlias = Literal["samples", "equal"]
"""How much a client counts in a mean: by its number of examples, or as much as any other."""


def mean(updates: Iterable[Update], weighting: Weighting = "samples") -> Params:
    """Return the average of the answers' trees, weighted by ``n``; zeros off a support count. Sums are in float64."""
    total, sums, dtypes = 0, dict[str, Tensor](), dict[str, torch.dtype]()
    for update in updates:
        weight = update.n if weighting == "samples" else 1
        for name, value in update.tree.items():
            assert isinstance(value, Tensor | Sparse)
            values = value.values if isinstance(value, Sparse) else value
            if name not in sums:
                sums[name], dtypes[name] = torch.zeros(value.shape, dtype=torch.float64), values.dtype
            if isinstance(value, Sparse):
                sums[name].view(-1).index_add_(0, value.index, values.double(), alpha=weight)
            else:
                sums[name].add_(values, alpha=weight)
        total += weight
    if not total:
        raise InputError("no client sent an update that the server could accept")
    return {name: value.div_(total).to(dtypes[name]) for name, value in sums.items()}


def mean_where_held(models: Iterable[tuple[Params, Mask]], old: Params) -> Params:
    """Return the mean of every element over the clients that hold it, all alike; what nobody holds stays ``old``.

    Babakniya et al. 2022 (FLASH), Sec. 4: WFA, the aggregation of hetero-FLASH. A model's mask names what its client
    holds; tensors without one are held whole.
    """
    sums = {name: torch.zeros(v.shape, dtype=torch.float64) for name, v in old.items()}
    held = {name: torch.zeros(v.shape, dtype=torch.int32) for name, v in old.items()}
    clients = 0
    for params, mask in models:
        clients += 1
        for name, value in params.items():
            sums[name] += value * mask[name] if name in mask else value
            held[name] += mask.get(name, 1)
    if not clients:
        raise InputError("no client sent an update that the server could accept")
    mean = {name: (sums[name] / held[name].clamp(min=1)).to(v.dtype) for name, v in old.items()}
    return {name: torch.where(held[name] > 0, mean[name], v) for name, v in old.items()}


@dataclass(frozen=True)
class Average:
    """FedAvg's step: the mean is the new model."""

    def init(self, params: Params) -> dict[str, Params]:
        """Return no moments."""
        return {}

    def step(self, old: Params, target: Params, moments: dict[str, Params]) -> tuple[Params, dict[str, Params]]:
        """Return the mean model ``target`` itself."""
        return target, moments


@dataclass(frozen=True)
class Adam:
    """FedAdam's step along ``target - old``; BatchNorm's running statistics take the plain mean."""

    eta: float = 0.01
    """The server's learning rate."""
    b1: float = 0.9
    """The decay of the first moment."""
    b2: float = 0.99
    """The decay of the second moment."""
    tau: float = 1e-3
    """What is added to the root of the second moment: the degree of adaptivity."""

    def __post_init__(self) -> None:
        if not (0 < self.eta <= 1e6 and 0 < self.tau <= 1e6) or not (0 <= self.b1 < 1 and 0 <= self.b2 < 1):
            raise InputError(f"FedAdam needs eta > 0, tau > 0 and b1, b2 in [0, 1), got {self}")

    def init(self, params: Params) -> dict[str, Params]:
        """Return first and second moments of zero."""
        learned = {name: v for name, v in params.items() if not is_statistic(name)}
        return {moment: {name: torch.zeros_like(v) for name, v in learned.items()} for moment in ("m", "v")}

    def step(self, old: Params, target: Params, moments: dict[str, Params]) -> tuple[Params, dict[str, Params]]:
        """Return the model and the moments after one step (Reddi et al. 2021, Algorithm 2)."""
        new, m, v = dict(target), dict[str, Tensor](), dict[str, Tensor]()
        for name, before in moments["m"].items():
            d = target[name] - old[name]
            m[name] = self.b1 * before + (1 - self.b1) * d
            v[name] = self.b2 * moments["v"][name] + (1 - self.b2) * d * d
            new[name] = old[name] + self.eta * m[name] / (v[name].sqrt() + self.tau)
        return new, {"m": m, "v": v}


Step = Average | Adam


def dense_bytes(params: Params) -> float:
    """Return four bytes for each of the model's numbers, BatchNorm's statistics included."""
    return 4.0 * sum(v.numel() for v in params.values())


def added(params: Params, change: Mapping[str, Tensor]) -> Params:
    """Return ``params + change``."""
    return {name: value + change[name] for name, value in params.items()}


def tensors(tree: Tree) -> Params:
    """Return a received tree of plain tensors as parameters; raises InputError if it holds anything else."""
    params = {name: v.dense() if isinstance(v, Sparse) else v for name, v in tree.items()}
    wrong = [name for name, v in params.items() if not isinstance(v, Tensor)]
    if wrong:
        raise InputError(f"the message holds no tensor at {', '.join(wrong)}")
    return params  # type: ignore[return-value]
