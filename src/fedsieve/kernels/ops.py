"""Each kernel as a function of ordinary tensors, [n, channels, height, width] or [n, features], packed and unpacked.

Weights are ``values`` [nnz] on a boolean ``mask``, in its order.
Inputs are float32 on the CPU, in any memory order; anything else is an InputError. NaN and infinity pass through as in
PyTorch. ``storage``: "fp32", or "bf16", which rounds every map to bfloat16 and sums in float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from fedsieve.kernels.abi import DotOp, LossOp, NormBackwardOp, NormOp, SgdOp, address
from fedsieve.kernels.checks import boolean_mask, floats, in_place, integer, labels, refuse, size_after
from fedsieve.kernels.graph import Window
from fedsieve.kernels.lower.index import norm_op, pool_op
from fedsieve.kernels.lower.single_op import SingleOp, SingleProduct, Storage
from fedsieve.kernels.program import Program
from fedsieve.types import InputError

Optional: TypeAlias = Tensor | None


@dataclass(frozen=True)
class BatchNorm:
    """What ``norm`` normalises with: vectors [channels]; the running ones are updated in training."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor
    training: bool = True
    momentum: float = 0.1
    eps: float = 1e-5


def conv2d(
    x: Tensor,
    values: Tensor,
    mask: Tensor,
    bias: Optional = None,
    stride: int = 1,
    padding: int = 0,
    *,
    storage: Storage = "fp32",
) -> Tensor:
    """Return the convolution of x with the weights [out, in, k, k] that are ``values`` on ``mask``."""
    p = SingleProduct(mask, values, stride, padding, storage)
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
    p = SingleProduct(mask, values, stride, padding, storage)
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
    p = SingleProduct(mask, None, stride, padding, storage)
    x = floats("x", x, None, p.inner, None, None)
    grad = floats("grad", grad, len(x), p.outer, *p.size_of(x))
    work, entries, second = SingleOp(len(x), storage), torch.zeros_like(p.values), torch.empty_like(p.values)
    work.run(DotOp(p.gather(work.pack(x, padding), work.pack(grad)), address(entries), address(second)))
    return torch.zeros_like(entries).index_copy_(0, p.order, entries)


def linear(x: Tensor, values: Tensor, mask: Tensor, bias: Optional = None, *, storage: Storage = "fp32") -> Tensor:
    """Return x [n, in] times the weights [out, in] that are ``values`` on ``mask``."""
    mask, x = boolean_mask("mask", mask, 2), floats("x", x, None, None)
    return conv2d(x[..., None, None], values, mask[..., None, None], bias, storage=storage).flatten(1)


def linear_input_gradient(grad: Tensor, values: Tensor, mask: Tensor, *, storage: Storage = "fp32") -> Tensor:
    """Return the gradient [n, in] of linear's input from that of its output."""
    mask, grad = boolean_mask("mask", mask, 2)[..., None, None], floats("grad", grad, None, None)[..., None, None]
    return conv2d_input_gradient(grad, values, mask, (1, 1), storage=storage).flatten(1)


def linear_weight_gradient(grad: Tensor, x: Tensor, mask: Tensor, *, storage: Storage = "fp32") -> Tensor:
    """Return the gradient [nnz] of linear's weights on the mask, from that of its output."""
    x, grad = floats("x", x, None, None)[..., None, None], floats("grad", grad, None, None)[..., None, None]
    return conv2d_weight_gradient(grad, x, boolean_mask("mask", mask, 2)[..., None, None], storage=storage)


def max_pool2d(
    x: Tensor, kernel: int, stride: int | None = None, padding: int = 0, *, storage: Storage = "fp32"
) -> Tensor:
    """Return the largest of every window; NaN where it holds one."""
    return _pool(0, x, kernel, stride, padding, storage)


def max_pool2d_gradient(
    grad: Tensor, x: Tensor, kernel: int, stride: int | None = None, padding: int = 0, *, storage: Storage = "fp32"
) -> Tensor:
    """Return the gradient of max_pool2d's input: a window's goes to the first of its largest."""
    return _pool(0, x, kernel, stride, padding, storage, grad)


def avg_pool2d(
    x: Tensor,
    kernel: int,
    stride: int | None = None,
    padding: int = 0,
    count_include_pad: bool = True,
    *,
    storage: Storage = "fp32",
) -> Tensor:
    """Return the mean of every window."""
    return _pool(1 if count_include_pad else 2, x, kernel, stride, padding, storage)


def avg_pool2d_gradient(
    grad: Tensor,
    x: Tensor,
    kernel: int,
    stride: int | None = None,
    padding: int = 0,
    count_include_pad: bool = True,
    *,
    storage: Storage = "fp32",
) -> Tensor:
    """Return the gradient of avg_pool2d's input."""
    return _pool(1 if count_include_pad else 2, x, kernel, stride, padding, storage, grad)


