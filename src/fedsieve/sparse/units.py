"""Masks in units of output channels: ``unit`` successive channels of a weight keep a position together, or lose it.

Of a weight [out, ...] unit g, j is position j (over all dimensions but the first) of the channels ``g * unit`` to
``g * unit + unit - 1``; the last group has fewer channels where ``unit`` does not divide ``out``, and a weight of fewer
channels than ``unit`` is one group. Units are numbered ``g * (elements of a channel) + j``, so that the lowest number
is also the lowest position. With units of one channel, a unit is a weight.

Channels are the first dimension, whatever holds the weight: the outputs of a linear layer or a convolution (of a
grouped one, j counts within each channel's own group of inputs), a recurrent layer's gates, an embedding's rows, which
are an output layer's channels where both are one weight. A transposed convolution has its inputs there: it is refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from fedsieve.sparse import selection
from fedsieve.types import InputError


def check_unit(unit: int) -> None:
    """Raise InputError unless it is a number of channels."""
    if unit < 1:
        raise InputError(f"unit must be 1 or more output channels that share a pattern, got {unit}")


def check_channels(model: nn.Module, names: Iterable[str], unit: int) -> None:
    """Raise InputError for a weight whose first dimension is not its layer's outputs, if units are of several."""
    for name in names if unit > 1 else ():
        if isinstance(model.get_submodule(name.rpartition(".")[0]), _ConvTransposeNd):
            raise InputError(
                f"unit={unit}: {name} is a transposed convolution's, whose first dimension is its inputs: take unit=1, "
                "or leave it out (-s method.policy=...)"
            )


def unit_count(shape: Sequence[int], unit: int) -> int:
    """Return how many units a weight of a shape has."""
    return -(-shape[0] // unit) * math.prod(shape[1:])


def unit_keys(x: Tensor, unit: int) -> Tensor:
    """Return integers [units] that order like the Euclidean norms of a tensor's units.

    A smaller last group counts as its root mean square does: its norm times sqrt(unit / channels). Squares are summed
    in float64, channel after channel, so that the order is the same on every machine; a NaN counts as largest.
    """
    if unit == 1:
        return selection.magnitude_keys(x)
    out = x.shape[0]
    channels = x.detach().reshape(out, -1).double()
    sums = channels.new_zeros(-(-out // unit), channels.shape[1])
    for first in range(min(unit, out)):
        own = channels[first::unit]
        sums[: len(own)] += own.square()
    if rest := out % unit:
        sums[-1] *= unit / rest
    return selection.magnitude_keys(sums)


def units_of(mask: Tensor, unit: int) -> Tensor:
    """Return which units [units] a boolean mask keeps that is in such units: those of each group's first channel."""
    return mask.reshape(len(mask), -1)[::unit].reshape(-1)


def spread(units: Tensor, shape: Sequence[int], unit: int) -> Tensor:
    """Return the mask of a shape that keeps boolean ``units`` [units]."""
    if unit == 1:
        return units.view(*shape)
    groups = units.view(-(-shape[0] // unit), -1)
    return groups.repeat_interleave(min(unit, shape[0]), 0)[: shape[0]].reshape(*shape)


def in_units(mask: Tensor, unit: int) -> bool:
    """Tell whether channels of every group have the same pattern in a mask."""
    return torch.equal(spread(units_of(mask, unit), mask.shape, unit), mask)
