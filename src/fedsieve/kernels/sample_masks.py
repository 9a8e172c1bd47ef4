"""Masks that differ from sample to sample: what one of the model's inputs says, such as which tokens are padding."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fedsieve.kernels.checks import Unsupported
from fedsieve.kernels.expressions import Expression
from fedsieve.kernels.graph import Value
from fedsieve.kernels.places import SAMPLES, Places
from fedsieve.kernels.token_calls import TokenCalls
from fedsieve.kernels.tokens import InputMask

NEVER = -1e30
"""What is added to a score that may not count is at most this; the softmax of float32 then is 0."""
COMPARISONS = {"ne", "eq", "gt", "ge", "lt", "le"}


@dataclass
class SampleMask(Expression):
    """Truth values: what a test says of the numbers of an input, where a constant is true as well."""

    allowed: Tensor = field(default_factory=lambda: torch.ones((), dtype=torch.bool))
    """bool, shaped as the tensor."""
    test: Callable[[Tensor], Tensor] = torch.Tensor.bool

    def at(self, sizes: torch.Size) -> SampleMask:
        """Return it repeated to a larger size."""
        return replace(self, index=self.index.expand(sizes), allowed=self.allowed.expand(sizes))


@dataclass
class AddedMask(SampleMask):
    """The same as numbers that are added to scores: 0 where it is true, and minus infinity."""


@dataclass
class Zeros(Expression):
    """Zeros shaped as a mask, to be filled by it."""


@dataclass
class Computed(Expression):
    """Whole numbers computed of an input's, [n, length]: positions that leave padding out, for an embedding."""

    compute: Callable[[Tensor], Tensor] = torch.Tensor.long
    """What they are of a batch of the input's numbers."""


def moved_mask(move: Callable[..., Any], places: list[Places], args: Any, kwargs: Any) -> SampleMask | Computed:
    """Return a mask whose values were only moved, or numbers that stay where they are."""
    x = places[0]
    if len(places) == 1 and isinstance(args[0], Places):
        index = move(x.index, *args[1:], **kwargs)
        if isinstance(x, SampleMask):
            return replace(x, index=index, allowed=move(x.allowed, *args[1:], **kwargs))
        if isinstance(x, Computed) and isinstance(index, Tensor) and torch.equal(index, x.index):
            return x
    raise Unsupported("truth values, or numbers computed of an input's, that are joined or moved")


def only_in_attention(name: str, places: list[Places]) -> None:
    """Raise Unsupported if another operation than attention takes a mask that is added."""
    if name != "scaled_dot_product_attention" and any(isinstance(one, AddedMask) for one in places):
        raise Unsupported(f"a mask of minus infinities in {name}, not in attention")


def attention_mask(x: SampleMask, sizes: torch.Size) -> tuple[Tensor, InputMask]:
    """Return what a mask of scores [n, heads, length, length] bars in all samples, and what it does in each."""
    x = x.at(sizes)
    numel = torch.Size(x.of.sizes).numel()
    sample, place = x.index // numel, x.index % numel
    own = torch.equal(sample, torch.arange(SAMPLES).view(-1, 1, 1, 1).expand(sizes))
    alike = all(torch.equal(one, one[:1, :1].expand(sizes)) for one in (place, x.allowed))
    if not own or not alike:
        raise Unsupported("attention with a mask that has another sample's or another head's numbers")
    return x.allowed[0, 0], InputMask(x.of, place[0, 0], x.test)


