"""Which of PyTorch's calls the kernels have an operation for: questions about a node of a traced model."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fedsieve.sparse.layers import PowerConv2d, PowerLinear, SwatConv2d, SwatLinear

CONVOLUTIONS = (nn.Conv2d, SwatConv2d, PowerConv2d)
LINEARS = (nn.Linear, SwatLinear, PowerLinear)


@dataclass(frozen=True)
class Window:
    """A pool's geometry; ``average``: 0 for the maximum, 1 for the mean, 2 for that of the part inside the map."""

    kernel: int
    stride: int
    padding: int
    average: int


def is_product(module: nn.Module | None) -> bool:
    """Tell whether a module is a linear layer, or a convolution that the kernels have; a subclass may be anything."""
    if type(module) in CONVOLUTIONS:
        assert isinstance(module, nn.Conv2d)
        k, s, p = module.kernel_size, module.stride, module.padding
        plain = module.groups == 1 and module.dilation == (1, 1) and module.padding_mode == "zeros"
        square = k[0] == k[1] and s[0] == s[1] and not isinstance(p, str) and p[0] == p[1]
        return plain and square and k[0] % 2 == 1 and s[0] in (1, 2) and int(p[0]) < k[0]
    return type(module) in LINEARS


def is_norm(module: nn.Module | None) -> bool:
    """Tell whether a module is a BatchNorm of maps that is trained and keeps running statistics."""
    if not isinstance(module, nn.BatchNorm2d) or type(module) is not nn.BatchNorm2d:
        return False
    return bool(module.affine and module.track_running_stats and module.momentum is not None)


def is_relu(kind: Any) -> bool:
    """Tell whether a module, function or method is ReLU."""
    return type(kind) is nn.ReLU or kind in (F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_")


def is_sum(kind: Any, node: fx.Node) -> bool:
    """Tell whether a node adds two values."""
    named = kind in (operator.add, operator.iadd, torch.add, "add", "add_")
    return named and len(node.args) == 2 and all(isinstance(a, fx.Node) for a in node.args) and not node.kwargs


def is_flatten(kind: Any) -> bool:
    """Tell whether a call keeps the order of the numbers, so that its result's shape says all."""
    return type(kind) is nn.Flatten or kind in (torch.flatten, torch.reshape, "flatten", "reshape", "view")


def is_nothing(module: nn.Module | None, training: bool) -> bool:
    """Tell whether a module returns what it is given."""
    if isinstance(module, nn.Dropout | nn.Dropout2d):
        return not (training and module.p)
    return type(module) is nn.Identity


def is_in_place(kind: Any, node: fx.Node) -> bool:
    """Tell whether a node changes its first input."""
    name = kind if isinstance(kind, str) else getattr(kind, "__name__", "")
    asked = getattr(kind, "inplace", False) or node.kwargs.get("inplace", False)
    asked = asked or (kind is F.relu and len(node.args) > 1 and node.args[1])
    operators = getattr(kind, "__module__", "") == "_operator" and name in ("iadd", "isub", "imul", "itruediv", "ipow")
    return bool(asked or operators or (name.endswith("_") and not name.endswith("__")))


def window(kind: Any, node: fx.Node, height: int, width: int) -> Window | None:
    """Return the geometry of a pool of maps that the kernels have."""
    rest = node.args[1:]
    if kind in ("mean", torch.mean):
        arguments = dict(zip(("dim", "keepdim"), rest, strict=False)) | node.kwargs
        dims: Any = arguments.get("dim")
        whole = isinstance(dims, tuple | list) and sorted(d % 4 for d in dims) == [2, 3] and not arguments.get("dtype")
        return _adaptive(1, height, width) if whole else None
    if type(kind) is nn.AdaptiveAvgPool2d:
        return _adaptive(kind.output_size, height, width)
    if kind is F.adaptive_avg_pool2d:
        return _adaptive(rest[0] if rest else node.kwargs["output_size"], height, width)
    if type(kind) in (nn.MaxPool2d, nn.AvgPool2d):
        return _window(dict(vars(kind)), type(kind) is nn.AvgPool2d)
    if kind in (F.max_pool2d, torch.max_pool2d):
        names = "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices"
    elif kind is F.avg_pool2d:
        names = "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override"
    else:
        return None
    return _window(dict(zip(names, rest, strict=False)) | node.kwargs, kind is F.avg_pool2d)


def _adaptive(size: Any, height: int, width: int) -> Window | None:
    """Return the window of a mean that leaves ``size`` positions, where all its windows are alike and square."""
    high, wide = size if isinstance(size, tuple | list) else (size, size)
    if high == wide == 1:
        side = max(height, width)
        return Window(side, side, 0, 2)
    if high is None or wide is None or height % high or width % wide or height // high != width // wide:
        return None
    return Window(height // high, height // high, 0, 1)


def _window(arguments: dict[str, Any], average: bool) -> Window | None:
    k, s, p, d = (_one(arguments.get(name)) for name in ("kernel_size", "stride", "padding", "dilation"))
    odd = arguments.get("ceil_mode") or arguments.get("return_indices") or arguments.get("divisor_override")
    if k is None or odd or -1 in (k, s, p, d) or d not in (None, 1):
        return None
    return Window(k, s or k, p or 0, (1 if arguments.get("count_include_pad", True) else 2) if average else 0)


def _one(value: Any) -> int | None:
    """Return the number that a square size stands for; -1 where it is not square."""
    if isinstance(value, tuple | list):
        return int(value[0]) if len(set(value)) == 1 else -1
    return None if value is None else int(value)


def put_back(states: list[tuple[nn.Module, dict[str, Any], dict[str, Any]]]) -> str:
    """Give modules back the attributes and buffers they had; return one that had changed, "" if none had."""
    first = ""
    for m, attributes, buffers in states:
        for now, before in ((vars(m), attributes), (m._buffers, buffers)):
            changed = [n for n in now.keys() | before.keys() if now.get(n) is not before.get(n) and n != "training"]
            first = first or min(changed, default="")
            now.clear()
            now.update(before)
    return first
