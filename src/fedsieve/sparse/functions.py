"""Products whose gradients are SWAT's: the input's comes of the sparse weight, the weight's of the sparse input."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


class SwatConvFunction(torch.autograd.Function):
    """A convolution with ``w``, whose weight's gradient, dense and for ``weight``, comes of the input ``a``."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, w: Tensor, a: Tensor, geometry: Any
    ) -> Tensor:
        """[n, in, h, w] -> [n, out, h', w']."""
        y = F.conv2d(x, w, bias, *geometry)
        ctx.save_for_backward(w.to(y.dtype), a.to(y.dtype))  # another type under autocast
        ctx.geometry, ctx.bias = geometry, bias is not None
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of input, weight and bias, of the output's."""
        w, a = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.geometry
        needs_grad = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.bias]
        grads = torch.ops.aten.convolution_backward(
            g, a, w, [w.shape[0]], stride, padding, dilation, False, [0, 0], groups, needs_grad
        )
        return *grads, None, None, None


class SwatLinearFunction(torch.autograd.Function):
    """A linear layer with ``w``, whose weight's gradient, dense and for ``weight``, comes of the input ``a``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, w: Tensor, a: Tensor) -> Tensor:
        """[n, in] -> [n, out]."""
        y = F.linear(x, w, bias)
        ctx.save_for_backward(w.to(y.dtype), a.to(y.dtype))
        ctx.bias = bias is not None
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of input, weight and bias, of the output's."""
        w, a = ctx.saved_tensors
        rows = g.reshape(-1, g.shape[-1])
        grad_weight = rows.T @ a.reshape(-1, a.shape[-1])
        return g @ w if ctx.needs_input_grad[0] else None, grad_weight, rows.sum(0) if ctx.bias else None, None, None
