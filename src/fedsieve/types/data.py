"""Tensors as they are stored and sent, and examples with their targets."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, is_dataclass, replace
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
        bits = np.unpackbits(self.positions.numpy(), count=math.prod(self.shape), bitorder="little")
        return true_positions(torch.from_numpy(bits.view(bool)))

    @property
    def support(self) -> Tensor:
        """Where it has values, zeros among them: boolean, of its shape."""
        return torch.zeros(math.prod(self.shape), dtype=torch.bool).index_fill_(0, self.index, True).view(self.shape)

    @classmethod
    def of(cls, dense: Tensor, support: Tensor) -> Sparse:
        """Take the entries of ``dense`` where the boolean ``support``, shaped alike, is true; zeros there count."""
        index = true_positions(support)
        return cls(dense.reshape(-1).index_select(0, index), index, tuple(dense.shape))

    def dense(self) -> Tensor:
        """Return the full tensor, zero off the support."""
        flat = torch.zeros(math.prod(self.shape), dtype=self.values.dtype, device=self.values.device)
        return flat.index_copy_(0, self.index, self.values).view(self.shape)


def true_positions(mask: Tensor) -> Tensor:
    """Return where a boolean tensor is true: flat positions, int64, ascending. On a CPU by numpy, 4 times as fast."""
    flat = mask.reshape(-1)
    return flat.nonzero().squeeze(1) if flat.is_cuda else torch.from_numpy(np.flatnonzero(flat.numpy()))


Tree: TypeAlias = Mapping[str, "Tensor | Sparse | float | Tree"]
"""What crosses the wire: names to tensors, sparse tensors, numbers, or further trees."""


Examples: TypeAlias = "Tensor | tuple[Tensor, ...] | Mapping[str, Tensor]"
"""Inputs or targets of several examples, each tensor [n, ...]: one tensor, several, or several by name."""


def leaves(x: Examples) -> list[Tensor]:
    """Return the tensors that inputs or targets consist of."""
    return [x] if isinstance(x, Tensor) else [*(x.values() if isinstance(x, Mapping) else x)]


def map_examples(change: Callable[[Tensor], Tensor], x: Examples) -> Examples:
    """Return inputs or targets, each of their tensors changed."""
    if isinstance(x, Tensor):
        return change(x)
    if isinstance(x, Mapping):
        return {name: change(one) for name, one in x.items()}
    return tuple(map(change, x))


def apply_model(model: nn.Module, x: Examples) -> Any:
    """Return what a model makes of inputs: several are its arguments, several by name those of these names."""
    if isinstance(x, Tensor):
        return model(x)
    return model(**x) if isinstance(x, Mapping) else model(*x)


def tensors_of(output: Any) -> list[Tensor]:
    """Return all tensors of a model's output: a tensor, or a tuple, list, dictionary or dataclass of such."""
    if isinstance(output, Tensor):
        return [output]
    parts: Iterable[Any] = ()
    if isinstance(output, Mapping):
        parts = output.values()
    elif isinstance(output, tuple | list):
        parts = output
    elif is_dataclass(output) and not isinstance(output, type):
        parts = vars(output).values()
    return [one for part in parts for one in tensors_of(part)]


