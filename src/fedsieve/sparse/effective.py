"""Weights that a whole forward pass computes with in place of a model's parameters, wherever it reads them.

While the model that they are attached to is called, each of these parameters is replaced by a tensor computed from it,
in every module that holds it: layers, recurrent layers, attention, fused paths and bare uses alike compute with that,
and gradients go through it to the parameter. Before and after the call, also where it fails, the model has its own
parameters: its state, copies and pickles are those of the plain model.
"""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeAlias, cast

import torch
from torch import Tensor, nn

from fedsieve.sparse.layers import SparseLayer, no_twin, powerprop_, powerprop_weight, sparse_layers, swat_
from fedsieve.sparse.masks import top
from fedsieve.sparse.periodic import PeriodicTopK, share

Activations: TypeAlias = Literal["always", "where_possible"]
"""Whether a method's rule on activations holds for all weights that it makes sparse, or where a layer's product is
its own."""


class WeightRule(ABC):
    """What makes of one parameter the weight that a forward pass computes with."""

    step = 0
    """The step since ``restart`` that comes next, where a rule goes by it."""
    exact = True
    """Whether the next step cuts exactly."""

    @abstractmethod
    def weight(self, w: Tensor) -> Tensor:
        """Return the weight that a test computes with, of the parameter ``w``."""

    def of_step(self, w: Tensor) -> Tensor:
        """Return the weight of the next training step."""
        return self.weight(w)

    def restart(self) -> None:
        """Forget thresholds: the next step cuts exactly, as at the start of a client's training."""
        self.step = 0

    def thresholds(self) -> list[Tensor]:
        """Return the thresholds that a step may change and a later one reads."""
        return []


class TopShare(WeightRule):
    """The top share of a weight, as SWAT computes with: the gradient goes straight through to all of it."""

    def __init__(self, density: float, period: int):
        self.cut = PeriodicTopK(density, period)

    def weight(self, w: Tensor) -> Tensor:
        """Return the weight's top share."""
        return w * top(w, self.cut.density)

    def of_step(self, w: Tensor) -> Tensor:
        """Return the weight's top share, whose gradient is the parameter's at all positions."""
        with torch.no_grad():
            values = self.cut(w.detach())
        effective: Tensor = _StraightThrough.apply(w, values)  # type: ignore[no-untyped-call]
        return effective

    @property
    def step(self) -> int:
        """The step since ``restart`` that comes next."""
        return self.cut.step

    @step.setter
    def step(self, step: int) -> None:
        self.cut.step = step

    @property
    def exact(self) -> bool:  # type: ignore[override]
        """Whether the next step cuts exactly."""
        return self.cut.exact

    def restart(self) -> None:
        """Forget the threshold."""
        self.cut.restart()

    def thresholds(self) -> list[Tensor]:
        """Return the threshold."""
        return [self.cut.threshold]


class Power(WeightRule):
    """Powerpropagation's weight sign(th) |th|^a."""

    def __init__(self, a: float):
        self.a = a

    def weight(self, w: Tensor) -> Tensor:
        """Return sign(th) |th|^a of the parameter th."""
        return powerprop_weight(w, self.a)


class EffectiveWeights:
    """The rules of a model's parameters, by name; ``attach`` makes the model's calls go by them."""

    def __init__(self, rules: Mapping[str, WeightRule]):
        self.rules = dict(rules)
        self._replaced: list[tuple[nn.Module, str, nn.Parameter]] = []

    def attach(self, model: nn.Module) -> None:
        """Let the model compute with these weights, each in all places where it is."""
        own = {id(model.get_parameter(name)): name for name in self.rules}
        self._places: dict[str, list[tuple[str, str]]] = {name: [] for name in self.rules}
        for path, module in model.named_modules():
            for key, w in module._parameters.items():
                if name := own.get(id(w)):
                    self._places[name].append((path, key))
        model.register_forward_pre_hook(self._enter)
        model.register_forward_hook(self._leave, always_call=True)

    def _enter(self, model: nn.Module, _: object) -> None:
        self._restore()
        for name, rule in self.rules.items():
            w = model.get_parameter(name)
            effective = rule.of_step(w) if model.training else rule.weight(w)
            if model.training:
                density, declared = share(effective.detach()), cast(Any, w)
                declared.densities = (density, density, 1.0)  # for ``client.cost.Cost``
            for path, key in self._places[name]:
                module = model.get_submodule(path)
                self._replaced.append((module, key, w))
                _set(module, key, effective)

    def _leave(self, *_: object) -> None:
        self._restore()

    def _restore(self) -> None:
        while self._replaced:
            _set(*self._replaced.pop())


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor, values: Tensor) -> Tensor:
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return g, None


def _set(module: nn.Module, key: str, w: Tensor) -> None:
    """Let a module compute with a tensor, which need not be a parameter."""
    module._parameters[key] = w  # type: ignore[assignment]
    if isinstance(module, nn.RNNBase):  # what it hands to PyTorch is a list of its own
        place = module._flat_weights_names.index(key)
        module._flat_weights[place] = w
        if refs := getattr(module, "_flat_weight_refs", None):  # or it would make the list, and cuDNN's memory, anew
            refs[place] = weakref.ref(w)


def effective_weights(model: nn.Module) -> dict[str, WeightRule]:
    """Return the rules by which a prepared model computes its weights, by the parameter's name; empty without any."""
    owners = [getattr(hook, "__self__", None) for hook in model._forward_pre_hooks.values()]
    return next((owner.rules for owner in owners if isinstance(owner, EffectiveWeights)), {})


def sparse_parts(model: nn.Module) -> list[SparseLayer | WeightRule]:
    """Return what of a prepared model goes from exact cut to exact cut: sparse layers, and the rules of weights."""
    return [*sparse_layers(model).values(), *effective_weights(model).values()]


def reset_thresholds_(model: nn.Module) -> None:
    """Make everything sparse cut exactly at its next step, as at the start of a client's training."""
    for part in sparse_parts(model):
        part.restart()


def swat_where_possible_(model: nn.Module, densities: Mapping[str, float], period: int) -> nn.Module:
    """Let a model compute with the top share of each named weight, wherever it uses it, and return the model.

    Layers that can be replaced by a SWAT twin cut their input for the weight's gradient as well.
    """
    swat_(model, {name: densities[name] for name in _products(model, densities)}, period, cuts_weight=False)
    EffectiveWeights({name: TopShare(d, period) for name, d in densities.items()}).attach(model)
    return model


def powerprop_where_possible_(model: nn.Module, names: tuple[str, ...], a: float) -> nn.Module:
    """Let a model compute with sign(th) |th|^a of each named parameter, wherever it uses it, and return the model.

    Layers that can be replaced keep for backward as large a share of their input as their weight has non-zeros.
    """
    powerprop_(model, _products(model, names), 1.0, prune=True)
    EffectiveWeights({name: Power(a) for name in names}).attach(model)
    return model


def _products(model: nn.Module, names: Iterable[str]) -> tuple[str, ...]:
    """Return those of weights that a layer multiplies its input by, which a sparse one can take the place of."""
    paths = {name: name.removesuffix(".weight") for name in names if name.endswith(".weight")}
    return tuple(name for name, path in paths.items() if not no_twin(model.get_submodule(path)))
