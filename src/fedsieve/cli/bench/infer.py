"""The time of an inference, sparse against dense, for one batch.

Dense is the fastest of PyTorch's eager mode in both layouts, BatchNorm folded into the convolutions, and torch.jit
frozen for inference in both; the same eager ones under bf16 autocast beside it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fedsieve import kernels
from fedsieve.cli.bench.cases import Case
from fedsieve.cli.bench.clock import warm
from fedsieve.cli.bench.compare import Effort, best, compared
from fedsieve.cli.bench.fresh import fresh
from fedsieve.cli.bench.training import LAYOUTS, laid_out
from fedsieve.client.process import keep_freed_memory
from fedsieve.kernels import reason
from fedsieve.sparse.policy import layers


@dataclass(frozen=True)
class Row:
    """One case, measured; None where it could not be. Times in ms."""

    model: str
    batch: int
    sparsity: float
    storage: str
    density_per_multiply_add: float
    ms_sparse: float | None
    ms_dense_fp32: float | None
    ms_dense_bf16: float | None
    ratio_fp32: float | None
    ratio_bf16: float | None
    samples_kept: int
    samples_dropped: int


def measured(case: Case, effort: Effort) -> Row:
    """Return the case's row, measured in a process of its own."""
    known = {name: getattr(case, name) for name in ("model", "batch", "sparsity", "storage")}
    found = [fresh(timed, case, effort.threads, **asdict(effort)) for _ in range(effort.processes)]
    return Row(**known, **best(found))


def timed(case: Case, **effort: Any) -> dict[str, Any]:
    """Return the part of the case's row that tells times and density, measured in this process."""
    keep_freed_memory()
    model, x = case.pruned()[0].eval(), case.examples()[0]
    with torch.inference_mode():
        works = {key: warm(call) for key, call in _dense(model, x).items()}
    if reason() is None:
        options = {} if case.storage == "fp32" else {"storage": case.storage}
        works["sparse",] = warm(partial(kernels.Predictor(model, case.batch, **options), x))
    with torch.inference_mode():
        return compared(works, Effort(**effort)) | {"density_per_multiply_add": density(model, x)}


@torch.no_grad()
def density(model: nn.Module, x: Tensor) -> float:
    """Return the share of a forward pass's multiply-adds whose weight is not zero."""
    real, dense = 0.0, 0

    def count(layer: nn.Module, _: object, output: Tensor) -> None:
        nonlocal real, dense
        weight = layer.get_parameter("weight")
        products = output.numel() * weight[0].numel()
        real += products * int(weight.count_nonzero()) / weight.numel()
        dense += products

    hooks = [layer.register_forward_hook(count) for layer in layers(model).values()]
    model(x)
    for hook in hooks:
        hook.remove()
    return real / dense


def _dense(model: nn.Module, x: Tensor) -> dict[tuple[str, ...], Callable[[], object]]:
    found = dict[tuple[str, ...], Callable[[], object]]()
    for name, layout in LAYOUTS.items():
        own = laid_out(_folded(model), name)
        images = x.to(memory_format=layout)
        found["fp32", name] = partial(own, images)
        found["fp32", name, "jit"] = partial(_frozen(own, images), images)
        found["bf16", name] = partial(_by_autocast, own, images)
    return found


def _by_autocast(model: nn.Module, x: Tensor) -> object:
    with torch.autocast("cpu", torch.bfloat16):
        return model(x)


def _folded(model: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of torch.jit, by the import
        from torch.fx.experimental.optimization import fuse
    return fuse(model)


def _frozen(model: nn.Module, x: Tensor) -> Any:
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", DeprecationWarning)  # of torch.jit, still the faster one for small batches
        traced = torch.jit.trace(model, x)  # type: ignore[no-untyped-call]
        return torch.jit.optimize_for_inference(torch.jit.freeze(traced))
