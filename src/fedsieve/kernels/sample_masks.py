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
from fedsieve.kernels.places import SAMPLES, Places
from fedsieve.kernels.token_calls import TokenCalls
from fedsieve.kernels.tokens import InputMask

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


def moved_mask(move: Callable[..., Any], x: SampleMask, args: Any, kwargs: Any) -> SampleMask:
    """Return a mask whose values were only moved."""
    index, allowed = (move(one, *args[1:], **kwargs) for one in (x.index, x.allowed))
    return replace(x, index=index, allowed=allowed)


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
        raise Unsupported(f"a conversion to {wanted[0] if wanted else 'another device'}")

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
