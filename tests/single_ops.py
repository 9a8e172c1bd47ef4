"""Each kernel as a function of ordinary tensors, [n, channels, height, width] or [n, features], packed and unpacked."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedsieve.kernels.abi import (
    ActivationOp,
    LossOp,
    MapPointer,
    NormBackwardOp,
    NormOp,
    PoolOp,
    SgdOp,
    address,
    group_norm_memory,
)
from fedsieve.kernels.functional import SingleOp, Storage, conv2d, conv2d_input_gradient, conv2d_weight_gradient
from fedsieve.kernels.program import Program

__all__ = [
    "BatchNorm",
    "Storage",
    "activation",
    "avg_pool2d",
    "avg_pool2d_gradient",
    "conv2d",
    "conv2d_input_gradient",
    "conv2d_weight_gradient",
    "cross_entropy",
    "group_norm",
    "linear",
    "linear_input_gradient",
    "linear_weight_gradient",
    "max_pool2d",
    "max_pool2d_gradient",
    "norm",
    "norm_gradient",
    "sgd_",
]


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


def linear(x: Tensor, values: Tensor, mask: Tensor, bias: Tensor | None = None, *, storage: Storage = "fp32") -> Tensor:
    """Return x [n, in] times the weights [out, in] that are ``values`` on ``mask``."""
    return conv2d(x[..., None, None], values, mask[..., None, None], bias, storage=storage).flatten(1)


def linear_input_gradient(grad: Tensor, values: Tensor, mask: Tensor, *, storage: Storage = "fp32") -> Tensor:
    """Return the gradient [n, in] of linear's input from that of its output."""
    grad, mask = grad[..., None, None], mask[..., None, None]
    return conv2d_input_gradient(grad, values, mask, (1, 1), storage=storage).flatten(1)


def linear_weight_gradient(grad: Tensor, x: Tensor, mask: Tensor, *, storage: Storage = "fp32") -> Tensor:
    """Return the gradient [nnz] of linear's weights on the mask, from that of its output."""
    return conv2d_weight_gradient(*(t[..., None, None] for t in (grad, x, mask)), storage=storage)


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
    y: Tensor, by: BatchNorm | None = None, add: Tensor | None = None, relu: bool = False, *, storage: Storage = "fp32"
) -> Tensor:
    """Return relu(batch_norm(y) + add), each of the three optional."""
    work = SingleOp(len(y), storage)
    op = _norm(work, y, by, add, relu)
    work.run(op)
    return work.unpack(op.out)