class MaskCalls(TokenCalls):
    """Adds what masks of the samples are made of, a method for each operation."""

    def _compared(self, name: str, x: Any, number: Any) -> SampleMask:
        if not self._is_input(x) or isinstance(x, Expression) or not isinstance(number, int | float | bool):
            raise Unsupported("a comparison of anything but an input's numbers with a number")
        compare = getattr(operator, name)
        return self._mask_of(x, lambda numbers: compare(numbers, number))

    def _mask_of(self, x: Places, test: Callable[[Tensor], Tensor]) -> SampleMask:
        return SampleMask(x.of, x.index, torch.ones(x.index.shape, dtype=torch.bool), test)  # type: ignore[arg-type]

    def _op_to(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        wanted = [one for one in (*args, *kwargs.values()) if isinstance(one, torch.dtype)]
        if wanted == [torch.bool] and isinstance(x, SampleMask):
            return x
        if wanted == [torch.bool] and self._is_input(x) and not isinstance(x, Expression):
            return self._mask_of(x, torch.Tensor.bool)
        if len(wanted) == 1 and not wanted[0].is_floating_point and (own := self._computed(x)) is not None:
            kind, compute = wanted[0], own.compute
            return replace(own, compute=lambda numbers: compute(numbers).to(kind))
        raise Unsupported(f"a conversion to {wanted[0] if wanted else 'another device'}")

    def _computed(self, x: Any) -> Computed | None:
        """Return what is computed of all numbers of an input of whole ones; None of other tensors."""
        if isinstance(x, Computed):
            return x
        if not self._is_input(x) or x.of.dtype != torch.int64 or x.index.shape[1:] != x.of.sizes:
            return None
        whole = torch.equal(x.index.flatten(), torch.arange(x.index.numel()))
        if isinstance(x, SampleMask):
            return Computed(x.of, x.index, x.test) if whole and bool(x.allowed.all()) else None
        return Computed(x.of, x.index, torch.Tensor.long) if whole and not isinstance(x, Expression) else None

    def _op_cumsum(self, x: Any, dim: int) -> Computed:
        own = self._computed(x)
        if own is None or dim not in (1, -1) or x.index.dim() != 2:
            raise Unsupported("cumsum of anything but an input's whole numbers [n, length]")
        compute = own.compute
        return replace(own, compute=lambda numbers: compute(numbers).cumsum(1))

    def _op_gather(self, table: Any, dim: int, x: Any, sparse_grad: bool = False) -> Computed:
        if not isinstance(table, Tensor) or not isinstance(x, Computed) or dim not in (1, -1) or table.dim() != 2:
            raise Unsupported("gather of anything but constants by an input's whole numbers")
        if not torch.equal(table, table[:1].expand_as(table)):
            raise Unsupported("constants that differ from sample to sample")
        row, compute = table[0].clone(), x.compute
        return replace(x, compute=lambda numbers: row[compute(numbers)])

    def _both(self, op: Callable[[Any, Any], Tensor], x: Any, y: Any) -> Computed | None:
        """Return an operation on whole numbers of one input, or on these and a number; None of other tensors."""
        if not any(isinstance(one, Computed) for one in (x, y)):
            return None
        parts = [one if isinstance(one, int) else self._computed(one) for one in (x, y)]
        own = next(one for one in parts if isinstance(one, Computed))
        if any(one is None or (isinstance(one, Computed) and one.of is not own.of) for one in parts):
            raise Unsupported("arithmetic of an input's whole numbers and others")
        first, second = (one.compute if isinstance(one, Computed) else (lambda _, number=one: number) for one in parts)
        return replace(own, compute=lambda numbers: op(first(numbers), second(numbers)))

    def _op_mul(self, x: Any, y: Any) -> Any:
        return self._both(operator.mul, x, y) or super()._op_mul(x, y)

    def _op_add(self, x: Any, y: Any, alpha: float = 1) -> Any:
        own = self._both(operator.add if alpha == 1 else operator.sub, x, y) if alpha in (1, -1) else None
        return own or super()._op_add(x, y, alpha)

    def _op_zeros_like(self, x: Any, **_: Any) -> Zeros:
        if not isinstance(x, SampleMask):
            raise Unsupported("zeros shaped as anything but a mask that an input says")
        return Zeros(Value(0), x.index)

    def _added(self, x: Zeros, barred: Any, number: float) -> AddedMask:
        """Return zeros filled with minus infinity where a mask is true."""
        whole = isinstance(barred, SampleMask) and bool(barred.allowed.all()) and torch.equal(barred.index, x.index)
        if not whole or number > NEVER:
            raise Unsupported("zeros that are filled with anything but minus infinity, by a mask that an input says")
        test = barred.test
        return AddedMask(barred.of, barred.index, barred.allowed, lambda numbers: ~test(numbers))

    def _op_logical_not(self, x: Any) -> SampleMask:
        if self._is_input(x) and not isinstance(x, Expression):
            return self._mask_of(x, torch.logical_not)
        if not isinstance(x, SampleMask) or not bool(x.allowed.all()):
            raise Unsupported("the opposite of anything but a mask that an input says")
        test = x.test
        return replace(x, test=lambda numbers: ~test(numbers))

    _op_bitwise_not = _op_logical_not

    def _op_logical_and(self, x: Any, y: Any) -> SampleMask:
        x, y = (y, x) if isinstance(x, Tensor) else (x, y)
        if self._is_input(x) and not isinstance(x, Expression):
            x = self._op_to(x, torch.bool)
        if not isinstance(x, SampleMask) or not isinstance(y, Tensor):
            raise Unsupported("both of two masks that inputs say")
        mask = x.at((x.allowed & y.bool()).shape)
        return replace(mask, allowed=mask.allowed & y.bool())

    _op_bitwise_and = _op_and = _op_logical_and
