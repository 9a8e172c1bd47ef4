"""The time of an inference, sparse against dense, for one batch.

Dense is the fastest of PyTorch's eager mode in both layouts, BatchNorm folded into the convolutions, and torch.jit
frozen for inference in both; the same eager ones under bf16 autocast beside it.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fedsieve import kernels
from fedsieve.cli.bench.measurement import Effort, Measurement, compare_times, measure, warm_up
from fedsieve.cli.bench.workload import LAYOUTS, Workload, to_layout
from fedsieve.client.process import keep_freed_memory
from fedsieve.kernels import unavailable_reason
from fedsieve.sparse.policy import weight_layers


def measure_inference(workload: Workload, effort: Effort) -> Measurement:
    """Return the times of an inference, measured in a process of its own."""
    return measure(time_inference, workload, effort)


def time_inference(workload: Workload, **effort: Any) -> dict[str, Any]:
    """Return the times of an inference and its density a multiply-add, measured in this process."""
    keep_freed_memory()
    model, x = workload.pruned_network()[0].eval(), workload.examples()[0]
    with torch.inference_mode():
        calls = {key: warm_up(call) for key, call in _dense_variants(model, x).items()}
    if unavailable_reason() is None and (predictor := sparse_predictor(workload, model, x)).reason is None:
        calls["sparse",] = warm_up(partial(predictor, x))
    with torch.inference_mode():
        return compare_times(calls, Effort(**effort)) | {"density_per_multiply_add": forward_density(model, x)}


def sparse_predictor(workload: Workload, model: nn.Module, x: Tensor) -> kernels.Predictor:
    """Return what skips the zeros, having computed once; its ``reason`` says why it computes by PyTorch."""
    predictor = kernels.Predictor(model, workload.batch, workload.storage)
    predictor(x)
    return predictor


@torch.no_grad()
def forward_density(model: nn.Module, x: Tensor) -> float:
    """Return the share of a forward pass's multiply-adds whose weight is not zero."""
    real, dense = 0.0, 0

    def count(layer: nn.Module, _: object, output: Tensor) -> None:
        nonlocal real, dense
        weight = layer.get_parameter("weight")
        products = output.numel() * weight[0].numel()
        real += products * int(weight.count_nonzero()) / weight.numel()
        dense += products

    hooks = [layer.register_forward_hook(count) for layer in weight_layers(model).values()]
    model(x)
    for hook in hooks:
        hook.remove()
    return real / dense if dense else 1.0


def _dense_variants(model: nn.Module, x: Tensor) -> dict[tuple[str, ...], Callable[[], object]]:
    variants = dict[tuple[str, ...], Callable[[], object]]()
    for name, layout in LAYOUTS.items() if x.dim() == 4 else [("contiguous", torch.contiguous_format)]:
        own = to_layout(_fuse_batchnorm(model), name)
        images = x.to(memory_format=layout)
        variants["fp32", name] = partial(own, images)
        with suppress(Exception):  # a model of a user's own need not be one that torch.jit takes
            variants["fp32", name, "jit"] = partial(_freeze(own, images), images)
        variants["bf16", name] = partial(_autocast, own, images)
    return variants


def _autocast(model: nn.Module, x: Tensor) -> object:
    with torch.autocast("cpu", torch.bfloat16):
        return model(x)


def _fuse_batchnorm(model: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of torch.jit, by the import
        from torch.fx.experimental.optimization import fuse
    try:
        return fuse(model)
    except Exception:  # what torch.fx cannot trace runs as it is
        return copy.deepcopy(model)


def _freeze(model: nn.Module, x: Tensor) -> Any:
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", DeprecationWarning)  # of torch.jit, still the faster one for small batches
        traced = torch.jit.trace(model, x)  # type: ignore[no-untyped-call]
        return torch.jit.optimize_for_inference(torch.jit.freeze(traced))