def norm(
    y: Tensor, by: BatchNorm | None = None, add: Optional = None, relu: bool = False, *, storage: Storage = "fp32"
) -> Tensor:
    """Return relu(batch_norm(y) + add), each of the three optional."""
    y = floats("y", y, None, None, None, None)
    work = SingleOp(len(y), storage)
    op = _norm(work, y, by, add, relu)
    work.run(op)
    return work.unpack(op.out)


def norm_gradient(
    grad: Tensor,
    y: Tensor,
    by: BatchNorm | None = None,
    add: Optional = None,
    relu: bool = False,
    *,
    storage: Storage = "fp32",
) -> tuple[Tensor, Optional, Optional, Optional]:
    """Return the gradients of y, weight, bias and add; None for what is not there. Updates the running vectors too."""
    y = floats("y", y, None, None, None, None)
    work, c = SingleOp(len(y), storage), y.shape[1]
    op, vectors = _norm(work, y, by, add, relu), torch.zeros(2, c)
    back = NormBackwardOp(of=op, grad=work.pack(floats("grad", grad, *y.shape)), grad_y=work.map(*y.shape[1:]))
    if by is not None:
        back.grad_gamma, back.grad_beta = address(vectors), address(vectors, c)
    work.run(op, back)
    gamma, beta = (None, None) if by is None else (vectors[0], vectors[1])
    return work.unpack(back.grad_y), gamma, beta, None if add is None else work.unpack(back.grad)


def cross_entropy(logits: Tensor, label: Tensor, *, storage: Storage = "fp32") -> tuple[Tensor, Tensor]:
    """Return the mean cross-entropy of logits [n, classes] and labels (int64 [n]), and its gradient."""
    logits = floats("logits", logits, None, None)
    n, classes = logits.shape
    integer("the number of samples", n, 1)
    work, loss = SingleOp(n, storage), torch.zeros(())
    grad = work.map(classes, 1, 1)
    label = labels("label", label, n, classes)
    work.run(
        LossOp(
            logits=work.pack(logits[..., None, None]), grad=grad, label=address(label), loss=address(loss), samples=n
        )
    )
    return loss, work.unpack(grad).flatten(1)


def sgd_(
    w: Tensor,
    grad: Tensor,
    velocity: Optional,
    rate: float,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    power: float = 1.0,
) -> Tensor:
    """Do a step of gradient descent on w [m] in place; return the weights that it stands for.

    ``v = momentum v + grad + weight_decay w; w -= rate v``. With ``power`` above 1, w is the parameter of
    powerpropagation: the weights are sign(w) |w|^power, and ``grad`` is theirs.
    """
    w, grad = in_place("w", w, None), floats("grad", grad, len(w))
    velocity = None if velocity is None else in_place("velocity", velocity, len(w))
    if momentum and velocity is None:
        refuse("velocity", "given with momentum", None)
    value = w if power == 1 else torch.empty_like(w)
    op = SgdOp(
        address(w), address(velocity), address(grad), len(w), rate, momentum, weight_decay, power, address(value)
    )
    Program([op]).run()
    return value


def _pool(
    average: int, x: Tensor, kernel: int, stride: int | None, padding: int, storage: Storage, grad: Optional = None
) -> Tensor:
    x, kernel = floats("x", x, None, None, None, None), integer("kernel", kernel, 1)
    stride = integer("stride", kernel if stride is None else stride, 1)
    padding = integer("padding", padding, 0, kernel // 2)
    sizes = [size_after("pool", n, kernel, stride, padding) for n in x.shape[2:]]
    work = SingleOp(len(x), storage)
    op = pool_op(work.pack(x), work.map(x.shape[1], *sizes), Window(kernel, stride, padding, average))
    work.run(op)
    if grad is None:
        return work.unpack(op.out)
    op.grad_out, op.grad_in = work.pack(floats("grad", grad, *x.shape[:2], *sizes)), work.map(*x.shape[1:])
    op.backward = 1
    work.run(op)
    return work.unpack(op.grad_in)


def _norm(work: SingleOp, y: Tensor, by: BatchNorm | None, add: Optional, relu: bool) -> NormOp:
    c, more = y.shape[1], None if add is None else work.pack(floats("add", add, *y.shape))
    op = norm_op(work.pack(y), work.map(*y.shape[1:]), more, relu, 1)
    op.samples = work.n
    if by is not None:
        if by.training and y[:, 0].numel() < 2:
            raise InputError(f"norm: BatchNorm needs more than one value a channel in training, got {list(y.shape)}")
        stats = work.hold(torch.zeros(2, c))
        op.mean, op.invstd, op.momentum, op.eps, op.training = *map(address, stats), by.momentum, by.eps, by.training
        vectors = floats("weight", by.weight, c), floats("bias", by.bias, c)
        op.gamma, op.beta = (address(work.hold(vector)) for vector in vectors)
        op.running_mean = address(in_place("running_mean", by.running_mean, c))
        op.running_var = address(in_place("running_var", by.running_var, c))
    return op
