"""What a model of tokens calls, as layers of the kernels: a method for each operation of PyTorch's that they know."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partialmethod
from typing import Any

import torch
from torch import Tensor, nn

from fedsieve.kernels.checks import Unsupported
from fedsieve.kernels.expressions import Combination
from fedsieve.kernels.graph import ActivationLayer, ConcatenationLayer, NormLayer
from fedsieve.kernels.input_numbers import InputNumbers
from fedsieve.kernels.places import SAMPLES, Places, pair
from fedsieve.kernels.token_expressions import TokenExpressions
from fedsieve.kernels.tokens import (
    DropoutLayer,
    EmbeddingLayer,
    LayerNormLayer,
    MeanLayer,
    Parameters,
    PickedLayer,
    RearrangedLayer,
    TokenProduct,
    tokens,
)


class TokenCalls(TokenExpressions):
    """Adds the layers of a model's operations, a method for each, and returns what they give."""

    def _op_linear(self, x: Any, weight: Any, bias: Any = None) -> Places:
        rows = self._all(self._rows(x))
        if not isinstance(weight, Places) or not isinstance(weight.of, nn.Parameter) or weight.index.dim() != 2:
            raise Unsupported("a product whose weight is no parameter")
        flat, (out, inner) = torch.arange(weight.of.numel()), weight.index.shape
        first = int(weight.index[0, 0]) // inner
        in_order = torch.equal(weight.index.flatten(), flat[first * inner :][: out * inner])
        part = len(flat) != out * inner
        if part and not (in_order and weight.of.shape[1:].numel() == inner and weight.of.is_contiguous()):
            raise Unsupported("a product with a part of a weight that is not some of its rows")
        if not in_order and not torch.equal(weight.index.t().flatten(), flat):
            raise Unsupported("a product with a weight in another order than its own, or turned")
        if part and isinstance(bias, Places) and isinstance(bias.of, Tensor):
            rows_of = torch.equal(bias.index, torch.arange(first, first + out)) and bias.of.numel() == len(weight.of)
            bias = bias.of if rows_of else bias
        module = self._module(weight.of, own := self._parameter(bias))
        name = self.names[id(weight.of)]
        layer = TokenProduct(
            [rows.value], tokens(out, rows.value.width), module, name.removesuffix(".weight"), parameter=name,
            transposed=not in_order, first=first,
        )  # fmt: skip
        assert own is None or own.numel() == (len(weight.of) if part else out)
        return self._given(self._put(layer), rows.ids)

    def _module(self, weight: nn.Parameter, bias: Tensor | None) -> Any:
        """Return the linear layer or convolution that has these parameters; where none has, what holds them."""
        for module in self.model.modules():
            same = isinstance(module, nn.Linear | nn.Conv2d) and module.weight is weight and module.bias is bias
            if same and len([*module.parameters()]) == 1 + (bias is not None):
                return module
        return Parameters(weight=weight, bias=bias)

    def _op_addmm(self, bias: Any, x: Any, weight: Any) -> Places:
        return self._op_linear(x, Places(weight.of, weight.index.t()), bias)

    def _op_matmul(self, x: Any, weight: Any) -> Places:
        if not isinstance(weight, Places) or not isinstance(weight.of, nn.Parameter) or weight.index.dim() != 2:
            raise Unsupported("a matrix product of two activations, apart from scaled_dot_product_attention")
        return self._op_linear(x, Places(weight.of, weight.index.t()))

    _op_mm = _op_matmul

    def _op_conv2d(
        self, x: Any, weight: Any, bias: Any = None, stride: Any = (1, 1), padding: Any = (0, 0),
        dilation: Any = (1, 1), groups: int = 1,
    ) -> Places:  # fmt: skip
        """A convolution of the input whose windows do not overlap: a linear layer of patches."""
        size = tuple(weight.index.shape[2:])
        plain = [pair(stride), pair(padding), pair(dilation), groups] == [size, (0, 0), (1, 1), 1]
        if not plain or not self._is_input(x) or x.index.dim() != 4:
            raise Unsupported("a convolution among tokens that is not one of the input's patches")
        patches = x.index.unfold(2, size[0], size[0]).unfold(3, size[1], size[1]).permute(0, 2, 3, 1, 4, 5)
        y = self._op_linear(Places(x.of, patches.flatten(3)), Places(weight.of, weight.index.flatten(1)), bias)
        return Places(y.of, y.index.permute(0, 3, 1, 2))

    def _op_layer_norm(
        self, x: Any, shape: Sequence[int], weight: Any = None, bias: Any = None, eps: float = 1e-5, _: bool = True
    ) -> Places:
        return self._normed(x, shape, weight, bias, eps, False)

    def _op_rms_norm(self, x: Any, shape: Sequence[int], weight: Any = None, eps: float | None = None) -> Places:
        return self._normed(x, shape, weight, None, torch.finfo(torch.float32).eps if eps is None else eps, True)

    def _normed(self, x: Any, shape: Sequence[int], weight: Any, bias: Any, eps: float, rms: bool) -> Places:
        rows = self._all(self._rows(x))
        if list(shape) != [rows.channels]:
            raise Unsupported(f"a norm over {list(shape)}, which are not the channels alone")
        module = Parameters(weight=self._parameter(weight), bias=self._parameter(bias))
        value = tokens(rows.channels, rows.value.width)
        return self._given(self._put(LayerNormLayer([rows.value], value, module, eps, rms)), rows.ids)

    def _op_embedding(
        self, weight: Any, x: Any, padding: int = -1, by_count: bool = False, sparse: bool = False
    ) -> Places:
        if by_count or sparse:
            raise Unsupported("an embedding with scale_grad_by_freq or sparse")
        if isinstance(x, Tensor):
            if bool((x == padding).any()):
                raise Unsupported("constant numbers of an embedding, one of which is its padding_idx")
            return Places(weight.of, weight.index[x])
        table = self._parameter(weight)
        if table is None or (isinstance(weight, Places) and weight.index.shape != table.shape):
            raise Unsupported("an embedding in a table of another shape than its parameter has")
        if not isinstance(x, InputNumbers) or (places := self._input_places(x)).of.dtype != torch.int64:
            raise Unsupported("an embedding of anything but whole numbers of the inputs")
        length = places.index.numel() // SAMPLES
        layer = EmbeddingLayer([], tokens(table.shape[1], length), Parameters(weight=table), self._name(table))
        layer.padding, layer.of = padding, self._value_of(x)
        return self._given(self._put(layer), places.index)

    def _op_index(self, x: Any, index: Sequence[Any]) -> Places:
        """A token of each sample, at a place that the inputs say."""
        rows = self._all(self._rows(self.settled(x)))
        samples, place = index if len(index) == 2 else (None, None)
        if (
            not isinstance(samples, Tensor)
            or not torch.equal(samples, torch.arange(SAMPLES))
            or not isinstance(place, InputNumbers)
            or place.example.shape != (SAMPLES,)
            or not torch.equal(rows.ids, torch.arange(SAMPLES * rows.value.width).view(SAMPLES, -1))
        ):
            raise Unsupported("an index that is not x[torch.arange(n), places], of tokens and of numbers of the inputs")
        layer = PickedLayer([rows.value], tokens(rows.channels, 1), self._value_of(place))
        return self._given(self._put(layer), torch.arange(SAMPLES))

    def _op_to(self, x: Any, *args: Any, **kwargs: Any) -> Places:
        wanted = [one for one in (*args, *kwargs.values()) if isinstance(one, torch.dtype)]
        raise Unsupported(f"a conversion to {wanted[0] if wanted else 'another device'}")

    def _op_gelu(self, x: Any, approximate: str = "none") -> Places:
        return self._activated(x, "gelu" if approximate == "none" else "gelu_tanh")

    def _activated(self, x: Any, function: str) -> Places:
        rows = self._all(self._rows(x))
        layer = ActivationLayer([rows.value], tokens(rows.channels, rows.value.width), function)
        return self._given(self._put(layer), rows.ids)

    _op_silu = partialmethod(_activated, function="silu")
    _op_sigmoid = partialmethod(_activated, function="sigmoid")
    _op_hardswish = partialmethod(_activated, function="hardswish")

    def _op_relu(self, x: Any) -> Places:
        rows = self._all(self._rows(x))
        return self._given(
            self._put(NormLayer([rows.value], tokens(rows.channels, rows.value.width), relu=1)), rows.ids
        )

    def _op_dropout(self, x: Any, p: float, train: bool) -> Places:
        if not train or not p:
            assert isinstance(x, Places)
            return x
        self._some_kept(p)
        self._draws()
        rows = self._all(self._rows(x))
        length = rows.value.width
        order = [*range(rows.ids.dim() + 1)]
        plain = torch.arange(SAMPLES * length)
        if rows.ids.dim() == 2 and torch.equal(rows.ids.t().flatten(), plain):  # [length, n, channels]
            rows.ids, order = rows.ids.t(), [1, 0, 2]
        if rows.ids.dim() > 2 or not torch.equal(rows.ids.flatten(), plain):
            raise Unsupported("dropout of a tensor that is not [n, length, channels]")
        memory = self._memory_order()
        drawn = [memory.index(d) for d in order]
        layer = DropoutLayer([rows.value], tokens(rows.channels, length), p, drawn)
        given = self._given(self._put(layer), rows.ids)
        return replace(given, index=given.index.permute(order))

    def _some_kept(self, p: float) -> None:
        if p == 1:
            raise Unsupported("dropout of everything (p is 1)")

    def _memory_order(self) -> list[int]:
        """Return the dimensions of an operation's first tensor from the widest stride to the narrowest."""
        strides = self.node.args[0].meta["val"].stride()
        sizes = [s.node.hint if isinstance(s, torch.SymInt) else s for s in strides]
        return sorted(range(len(sizes)), key=lambda d: -sizes[d])

    def _op_mean(self, x: Any, dims: Sequence[int], keepdim: bool = False) -> Any:
        square = self._mean_square(x, dims, keepdim)
        return self._over_tokens(x, dims, keepdim, False) if square is None else square

    def _op_sum(self, x: Any, dims: Sequence[int] = (), keepdim: bool = False) -> Places:
        return self._over_tokens(x, dims, keepdim, True)

    def _over_tokens(self, x: Any, dims: Sequence[int], keepdim: bool, total: bool) -> Places:
        rows = self._all(self._rows(self.settled(x)))
        length = rows.value.width
        plain = rows.ids.dim() == 2 and torch.equal(rows.ids.flatten(), torch.arange(SAMPLES * length))
        if not plain or [d % 3 for d in dims] != [1]:
            what = "sum" if total else "mean"
            raise Unsupported(f"a {what} that is not over the tokens of [n, length, channels]")
        value = self._put(MeanLayer([rows.value], tokens(rows.channels, 1), total))
        return self._given(value, torch.arange(SAMPLES).view(SAMPLES, *[1] * keepdim))

    def _op_cat(self, parts: Sequence[Any], dim: int = 0) -> Any:
        """Tokens one behind another; those of a parameter are the same in every sample."""
        parts = [self._places(part) if isinstance(part, Tensor) else part for part in parts]
        parts = [self._input_places(part) if isinstance(part, InputNumbers) else part for part in parts]
        last = max(part.index.dim() for part in parts) - 1
        of_one = (
            len({id(part.of) for part in parts}) == 1 and self._is_tokens(parts[0]) and not self._is_input(parts[0])
        )
        if of_one and (dim in (-1, last) or any(isinstance(part, Combination) for part in parts)):
            return self._moved(torch.cat, (parts, dim), {}, parts)
        parts = self.settled(parts)
        if dim in (-1, last) and all(self._is_tokens(part) for part in parts):
            return self._channels_joined(parts)
        values = {id(part.of): part.of for part in parts if self._is_tokens(part)}
        if dim in (-1, last) or len(values) != 1:
            raise Unsupported("a concatenation that is not one of tokens and parameters")
        (value,) = values.values()
        if value in self.inputs:
            raise Unsupported("a concatenation with numbers of the input")
        wide = value.channels
        index = torch.cat([part.index for part in parts], dim)
        source = torch.cat([torch.full_like(part.index, k) for k, part in enumerate(parts)], dim)[..., 0]
        row = index[..., 0] // wide
        if not torch.equal(index, (row * wide).unsqueeze(-1) + torch.arange(wide)) or index.dim() != 3:
            raise Unsupported("a concatenation of tensors that are not [n, length, channels]")
        own = torch.tensor([self._is_tokens(part) for part in parts])[source]
        if not bool((row // value.width == torch.arange(SAMPLES)[:, None])[own].all()):
            raise Unsupported("a concatenation of several samples' tokens")
        place = torch.where(own, row % value.width, -1)
        table = {k: torch.where(source == k, row, -1) for k, part in enumerate(parts) if not self._is_tokens(part)}
        if any(not torch.equal(each[0], each[1]) for each in (place, *table.values())):
            raise Unsupported("a concatenation that differs from sample to sample")
        length = index.shape[1]
        out = self._put(RearrangedLayer([value], tokens(wide, length), place[0]))
        for k, rows in table.items():
            module = Parameters(weight=parts[k].of)
            out = self._put(EmbeddingLayer([out], tokens(wide, length), module, self._name(parts[k].of), rows[0]))
        return self._given(out, torch.arange(SAMPLES * length).view(SAMPLES, length))

    def _channels_joined(self, parts: Sequence[Places]) -> Places:
        """Put the channels of several tensors of the same tokens one behind another."""
        rows = [self._all(self._rows(part)) for part in parts]
        if any(one.ids.shape != rows[0].ids.shape or not torch.equal(one.ids, rows[0].ids) for one in rows):
            raise Unsupported("a concatenation of channels of tokens that stand in other places")
        value = tokens(sum(one.channels for one in rows), rows[0].value.width)
        return self._given(self._put(ConcatenationLayer([one.value for one in rows], value)), rows[0].ids)
