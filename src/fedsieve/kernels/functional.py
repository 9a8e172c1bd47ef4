"""Sparse layers for anybody's PyTorch model, differentiable; a whole step of ``Trainer``'s is much faster.

They are made of ``conv2d`` and its gradients: kernels as functions of ordinary tensors, packed and unpacked. Weights
are ``values`` [nnz] on a boolean ``mask``, in its order. Inputs are float32 on the CPU, in any memory order; anything
else is an InputError. NaN and infinity pass through as in PyTorch. ``storage``: "fp32", or "bf16", which rounds every
map to bfloat16 and sums in float32.
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from fedsieve.kernels.abi import DotOp, FeatureMap, GatherOp, Operation, PackOp, address
from fedsieve.kernels.checks import LARGEST, boolean_mask, floats, integer, is_bf16
from fedsieve.kernels.index import SparseIndex
from fedsieve.kernels.program import Program
from fedsieve.types import InputError

Storage: TypeAlias = Literal["fp32", "bf16"]


def sparse_conv2d(x: Tensor, weight: Tensor, mask: Tensor, stride: int = 1, padding: int = 0) -> Tensor:
    """Return ``F.conv2d(x, weight * mask, None, stride, padding)``; the weight's gradient is zero off the mask."""
    out: Tensor = SparseConv2d.apply(x, weight, mask, stride, padding)  # type: ignore[no-untyped-call]
    return out