def norm_gradient(
    grad: Tensor,
    y: Tensor,
    by: BatchNorm | None = None,
    add: Tensor | None = None,
    relu: bool = False,
    *,
    storage: Storage = "fp32",
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of y, weight, bias and add; None for what is not there. Updates the running vectors too."""
    work, c = SingleOp(len(y), storage), y.shape[1]
    op, vectors = _norm(work, y, by, add, relu), torch.zeros(2, c)
    back = NormBackwardOp(of=op, grad=work.pack(grad.contiguous()), grad_y=work.map(*y.shape[1:]))
    if by is not None:
        back.grad_gamma, back.grad_beta = address(vectors), address(vectors, c)
    work.run(op, back)
    gamma, beta = (None, None) if by is None else vectors
    return work.unpack(back.grad_y), gamma, beta, None if add is None else work.unpack(back.grad)


def group_norm(
    y: Tensor, norm: nn.GroupNorm, grad: Tensor, add: Tensor | None, relu: int, *, storage: Storage = "fp32"
) -> list[Tensor]:
    """Return relu(norm(y) + add), and from its gradient those of y, of add, and of the weight and bias, if any."""
    work = SingleOp(len(y), storage)
    op, into = _norm(work, y, None, add, False), work.map(*y.shape[1:], halo=1)
    statistics, sums = group_norm_memory(norm.num_groups, norm.num_channels, op.y.blocks, bool(op.y.packed))
    op.set_group_norm(norm, work.hold(statistics), work.hold(sums.fill_(torch.nan)))
    op.gamma, op.beta, op.relu = address(norm.weight), address(norm.bias), relu
    vectors = torch.zeros(2, y.shape[1])
    back = NormBackwardOp(of=op, grad=work.pack(grad), grad_y=into)
    if norm.affine:
        back.grad_gamma, back.grad_beta = address(vectors), address(vectors, y.shape[1])
    work.run(op, back)
    maps = [op.out, into, *([back.grad] if add is not None else [])]
    return [*map(work.unpack, maps), *(vectors if norm.affine else ())]


def activation(function: str, x: Tensor, grad: Tensor | None = None, *, storage: Storage = "fp32") -> Tensor:
    """Return a function of every number, or the gradient of x from that of the function's result."""
    work = SingleOp(len(x), storage)
    out = work.map(*x.shape[1:], halo=1)
    work.run(ActivationOp.of(function, work.pack(x, 2), out, None if grad is None else work.pack(grad)))
    return work.unpack(out)


def cross_entropy(logits: Tensor, label: Tensor, *, storage: Storage = "fp32") -> tuple[Tensor, Tensor]:
    """Return the mean cross-entropy of logits [n, classes] and labels (int64 [n]), and its gradient."""
    (n, classes), loss = logits.shape, torch.zeros(())
    work = SingleOp(n, storage)
    grad, packed = work.map(classes, 1, 1), work.pack(logits.contiguous()[..., None, None])
    work.run(LossOp(logits=packed, grad=grad, label=address(label), loss=address(loss), samples=n))
    return loss, work.unpack(grad).flatten(1)


def sgd_(
    w: Tensor,
    grad: Tensor,
    velocity: Tensor | None,
    rate: float,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    power: float = 1.0,
    nesterov: bool = False,
) -> Tensor:
    """Do a step of gradient descent on w [m] in place; return the weights that it stands for.

    ``v = momentum v + grad + weight_decay w; w -= rate v``. With ``power`` above 1, w is the parameter of
    powerpropagation: the weights are sign(w) |w|^power, and ``grad`` is theirs.
    """
    value = w if power == 1 else torch.empty_like(w)
    vectors = address(w), address(velocity), address(grad)
    Program([SgdOp(*vectors, len(w), rate, momentum, weight_decay, power, address(value), nesterov)]).run()
    return value


def _pool(
    average: int,
    x: Tensor,
    kernel: int,
    stride: int | None,
    padding: int,
    storage: Storage,
    grad: Tensor | None = None,
) -> Tensor:
    x, stride, work = x.contiguous(), stride or kernel, SingleOp(len(x), storage)
    out = work.map(x.shape[1], *((size + 2 * padding - kernel) // stride + 1 for size in x.shape[2:]))
    op = PoolOp(in_=work.pack(x), out=out, kernel=kernel, stride=stride, padding=padding, average=average)
    work.run(op)
    if grad is None:
        return work.unpack(op.out)
    op.grad_out, op.grad_in, op.backward = work.pack(grad.contiguous()), work.map(*x.shape[1:]), 1
    work.run(op)
    return work.unpack(op.grad_in)


def _norm(work: SingleOp, y: Tensor, by: BatchNorm | None, add: Tensor | None, relu: bool) -> NormOp:
    op = NormOp(y=work.pack(y.contiguous()), out=work.map(*y.shape[1:]), training=1, relu=int(relu), samples=work.n)
    if add is not None:
        op.add = MapPointer(work.pack(add.contiguous()))
    if by is not None:
        op.mean, op.invstd = map(address, work.hold(torch.zeros(2, y.shape[1])))
        op.momentum, op.eps, op.training = by.momentum, by.eps, by.training
        op.gamma, op.beta = (address(work.hold(vector.contiguous())) for vector in (by.weight, by.bias))
        op.running_mean, op.running_var = address(by.running_mean), address(by.running_var)
    return op
