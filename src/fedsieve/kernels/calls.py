"""What a module, function or method is to the kernels: which of their layers, and with what geometry."""

from __future__ import annotations

import inspect
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fedsieve.kernels.checks import LARGEST
from fedsieve.kernels.graph import Window
from fedsieve.sparse.layers import PowerConv2d, PowerLinear, SwatConv2d, SwatLinear

CONVOLUTIONS = (nn.Conv2d, SwatConv2d, PowerConv2d)
LINEARS = (nn.Linear, SwatLinear, PowerLinear)


def is_product(kind: Any) -> bool:
    """Tell whether a module is a linear layer, or a convolution that the kernels have; a subclass may be anything."""
    if type(kind) in CONVOLUTIONS:
        k, s, p = kind.kernel_size, kind.stride, kind.padding
        plain = kind.dilation == (1, 1) and kind.padding_mode == "zeros"
        if kind.groups > 1:  # whose positions are those of a weight without groups, in 32 bits
            plain &= type(kind) is not SwatConv2d and kind.out_channels * kind.in_channels * k[0] ** 2 <= LARGEST
        square = k[0] == k[1] and s[0] == s[1] and not isinstance(p, str) and p[0] == p[1]
        return bool(plain and square and k[0] % 2 == 1 and s[0] in (1, 2) and int(p[0]) < k[0])
    return type(kind) in LINEARS


def is_norm(kind: Any) -> bool:
    """Tell whether a module is a GroupNorm, or a BatchNorm of maps that is trained and keeps running statistics."""
    if type(kind) is nn.GroupNorm:
        return True
    return type(kind) is nn.BatchNorm2d and kind.affine and kind.track_running_stats and kind.momentum is not None


def relu_of(kind: Any, node: fx.Node) -> int:
    """Tell whether a module, function or method is ReLU (1), or ReLU6 (2)."""
    if type(kind) is nn.ReLU or kind in (F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"):
        return 1
    limits = None
    if type(kind) in (nn.ReLU6, nn.Hardtanh):
        limits = kind.min_val, kind.max_val
    elif kind is F.hardtanh or kind is F.hardtanh_:
        arguments = _arguments(F.hardtanh, node)
        limits = arguments["min_val"], arguments["max_val"]
    return 2 if kind is F.relu6 or limits == (0, 6) else 0


def activation_of(kind: Any, node: fx.Node) -> str:
    """Return which of the other activations a module, function or method is, "" if none."""
    if type(kind) is nn.GELU or kind is F.gelu:
        how = kind.approximate if isinstance(kind, nn.GELU) else node.kwargs.get("approximate", "none")
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(str(how), "")
    names = {
        "silu": (nn.SiLU, F.silu),
        "hardswish": (nn.Hardswish, F.hardswish),
        "sigmoid": (nn.Sigmoid, F.sigmoid, torch.sigmoid, torch.sigmoid_, "sigmoid", "sigmoid_"),
    }
    return next((name for name, same in names.items() if kind in same or type(kind) in same), "")


def is_sum(kind: Any, node: fx.Node) -> bool:
    """Tell whether a node adds two values."""
    named = kind in (operator.add, operator.iadd, torch.add, "add", "add_")
    return named and len(node.args) == 2 and all(isinstance(a, fx.Node) for a in node.args) and not node.kwargs


def concatenated(kind: Any, node: fx.Node) -> list[fx.Node]:
    """Return the nodes that a call concatenates by channel (or feature); none if it is no such call."""
    if kind not in (torch.cat, torch.concat, torch.concatenate) or not node.args:
        return []
    parts, dim = node.args[0], node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    known = isinstance(parts, tuple | list) and all(isinstance(part, fx.Node) for part in parts)
    return [*parts] if known and dim in (1, 1 - len(node.meta["value"][0])) else []  # type: ignore[misc]


def is_flatten(kind: Any) -> bool:
    """Tell whether a call keeps the order of the numbers, so that its result's shape says all."""
    return type(kind) is nn.Flatten or kind in (torch.flatten, torch.reshape, "flatten", "reshape", "view")


def is_identity(kind: Any, training: bool) -> bool:
    """Tell whether a module returns its input."""
    if isinstance(kind, nn.Dropout | nn.Dropout2d):
        return not (training and kind.p)
    return type(kind) is nn.Identity


def is_in_place(kind: Any, node: fx.Node) -> bool:
    """Tell whether a node changes its first input."""
    name = kind if isinstance(kind, str) else getattr(kind, "__name__", "")
    option = getattr(kind, "inplace", False) or node.kwargs.get("inplace", False)
    option = option or (inspect.isfunction(kind) and _arguments(kind, node).get("inplace"))
    operators = getattr(kind, "__module__", "") == "_operator" and name in ("iadd", "isub", "imul", "itruediv", "ipow")
    return bool(option or operators or (name.endswith("_") and not name.endswith("__")))


def _arguments(function: Any, node: fx.Node) -> dict[str, Any]:
    """Return a call's arguments by name, those that are not given too; none of a call that does not fit."""
    try:
        bound = inspect.signature(function).bind(*node.args, **node.kwargs)
    except TypeError:
        return {}
    bound.apply_defaults()
    return bound.arguments


def pool_window(kind: Any, node: fx.Node, height: int, width: int) -> Window | None:
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
