"""What every function of ``single_ops`` computes, in plain PyTorch: of any floating type, gradients by autograd."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from single_ops import BatchNorm


def conv2d(
    x: Tensor, values: Tensor, mask: Tensor, bias: Tensor | None = None, stride: int = 1, padding: int = 0
) -> Tensor:
    """Return the convolution of x with the weights [out, in, k, k] that are ``values`` on ``mask``."""
    return F.conv2d(x, dense(values, mask), bias, stride, padding)


def conv2d_input_gradient(
    grad: Tensor, values: Tensor, mask: Tensor, size: tuple[int, int], stride: int = 1, padding: int = 0
) -> Tensor:
    """Return the gradient of conv2d's input, [n, in, *size], from that of its output."""
    x = grad.new_zeros(len(grad), mask.shape[1], *size)
    return _gradient(lambda x: conv2d(x, values, mask, None, stride, padding), grad, x)[0]


def conv2d_weight_gradient(grad: Tensor, x: Tensor, mask: Tensor, stride: int = 1, padding: int = 0) -> Tensor:
    """Return the gradient [nnz] of conv2d's weights on the mask, from that of its output."""
    values = x.new_zeros(int(mask.sum()))
    return _gradient(lambda values: conv2d(x, values, mask, None, stride, padding), grad, values)[0]


def linear(x: Tensor, values: Tensor, mask: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x [n, in] times the weights [out, in] that are ``values`` on ``mask``."""
    return F.linear(x, dense(values, mask), bias)


def linear_input_gradient(grad: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """Return the gradient [n, in] of linear's input from that of its output."""
    return grad @ dense(values, mask)


def linear_weight_gradient(grad: Tensor, x: Tensor, mask: Tensor) -> Tensor:
    """Return the gradient [nnz] of linear's weights on the mask, from that of its output."""
    return (grad.T @ x)[mask]


def max_pool2d(x: Tensor, kernel: int, stride: int | None = None, padding: int = 0) -> Tensor:
    """Return the largest of every window; NaN where it holds one."""
    return F.max_pool2d(x, kernel, stride, padding)


def max_pool2d_gradient(grad: Tensor, x: Tensor, kernel: int, stride: int | None = None, padding: int = 0) -> Tensor:
    """Return the gradient of max_pool2d's input: a window's goes to the first of its largest."""
    return _gradient(lambda x: max_pool2d(x, kernel, stride, padding), grad, x)[0]


def avg_pool2d(
    x: Tensor, kernel: int, stride: int | None = None, padding: int = 0, count_include_pad: bool = True
) -> Tensor:
    """Return the mean of every window."""
    return F.avg_pool2d(x, kernel, stride, padding, count_include_pad=count_include_pad)


def avg_pool2d_gradient(
    grad: Tensor, x: Tensor, kernel: int, stride: int | None = None, padding: int = 0, count_include_pad: bool = True
) -> Tensor:
    """Return the gradient of avg_pool2d's input."""
    return _gradient(lambda x: avg_pool2d(x, kernel, stride, padding, count_include_pad), grad, x)[0]


def norm(y: Tensor, by: BatchNorm | None = None, add: Tensor | None = None, relu: bool = False) -> Tensor:
    """Return relu(batch_norm(y) + add), each of the three optional."""
    return _norm(y, None if by is None else by.weight, None if by is None else by.bias, add, by, relu)


def norm_gradient(
    grad: Tensor, y: Tensor, by: BatchNorm | None = None, add: Tensor | None = None, relu: bool = False
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of y, weight, bias and add; None for what is not there. Updates the running vectors too."""
    of = (y, None if by is None else by.weight, None if by is None else by.bias, add)
    given = [x for x in of if x is not None]

    def call(*given: Tensor) -> Tensor:
        rest = iter(given)
        y, weight, bias, add = (None if x is None else next(rest) for x in of)
        assert y is not None
        return _norm(y, weight, bias, add, by, relu)

    found = iter(_gradient(call, grad, *given))
    y_, weight, bias, add_ = (None if x is None else next(found) for x in of)
    assert y_ is not None
    return y_, weight, bias, add_


def group_norm(y: Tensor, norm: nn.GroupNorm, grad: Tensor, add: Tensor | None, relu: int) -> list[Tensor]:
    """Return relu(norm(y) + add), and from its gradient those of y, of add, and of the weight and bias, if any."""

    def call(y: Tensor, *more: Tensor) -> Tensor:
        y = F.group_norm(y, norm.num_groups, *(more[-2:] if norm.affine else (None, None)), norm.eps)
        y = y if add is None else y + more[0]
        return y if not relu else F.relu(y) if relu == 1 else F.relu6(y)

    given = [y, *([] if add is None else [add]), *norm.parameters()]
    return [call(*given).detach(), *_gradient(call, grad, *given)]


def activation(function: str, x: Tensor, grad: Tensor | None = None) -> Tensor:
    """Return a function of every number, or the gradient of x from that of the function's result."""
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "sigmoid": torch.sigmoid,
        "silu": F.silu,
        "gelu": F.gelu,
        "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
        "hardswish": F.hardswish,
        "tanh": torch.tanh,
    }
    return functions[function](x) if grad is None else _gradient(functions[function], grad, x)[0]


def cross_entropy(logits: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean cross-entropy of logits [n, classes] and labels (int64 [n]), and its gradient."""
    loss = F.cross_entropy(logits, label)
    return loss, _gradient(lambda logits: F.cross_entropy(logits, label), torch.ones_like(loss), logits)[0]


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
    """Do a step of gradient descent on w [m] in place; return the weights that it stands for."""
    step = grad if power == 1 else grad * power * w.abs() ** (power - 1)
    step = step + weight_decay * w
    if velocity is not None:
        gradient, step = step, velocity.mul_(momentum).add_(step)
        step = gradient + momentum * step if nesterov else step
    w.sub_(rate * step)
    return w if power == 1 else w.sign() * w.abs() ** power


def dense(values: Tensor, mask: Tensor) -> Tensor:
    """Return the dense weight: ``values`` on ``mask``, zero elsewhere."""
    return values.new_zeros(mask.shape).masked_scatter(mask, values)


def _norm(
    y: Tensor, weight: Tensor | None, bias: Tensor | None, add: Tensor | None, by: BatchNorm | None, relu: bool
) -> Tensor:
    if by is not None:
        y = F.batch_norm(y, by.running_mean, by.running_var, weight, bias, by.training, by.momentum, by.eps)
    y = y if add is None else y + add
    return y.relu() if relu else y


def _gradient(call: Callable[..., Tensor], grad: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in given]
        return torch.autograd.grad(call(*leaves), leaves, grad)
