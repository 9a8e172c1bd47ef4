"""What arithmetic between tensors of tokens becomes: a layer, or an expression that waits for what it is for."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partialmethod
from typing import Any

import torch
from torch import Tensor, nn

from fedsieve.kernels.checks import Unsupported
from fedsieve.kernels.expressions import (
    Combination,
    Complex,
    Expression,
    Function,
    MeanSquare,
    RaisedParameter,
    RowNoise,
    applied,
    as_complex,
    as_real,
    distinct_channels,
    function,
    moved,
    multiple,
    name_of,
    square_factor,
    square_of,
    sum_of_terms,
    tokens_of,
    turned,
)
from fedsieve.kernels.graph import ActivationLayer, NormLayer
from fedsieve.kernels.input_numbers import OTHER_SAMPLES, InputNumbers
from fedsieve.kernels.places import Places, by_sample
from fedsieve.kernels.token_tensors import TokenTensors
from fedsieve.kernels.tokens import (
    CombinationLayer,
    ElementProductLayer,
    LayerNormLayer,
    Parameters,
    RearrangedLayer,
    RowDropoutLayer,
    ScaleLayer,
    TokenFactorLayer,
    tokens,
)

EXPRESSIONS = {
    "mul", "add", "sub", "div", "neg", "pow", "square", "tanh", "mean", "rsqrt", "sqrt", "cat", "view_as_complex",
    "view_as_real", "bernoulli", "matmul", "bmm", "baddbmm", "einsum", "masked_fill", "where", "softmax", "_softmax",
    "scaled_dot_product_attention", "embedding", "index",
}  # fmt: skip
"""Operations that take expressions, and numbers of the inputs, as they are."""


class TokenExpressions(TokenTensors):
    """Adds the layers of arithmetic, a method for each operation, and returns what they give."""

    # What an expression is, once its numbers are needed.

    def settled(self, x: Any) -> Any:
        """Return arguments with layers for the expressions in them."""
        if isinstance(x, list | tuple):
            return type(x)(self.settled(one) for one in x)
        if isinstance(x, dict):
            return {name: self.settled(one) for name, one in x.items()}
        if isinstance(x, InputNumbers):
            return self._input_places(x)
        if not isinstance(x, Expression):
            return x
        if id(x) not in self.known:
            self.known[id(x)] = x, self._layer_of(x)
        return self.known[id(x)][1]

    def _layer_of(self, x: Expression) -> Places:
        if isinstance(x, Combination):
            return self._combined(x)
        if isinstance(x, Function):
            plain = Places(x.of, x.index)
            if (factor := square_factor(x)) is not None:
                left, right = self._alike(self.settled(multiple(plain, factor)), plain)
                value = tokens(left.channels, left.value.width)
                return self._given(self._put(ElementProductLayer([left.value, right.value], value)), left.ids)
            name, rows = name_of(x), self._all(self._rows(plain))
            value = tokens(rows.channels, rows.value.width)
            return self._given(self._put(ActivationLayer([rows.value], value, name)), rows.ids)
        what = "complex numbers" if isinstance(x, Complex) else "a mean over channels"
        raise Unsupported(f"{what} in another way than a norm's or a rotation's")

    def _combined(self, x: Combination) -> Places:
        if len(x.terms) == 1 and bool((x.terms[0][1] == 1).all()):
            return Places(x.of, x.index)
        of, present = x.of, tokens_of(x)
        if len(present) < 2 * of.width:  # some tokens alone: they are rearranged first
            ids, source = by_sample(present, of.width)
            of = self._put(RearrangedLayer([of], tokens(of.channels, len(source)), source))
            number = torch.zeros(int(present[-1]) + 1, dtype=torch.int64)
            number[present] = ids
            wide = of.channels
            terms = [(number[index // wide] * wide + index % wide, factor) for index, factor in x.terms]
            x = Combination(of, terms[0][0], terms)
        own = distinct_channels(x, of.width)
        value = tokens(own.source.shape[1], of.width, of.flat)
        return Places(self._put(CombinationLayer([of], value, own.source, own.factor)), own.index)

    def _moved(self, move: Any, args: Any, kwargs: Any, places: Sequence[Places]) -> Any:
        """Return moved expressions; those that cannot be moved as such become layers first."""
        movable = all(not isinstance(x, MeanSquare | Complex) for x in places)
        if movable and (len(places) == 1 or not any(isinstance(x, Function) for x in places)):
            return moved(move, args, kwargs, places)
        raise Unsupported("functions of numbers, or means, moved before they are what they are for")

    # Operations.

    def _op_mul(self, x: Any, y: Any) -> Any:
        if not self._is_tokens(x):
            x, y = y, x
        if isinstance(y, InputNumbers):
            return self._by_numbers(x, y, "times")
        if isinstance(y, RowNoise):
            return self._row_dropout(self.settled(x), y)
        for one, other in ((x, y), (y, x)):
            if isinstance(one, MeanSquare):
                return self._root_mean_square(other, one, -0.5)
        if isinstance(x, Complex):
            if not isinstance(y, Tensor):
                raise Unsupported("a product of complex numbers and no constant")
            return turned(x, y)
        if isinstance(y, int | float | Tensor) and not isinstance(x, Function):
            return self._multiple(x, y)
        if isinstance(x, Function) or isinstance(y, Function):
            if (both := self._applied(torch.mul, x, y)) is not None:
                return both
            return self._op_mul(self.settled(x), self.settled(y))
        if (both := square_of(x, y)) is not None:
            return both
        x, y = self.settled(x), self.settled(y)
        if not self._is_tokens(y):
            return self._scaled_by(x, y)
        left, right = self._alike(x, y)
        layer = ElementProductLayer([left.value, right.value], tokens(left.channels, left.value.width))
        return self._given(self._put(layer), left.ids)

    def _by_numbers(self, x: Any, y: InputNumbers, how: str) -> Any:
        """Multiply tokens by numbers of the inputs, or divide them, or bar those where these are true."""
        x = self.settled(x)
        if not isinstance(y.example, Tensor):
            raise Unsupported(OTHER_SAMPLES)
        if not self._is_tokens(x) or y.example.shape[-1:] != (1,):
            return self._op_mul(x, self._input_places(y, how))
        rows = self._all(self._rows(x))
        value = tokens(rows.channels, rows.value.width)
        layer = TokenFactorLayer([rows.value], value, *self._number_of_each(y, rows, how))
        return self._given(self._put(layer), rows.ids)

    def _multiple(self, x: Any, number: Any) -> Combination:
        if not isinstance(x, Places) or isinstance(x.of, Tensor):
            raise Unsupported("a multiple of a parameter")
        return multiple(self._packed(x) if self._is_input(x) else x, number)

    def _scaled_by(self, x: Any, y: Any) -> Any:
        """Multiply by a parameter that has one number a channel, and a number may be added to."""
        if isinstance(y, RaisedParameter):
            return self._op_add(self._scaled_by(x, y.parameter), self._op_mul(x, y.number))
        rows = self._all(self._rows(x))
        own = y.of if isinstance(y, Places) and isinstance(y.of, nn.Parameter) else None
        if own is None or y.index.shape[-1:] != (rows.channels,) or own.numel() != rows.channels:
            raise Unsupported("a product with a parameter that has not one number a channel")
        if not torch.equal(
            y.index.expand(*rows.ids.shape, -1), torch.arange(rows.channels).expand(*rows.ids.shape, -1)
        ):
            raise Unsupported("a product with a parameter whose numbers are not the channels' in order")
        layer = ScaleLayer([rows.value], tokens(rows.channels, rows.value.width), Parameters(weight=own))
        return self._given(self._put(layer), rows.ids)

    def _row_dropout(self, x: Any, noise: RowNoise) -> Places:
        if noise is not self.noise:
            raise Unsupported("random numbers that are used twice, or that are not drawn by bernoulli_")
        rows = self._all(self._rows(x))
        value = tokens(rows.channels, rows.value.width)
        sample = rows.ids // rows.value.width
        if not torch.equal(sample, torch.arange(len(sample)).view(-1, *[1] * (sample.dim() - 1)).expand_as(sample)):
            raise Unsupported("a random number for each sample where the first dimension is not the samples'")
        self.noise = None
        return self._given(self._put(RowDropoutLayer([rows.value], value, noise.p, noise.scale)), rows.ids)

    def _op_bernoulli(self, x: Any, p: float = 0.5) -> RowNoise:
        if not isinstance(x, RowNoise):
            raise Unsupported("random numbers apart from the samples (bernoulli)")
        self._draws(x)
        x.p = p
        return x

    def _op_neg(self, x: Any) -> Any:
        return self._op_mul(x, -1)

    def _op_add(self, x: Any, y: Any, alpha: float = 1) -> Any:
        x, y = (self._input_places(one, "times") if isinstance(one, InputNumbers) else one for one in (x, y))
        if not self._is_tokens(x) and alpha == 1:
            x, y = y, x
        if alpha != 1:
            y = y * alpha if isinstance(y, int | float | Tensor) else self._op_mul(y, alpha)
        if isinstance(x, MeanSquare) and isinstance(y, int | float) and x.power == 1:
            return MeanSquare(x.of, x.index, x.of_channels, x.eps + y)
        if isinstance(x, Function) or isinstance(y, Function):
            if (both := self._applied(torch.add, x, y)) is not None:
                return both
        elif self._is_tokens(x) and self._is_tokens(y) and (isinstance(x, Combination) or isinstance(y, Combination)):
            both_terms = sum_of_terms(x, y)
            if both_terms is not None:
                return both_terms
        x, y = self.settled(x), self.settled(y)
        if not self._is_tokens(x):
            x, y = y, x
        if isinstance(x, Places) and isinstance(x.of, Tensor) and isinstance(y, int | float):
            return RaisedParameter(x, y)
        if not self._is_tokens(y):
            return self._table_added(self._all(self._rows(x)), y)
        left, right = self._alike(x, y)
        layer = NormLayer([left.value, right.value], tokens(left.channels, left.value.width))
        return self._given(self._put(layer), left.ids)

    def _op_sub(self, x: Any, y: Any, alpha: float = 1) -> Any:
        return self._op_add(x, y, -alpha)

    def _op_div(self, x: Any, y: Any) -> Any:
        if isinstance(x, RowNoise) and isinstance(y, int | float):
            x.scale /= y
            return x
        if isinstance(y, MeanSquare):
            return self._root_mean_square(x, y, 0.5)
        if isinstance(y, InputNumbers):
            return self._by_numbers(x, y, "over")
        if not isinstance(y, int | float | Tensor):
            raise Unsupported("a quotient of two tensors")
        return self._op_mul(x, 1 / y)

    # Functions of each number, and norms that are written out.

    def _op_pow(self, x: Any, exponent: Any) -> Any:
        if isinstance(x, MeanSquare) and x.power == 1 and exponent in (0.5, -0.5):
            return MeanSquare(x.of, x.index, x.of_channels, x.eps, exponent)
        return self._function(x, lambda v: v**exponent)

    _op_square = partialmethod(_op_pow, exponent=2)
    _op_sqrt = partialmethod(_op_pow, exponent=0.5)
    _op_rsqrt = partialmethod(_op_pow, exponent=-0.5)

    def _op_tanh(self, x: Any) -> Function:
        return self._function(x, torch.tanh)

    def _function(self, x: Any, apply: Any) -> Function:
        if self._is_input(x):
            x = self._packed(x)
        if not self._is_tokens(x):
            raise Unsupported("a function of a parameter")
        return function(x if isinstance(x, Function) else self.settled(x), apply)

    def _applied(self, op: Any, x: Any, y: Any) -> Function | None:
        if (both := applied(op, x, y)) is not None:
            return both
        return applied(op, *(one if isinstance(one, Function) else self.settled(one) for one in (x, y)))

    def _mean_square(self, x: Any, dims: Sequence[int], keepdim: bool) -> MeanSquare | None:
        """Return the mean over the channels of squares; None of other means."""
        last = isinstance(x, Function) and [d % x.index.dim() for d in dims] == [x.index.dim() - 1]
        if not last or not keepdim or name_of(x) != "square":
            return None
        return MeanSquare(x.of, x.index[..., :1], x.index)

    def _root_mean_square(self, x: Any, square: MeanSquare, power: float) -> Places:
        x = self.settled(x)
        own = isinstance(x, Places) and x.of is square.of and torch.equal(x.index, square.of_channels)
        if not own or square.power != power:
            raise Unsupported("a mean over channels in another way than a norm's")
        rows = self._all(self._rows(x))
        module, value = Parameters(weight=None, bias=None), tokens(rows.channels, rows.value.width)
        return self._given(self._put(LayerNormLayer([rows.value], value, module, square.eps, True)), rows.ids)

    # Rotations of complex numbers.

    def _op_view_as_complex(self, x: Any) -> Complex:
        return as_complex(x)

    def _op_view_as_real(self, x: Any) -> Combination:
        if not isinstance(x, Complex):
            raise Unsupported("parts of numbers that are not complex")
        return as_real(x)
