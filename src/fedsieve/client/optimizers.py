"""PyTorch's optimizers, made of the settings of a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fedsieve.types import SGD, AdamW, Device, InputError


def torch_optimizer(device: Device, decayed: Sequence[Tensor], others: Sequence[Tensor]) -> torch.optim.Optimizer:
    """Return the optimizer of a training, other than SGD; weight decay reaches ``decayed``, not the ``others``.

    Raises InputError if a user's factory gives none.
    """
    optimizer, where = device.optimizer, (*decayed, *others)[0].device
    groups = [{"params": [*decayed], "weight_decay": device.weight_decay}, {"params": [*others], "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    lr: Any = torch.tensor(device.lr, device=where) if where.type == "cuda" else device.lr
    if isinstance(optimizer, AdamW):
        kind = torch.optim.AdamW if optimizer.decoupled else torch.optim.Adam
        betas = (optimizer.beta1, optimizer.beta2)
        return kind(groups, lr, betas, optimizer.eps, foreach=True, capturable=where.type == "cuda")
    return _own_optimizer(optimizer, groups, device)


def gradients_in_change(device: Device, steps: int) -> float:
    """Return how many times a gradient that never changes is in what ``steps`` of SGD change, at a learning rate of 1.

    With momentum b the gradient of step j counts 1 + b + ... + b^(steps - j) times: |a| of Wang et al. 2020 (FedNova).
    """
    b = device.momentum
    velocities = sum((1 - b**k) / (1 - b) for k in range(1, steps + 1))
    return steps + b * velocities if device.optimizer == SGD(nesterov=True) else max(velocities, 1.0)


def _own_optimizer(factory: Callable[..., Any], groups: list[dict[str, Any]], device: Device) -> torch.optim.Optimizer:
    """Return what a user's factory makes of groups of parameters. Raises InputError if that is no optimizer."""
    if not device.weight_decay:
        groups = [{"params": group["params"]} for group in groups]  # the factory may have a decay of its own
    try:
        result = factory(groups, lr=device.lr)
    except Exception as error:
        line = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"optimizer: it cannot be made of parameter groups and lr={device.lr} ({line})") from error
    if not isinstance(result, torch.optim.Optimizer):
        raise InputError(f"optimizer: its factory gives {type(result).__name__}, which is no torch.optim.Optimizer")
    return result