def sparse_linear(x: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
    """Return ``F.linear(x, weight * mask)`` for x [n, in]; the weight's gradient is zero off the mask."""
    mask = boolean_mask("mask", mask, 2)
    floats("weight", weight, *mask.shape)
    floats("x", x, None, None)
    return sparse_conv2d(x[..., None, None], weight[..., None, None], mask[..., None, None]).flatten(1)


class SparseConv2d(torch.autograd.Function):
    """The convolution with a masked weight: ``sparse_conv2d``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, mask: Tensor, stride: int, padding: int) -> Tensor:
        """Compute with the mask's weights alone."""
        values = floats("weight", weight, *boolean_mask("mask", mask, 4).shape)[mask]
        ctx.save_for_backward(x, values, mask)
        ctx.stride, ctx.padding = stride, padding
        return conv2d(x, values, mask, None, stride, padding)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        """Return the gradients that are asked for."""
        (x, values, mask), geometry = ctx.saved_tensors, (ctx.stride, ctx.padding)
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = conv2d_input_gradient(grad, values, mask, x.shape[2:], *geometry)
        if ctx.needs_input_grad[1]:
            grad_values = conv2d_weight_gradient(grad, x, mask, *geometry)
            grad_weight = values.new_zeros(mask.shape).masked_scatter(mask, grad_values)
        return grad_x, grad_weight, None, None, None


def conv2d(
    x: Tensor,
    values: Tensor,
    mask: Tensor,
    bias: Tensor | None = None,
    stride: int = 1,
    padding: int = 0,
    *,
    storage: Storage = "fp32",
) -> Tensor:
    """Return the convolution of x with the weights [out, in, k, k] that are ``values`` on ``mask``."""
    p = _SingleProduct(mask, values, stride, padding, storage)
    x = floats("x", x, None, p.inner, None, None)
    work = SingleOp(len(x), storage)
    out = work.map(p.outer, *p.size_of(x))
    op = p.gather(work.pack(x, padding), out)
    if bias is not None:
        op.bias = address(work.hold(floats("bias", bias, p.outer)))
    work.run(op)
    return work.unpack(out)


def conv2d_input_gradient(
    grad: Tensor,
    values: Tensor,
    mask: Tensor,
    size: tuple[int, int],
    stride: int = 1,
    padding: int = 0,
    *,
    storage: Storage = "fp32",
) -> Tensor:
    """Return the gradient of conv2d's input, [n, in, *size], from that of its output."""
    p = _SingleProduct(mask, values, stride, padding, storage)
    height, width = (integer("size", n, 1) for n in size)
    grad = floats("grad", grad, None, p.outer, *p.size_of(torch.empty(0, p.inner, height, width)))
    work = SingleOp(len(grad), storage)
    out = work.map(p.inner, height, width)
    work.run(*p.gather_back(work.pack(grad, p.kernel), out))
    return work.unpack(out)


def conv2d_weight_gradient(
    grad: Tensor, x: Tensor, mask: Tensor, stride: int = 1, padding: int = 0, *, storage: Storage = "fp32"
) -> Tensor:
    """Return the gradient [nnz] of conv2d's weights on the mask, from that of its output."""
    p = _SingleProduct(mask, None, stride, padding, storage)
    x = floats("x", x, None, p.inner, None, None)
    grad = floats("grad", grad, len(x), p.outer, *p.size_of(x))
    work, entries, second = SingleOp(len(x), storage), torch.zeros_like(p.values), torch.empty_like(p.values)
    work.run(DotOp(p.gather(work.pack(x, padding), work.pack(grad)), address(entries), address(second)))
    return torch.zeros_like(entries).index_copy_(0, p.order, entries)


class SingleOp:
    """What operations need to run alone on ``n`` samples: maps, and what must live while they run."""

    def __init__(self, n: int, storage: Storage):
        self.n, self.packed = n, is_bf16(storage)
        self.keep: list[Tensor] = []

    def map(self, channels: int, height: int, width: int, halo: int = 0) -> FeatureMap:
        """Return a new map."""
        blocks = max(1, -(-self.n // (32 if self.packed else 16)))
        new = FeatureMap(None, channels, blocks, height, width, halo, self.packed)
        if new.words > LARGEST:
            raise InputError(f"a map of {[channels, blocks, height, width]} is larger than 2^31 words")
        new.data = address(self.hold(torch.empty(new.words, dtype=torch.int32)))
        return new

    def pack(self, x: Tensor, halo: int = 0) -> FeatureMap:
        """Return a tensor as a map."""
        channels, height, width = x.shape[1:]
        into = self.map(channels, height, width, halo)
        self.run(PackOp(into, address(x), self.n, 0))
        return into

    def unpack(self, m: FeatureMap) -> Tensor:
        """Return a map as a tensor."""
        x = torch.empty(self.n, m.channels, m.height, m.width)
        self.run(PackOp(m, address(x), self.n, 1))
        return x

    def hold(self, x: Tensor) -> Tensor:
        """Return a tensor, kept alive."""
        self.keep.append(x)
        return x

    def run(self, *ops: Operation) -> None:
        """Run operations, unless there are no samples."""
        if self.n:
            Program([*ops]).run()


class _SingleProduct:
    """A convolution's weights and geometry, checked."""

    def __init__(self, mask: Tensor, values: Tensor | None, stride: int, padding: int, storage: Storage):
        self.packed = is_bf16(storage)
        self.mask = boolean_mask("mask", mask, 4)
        self.outer, self.inner, self.kernel, _ = mask.shape
        self.stride = integer("stride", stride, 1, 2)
        self.padding = integer("padding", padding, 0, self.kernel - 1)
        self.positions = self.mask.flatten().nonzero().squeeze(1)
        count = len(self.positions)
        self.values = torch.zeros(count) if values is None else floats("values", values, count)
        self.index = SparseIndex(self.outer, self.inner, self.kernel, self.stride, self.padding, count)

    def size_of(self, x: Tensor) -> tuple[int, int]:
        """Return the height and width of an input's output."""
        for size in x.shape[2:]:
            if size + 2 * self.padding < self.kernel:
                raise InputError(
                    f"conv2d: a kernel of {self.kernel} does not fit into a side of {size} with padding {self.padding}"
                )
        height, width = ((size + 2 * self.padding - self.kernel) // self.stride + 1 for size in x.shape[2:])
        return height, width

    def gather(self, x: FeatureMap, out: FeatureMap) -> GatherOp:
        """Return the forward product; ``order`` then tells which of the values each of its entries has."""
        self.order = self.index.fill_values(self.values, self.positions, self.mask, x, self.packed)
        return self.index.gather(x, out)

    def gather_back(self, g: FeatureMap, into: FeatureMap) -> list[Operation]:
        """Return the operations of the input's gradient, one for each parity of the stride."""
        x = FeatureMap(None, into.channels, into.blocks, into.height, into.width, self.padding, self.packed)
        self.gather(x, g)
        if self.index.unit > 1:
            self.index.fill_scatter(into)
            return [self.index.scatter(g, into)]
        order = torch.empty(len(self.order), dtype=torch.int32)
        self.index.fill_back(g, order)
        self.back_entries = self.index.entries[order.long()]
        self.index.back_value = address(self.back_entries)
        return [self.index.gather_back(g, into, parity) for parity in self.index.parities(into)]
