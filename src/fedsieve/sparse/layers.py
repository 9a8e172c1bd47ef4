"""SWAT and powerpropagation layers: the reference that every sparse kernel is checked against.

Raihan & Aamodt 2020 (SWAT), METHODS of ZeroFL Sec. 3: the forward pass uses ``w * top(w, d)``; backward, the input's
gradient comes from the full output gradient and the sparse weights, the weight's from the full output gradient and
the layer input reduced to ``top(a, d)`` over the whole batch tensor. The weight's gradient is dense and goes straight
through to the dense master weights.

Schwarz et al. 2021 (Powerpropagation), eq. 1: the layer's parameter is ``th``, its weight ``w = sign(th) |th|^a``. In
this form the gradient ``a |th|^(a-1)`` is 0, never NaN, at ``th = 0`` for ``a > 1``: an exact zero stays one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedsieve.sparse.functions import SwatConvFunction, SwatLinearFunction
from fedsieve.sparse.masks import top, topk_count
from fedsieve.sparse.periodic import PeriodicTopK, assign, on_device, share
from fedsieve.sparse.selection import cut, cuts
from fedsieve.types import InputError

Twin: TypeAlias = Callable[..., nn.Module]
"""What makes the sparse layer in place of a plain one."""


class SparseLayer(nn.Module):
    """A layer in a plain one's place: it shares the plain one's parameters, and multiplies by fewer numbers."""

    weight: Tensor
    densities: tuple[float | Tensor, float | Tensor, float | Tensor] = (1.0, 1.0, 1.0)
    """The shares of non-zeros that forward, input gradient and weight gradient multiplied by in the last step."""
    step = 0
    """The step since ``restart`` that comes next, where a layer goes by it."""
    exact = True
    """Whether the next step cuts exactly: in others a layer computes something else."""

    def effective(self) -> Tensor:
        """Return the weight that the layer computes with."""
        raise NotImplementedError

    def operands(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the weight that takes the gradient, the one that multiplies, and the input kept for backward."""
        raise NotImplementedError

    def restart(self) -> None:
        """Forget thresholds: the next step cuts exactly, as at the start of a client's training."""

    def thresholds(self) -> list[Tensor]:
        """Return the thresholds that a step may change and a later one reads."""
        return []


class _Conv2d(SparseLayer, nn.Conv2d):
    def __init__(self, plain: nn.Conv2d):
        names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
        shape: Any = {name: getattr(plain, name) for name in names}
        super().__init__(**shape, bias=plain.bias is not None, device="meta")
        self.weight, self.bias = plain.weight, plain.bias
        self.geometry: Any = (self.stride, self.padding, self.dilation, self.groups)

    def forward(self, x: Tensor) -> Tensor:
        """[n, in, h, w] -> [n, out, h', w']."""
        if not self.training:
            return F.conv2d(x, self.effective(), self.bias, *self.geometry)
        master, w, a = self.operands(x)
        y: Tensor = SwatConvFunction.apply(x, master, self.bias, w, a, self.geometry)  # type: ignore[no-untyped-call]
        return y


class _Linear(SparseLayer, nn.Linear):
    def __init__(self, plain: nn.Linear):
        super().__init__(plain.in_features, plain.out_features, plain.bias is not None, device="meta")
        self.weight, self.bias = plain.weight, plain.bias

    def forward(self, x: Tensor) -> Tensor:
        """[n, in] -> [n, out]."""
        if not self.training:
            return F.linear(x, self.effective(), self.bias)
        master, w, a = self.operands(x)
        y: Tensor = SwatLinearFunction.apply(x, master, self.bias, w, a)  # type: ignore[no-untyped-call]
        return y


