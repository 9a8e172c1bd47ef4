"""Sparse layers for anybody's PyTorch model, differentiable; a whole step of ``Trainer``'s is much faster."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fedsieve.kernels import ops
from fedsieve.kernels.checks import boolean_mask, floats


def sparse_conv2d(x: Tensor, weight: Tensor, mask: Tensor, stride: int = 1, padding: int = 0) -> Tensor:
    """Return ``F.conv2d(x, weight * mask, None, stride, padding)``; the weight's gradient is zero off the mask."""
    out: Tensor = SparseConv2d.apply(x, weight, mask, stride, padding)  # type: ignore[no-untyped-call]
    return out


def sparse_linear(x: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
    """Return ``F.linear(x, weight * mask)`` for x [n, in]; the weight's gradient is zero off the mask."""
    out: Tensor = SparseLinear.apply(x, weight, mask)  # type: ignore[no-untyped-call]
    return out


class SparseConv2d(torch.autograd.Function):
    """The convolution with a masked weight: ``sparse_conv2d``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, mask: Tensor, stride: int, padding: int) -> Tensor:
        """Compute with the mask's weights alone."""
        values = floats("weight", weight, *boolean_mask("mask", mask, 4).shape)[mask]
        ctx.save_for_backward(x, values, mask)
        ctx.stride, ctx.padding = stride, padding
        return ops.conv2d(x, values, mask, None, stride, padding)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        """Return the gradients that are asked for."""
        x, values, mask = ctx.saved_tensors
        how = (ctx.stride, ctx.padding)
        back = ops.conv2d_input_gradient(grad, values, mask, x.shape[2:], *how) if ctx.needs_input_grad[0] else None
        grad_values = ops.conv2d_weight_gradient(grad, x, mask, *how) if ctx.needs_input_grad[1] else None
        return back, _scatter(grad_values, mask), None, None, None


class SparseLinear(torch.autograd.Function):
    """The linear layer with a masked weight: ``sparse_linear``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
        """Compute with the mask's weights alone."""
        values = floats("weight", weight, *boolean_mask("mask", mask, 2).shape)[mask]
        ctx.save_for_backward(x, values, mask)
        return ops.linear(x, values, mask)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """Return the gradients that are asked for."""
        x, values, mask = ctx.saved_tensors
        back = ops.linear_input_gradient(grad, values, mask) if ctx.needs_input_grad[0] else None
        grad_values = ops.linear_weight_gradient(grad, x, mask) if ctx.needs_input_grad[1] else None
        return back, _scatter(grad_values, mask), None


def _scatter(values: Tensor | None, mask: Tensor) -> Tensor | None:
    return None if values is None else values.new_zeros(mask.shape).masked_scatter(mask, values)
