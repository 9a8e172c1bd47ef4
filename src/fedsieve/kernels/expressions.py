"""Expressions of one tensor of tokens, which become a layer where something else needs their numbers.

Multiples and sums of a value's own channels (rotations of positions, scales) are one layer, whatever calls they are
written in; a function of each number is known by what it gives; a mean square by the norm that it is for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from fedsieve.kernels.checks import Unsupported
from fedsieve.kernels.graph import Value
from fedsieve.kernels.places import SAMPLES, Places

Term: TypeAlias = tuple[Tensor, Tensor]
"""Where numbers stand, and what each is multiplied by: shaped alike."""
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "tanh": torch.tanh,
    "square": torch.square,
}
"""What functions of each number may be."""


@dataclass
class Expression(Places):
    """What is computed of a value's numbers, and no layer yet."""

    of: Value


@dataclass
class Combination(Expression):
    """Sums of a token's channels, each multiplied by a constant."""

    terms: list[Term] = field(default_factory=list)


@dataclass
class Function(Expression):
    """A function of each number, here of float64."""

    apply: Callable[[Tensor], Tensor] = torch.square


@dataclass
class MeanSquare(Expression):
    """The mean square of a token's channels, [..., 1], and a number; its ``power``: 1/2 and -1/2 once it has a root."""

    of_channels: Tensor = field(default_factory=lambda: torch.empty(0))
    """Where the channels stand."""
    eps: float = 0.0
    power: float = 1.0


@dataclass
class Complex(Expression):
    """Pairs of channels as complex numbers."""

    parts: tuple[list[Term], list[Term]] = field(default_factory=lambda: ([], []))
    """The real and the imaginary ones."""


@dataclass
class RaisedParameter:
    """A parameter, and a number that is added to all of it."""

    parameter: Places
    number: float


@dataclass
class RowNoise:
    """A random number for each sample, [n, 1, ...]."""

    p: float = 1.0
    """The probability of 1; else it is 0."""
    scale: float = 1.0


def terms_of(x: Places, count: int = 0) -> list[Term]:
    """Return the terms of a tensor, with zeros up to so many."""
    if isinstance(x, Expression) and not isinstance(x, Combination):
        raise Unsupported("an expression among sums of channels that is none")
    terms = x.terms if isinstance(x, Combination) else [(x.index, _constants(1, x.index))]
    return terms + [(x.index, _constants(0, x.index))] * (count - len(terms))


def _constants(number: float, like: Tensor) -> Tensor:
    return torch.tensor(number, dtype=torch.float64).expand(like.shape)


def combination(x: Places, terms: list[Term]) -> Combination:
    """Return a sum of terms of the numbers of one value."""
    assert isinstance(x.of, Value)
    return Combination(x.of, terms[0][0], terms)


def multiple(x: Places, factor: Any) -> Combination:
    """Return a tensor times a number, or a constant that is not larger."""
    factor = torch.as_tensor(factor, dtype=torch.float64)
    terms = [(index, own * factor) for index, own in terms_of(x)]
    if terms[0][1].shape != x.index.shape:
        raise Unsupported("a product with a constant of a larger shape")
    return combination(x, terms)


def factored(x: Any) -> tuple[Any, float]:
    """Return a tensor without the number that all of it is multiplied by, and that number."""
    if not isinstance(x, Combination) or len(x.terms) > 1:
        return x, 1.0
    index, factor = x.terms[0]
    number = float(factor.flatten()[0])
    return (Places(x.of, index), number) if bool((factor == number).all()) else (x, 1.0)


