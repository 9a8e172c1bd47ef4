"""What a model is called with: one tensor, several, or several by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedsieve.types import Examples, InputError, leaves


@dataclass(frozen=True)
class Inputs:
    """Several inputs of a model: a sample's shape and the type of each; the names of those that have some."""

    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]
    names: tuple[str, ...] = ()

    @classmethod
    def of(cls, x: Examples) -> Inputs:
        """Return those of examples, as a model is given them: whole numbers and truth values, or float32."""
        shapes, dtypes = zip(*((tuple(one.shape[1:]), one.dtype) for one in leaves(x)), strict=True)
        kept = torch.int64, torch.bool
        names = tuple(x) if isinstance(x, Mapping) else ()
        return cls(shapes, tuple(one if one in kept else torch.float32 for one in dtypes), names)

    @property
    def alone(self) -> bool:
        """Whether there is one, without a name."""
        return len(self.shapes) == 1 and not self.names

    def arguments(self, tensors: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return what a model is called with."""
        return ((), dict(zip(self.names, tensors, strict=True))) if self.names else (tuple(tensors), {})

    def zeros(self, n: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return what a model is called with: zeros, n samples."""
        kinds = zip(self.shapes, self.dtypes, strict=True)
        return self.arguments([torch.zeros(n, *shape, dtype=dtype) for shape, dtype in kinds])

    def take(self, x: Examples) -> list[Tensor]:
        """Return the tensors of a batch, in order. Raises InputError for others."""
        if isinstance(x, Mapping) and x.keys() == {*self.names}:
            return [x[name] for name in self.names]
        if isinstance(x, Mapping) or self.names or len(leaves(x)) != len(self.shapes):
            what = ", ".join(self.names) or f"{len(self.shapes)} tensors"
            raise InputError(f"x must be {what}, got {', '.join(x) if isinstance(x, Mapping) else type(x).__name__}")
        return leaves(x)


def split_examples(x: Examples, size: int) -> list[Examples]:
    """Return inputs in parts of so many samples."""
    parts = [*zip(*(torch.split(one, size) for one in leaves(x)), strict=True)]
    if isinstance(x, Tensor):
        return [part for (part,) in parts]
    return [dict(zip(x, part, strict=True)) for part in parts] if isinstance(x, Mapping) else [*parts]
