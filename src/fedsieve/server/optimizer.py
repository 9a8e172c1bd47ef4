"""The server's optimizers: a step from the old model towards the mean of the clients' (FedAvg's or FedAdam's).

McMahan et al. 2017 (FedAvg); Reddi et al. 2021, Algorithm 2 (FedAdam).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedsieve.types import InputError, Params
from fedsieve.types.contract import is_statistic


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


ServerOptimizer = Average | Adam
