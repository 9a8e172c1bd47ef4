"""What of its arrays a client sends: all, or the top ones of each weight tensor, exact or rounded.

Seide et al. 2014, "1-bit stochastic gradient descent" (error feedback); Stich et al. 2018, "Sparsified SGD with
Memory", Algorithm 1 (top-k with it).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from fedsieve.flower.mod.records import ADDED, ITSELF, MOVED, Base, TensorOrArray
from fedsieve.sparse.policy import check_share
from fedsieve.sparse.topk import top
from fedsieve.types import InputError, Sparse
from fedsieve.wire import finite, rounded

Criterion: TypeAlias = Literal["update", "weights"]
Values: TypeAlias = Literal["f32", "bf16", "int8", "int4"]


@dataclass(frozen=True)
class Compression:
    """How a client's arrays are cut and rounded: see ``SparseMod``."""

    top: float | None = None
    of: Criterion = "update"
    values: Values = "f32"
    feedback: bool = False

    def __post_init__(self) -> None:
        if self.top is not None:
            check_share("top", self.top, zero=False)
        if self.of not in ("update", "weights"):
            raise InputError(f"of must be update or weights, got {self.of!r}")
        check_values(self.values)
        if self.of == "weights" and self.top is None:
            raise InputError("of='weights' says what top cuts: give top as well, the share that stays")
        if self.feedback and (self.exact or self.of == "weights"):
            raise InputError("feedback sends later what a cut update or a rounded value left out: set top or values")

    @property
    def exact(self) -> bool:
        """Whether everything is sent, to the bit."""
        return self.top is None and self.values == "f32"

    def compress(
        self, now: Mapping[str, TensorOrArray], base: Base, left: Mapping[str, Tensor]
    ) -> tuple[dict[str, TensorOrArray | Sparse], int, dict[str, Tensor]]:
        """Return what to send of a record's arrays, what that stands for, and what is left for the next time."""
        if self.exact:
            return {**now}, ITSELF, {}
        if self.of == "weights":
            return {name: self._cut(v) for name, v in now.items()}, ITSELF, {}
        sent, kept = dict[str, TensorOrArray | Sparse](), dict[str, Tensor]()
        for name, value in now.items():
            like = base.like(name, value) if isinstance(value, Tensor) else None
            if like is None or not isinstance(value, Tensor):
                sent[name] = value
                continue
            change = value - like
            if (before := left.get(name)) is not None and before.shape == value.shape:
                change += before
                value = like + change
            support = self._support(change)
            told = value if self.values == "f32" else change
            sent[name] = told if support is None else Sparse.of(told, support)
            if self.feedback and value.dim() > 1:
                residual = change - self._arrived(change, value - like, support)
                kept |= {name: residual} if finite(residual) else {}
        return sent, MOVED if self.values == "f32" else ADDED, kept

    def _cut(self, value: TensorOrArray) -> TensorOrArray | Sparse:
        """Return a weight tensor's top values; any other array as it is."""
        weights = isinstance(value, Tensor) and value.dim() > 1 and value.is_floating_point()
        return Sparse.of(value, top(value, self.top or 1.0)) if weights and isinstance(value, Tensor) else value

    def _support(self, change: Tensor) -> Tensor | None:
        """Return where a tensor's change is sent; None: everywhere."""
        if self.top is None or change.dim() < 2:
            return None
        support = top(change, self.top)
        return None if bool(support.all()) else support

    def _arrived(self, change: Tensor, exact: Tensor, support: Tensor | None) -> Tensor:
        """Return what the server sees of a weight tensor's change; ``exact`` is what it sees of values sent whole."""
        if self.values == "f32":
            return exact if support is None else exact * support
        if support is None:
            return rounded(change, self.values)
        arrived = torch.zeros_like(change)
        arrived[support] = rounded(change[support], self.values)
        return arrived


def check_values(values: str) -> None:
    """Raise InputError unless values can be rounded so."""
    if values not in ("f32", "bf16", "int8", "int4"):
        raise InputError(f"values must be f32, bf16, int8 or int4, got {values!r}")
