"""LoRA, low-rank adapters beside frozen linear layers (Hu et al. 2022, "LoRA: Low-Rank Adaptation of Large Language
Models").

A layer's product becomes ``W x + b + (alpha / rank) B A x``; W and b are frozen, A [rank, in] and B [out, rank] are
trained, under the names of peft: ``lora_A.weight`` and ``lora_B.weight``. A model of peft's needs nothing of this.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedsieve.sparse.layers import beside_plain, keep_calls_
from fedsieve.types import InputError

A, B = "lora_A.weight", "lora_B.weight"
"""What the names of adapters end in."""


class LoRALinear(nn.Linear):
    """A linear layer whose own weight is frozen, with an adapter; it takes over the layer's parameters."""

    def __init__(self, layer: nn.Linear, rank: int, alpha: float):
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias, self.scale = layer.weight, layer.bias, alpha / rank
        with torch.device("meta"):  # so that no chance is taken from the run's
            self.lora_A = nn.Linear(self.in_features, rank, bias=False)
            self.lora_B = nn.Linear(rank, self.out_features, bias=False)
        self.lora_A.weight = nn.Parameter(layer.weight.new_zeros(rank, self.in_features))
        self.lora_B.weight = nn.Parameter(layer.weight.new_zeros(self.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        product: Tensor = self.lora_B(self.lora_A(x))
        return F.linear(x, self.weight, self.bias) + self.scale * product

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """Return the plain layer that computes the same."""
        with torch.device("meta"):
            layer = nn.Linear(self.in_features, self.out_features)
        layer.weight = nn.Parameter(self.weight + self.scale * (self.lora_B.weight @ self.lora_A.weight))
        layer.bias = self.bias
        layer.train(self.training)
        return layer


@dataclass(frozen=True)
class LoRA:
    """Adapters on linear layers; all else of the model is frozen."""

    rank: int = 8
    """The rows of A, and columns of B."""
    alpha: float = 16.0
    """BA is multiplied with alpha / rank."""
    modules: str = "*"
    """Which linear layers have one: names and patterns, by commas (``"*.qkv,*.proj"``)."""
    trained: str = ""
    """Which modules or parameters are trained whole beside them, such as a new head: names and patterns, by commas."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise InputError(f"task.adapters.rank must be 1 or more, got {self.rank}")
        if not 0 < self.alpha < math.inf:
            raise InputError(f"task.adapters.alpha must be positive, got {self.alpha}")

    def attach_(self, model: nn.Module, rng: torch.Generator | None = None) -> nn.Module:
        """Freeze a model, and give it adapters, A drawn as PyTorch draws linear weights, B zero. Raises InputError."""
        if any(name.endswith((A, B)) for name, _ in model.named_parameters()):
            raise InputError("task.adapters: the model has adapters of its own (peft's): leave task.adapters out")
        fused = {id(one) for module in model.modules() if isinstance(module, nn.MultiheadAttention)
                 for one in module.modules()}  # fmt: skip
        layers = {n: m for n, m in model.named_modules() if type(m) is nn.Linear and id(m) not in fused}
        chosen = [name for name in layers if _matches(name, self.modules)]
        whole = [name for name, _ in model.named_parameters() if self.trained and _matches(name, self.trained)]
        for field, patterns, found in (("modules", self.modules, chosen), ("trained", self.trained, whole)):
            if patterns and not found:
                what = f"the linear layers are {', '.join([*layers][:40]) or 'none'}"
                raise InputError(f"task.adapters.{field}={patterns} matches nothing; {what}")
        for name in chosen:
            if own := beside_plain(layers[name]):
                raise InputError(f"task.adapters: one in the place of {name} would lack {own}: leave it out of modules")
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in whole)
        for name in chosen:
            if any(f"{name}.{part}" in whole for part in ("weight", "bias")):
                continue  # trained whole: an adapter beside it adds nothing
            parent, _, last = name.rpartition(".")
            layer = LoRALinear(layers[name], self.rank, self.alpha)
            if rng is not None:
                nn.init.kaiming_uniform_(layer.lora_A.weight, a=math.sqrt(5), generator=rng)
            setattr(model.get_submodule(parent), last, layer)
        return keep_calls_(model)


def _matches(name: str, patterns: str) -> bool:
    """Tell whether a module or parameter, or the module that holds it, has a name that one of the patterns matches."""
    several = (pattern.strip() for pattern in patterns.split(","))
    return any(fnmatchcase(name, one) or fnmatchcase(name.rpartition(".")[0], one) for one in several)


def merge_adapters_(model: nn.Module) -> nn.Module:
    """Put the plain layer that computes the same in the place of each with an adapter; return the model."""
    for name, layer in [*model.named_modules()]:
        if isinstance(layer, LoRALinear):
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, layer.merged())
    return model
