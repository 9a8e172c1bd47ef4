"""One training twice, by PyTorch and by the kernels."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from fedsieve import Device
from fedsieve.client.cost import Cost
from fedsieve.client.training import params_of
from fedsieve.kernels.dispatch import Kernels
from fedsieve.sparse.layers import powerprop_, swat_
from fedsieve.sparse.masks import layer_counts, random_masks
from fedsieve.sparse.policy import select_weights
from fedsieve.types import Mask, rng
from tiny import TinyNet, blobs

SHAPE = (2, 6, 6)


def mask_of(model: nn.Module, d: float, seed: int = 1) -> Mask:
    like = {name: model.get_parameter(name) for name in select_weights("flash", model)}
    return random_masks(seed, layer_counts(dict.fromkeys(like, d), like), like)


def device_of(model: nn.Module, cost: Cost | None = None, examples: int = 40, **changes: Any) -> Device:
    data = blobs().train.subset(torch.arange(examples))
    settings: dict[str, Any] = {"lr": 0.1, "epochs": 2, "batch": 16, "momentum": 0.0, "weight_decay": 0.0} | changes
    return Device(model, data, data, rng=rng(0, "x"), steps=cost.begin if cost else None, **settings)


def fresh(rule: str = "plain") -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = TinyNet()
    if rule == "swat":
        return swat_(model, {"conv2.weight": 0.3, "fc1.weight": 0.2}, 1)
    if rule == "unused":
        with torch.random.fork_rng():
            model.spare, model.spare_norm = nn.Linear(5, 3), nn.BatchNorm2d(4)
    if rule in ("plain", "unused"):
        return model
    powers = ("conv2.weight", "fc1.weight")
    with (
        torch.no_grad()
    ):  # the slope of |w|^1.25 has none at 0: no weight comes there, where rounding alone would count
        for name in powers:
            model.get_parameter(name).add_(model.get_parameter(name).sign(), alpha=0.1)
    return powerprop_(model, powers, 1.25, True, cached=rule == "cached")


def both(rule: str = "plain", **changes: Any) -> Iterator[tuple[nn.Module, Device]]:
    """The same training twice: by PyTorch, and by the kernels."""
    for way in ("dense", "sparse"):
        model = fresh(rule)
        yield model, device_of(model, Cost(model, Kernels(model, way)), **changes)


def assert_equal(models: list[nn.Module]) -> None:
    dense, sparse = map(params_of, models)
    for name, value in dense.items():
        torch.testing.assert_close(sparse[name], value, rtol=0, atol=1e-5)
