"""Where the maps of one sample alone lie, and its windows: the lanes are positions."""

from __future__ import annotations

import torch
from torch import Tensor

from fedsieve.kernels.abi import WORDS, FeatureMap, WindowOp
from fedsieve.kernels.graph import FusedProduct, Value, Window
from fedsieve.kernels.program import Buffer

COPY = Window(1, 1, 0, 0)
"""The window that changes nothing."""


def inside_mask(layer: FusedProduct, lines: int, rows: int, columns: int) -> Tensor:
    """Return the mask of an Unfold: which of its elements lie inside the map."""
    x, k, s, p = layer.inputs[0], layer.kernel, layer.stride, layer.padding
    row = torch.arange(rows) * s + torch.arange(lines)[:, None] - p
    column = torch.arange(columns) * s + torch.arange(k)[:, None] - p
    inside = ((row >= 0) & (row < x.height))[:, :, None] & ((column >= 0) & (column < x.width))[:, None, None]
    return torch.cat([inside.flatten(), torch.zeros(WORDS, dtype=torch.bool)]).to(torch.int32).neg()


def place_of(value: Value, x: FeatureMap) -> tuple[int | None, int]:
    """Return where a value begins, and its distance from channel to channel."""
    return x.data, 1 if value.flat else x.channel


def window_op(
    window: Window, value: Value, to: Value, source: tuple[int | None, int], target: tuple[int | None, int]
) -> WindowOp:
    """Return a window's operation from a value to another, which begin and have their channels there."""
    places = (source[0], target[0], source[1], target[1])
    sizes = (value.channels, value.height, value.width, to.height, to.width)
    return WindowOp(*places, *sizes, *vars(window).values())


def line_buffer(channels: int, positions: int) -> Buffer:
    """Return a buffer whose channels are so many positions in a line."""
    return Buffer(channels, 1, 1, -(-positions // WORDS))
