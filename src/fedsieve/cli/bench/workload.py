"""What is measured: a network on a batch, how sparse it is, and its training steps.

The steps are dense, as a good engineer writes it in PyTorch, and sparse, by our kernels.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedsieve import kernels
from fedsieve.client.losses import Loss, NextToken
from fedsieve.client.models import MODELS
from fedsieve.client.process import seeded
from fedsieve.client.training import params_of
from fedsieve.client.vector_models import CharGPT
from fedsieve.engine.models import first_line
from fedsieve.runs.model import TrainedModel, open_model
from fedsieve.sparse.layers import swat_
from fedsieve.sparse.masks import layer_counts, random_masks
from fedsieve.sparse.policy import erdos_renyi_kernel, select_weights, uniform_densities
from fedsieve.sparse.units import check_channels, check_unit
from fedsieve.types import InputError, Mask
from fedsieve.types.errors import check_interval

Step: TypeAlias = Callable[[], object]
LR, MOMENTUM = 1e-3, 0.9
LAYOUTS: Mapping[str, torch.memory_format] = {
    "contiguous": torch.contiguous_format,
    "channels_last": torch.channels_last,
}
Rule: TypeAlias = Literal["frozen", "swat"]
"""Weights on one frozen random mask; or SWAT's top weights and activations, chosen anew every ``period`` steps."""
Storage: TypeAlias = Literal["fp32", "bf16"]
Budget: TypeAlias = Literal["uniform", "erk"]
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


NETWORKS = MODELS | {"linear": LinearNet, "char_gpt": CharGPT}
TEXTS: Mapping[str, tuple[int, int]] = {"char_gpt": (80, 65)}
"""The tokens of an example, and those of the vocabulary, of networks of text."""
SHAPES: Mapping[str, tuple[int, int, int]] = {
    "resnet18": (3, 32, 10),
    "leaf_cnn": (1, 28, 62),
    "mnist_net": (1, 28, 10),
    "mnist_net_softmax": (1, 28, 10),
    "digits_net": (1, 8, 10),
    "lenet5": (3, 32, 10),
    "feddst_net": (3, 32, 10),
    "resnet18_groupnorm": (3, 32, 10),
    "resnet50": (3, 32, 10),
    "mobilenet_v2": (3, 32, 10),
    "vit_tiny": (3, 32, 10),
    "linear": (1, 7, 2048),
}
"""Channels, side and classes of a network's images."""
POLICIES = {
    **{"resnet18": "layer*", "resnet18_groupnorm": "layer*", "resnet50": "layer*", "linear": "fc"},
    **dict.fromkeys(("mnist_net", "mnist_net_softmax", "mobilenet_v2", "vit_tiny", "char_gpt"), "flash"),
}
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
    unit: int = 1
    """How many output channels share the pattern of a frozen mask."""
    period: int = 1
    """Of SWAT: after how many steps a threshold is chosen anew, as ZeroFL's recipes do at every step."""
    recipe: str = ""
    """Of a trained model whose network is the user's own: the recipe, or the function, that makes it."""

    def __post_init__(self) -> None:
        if not self.trained:
            _check("model", self.model, NETWORKS)
        _check("rule", self.rule, ("frozen", "swat"))
        _check("storage", self.storage, ("fp32", "bf16"))
        _check("budget", self.budget, ("uniform", "erk"))
        check_interval("sparsity", self.sparsity, "[0, 1)")
        check_unit(self.unit)
        if self.unit > 1 and self.rule == "swat":
            raise InputError("unit is of frozen masks: leave --unit out, or take --rule frozen")
        if self.period < 1 or (self.period > 1 and self.rule != "swat"):
            raise InputError(f"period is a number of steps of --rule swat, got {self.period} with --rule {self.rule}")
        if self.batch < 1:
            raise InputError(f"batch must be at least 1 example, got {self.batch}")

    @property
    def trained(self) -> bool:
        """Whether ``model`` is the path of a trained one, whose zeros are its own."""
        return self.model not in NETWORKS and Path(self.model).exists()

    @property
    def text(self) -> bool:
        """Whether examples are tokens, and targets those that follow."""
        return _opened(self.model, self.recipe).metadata.next_token if self.trained else self.model in TEXTS

    @property
    def loss(self) -> Loss:
        """The loss of a training step."""
        return NextToken() if self.text else F.cross_entropy

    def network(self) -> nn.Module:
        """Return the network, always with the same weights."""
        if self.trained:
            return copy.deepcopy(_opened(self.model, self.recipe).network)
        channels, classes = TEXTS.get(self.model) or SHAPES[self.model][::2]
        with seeded(SEED, []):
            return NETWORKS[self.model](channels, classes)

    def examples(self) -> tuple[Tensor, Tensor]:
        """Return a batch of noise, always the same."""
        generator = torch.Generator().manual_seed(SEED)
        shape: tuple[int, ...]
        if self.trained:
            about = _opened(self.model, self.recipe).metadata
            shape, classes = about.shape, max(1, len(about.classes))
        elif self.text:
            length, classes = TEXTS[self.model]
            shape = (length,)
        else:
            channels, side, classes = SHAPES[self.model]
            shape = channels, side, side
        if self.text:
            x, y = (torch.randint(classes, (self.batch, *shape), generator=generator) for _ in range(2))
            return x, y
        x = torch.randn(self.batch, *shape, generator=generator)
        return x, torch.randint(classes, (self.batch,), generator=generator)

    def densities(self, model: nn.Module) -> dict[str, float]:
        """Return the density of every sparse layer."""
        policy = self.policy or ("zerofl" if self.rule == "swat" and self.model != "linear" else "")
        names = select_weights(policy or POLICIES.get(self.model, "zerofl"), model)
        if self.budget == "erk":
            return erdos_renyi_kernel(params_of(model), names, 1 - self.sparsity)
        return uniform_densities(names, 1 - self.sparsity)

    def mask(self, model: nn.Module) -> Mask:
        """Return a random mask of these densities, in memory of its own."""
        densities = self.densities(model)
        check_channels(model, densities, self.unit)
        like = {name: model.get_parameter(name) for name in densities}
        drawn = random_masks(SEED, layer_counts(densities, like, self.unit), like, self.unit)
        return {name: own.clone() for name, own in drawn.items()}

    def pruned_network(self) -> tuple[nn.Module, Mask]:
        """Return the network with its weights on the mask, and the mask."""
        model = self.network()
        mask = {} if self.trained else self.mask(model)
        with torch.no_grad():
            for name, own in mask.items():
                model.get_parameter(name).masked_fill_(~own, 0.0)
        return model, mask


