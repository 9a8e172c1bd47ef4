"""Training steps to be measured: dense, as a good engineer writes it in PyTorch, and sparse, by our kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedsieve import kernels
from fedsieve.cli.bench.workload import PERIOD, Workload
from fedsieve.sparse.layers import swat_

Step: TypeAlias = Callable[[], object]
LR, MOMENTUM = 1e-3, 0.9
LAYOUTS: Mapping[str, torch.memory_format] = {
    "contiguous": torch.contiguous_format,
    "channels_last": torch.channels_last,
}


def to_layout(model: nn.Module, layout: str) -> nn.Module:
    """Return the model with its convolutions' weights in one of ``LAYOUTS``."""
    return model.to(memory_format=LAYOUTS[layout])  # type: ignore[call-overload,no-any-return]


def dense_step(workload: Workload, kind: str, layout: str, frozen: bool, compiled: bool = False) -> Step:
    """Return a dense step: forward, backward, SGD with momentum, and if ``frozen``, the weights times their mask.

    ``kind``: fp32, or bf16 by autocast. ``layout``: one of ``LAYOUTS``. ``compiled``: through torch.compile.
    """
    model, mask = workload.pruned_network() if frozen else (workload.network(), {})
    model = to_layout(model, layout).train()
    x, y = workload.examples()
    x = x.to(memory_format=LAYOUTS[layout])
    masked: list[Tensor] = [model.get_parameter(name) for name in mask]
    kept: Any = [torch.empty_like(w).copy_(own) for w, own in zip(masked, mask.values(), strict=True)]
    optimizer = torch.optim.SGD(model.parameters(), LR, MOMENTUM, foreach=True)
    forward: Any = torch.compile(model) if compiled else model

    def step() -> object:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == "bf16"):
            loss = F.cross_entropy(forward(x), y)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if masked:
            with torch.no_grad():
                torch._foreach_mul_(masked, kept)
        return loss.detach()

    return step


def sparse_trainer(workload: Workload, low_memory: bool = False) -> kernels.Trainer:
    """Return the kernels' trainer of the workload's network; ``low_memory``: with the least memory."""
    model, mask = workload.pruned_network() if workload.rule == "frozen" else (workload.network(), {})
    if workload.rule == "swat":
        swat_(model, workload.densities(model), PERIOD)
    return kernels.Trainer(
        model.train(), mask, workload.batch, lr=LR, momentum=MOMENTUM, storage=workload.storage, low_memory=low_memory
    )


def sparse_step(trainer: kernels.Trainer, workload: Workload) -> Step:
    """Return the trainer's step on the workload's batch."""
    return partial(trainer.step, *workload.examples())


def instruction_set() -> str:
    """Return the instruction set that the kernels use here, or that there are none."""
    return kernels.loaded_isa() if kernels.unavailable_reason() is None else "none"
