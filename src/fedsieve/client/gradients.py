"""Gradients beside training: of one batch, at all positions, for what a mask may grow by."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fedsieve.client.training import train_
from fedsieve.types import Device, Params, apply_model, compute_loss


def gradient(device: Device, index: Tensor) -> Params:
    """Return the loss's gradient of the examples at ``index`` (int64 [b]) by all trained parameters, at all positions.

    It is of the weights that ``device.model`` has, in training, and lies on the CPU; the model stays as it is.
    """
    model = train_(device.model)
    before = {name: value.clone() for name, value in model.named_buffers()}
    draws = device.augment.draw(len(index), device.rng) if device.augment else None
    ((x, y),) = replace(device, batch=len(index)).batches(index, draws)
    named = {name: w for name, w in model.named_parameters() if w.requires_grad}
    with _dense_weight_gradients(model):
        loss = compute_loss(device.loss, apply_model(model, x), y)
        gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True, materialize_grads=True)
    with torch.no_grad():
        for name, value in model.named_buffers():
            value.copy_(before[name])
    return {name: g.detach().to_dense().cpu() for name, g in zip(named, gradients, strict=True)}


@contextmanager
def _dense_weight_gradients(model: nn.Module) -> Iterator[None]:
    """Let layers and weights that declare what share of their products they need declare all of weights' gradients."""
    several: list[Any] = [one for one in (*model.modules(), *model.parameters()) if hasattr(one, "densities")]
    before = [one.densities for one in several]
    for one in several:
        one.densities = (*one.densities[:2], 1.0)
    try:
        yield
    finally:
        for one, own in zip(several, before, strict=True):
            one.densities = own
