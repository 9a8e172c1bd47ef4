"""Training steps to be measured: dense, as a good engineer writes it in PyTorch, and sparse, by our kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedsieve import kernels
from fedsieve.cli.bench.cases import PERIOD, Case
from fedsieve.sparse.layers import swat_

Step: TypeAlias = Callable[[], object]
LR, MOMENTUM = 1e-3, 0.9
LAYOUTS: Mapping[str, torch.memory_format] = {
    "contiguous": torch.contiguous_format,
    "channels_last": torch.channels_last,
}


def laid_out(model: nn.Module, layout: str) -> nn.Module:
    """Return the model with its convolutions' weights in one of ``LAYOUTS``."""
    return model.to(memory_format=LAYOUTS[layout])  # type: ignore[call-overload,no-any-return]


def dense(case: Case, kind: str, layout: str, frozen: bool, compiled: bool = False) -> Step:
    """Return a dense step: forward, backward, SGD with momentum, and if ``frozen``, the weights times their mask.

    ``kind``: fp32, or bf16 by autocast. ``layout``: one of ``LAYOUTS``. ``compiled``: through torch.compile.
    """
    model, mask = case.pruned() if frozen else (case.network(), {})
    model = laid_out(model, layout).train()
    x, y = case.examples()
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


def trainer(case: Case, lean: bool = False) -> kernels.Trainer:
    """Return the kernels' trainer of the case's network; ``lean``: with the least memory."""
    model, mask = case.pruned() if case.rule == "frozen" else (case.network(), {})
    if case.rule == "swat":
        swat_(model, case.densities(model), PERIOD)
    return kernels.Trainer(model.train(), mask, case.batch, lr=LR, momentum=MOMENTUM, storage=case.storage, lean=lean)


def sparse(trainer: kernels.Trainer, case: Case) -> Step:
    """Return the trainer's step on the case's batch."""
    return partial(trainer.step, *case.examples())


def isa() -> str:
    """Return the instruction set that the kernels use here, or that there are none."""
    return kernels.isa() if kernels.reason() is None else "none"
