"""``fedsieve.compress``: a model that was trained elsewhere, pruned once by magnitude, as what FedSieve ships."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Literal, get_args

import torch
from torch import nn

from fedsieve.client.training import params_of
from fedsieve.engine.models import first_line, resolve_model
from fedsieve.runs.model import ModelMetadata, TrainedModel, module_name
from fedsieve.sparse.masks import global_top, keep_topk, weight_density
from fedsieve.sparse.policy import erdos_renyi_kernel, select_weights, uniform_densities
from fedsieve.sparse.units import check_channels, check_unit
from fedsieve.types import InputError
from fedsieve.types.errors import check_interval

Pruning = Literal["global", "uniform", "erk"]
"""One cut over all of the policy's weights; the same density for each layer; Erdos-Renyi-kernel's densities."""


@dataclass(frozen=True)
class CompressedModel(TrainedModel):
    """A model that was pruned after its training."""

    names: tuple[str, ...] = ()
    """The weights that the policy prunes."""

    def line(self) -> str:
        """Return in a line how dense it is."""
        within, every = weight_density(self.weights(), self.names), self.density()
        return f"density {within:.2%} of the {len(self.names)} weight tensors that the policy names, {every:.2%} of all"


@torch.no_grad()
def compress(
    model: nn.Module | TrainedModel,
    density: float = 0.1,
    method: Pruning = "global",
    *,
    policy: str = "all",
    unit: int = 1,
    shape: Sequence[int] = (),
    classes: Sequence[str] = (),
    mean: Sequence[float] = (0.0,),
    std: Sequence[float] = (1.0,),
) -> CompressedModel:
    """Return a copy of a trained model that keeps the weights of the largest magnitudes, ``density`` of the policy's.

    ``method`` says where: ``global``, one cut over all of them, exactly ceil(density n) of n; ``uniform``, so of each
    layer; ``erk``, of each layer the density that Erdos-Renyi-kernel gives it. Ties go to the first position. ``unit``:
    so many output channels keep a position together, by their norm, or lose it (n then counts such units). Biases and
    what ``policy`` leaves out stay. To be predicted with, and exported as ONNX, a module needs the ``shape`` of one
    example, the names of its ``classes`` (default: numbers), and the ``mean`` and ``std`` that inputs are normalised
    with; a model of a run has them. Raises InputError.
    """
    check_interval("density", density, "(0, 1]")
    check_unit(unit)
    if method not in get_args(Pruning):
        raise InputError(f"method must be one of {', '.join(get_args(Pruning))}, got {method!r}")
    if isinstance(model, TrainedModel):
        network, metadata = copy.deepcopy(model.network), model.metadata
    elif isinstance(model, nn.Module):
        network = resolve_model(model)
        about = {"task": {"model": module_name(network)}}
        plain = (tuple(map(float, numbers)) for numbers in (mean, std))
        metadata = ModelMetadata("compress", version("fedsieve"), about, tuple(classes), tuple(shape), *plain)
    else:
        raise InputError(f"compress needs a torch.nn.Module or a model of open_model, got {type(model).__name__}")
    network.requires_grad_(True)  # a frozen weight is as large as others, and nothing is trained here
    names, params = select_weights(policy, network), params_of(network)
    check_channels(network, names, unit)
    if odd := [name for name in names if not bool(params[name].isfinite().all())]:
        raise InputError(f"{odd[0]} holds NaN or infinity: give weights from before they diverged")
    if method == "global":
        pruned = {name: params[name] * mask for name, mask in global_top(params, names, density, unit).items()}
    else:
        share = erdos_renyi_kernel(params, names, density) if method == "erk" else uniform_densities(names, density)
        pruned = keep_topk({name: params[name] for name in names}, share, unit)
    for name, value in pruned.items():
        network.get_parameter(name).copy_(value)
    network.requires_grad_(False).eval()
    how: dict[str, object] = {"density": density, "method": method, "policy": policy}
    how |= {"unit": unit} if unit > 1 else {}
    metadata = replace(metadata, run=metadata.run | {"compress": how})
    return CompressedModel(network, _with_classes(network, metadata), names)


def _with_classes(network: nn.Module, metadata: ModelMetadata) -> ModelMetadata:
    """Return the metadata with numbers for the classes that are not named. Raises InputError if the shape is wrong."""
    if not metadata.shape:
        return metadata
    try:
        logits = network(torch.zeros(2, *metadata.shape))
    except Exception as error:
        raise InputError(
            f"shape: given examples of {[*metadata.shape]} the model fails ({first_line(error)})"
        ) from error
    count = logits.shape[-1] if isinstance(logits, torch.Tensor) and logits.dim() == 2 else 0
    if metadata.classes and count != len(metadata.classes):
        raise InputError(f"classes: {len(metadata.classes)} names for a model that tells {count} apart")
    return replace(metadata, classes=metadata.classes or tuple(map(str, range(count))))
