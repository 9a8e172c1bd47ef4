"""What is measured: the step of a network on a batch, and how sparse it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedsieve.client.models import MODELS
from fedsieve.client.process import seeded
from fedsieve.client.training import params_of
from fedsieve.sparse.masks import layer_counts, random_masks
from fedsieve.sparse.policy import erdos_renyi_kernel, select_weights, uniform_densities
from fedsieve.types import InputError, Mask, check_interval

Rule: TypeAlias = Literal["frozen", "swat"]
"""Weights on one frozen random mask; or SWAT's top weights and activations, chosen anew every ``PERIOD`` steps."""
Storage: TypeAlias = Literal["fp32", "bf16"]
Budget: TypeAlias = Literal["uniform", "erk"]
PERIOD = 10
SEED = 0


class LinearNet(nn.Module):
    """LEAF's fc1 (3136 to 2048) alone: the convolution before it costs next to nothing but asks for a gradient."""

    def __init__(self, channels: int = 1, classes: int = 2048):
        super().__init__()
        self.conv = nn.Conv2d(channels, 64, 1)
        self.fc = nn.Linear(64 * 7 * 7, classes)

    def forward(self, x: Tensor) -> Tensor:
        """[n, channels, 7, 7] -> [n, classes]."""
        logits: Tensor = self.fc(F.relu(self.conv(x)).flatten(1))
        return logits


NETWORKS = MODELS | {"linear": LinearNet}
SHAPES: Mapping[str, tuple[int, int, int]] = {
    "resnet18": (3, 32, 10),
    "leaf_cnn": (1, 28, 62),
    "mnist_net": (1, 28, 10),
    "digits_net": (1, 8, 10),
    "linear": (1, 7, 2048),
}
"""Channels, side and classes of a network's images."""
POLICIES = {"resnet18": "layer*", "mnist_net": "flash", "linear": "fc"}
"""The policy on a frozen mask, where it is not ``zerofl``: ResNet-18's shortcuts are sparse too."""


@dataclass(frozen=True)
class Workload:
    """A training step or an inference to measure. Raises InputError on what cannot be measured."""

    model: str = "resnet18"
    batch: int = 16
    sparsity: float = 0.9
    rule: Rule = "frozen"
    storage: Storage = "fp32"
    policy: str = ""
    """Which layers are sparse; empty: the model's own choice."""
    budget: Budget = "uniform"
    """How the density is shared among the layers: the same for each, or by Erdos-Renyi-kernel."""

    def __post_init__(self) -> None:
        _check("model", self.model, NETWORKS)
        _check("rule", self.rule, ("frozen", "swat"))
        _check("storage", self.storage, ("fp32", "bf16"))
        _check("budget", self.budget, ("uniform", "erk"))
        check_interval("sparsity", self.sparsity, "[0, 1)")
        if self.batch < 1:
            raise InputError(f"batch must be at least 1 example, got {self.batch}")

    def network(self) -> nn.Module:
        """Return the network, always with the same weights."""
        channels, _, classes = SHAPES[self.model]
        with seeded(SEED, []):
            return NETWORKS[self.model](channels, classes)

    def examples(self) -> tuple[Tensor, Tensor]:
        """Return a batch of noise, always the same."""
        channels, side, classes = SHAPES[self.model]
        generator = torch.Generator().manual_seed(SEED)
        x = torch.randn(self.batch, channels, side, side, generator=generator)
        return x, torch.randint(classes, (self.batch,), generator=generator)

    def densities(self, model: nn.Module) -> dict[str, float]:
        """Return the density of every sparse layer."""
        chosen = self.policy or ("zerofl" if self.rule == "swat" and self.model != "linear" else "")
        names = select_weights(chosen or POLICIES.get(self.model, "zerofl"), model)
        if self.budget == "erk":
            return erdos_renyi_kernel(params_of(model), names, 1 - self.sparsity)
        return uniform_densities(names, 1 - self.sparsity)

    def mask(self, model: nn.Module) -> Mask:
        """Return a random mask of these densities, in memory of its own."""
        densities = self.densities(model)
        like = {name: model.get_parameter(name) for name in densities}
        return {name: own.clone() for name, own in random_masks(SEED, layer_counts(densities, like), like).items()}

    def pruned_network(self) -> tuple[nn.Module, Mask]:
        """Return the network with its weights on the mask, and the mask."""
        model = self.network()
        mask = self.mask(model)
        with torch.no_grad():
            for name, own in mask.items():
                model.get_parameter(name).masked_fill_(~own, 0.0)
        return model, mask


def _check(what: str, value: str, known: Mapping[str, object] | tuple[str, ...]) -> None:
    if value not in known:
        raise InputError(f"unknown {what} {value!r}; there are {', '.join(known)}")