def sum_of_terms(x: Places, y: Places) -> Combination | None:
    """Return the sum of two combinations of the same tokens; None of others."""
    if x.of is not y.of or x.index.shape != y.index.shape:
        return None
    assert isinstance(x.of, Value)
    wide = x.of.channels
    alike = torch.equal(x.index // wide, y.index // wide)
    return combination(x, terms_of(x) + terms_of(y)) if alike else None


def applied(op: Callable[[Any, Any], Tensor], x: Any, y: Any) -> Function | None:
    """Return an operation on two functions of the same numbers, or one and a number; None of others."""
    own = next(one for one in (x, y) if isinstance(one, Function))
    first, second = _as_function(x, own), _as_function(y, own)
    if first is None or second is None:
        return None
    return Function(own.of, own.index, lambda v: op(torch.as_tensor(first(v)), second(v)))


def square_of(x: Any, y: Any) -> Function | None:
    """Return the product of two multiples of the same numbers; None of others."""
    same = isinstance(x, Places) and isinstance(y, Places) and x.of is y.of and isinstance(x.of, Value)
    if not same or not torch.equal(x.index, y.index) or (first := _multiplied(x)) is None:
        return None
    return applied(torch.mul, Function(x.of, x.index, first), y)


def square_factor(x: Function) -> float | None:
    """Return the number that squares are multiplied by, if that is the function; None of others."""
    v = torch.linspace(-7, 7, 113, dtype=torch.float64)
    number = x.apply(torch.ones((), dtype=torch.float64))
    return float(number) if torch.allclose(x.apply(v), number * v**2, rtol=1e-6, atol=1e-7) else None


def _as_function(x: Any, own: Function) -> Callable[[Tensor], Any] | None:
    if isinstance(x, int | float):
        return lambda _: float(x)
    if not isinstance(x, Places) or x.of is not own.of or not torch.equal(x.index, own.index):
        return None
    return x.apply if isinstance(x, Function) else _multiplied(x)


def _multiplied(x: Places) -> Callable[[Tensor], Tensor] | None:
    """Return what multiplies by a combination's only number; None where there are several."""
    terms = terms_of(x)
    factor = terms[0][1]
    if isinstance(x, MeanSquare | Complex) or len(terms) > 1 or bool((factor != factor.flatten()[0]).any()):
        return None
    number = float(factor.flatten()[0])
    return lambda v: number * v


def function(x: Places, apply: Callable[[Tensor], Tensor]) -> Function:
    """Return a function of a tensor's numbers, or of what is one already."""
    assert isinstance(x.of, Value)
    inner = x.apply if isinstance(x, Function) else None
    return Function(x.of, x.index, apply if inner is None else lambda v: apply(inner(v)))


def name_of(x: Function) -> str:
    """Return which of the known functions one is, by what it gives. Raises Unsupported for others."""
    v = torch.linspace(-7, 7, 113, dtype=torch.float64)
    got = x.apply(v)
    for name, known in FUNCTIONS.items():
        if torch.allclose(got, known(v), rtol=1e-6, atol=1e-7):
            return name
    raise Unsupported("a function of each number that the kernels do not have")


def moved(move: Callable[..., Any], args: Any, kwargs: Any, places: Sequence[Places]) -> Any:
    """Return what moves the numbers of combinations, or of a function: one tensor, or several."""
    first = places[0]
    if isinstance(first, Function) and len(places) == 1:
        return _each(move(*_replaced(args, lambda x: x.index), **kwargs), lambda x: Function(first.of, x, first.apply))
    count = max(len(terms_of(x)) for x in places)

    def part(k: int, i: int) -> Any:
        return move(*_replaced(args, lambda x: terms_of(x, count)[k][i]), **kwargs)

    both = [[part(k, i) for i in range(2)] for k in range(count)]
    if isinstance(both[0][0], Tensor):
        return combination(first, [(index, factor) for index, factor in both])
    parts = range(len(both[0][0]))
    return [combination(first, [(index[j], factor[j]) for index, factor in both]) for j in parts]


def _each(x: Any, make: Callable[[Tensor], Any]) -> Any:
    return make(x) if isinstance(x, Tensor) else [make(one) for one in x]


def _replaced(x: Any, change: Callable[[Places], Any]) -> Any:
    if isinstance(x, list | tuple):
        return type(x)(_replaced(one, change) for one in x)
    return change(x) if isinstance(x, Places) else x


def as_complex(x: Places) -> Complex:
    """Return pairs [..., 2] as complex numbers."""
    parts = [[(index[..., i], factor[..., i]) for index, factor in terms_of(x)] for i in range(2)]
    assert isinstance(x.of, Value)
    return Complex(x.of, x.index[..., 0], (parts[0], parts[1]))


def turned(x: Complex, factor: Tensor) -> Complex:
    """Return complex numbers times a constant."""
    real, imaginary = factor.real.double(), factor.imag.double()
    a, b = x.parts

    def times(terms: list[Term], n: Tensor) -> list[Term]:
        return [(index, own * n) for index, own in terms]

    return Complex(x.of, x.index, (times(a, real) + times(b, -imaginary), times(a, imaginary) + times(b, real)))


def as_real(x: Complex) -> Combination:
    """Return complex numbers as pairs [..., 2]."""
    pairs = zip(*x.parts, strict=True)
    terms = [(torch.stack([a, c], -1), torch.stack([b.expand_as(a), d.expand_as(c)], -1)) for (a, b), (c, d) in pairs]
    return combination(x, terms)


@dataclass
class DistinctChannels:
    """A combination's different channels: each token has the same, of which some stand in several places."""

    source: Tensor
    """int64 [terms, channels]."""
    factor: Tensor
    """float32 [terms, channels, length], or [terms, channels, 1] where it is the same at every place."""
    index: Tensor
    """int64, shaped as the tensor: which token and channel of these."""


def distinct_channels(x: Combination, length: int) -> DistinctChannels:
    """Find them, for samples of so many tokens, all of which the tensor has. Raises Unsupported if that cannot be."""
    index = torch.stack([i.flatten() for i, _ in x.terms])
    factor = torch.stack([f.expand(i.shape).flatten() for i, f in x.terms])
    wide, count, (terms, total) = x.of.channels, SAMPLES * length, index.shape
    token, each = index[0] // wide, total // count
    order = token.argsort(stable=True)
    whole = total % count == 0 and torch.equal(
        token[order].view(count, -1), torch.arange(count)[:, None].expand(-1, each)
    )
    if not whole or bool((index // wide != token).any()):
        raise Unsupported("a sum of channels of several tokens, or of some tokens alone")
    source = (index % wide)[:, order].view(terms, count, each)
    number = factor[:, order].view(terms, SAMPLES, length, each)
    if not torch.equal(source, source[:, :1].expand_as(source)):
        raise Unsupported("a sum of other channels at other places")
    if not torch.equal(number, number[:, :1].expand_as(number)):
        raise Unsupported("a product with a constant that differs from sample to sample")
    source, number = source[:, 0], number[:, 0]
    if torch.equal(number, number[:, :1].expand_as(number)):
        number = number[:, :1]
    key = torch.cat([source.double(), number.flatten(0, 1)])
    _, which = torch.unique(key, dim=1, return_inverse=True)
    first = torch.full((int(which.max()) + 1,), each).scatter_reduce(0, which, torch.arange(each), "amin")
    chosen, place = first.sort().values, first.argsort().argsort()[which]
    at = torch.empty_like(token)
    at[order] = (torch.arange(count)[:, None] * len(chosen) + place).flatten()
    return DistinctChannels(
        source[:, chosen], number[:, :, chosen].transpose(1, 2).float().contiguous(), at.view(x.index.shape)
    )


def tokens_of(x: Combination) -> Tensor:
    """Return the tokens of the batch that a combination has, ascending."""
    has = torch.zeros(SAMPLES * x.of.width, dtype=torch.bool)
    for index, _ in x.terms:
        has[index.flatten() // x.of.channels] = True
    return has.nonzero().squeeze(1)
