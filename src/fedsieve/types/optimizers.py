"""What steps along the gradients on a client: the settings of a run, whatever computes the steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch

from fedsieve.types.errors import InputError, check_interval


@dataclass(frozen=True)
class SGD:
    """Stochastic gradient descent, with the run's ``momentum`` and ``weight_decay``."""

    nesterov: bool = False
    """Whether momentum is Nesterov's."""


@dataclass(frozen=True)
class AdamW:
    """Adam with the run's ``weight_decay``, decoupled from the gradients (Loshchilov and Hutter 2019)."""

    beta1: float = 0.9
    """How much of the mean gradient is kept at a step."""
    beta2: float = 0.999
    """How much of the mean squared gradient is kept."""
    eps: float = 1e-8
    """What is added to the root of the mean squared gradient."""
    decoupled: bool = True
    """Whether weights decay apart from the gradients; false: Adam, where the decay is a part of them."""

    def __post_init__(self) -> None:
        for name in ("beta1", "beta2"):
            check_interval(f"optimizer.{name}", getattr(self, name), "[0, 1)")
        if not 0 < self.eps < float("inf"):
            raise InputError(f"optimizer.eps must be positive, got {self.eps}")


Optimizer: TypeAlias = SGD | AdamW | Callable[..., torch.optim.Optimizer]
"""One of those here, or a factory of a PyTorch optimizer: it is given groups of parameters, and ``lr``."""