class SwatLayer(SparseLayer):
    """A layer trained by SWAT."""

    def __init__(self, plain: nn.Module, density: float, period: int, cuts_weight: bool = True):
        super().__init__(plain)
        self.cut_weight, self.cut_input = PeriodicTopK(density, period), PeriodicTopK(density, period)
        self.cuts_weight = cuts_weight
        """Whether the layer cuts its weight itself: else what it has is cut already (``sparse.effective``)."""

    def effective(self) -> Tensor:
        """Return the weight's top share."""
        return self.weight * top(self.weight, self.cut_weight.density) if self.cuts_weight else self.weight

    def restart(self) -> None:
        """Forget the thresholds of weight and input."""
        self.step = 0

    def thresholds(self) -> list[Tensor]:
        """Return those of weight and input."""
        return [self.cut_weight.threshold, self.cut_input.threshold]

    @property
    def step(self) -> int:
        """The step since ``restart`` that comes next."""
        return self.cut_input.step

    @step.setter
    def step(self, step: int) -> None:
        self.cut_weight.step = self.cut_input.step = step

    @property
    def exact(self) -> bool:  # type: ignore[override]
        """Whether the next step cuts exactly."""
        return self.cut_input.exact

    @torch.no_grad()
    def operands(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the weight, its top share, and the top share of the input."""
        w = self.cut_weight(self.weight) if self.cuts_weight else self.weight.detach()
        a = self.cut_input(x)
        dw = share(w)
        self.densities = (dw, dw, share(a))
        return self.weight, w, a


class SwatConv2d(SwatLayer, _Conv2d):
    """A convolution trained by SWAT; shares the parameters of the plain one."""


class SwatLinear(SwatLayer, _Linear):
    """A linear layer trained by SWAT; shares the parameters of the plain one."""


class PowerLayer(SparseLayer):
    """A layer whose ``weight`` is th; backward sees only as large a share of its input as it has non-zeros.

    Where it is ``cached``, that share is cut in the first step whose weight has a zero, and what reaches the threshold
    of that step is kept from then on, until ``restart``.
    """

    def __init__(self, plain: nn.Module, a: float, prune: bool, cached: bool):
        super().__init__(plain)
        self.a, self.prune, self.cached = a, prune, cached
        self.threshold: Tensor | None = None

    def effective(self) -> Tensor:
        """Return sign(th) |th|^a."""
        return powerprop_weight(self.weight, self.a)

    def restart(self) -> None:
        """Forget the threshold of the input."""
        if not on_device(self.weight):
            self.threshold = None
        else:  # in the memory that captured steps read
            self.threshold = assign(self.threshold, self.weight.detach().new_full((), torch.nan))

    def thresholds(self) -> list[Tensor]:
        """Return that of the input, where there is one."""
        return [] if self.threshold is None else [self.threshold]

    def operands(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the effective weight, the same detached, and the input, pruned if that is wanted."""
        w = self.effective()
        with torch.no_grad():
            if on_device(x):
                return w, w.detach(), self._pruned_on_device(x, w)
            dw = float(share(w))
            q = max(dw, 1 / max(x.numel(), 1))  # at least one element
            sparse = self.prune and (q < 1 or self.threshold is not None)
            a = x * self._support(x, q) if sparse else x
            self.densities = (dw, dw, share(a) if sparse else 1.0)
        return w, w.detach(), a

    def _support(self, x: Tensor, q: float) -> Tensor:
        """Return what is kept of an input: its top share, or what reaches the threshold of an earlier step."""
        if self.threshold is not None:
            return x.abs() >= self.threshold
        support = top(x, q)
        if self.cached:
            self.threshold = x.abs()[support].min()
        return support

    def _pruned_on_device(self, x: Tensor, w: Tensor) -> Tensor:
        """Return the input, pruned by the same rule; a threshold that there is not yet is NaN, and nothing waits."""
        dw = share(w)
        if not self.prune:
            self.densities = (dw, dw, 1.0)
            return x
        assert isinstance(dw, Tensor)
        n = max(x.numel(), 1)
        q = dw.clamp(min=1 / n)
        a, threshold = cut(x, torch.ceil(torch.round(q * n, decimals=6)).long())
        sparse = q < 1
        if self.cached:
            if self.threshold is None:
                self.restart()
            assert self.threshold is not None
            earlier = ~self.threshold.isnan()
            a = torch.where(earlier, x * (x.abs() >= self.threshold), a)
            self.threshold.copy_(torch.where(sparse & ~earlier, threshold, self.threshold))
            sparse = sparse | earlier
        self.densities = (dw, dw, torch.where(sparse, share(a), 1.0))
        return a


class PowerConv2d(PowerLayer, _Conv2d):
    """A convolution trained by powerpropagation."""


class PowerLinear(PowerLayer, _Linear):
    """A linear layer trained by powerpropagation."""


class WeightCuts:
    """What cuts, on a GPU, the weights of all of a model's SWAT layers before a step, in the launches of one."""

    def __init__(self, layers: Iterable[SparseLayer], dtype: torch.dtype | None = None):
        self.dtype = dtype
        """What values are rounded to: the type that is multiplied."""
        self.layers = [layer for layer in layers if isinstance(layer, SwatLayer) and layer.cuts_weight]
        self._cut: Callable[[], tuple[list[Tensor], Tensor]] | None = None

    def __call__(self) -> None:
        """Cut all weights, if the next step cuts exactly."""
        if not self.layers or not self.layers[0].exact:
            return
        if self._cut is None:
            weights = [layer.weight.detach() for layer in self.layers]
            counts = [topk_count(layer.cut_weight.density, layer.weight.numel()) for layer in self.layers]
            self._cut = cuts(weights, counts, self.dtype)
        for layer, values, threshold in zip(self.layers, *self._cut(), strict=True):
            layer.cut_weight.set(values, threshold)


def powerprop_weight(th: Tensor, a: float) -> Tensor:
    """Return the effective weight sign(th) |th|^a; ``th`` itself at a = 1, with a gradient of 1 everywhere."""
    return th if a == 1 else th.sign() * th.abs().pow(a)


def powerprop_parameter(w: Tensor, a: float) -> Tensor:
    """Return the parameter whose effective weight is ``w``."""
    return powerprop_weight(w, 1 / a)


def swat_(model: nn.Module, densities: Mapping[str, float], period: int, cuts_weight: bool = True) -> nn.Module:
    """Replace, in place, every layer whose weight is named by its SWAT twin of that density, and return the model."""
    for name, density in densities.items():
        _replace_(model, name, SwatConv2d, SwatLinear, density, period, cuts_weight)
    return model


def powerprop_(model: nn.Module, names: tuple[str, ...], a: float, prune: bool, cached: bool = False) -> nn.Module:
    """Replace, in place, every layer whose weight is named by its powerpropagation twin, and return the model.

    ``prune``: keep of a layer's input for backward only the share that its effective weight has non-zeros; ``cached``:
    convolutions do so by the threshold of the first step in which there is one.
    """
    for name in names:
        conv = isinstance(model.get_submodule(name.removesuffix(".weight")), nn.Conv2d)
        _replace_(model, name, PowerConv2d, PowerLinear, a, prune, cached and conv)
    return model


def no_twin(layer: nn.Module) -> str:
    """Return why no sparse layer can take a layer's place; "" where one can."""
    conv = isinstance(layer, nn.Conv2d) and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    if not conv and not isinstance(layer, nn.Linear):
        return "a Linear, or a Conv2d with numeric zero padding, is needed"
    assert isinstance(layer, nn.Conv2d | nn.Linear)
    if own := beside_plain(layer):
        remedy = "leave it out of method.policy, or take flash, pdst, nst or topk"
        return f"a plain layer in its place would lack {own}: {remedy}"
    return ""


def _replace_(model: nn.Module, name: str, conv2d: Twin, linear: Twin, *options: Any) -> None:
    path = name.removesuffix(".weight")
    plain, parent = model.get_submodule(path), model.get_submodule(path.rpartition(".")[0])
    if why := no_twin(plain):
        raise InputError(f"layer {path} cannot be trained sparsely: {why}")
    assert isinstance(plain, nn.Conv2d | nn.Linear)
    new = (conv2d if isinstance(plain, nn.Conv2d) else linear)(plain, *options)
    new.register_forward_hook(_pass)
    setattr(parent, path.rpartition(".")[2], new)


def beside_plain(layer: nn.Conv2d | nn.Linear) -> str:
    """Return what a layer has beside that of PyTorch: a forward, hooks, parameters or other parts; "" if nothing."""
    base = nn.Linear if isinstance(layer, nn.Linear) else nn.Conv2d
    calls = ("__call__", "forward", "_conv_forward")  # what computes in a layer of PyTorch's
    if any(name in vars(layer) or getattr(type(layer), name, None) is not getattr(base, name, None) for name in calls):
        return "its own forward"
    parts = (*layer.named_parameters(), *layer.named_buffers(), *layer.named_children())
    more = [name for name, _ in parts if name not in ("weight", "bias")]
    hooks = layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
    return f"its own {more[0]}" if more else "its hooks" if hooks else ""


def keep_calls_(model: nn.Module) -> nn.Module:
    """Let PyTorch's encoder layers call layers that are no plain ones, such as adapters; return the model.

    In tests an encoder layer else computes with its parts' weights, and calls none, unless one has a hook.
    """
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            parts = module.linear1, module.linear2, module.self_attn.out_proj
            if any(type(part) not in (nn.Linear, type(nn.MultiheadAttention(1, 1).out_proj)) for part in parts):
                module.register_forward_hook(_pass)
    return model


def _pass(*_: object) -> None:
    """Do nothing: PyTorch's fused encoder layer, which calls none of its layers, is not used where one has a hook."""


def sparse_layers(model: nn.Module) -> dict[str, SparseLayer]:
    """Return the layers of a prepared model that took the place of plain ones, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SparseLayer)}