def compute_loss(loss: Callable[[Any, Any], Tensor], output: Any, target: Any) -> Tensor:
    """Return a loss in a training step. Raises InputError, with what it says, if the user's function fails.

    PyTorch's cross-entropy itself is of the output's logits.
    """
    try:
        return loss(logits_of(output) if loss is F.cross_entropy else output, target)
    except (InputError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise  # what cannot be captured is run eagerly
        line = (str(error).splitlines() or [""])[0]
        raise InputError(f"task.loss fails in training ({type(error).__name__}: {line})") from error


def logits_of(output: Any) -> Tensor:
    """Return the logits of a model's output: itself, its ``logits`` (of a dictionary too), or a tuple's first.

    Raises InputError where there are none.
    """
    logits = getattr(output, "logits", output)
    if isinstance(logits, Mapping):
        logits = logits.get("logits")
    elif isinstance(logits, tuple | list) and logits:
        logits = logits[0]
    if not isinstance(logits, Tensor):
        raise InputError(
            f"the model returns {type(output).__name__}, where a tensor is needed, or what has logits: give a loss of "
            "your own, task.loss, that takes what the model returns"
        )
    return logits


def normalize_inputs(x: Tensor, mean: tuple[float, ...] | Tensor, std: tuple[float, ...] | Tensor) -> Tensor:
    """Return raw inputs [b, ...] as ``(x - mean) / std`` in float32; uint8 stands for x / 255.

    Other integers, and truth values, stay what they are: numbers of tokens, or of categories. ``mean`` and ``std`` as
    tensors lie where ``x`` does: nothing is then copied to a GPU.
    """
    if x.dtype != torch.uint8 and not x.is_floating_point():
        return x
    x = x.float().div_(255) if x.dtype == torch.uint8 else x.float()
    if isinstance(mean, tuple) and (mean, std) == ((0.0,), (1.0,)):
        return x
    channels = (-1,) + (1,) * (x.dim() - 2)
    mean, std = (torch.as_tensor(value, dtype=torch.float32, device=x.device).view(channels) for value in (mean, std))
    return (x - mean).div_(std)


@dataclass(frozen=True, eq=False)
class Data:
    """Examples with their targets.

    ``x`` [n, ...] is float32, or uint8 that stands for x / 255, or other integers, which stay so; ``y`` [n, ...] is
    what the loss takes: int64 class labels [n], or anything else. Each may be several tensors, in a tuple or by name:
    the model's arguments. Arrays and lists become tensors. A batch of floating inputs comes out as ``(x - mean) / std``
    in float32, ``mean`` and ``std`` holding one number, or one a channel (dimension 1 of ``x``).
    """

    x: Examples
    y: Examples
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        for name in ("x", "y"):
            object.__setattr__(self, name, _examples(name, getattr(self, name)))
        lengths = [[len(one) if one.dim() else -1 for one in leaves(part)] for part in (self.x, self.y)]
        if len({*lengths[0], *lengths[1]}) != 1 or -1 in lengths[0]:
            examples, targets = (
                "no" if -1 in several else " and ".join(map(str, dict.fromkeys(several))) for several in lengths
            )
            raise InputError(f"data: {examples} examples but {targets} labels")
        for name in ("mean", "std"):
            numbers: Any = getattr(self, name)
            try:
                several = torch.as_tensor(numbers, dtype=torch.float64).reshape(-1)
                numbers = (numbers,) if isinstance(numbers, int | float) else tuple(several.tolist())
            except (TypeError, ValueError, RuntimeError):
                raise InputError(f"data: {name} must be a number, or one a channel, got {numbers!r}") from None
            object.__setattr__(self, name, numbers)
            channels = self.x.shape[1:2] if isinstance(self.x, Tensor) else ()
            if len(numbers) != 1 and (len(numbers),) != tuple(channels):
                raise InputError(f"data: {name} must hold one number, or one a channel, got {len(numbers)}")
            if not isinstance(self.x, Tensor) and numbers != ((0.0,) if name == "mean" else (1.0,)):
                raise InputError(f"data: {name} is for inputs of one tensor: normalise several before you give them")
            if name == "std" and not all(value > 0 for value in numbers):
                raise InputError(f"data: std must be above 0, got {numbers}")
            if not all(map(math.isfinite, numbers)):
                raise InputError(f"data: {name} must be finite, got {numbers}")

    def __len__(self) -> int:
        return len(leaves(self.y)[0])

    @property
    def device(self) -> torch.device:
        """Where the examples lie."""
        return leaves(self.y)[0].device

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one input, of one tensor; empty of several."""
        return tuple(self.x.shape[1:]) if isinstance(self.x, Tensor) else ()

    @property
    def form(self) -> tuple[Any, ...]:
        """What its tensors are, and how they are scaled: what a hash of it goes by beside the numbers."""
        one = isinstance(self.x, Tensor) and isinstance(self.y, Tensor)
        several = tuple((part.shape, part.dtype) for part in self.tensors)
        return (*several[0], several[1][0], self.mean, self.std) if one else (*several, self.mean, self.std)

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors of inputs and targets."""
        return [*leaves(self.x), *leaves(self.y)]

    def map(self, change: Callable[[Tensor], Tensor]) -> Data:
        """Return the examples, each tensor of theirs changed."""
        return replace(self, x=map_examples(change, self.x), y=map_examples(change, self.y))

    def subset(self, index: Tensor) -> Data:
        """Return the examples at ``index`` (int64 [m]), copied, where they lie."""
        index = index.to(self.device)
        return self.map(lambda one: one.index_select(0, index))

    def to(self, device: torch.device | str) -> Data:
        """Return the same examples on ``device``: themselves if they lie there."""
        where = torch.device(device)
        return self if all(one.device == where for one in self.tensors) else self.map(lambda one: one.to(where))

    def batch(
        self, index: Tensor | slice, change: Callable[[Tensor], Tensor] | None = None
    ) -> tuple[Examples, Examples]:
        """Return inputs as the model takes them, [b, ...], raw ones passed through ``change``; and targets."""

        def rows(one: Tensor) -> Tensor:
            plain = type(one) is Tensor and not one.is_cuda  # of which this takes a fraction of the time
            return one.index_select(0, index) if plain and isinstance(index, Tensor) else one[index]

        def inputs(one: Tensor) -> Tensor:
            x = rows(one) if change is None else change(rows(one))
            return normalize_inputs(x, *self.scale)

        return map_examples(inputs, self.x), map_examples(rows, self.y)

    @cached_property
    def scale(self) -> tuple[Any, Any]:
        """Mean and standard deviation where the examples lie: no batch copies them to a GPU, which would wait."""
        if (self.mean, self.std) == ((0.0,), (1.0,)):
            return self.mean, self.std
        mean, std = (torch.tensor(v, dtype=torch.float32, device=self.device) for v in (self.mean, self.std))
        return mean, std

    @property
    def nbytes(self) -> int:
        """The memory that inputs and targets take."""
        return sum(one.nbytes for one in self.tensors)


def _examples(name: str, values: Any) -> Examples:
    """Return what a user gave as inputs or targets as tensors. Raises InputError."""
    if isinstance(values, Mapping | tuple) and not values:
        raise InputError(f"data: {name} is empty: give a tensor, or several in a tuple or by name")
    if isinstance(values, list) and values and isinstance(values[0], Tensor) and values[0].numel() != 1:
        raise InputError(f"data: {name} is a list of tensors: torch.stack examples, give several inputs as a tuple")
    if isinstance(values, Mapping) and values and all(isinstance(key, str) for key in values):
        return {key: _tensor(f"{name}[{key!r}]", one) for key, one in values.items()}
    arrays = isinstance(values, tuple) and all(isinstance(one, Tensor) or hasattr(one, "__array__") for one in values)
    if arrays and values:
        several = tuple(_tensor(f"{name}[{i}]", one) for i, one in enumerate(values))
        if any(one.dim() for one in several):
            return several
    return _tensor(name, values)


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
