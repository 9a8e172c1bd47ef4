"""SWAT layers: the reference that every sparse kernel is checked against.

Raihan & Aamodt 2020 (SWAT), METHODS of ZeroFL Sec. 3: the forward pass uses ``w * top(w, d)``; backward, the input's
gradient comes from the full output gradient and the sparse weights, the weight's from the full output gradient and
the layer input reduced to ``top(a, d)`` over the whole batch tensor. The weight's gradient is dense and goes straight
through to the dense master weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fedsieve.sparsity import top
from fedsieve.types import InputError


class Cut:
    """Keep the top share of a tensor: exactly every ``period`` calls, by the last threshold in between."""

    def __init__(self, density: float, period: int):
        self.density, self.period = density, period
        self.restart()

    def restart(self) -> None:
        """Forget the threshold: the next call cuts exactly."""
        self.step, self.threshold = 0, torch.zeros(())

    def __call__(self, x: Tensor) -> Tensor:
        """Return ``x``, zero off its support."""
        refresh = self.step % self.period == 0
        self.step += 1
        support = top(x, self.density) if refresh else x.abs() >= self.threshold
        if refresh and self.period > 1:
            self.threshold = x.abs()[support].min()
        return x * support


class SwatConv2d(nn.Conv2d):
    """A convolution trained by SWAT; shares the parameters of the plain one."""

    def __init__(self, plain: nn.Conv2d, density: float, period: int):
        super().__init__(**_shape(plain), bias=plain.bias is not None, device="meta")
        self.weight, self.bias = plain.weight, plain.bias
        self.geometry: Any = (self.stride, self.padding, self.dilation, self.groups)
        self.cut_weight, self.cut_input = Cut(density, period), Cut(density, period)
        self.densities = (1.0, 1.0, 1.0)

    def forward(self, x: Tensor) -> Tensor:
        """[n, in, h, w] -> [n, out, h', w']."""
        if not self.training:
            w = self.weight * top(self.weight, self.cut_weight.density)
            return F.conv2d(x, w, self.bias, *self.geometry)
        with torch.no_grad():
            w, a = self.cut_weight(self.weight), self.cut_input(x)
        self.densities = _densities(w, a)
        y: Tensor = _SwatConv.apply(x, self.weight, self.bias, w, a, self.geometry)  # type: ignore[no-untyped-call]
        return y


class SwatLinear(nn.Linear):
    """A linear layer trained by SWAT; shares the parameters of the plain one."""

    def __init__(self, plain: nn.Linear, density: float, period: int):
        super().__init__(plain.in_features, plain.out_features, plain.bias is not None, device="meta")
        self.weight, self.bias = plain.weight, plain.bias
        self.cut_weight, self.cut_input = Cut(density, period), Cut(density, period)
        self.densities = (1.0, 1.0, 1.0)

    def forward(self, x: Tensor) -> Tensor:
        """[n, in] -> [n, out]."""
        if not self.training:
            return F.linear(x, self.weight * top(self.weight, self.cut_weight.density), self.bias)
        with torch.no_grad():
            w, a = self.cut_weight(self.weight), self.cut_input(x)
        self.densities = _densities(w, a)
        y: Tensor = _SwatLinear.apply(x, self.weight, self.bias, w, a)  # type: ignore[no-untyped-call]
        return y


def swat_(model: nn.Module, densities: Mapping[str, float], period: int) -> nn.Module:
    """Replace, in place, every layer whose weight is named by its SWAT twin of that density, and return the model."""
    for name, density in densities.items():
        path = name.removesuffix(".weight")
        parent = model.get_submodule(path.rpartition(".")[0])
        setattr(parent, path.rpartition(".")[2], _twin(path, model.get_submodule(path), density, period))
    return model


def restart_(model: nn.Module) -> None:
    """Make every SWAT layer cut exactly at its next step, as at the start of a client's training."""
    for layer in model.modules():
        if isinstance(layer, SwatConv2d | SwatLinear):
            layer.cut_weight.restart()
            layer.cut_input.restart()


def _twin(path: str, plain: nn.Module, density: float, period: int) -> nn.Module:
    if isinstance(plain, nn.Linear):
        return SwatLinear(plain, density, period)
    if isinstance(plain, nn.Conv2d) and plain.padding_mode == "zeros" and not isinstance(plain.padding, str):
        return SwatConv2d(plain, density, period)
    raise InputError(
        f"layer {path} cannot be trained by SWAT: a Linear, or a Conv2d with numeric zero padding, is needed"
    )


def _shape(conv: nn.Conv2d) -> dict[str, Any]:
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
    return {name: getattr(conv, name) for name in names}


def _densities(w: Tensor, a: Tensor) -> tuple[float, float, float]:
    """Return the shares of non-zeros that forward, input gradient and weight gradient multiply by."""
    dw = int(w.count_nonzero()) / w.numel()
    return dw, dw, int(a.count_nonzero()) / max(a.numel(), 1)


class _SwatConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, w: Tensor, a: Tensor, geometry: Any
    ) -> Tensor:
        ctx.save_for_backward(w, a)
        ctx.geometry, ctx.bias = geometry, bias is not None
        return F.conv2d(x, w, bias, *geometry)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        w, a = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.geometry
        wanted = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.bias]
        grads = torch.ops.aten.convolution_backward(
            g, a, w, [w.shape[0]], stride, padding, dilation, False, [0, 0], groups, wanted
        )
        return *grads, None, None, None


class _SwatLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, w: Tensor, a: Tensor) -> Tensor:
        ctx.save_for_backward(w, a)
        ctx.bias = bias is not None
        return F.linear(x, w, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        w, a = ctx.saved_tensors
        rows = g.reshape(-1, g.shape[-1])
        grad_weight = rows.T @ a.reshape(-1, a.shape[-1])
        return g @ w if ctx.needs_input_grad[0] else None, grad_weight, rows.sum(0) if ctx.bias else None, None, None
