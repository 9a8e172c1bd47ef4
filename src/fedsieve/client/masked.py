"""Local training on a mask, frozen or learnt by prune and regrow."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fedsieve.client.training import Training, mean_loss
from fedsieve.sparse.dnr import GrowthShare, prune_regrow
from fedsieve.types import Device, Mask


def train_on_mask(
    device: Device, mask: Mask, rates: Mapping[int, float] | None = None, share: GrowthShare = "mean"
) -> tuple[dict[str, float], Mask]:
    """Train ``device.model`` on a mask; after step s, prune and regrow at the rate ``rates[s]``.

    Without rates the mask is frozen. Returns the metrics and the mask at the end.
    """
    _declare_(device.model, mask)
    training, losses = Training(device, mask), list[Tensor]()
    for step, loss in enumerate(training, start=1):
        losses.append(loss)
        if rates and rates.get(step):
            training.steps.write_()
            mask = _moved(device, mask, rates[step], share)
            training.steps.put_(mask)
    return mean_loss(losses), mask


def _moved(device: Device, mask: Mask, p: float, share: GrowthShare) -> Mask:
    """Return the mask after a step of DNR on the model's weights, which are left on both masks."""
    weights = {name: device.model.get_parameter(name) for name in mask}
    now = {name: w.detach().cpu() for name, w in weights.items()}
    left, after = prune_regrow(now, mask, p, share, device.rng)
    with torch.no_grad():
        for name, w in weights.items():
            w.copy_(left[name])
    _declare_(device.model, after)
    return after


def epoch_ends(device: Device) -> tuple[int, int]:
    """Return the steps of one local epoch, and of the whole local training."""
    steps = -(-len(device.data) // device.batch)
    return steps, steps * device.epochs


def _declare_(model: nn.Module, mask: Mask) -> None:
    """Tell ``client.cost.Cost`` what share of its products each layer on a mask needs."""
    for name, own in mask.items():
        d = int(own.sum()) / max(own.numel(), 1)
        layer: Any = model.get_submodule(name.rpartition(".")[0])
        layer.densities = (d, d, d)
