"""Tensors as they are stored and sent, and labelled examples."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fedsieve.types.errors import InputError

Params: TypeAlias = dict[str, Tensor]
"""The floating state of a plain model, flat: weights, biases, and BatchNorm's running statistics."""

Mask: TypeAlias = dict[str, Tensor]
"""Boolean supports by parameter name; a missing name is dense."""


@dataclass(frozen=True)
class Sparse:
    """``values`` [nnz] at flat positions of a tensor of ``shape``.

    ``positions`` are these (int64 [nnz], strictly increasing) or a bit for each element of the tensor, the lowest first
    (uint8 [ceil(numel / 8)]): of many positions a 64th of the memory.
    """

    values: Tensor
    positions: Tensor
    shape: tuple[int, ...]

    @property
    def index(self) -> Tensor:
        """The positions, int64 [nnz]; worked out anew each time where they are kept as bits."""
        if self.positions.dtype != torch.uint8:
            return self.positions
        bits = (self.positions[:, None] >> torch.arange(8, dtype=torch.uint8)).bitwise_and_(1).view(torch.bool)
        return bits.view(-1)[: math.prod(self.shape)].nonzero().squeeze(1)

    @classmethod
    def of(cls, dense: Tensor, support: Tensor) -> Sparse:
        """Take the entries of ``dense`` where the boolean ``support``, shaped alike, is true; zeros there count."""
        index = support.reshape(-1).nonzero().squeeze(1)
        return cls(dense.reshape(-1)[index], index, tuple(dense.shape))

    def dense(self) -> Tensor:
        """Return the full tensor, zero off the support."""
        flat = torch.zeros(math.prod(self.shape), dtype=self.values.dtype, device=self.values.device)
        return flat.index_copy_(0, self.index, self.values).view(self.shape)


Tree: TypeAlias = Mapping[str, "Tensor | Sparse | float | Tree"]
"""What crosses the wire: names to tensors, sparse tensors, numbers, or further trees."""


def normalize_inputs(x: Tensor, mean: tuple[float, ...] | Tensor, std: tuple[float, ...] | Tensor) -> Tensor:
    """Return raw inputs [b, ...] as ``(x - mean) / std`` in float32; uint8 stands for x / 255.

    ``mean`` and ``std`` as tensors lie where ``x`` does: nothing is then copied to a GPU.
    """
    x = x.float().div_(255) if x.dtype == torch.uint8 else x.float()
    if isinstance(mean, tuple) and (mean, std) == ((0.0,), (1.0,)):
        return x
    channels = (-1,) + (1,) * (x.dim() - 2)
    mean, std = (torch.as_tensor(value, dtype=torch.float32, device=x.device).view(channels) for value in (mean, std))
    return (x - mean) / std


@dataclass(frozen=True, eq=False)
class Data:
    """Labelled examples.

    ``x`` [n, ...] is float32, or uint8 that stands for x / 255; ``y`` [n] is int64. Arrays and lists become tensors. A
    batch comes out as ``(x - mean) / std`` in float32, ``mean`` and ``std`` holding one number, or one a channel
    (dimension 1 of ``x``).
    """

    x: Tensor
    y: Tensor
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        for name in ("x", "y"):
            object.__setattr__(self, name, _tensor(name, getattr(self, name)))
        if self.y.dim() != 1:
            raise InputError(
                f"data: y must hold one whole number for each example, it has the shape {list(self.y.shape)}: "
                "of a one-hot y give y.argmax(1)"
            )
        if self.x.dim() == 0 or len(self.x) != len(self.y):
            raise InputError(f"data: {len(self.x) if self.x.dim() else 'no'} examples but {len(self.y)} labels")
        for name in ("mean", "std"):
            numbers: Any = getattr(self, name)
            try:
                several = torch.as_tensor(numbers, dtype=torch.float64).reshape(-1)
                numbers = (numbers,) if isinstance(numbers, int | float) else tuple(several.tolist())
            except (TypeError, ValueError, RuntimeError):
                raise InputError(f"data: {name} must be a number, or one a channel, got {numbers!r}") from None
            object.__setattr__(self, name, numbers)
            if len(numbers) != 1 and (self.x.dim() < 2 or len(numbers) != self.x.shape[1]):
                raise InputError(f"data: {name} must hold one number, or one a channel, got {len(numbers)}")
            if name == "std" and not all(value > 0 for value in numbers):
                raise InputError(f"data: std must be above 0, got {numbers}")
            if not all(map(math.isfinite, numbers)):
                raise InputError(f"data: {name} must be finite, got {numbers}")

    def __len__(self) -> int:
        return len(self.y)

    def subset(self, index: Tensor) -> Data:
        """Return the examples at ``index`` (int64 [m]), copied, where they lie."""
        index = index.to(self.y.device)
        return replace(self, x=self.x.index_select(0, index), y=self.y.index_select(0, index))

    def to(self, device: torch.device | str) -> Data:
        """Return the same examples on ``device``."""
        return replace(self, x=self.x.to(device), y=self.y.to(device))

    def batch(self, index: Tensor | slice, change: Callable[[Tensor], Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Return normalised inputs [b, ...] float32, raw ones passed through ``change``, and labels [b] int64."""
        x = self.x[index] if change is None else change(self.x[index])
        return normalize_inputs(x, *self.scale), self.y[index]

    @cached_property
    def scale(self) -> tuple[Any, Any]:
        """Mean and standard deviation where the examples lie: no batch copies them to a GPU, which would wait."""
        if (self.mean, self.std) == ((0.0,), (1.0,)):
            return self.mean, self.std
        mean, std = (torch.tensor(v, dtype=torch.float32, device=self.y.device) for v in (self.mean, self.std))
        return mean, std

    @property
    def nbytes(self) -> int:
        """The memory that inputs and labels take."""
        return self.x.nbytes + self.y.nbytes


def _tensor(name: str, values: Any) -> Tensor:
    """Return what a user gave as examples or labels as a tensor. Raises InputError."""
    try:
        tensor = values.detach() if isinstance(values, Tensor) else torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"data: {name} must be a tensor, an array or a list of numbers ({error})") from None
    odd = tensor.layout is not torch.strided or tensor.is_nested or tensor.is_quantized or tensor.is_complex()
    if odd or tensor.is_meta or hasattr(values, "filled"):  # a masked array
        raise InputError(f"data: {name} must hold plain real numbers, all of them, got {tensor.dtype}, {tensor.layout}")
    return tensor.float() if tensor.dtype == torch.float64 and not isinstance(values, Tensor) else tensor