@lru_cache(maxsize=1)
def _opened(path: str, recipe: str) -> TrainedModel:
    """Return a trained model. Raises InputError unless inference of it can be measured."""
    opened = open_model(Path(path), recipe)
    if not opened.metadata.shape:
        raise InputError(f"{path} does not say what one example is: compress it with shape=(...), or name its run")
    try:
        opened.network(torch.zeros(1, *opened.metadata.shape).to(opened.metadata.dtype))
    except Exception as error:
        what = f"given numbers of shape {[*opened.metadata.shape]} it fails ({first_line(error)})"
        raise InputError(f"{path}: {what}: models of numbers, images and text can be measured") from error
    return opened


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
    x = x.to(memory_format=LAYOUTS[layout]) if x.dim() == 4 else x
    weights: list[Tensor] = [model.get_parameter(name) for name in mask]
    masks: Any = [torch.empty_like(w).copy_(own) for w, own in zip(weights, mask.values(), strict=True)]
    optimizer = torch.optim.SGD(model.parameters(), LR, MOMENTUM, foreach=True)
    forward: Any = torch.compile(model) if compiled else model

    def step() -> object:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == "bf16"):
            loss = workload.loss(forward(x), y)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if weights:
            with torch.no_grad():
                torch._foreach_mul_(weights, masks)
        return loss.detach()

    return step


def sparse_trainer(workload: Workload, low_memory: bool = False) -> kernels.Trainer:
    """Return the kernels' trainer of the workload's network; ``low_memory``: with the least memory."""
    model, mask = workload.pruned_network() if workload.rule == "frozen" else (workload.network(), {})
    if workload.rule == "swat":
        swat_(model, workload.densities(model), workload.period)
    return kernels.Trainer(
        model.train(), mask, workload.batch, lr=LR, momentum=MOMENTUM, storage=workload.storage, low_memory=low_memory,
        loss=workload.loss,
    )  # fmt: skip


def sparse_step(trainer: kernels.Trainer, workload: Workload) -> Step:
    """Return the trainer's step on the workload's batch."""
    return partial(trainer.step, *workload.examples())


def instruction_set() -> str:
    """Return the instruction set that the kernels use here, or that there are none."""
    return kernels.loaded_isa() if kernels.unavailable_reason() is None else "none"


def _check(what: str, value: str, known: Mapping[str, object] | tuple[str, ...]) -> None:
    if value not in known:
        other = ", or a run directory, a .fsv file or a hub folder that is there" if what == "model" else ""
        raise InputError(f"unknown {what} {value!r}; there are {', '.join(known)}{other}")
