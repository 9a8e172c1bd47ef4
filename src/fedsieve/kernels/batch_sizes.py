"""What a model of tokens computes of the size of its batch: refused where it reaches the samples' numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fedsieve.kernels.checks import Unsupported
from fedsieve.kernels.expressions import RowNoise
from fedsieve.kernels.input_numbers import InputNumbers
from fedsieve.kernels.places import Places, arguments_of

SIZED = {"view", "reshape", "_unsafe_view", "expand", "repeat", "unflatten"}
"""Operations that are given sizes, of which the batch's may be one."""


def check_any_size(size: Any) -> None:
    """Raise Unsupported if a model was exported for some sizes of the batch alone, of which this is the symbol."""
    fixed = isinstance(size, int) or size.node.expr.is_number
    others = [] if fixed else [guard.expr for guard in size.node.shape_env.guards]
    n = None if fixed else size.node.expr
    if fixed or not all(expr.subs(dict.fromkeys(expr.free_symbols, n)) == True for expr in others):  # noqa: E712
        raise Unsupported("a batch of another size is computed otherwise (or its size is len(x), not x.shape[0])")


def check_same(name: str, given: Sequence[tuple[fx.Node, Any, Any]]) -> None:
    """Raise Unsupported if a node gives an operation other numbers in a larger batch: the second of each two.

    ``name``: the operation's, which may be given the batch's size as such.
    """
    for node, own, larger in given:
        numbers = zip(arguments_of(own), arguments_of(larger), strict=True)
        size = isinstance(node.meta["val"], torch.SymInt | torch.SymFloat)
        same = not size and all(_begins_with(more, one) for one, more in numbers)
        if not (name in SIZED and isinstance(own, int)) and not same:
            raise Unsupported("numbers that depend on the batch's size")


def is_constant(x: Any) -> bool:
    """Tell whether an operation's result has no numbers of the samples, and none that are drawn for them."""
    return not any(isinstance(one, Places | RowNoise | InputNumbers) for one in arguments_of(x))


def _begins_with(larger: Any, own: Any) -> bool:
    """Tell whether a constant is the beginning of what it is for a larger batch."""
    if not isinstance(own, Tensor):
        return bool(larger == own)
    return torch.equal(larger[tuple(slice(n) for n in own.shape)], own)
