"""What a model of tokens calls, as layers of the kernels: a method for each operation of PyTorch's that they know."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partialmethod
from typing import Any

import torch
from torch import Tensor, nn

from fedsieve.kernels.checks import Unsupported
from fedsieve.kernels.graph import ActivationLayer, Layer, NormLayer, Value
from fedsieve.kernels.places import SAMPLES, Places, TokenRows, by_sample, pair, token_offsets
from fedsieve.kernels.tokens import (
    ChannelsLayer,
    DropoutLayer,
    ElementProductLayer,
    EmbeddingLayer,
    InputLayer,
    LayerNormLayer,
    MeanLayer,
    Parameters,
    RearrangedLayer,
    TokenProduct,
    tokens,
)


class TokenCalls:
    """The layers of a model so far; each method adds those of an operation, and returns what they give."""

    node: Any
    """The operation of the exported model that is read."""

    def __init__(self, model: nn.Module, model_input: Value):
        self.model, self.input = model, model_input
        self.layers: list[Layer] = []
        self.names = {id(p): name for name, p in model.named_parameters()}

    def _places(self, tensor: Tensor) -> Places:
        return Places(tensor, torch.arange(tensor.numel()).view(tensor.shape))

    def _put(self, layer: Layer) -> Value:
        self.layers.append(layer)
        return layer.output

    # What a tensor holds.

    def _rows(self, x: Any, whole: bool = True) -> TokenRows:
        """Return the tokens that a tensor [..., channels] holds; ``whole``: all of their channels."""
        if not isinstance(x, Places) or isinstance(x.of, Tensor) or x.index.dim() < 2:
            raise Unsupported("a tensor that is not made of the samples' tokens")
        if x.of is self.input:
            x = replace(self._packed(x), scale=x.scale)
        assert isinstance(x.of, Value)
        wide, index = x.of.channels, x.index
        ids, first, channels = index[..., 0] // wide, int(index.flatten()[0]) % wide, index.shape[-1]
        if first + channels > wide:
            raise Unsupported("several tokens as the channels of one")
        if not torch.equal(index, (ids * wide + first).unsqueeze(-1) + torch.arange(channels)):
            raise Unsupported("channels in another order than they were made")
        rows = TokenRows(x.of, ids, first, channels)
        if whole and channels < wide:
            part = self._put(ChannelsLayer([x.of], tokens(channels, x.of.width, x.of.flat), first))
            rows = TokenRows(part, ids, 0, channels)
        return rows if x.scale == 1 else self._times_number(rows, x.scale)

    def _times_number(self, rows: TokenRows, number: float) -> TokenRows:
        value, length = rows.value, rows.value.width
        layer = RearrangedLayer([value], tokens(rows.channels, length), torch.arange(length), number)
        return TokenRows(self._put(layer), rows.ids, 0, rows.channels)

    def _packed(self, x: Places) -> Places:
        """Make tokens of the numbers of the input: the last dimension has the channels."""
        if self.input.dtype != torch.float32:
            raise Unsupported("numbers of the input that are whole, and not looked up in an embedding")
        ids, token, channel = token_offsets(x.index, torch.Size(self.input.sizes).numel())
        value = self._put(InputLayer([], tokens(len(channel), len(token), x.index.dim() == 2), token, channel))
        return Places(value, ids.unsqueeze(-1) * value.channels + torch.arange(value.channels))

    def _all(self, rows: TokenRows) -> TokenRows:
        """Return tokens that are all of a value's, each once: rearranged, where some are missing or repeated."""
        flat, length = rows.ids.flatten(), rows.value.width
        if len(flat) == SAMPLES * length and torch.equal(flat.sort().values, torch.arange(SAMPLES * length)):
            return rows
        ids, source = by_sample(flat, length)
        value = self._put(RearrangedLayer([rows.value], tokens(rows.channels, len(source)), source))
        return TokenRows(value, ids.view(rows.ids.shape), 0, rows.channels)

    def _given(self, value: Value, ids: Tensor) -> Places:
        """Return the tensor that a layer gives, of the tokens in the order in which it was given them."""
        value.flat = ids.dim() == 1
        return Places(value, ids.unsqueeze(-1) * value.channels + torch.arange(value.channels))

    def _parameter(self, x: Any) -> Tensor | None:
        """Return a parameter or a constant that is used as it is."""
        if x is None or isinstance(x, Tensor):
            return x
        constant = isinstance(x, Places) and isinstance(x.of, Tensor)
        if constant and torch.equal(x.index.flatten(), torch.arange(x.of.numel())):
            tensor: Tensor = x.of
            return tensor
        raise Unsupported("a weight that is computed of others, or a part of one")

    def _op_linear(self, x: Any, weight: Any, bias: Any = None) -> Places:
        rows = self._all(self._rows(x))
        if not isinstance(weight, Places) or not isinstance(weight.of, nn.Parameter) or weight.index.dim() != 2:
            raise Unsupported("a product whose weight is no parameter")
        flat, (out, inner) = torch.arange(weight.of.numel()), weight.index.shape
        transposed = not torch.equal(weight.index.flatten(), flat)
        if len(flat) != out * inner or (transposed and not torch.equal(weight.index.t().flatten(), flat)):
            raise Unsupported("a product with a part of a weight")
        module = self._module(weight.of, own := self._parameter(bias))
        name = self.names[id(weight.of)]
        layer = TokenProduct(
            [rows.value], tokens(out, rows.value.width), module, name.removesuffix(".weight"), parameter=name,
            transposed=transposed,
        )  # fmt: skip
        assert own is None or own.numel() == out
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
        if not plain or not isinstance(x, Places) or x.of is not self.input or x.index.dim() != 4:
            raise Unsupported("a convolution among tokens that is not one of the input's patches")
        patches = x.index.unfold(2, size[0], size[0]).unfold(3, size[1], size[1]).permute(0, 2, 3, 1, 4, 5)
        y = self._op_linear(replace(x, index=patches.flatten(3)), Places(weight.of, weight.index.flatten(1)), bias)
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
        if padding != -1 or by_count or sparse:
            raise Unsupported("an embedding with padding_idx, scale_grad_by_freq or sparse")
        if isinstance(x, Tensor):
            return Places(weight.of, weight.index[x])
        table = self._parameter(weight)
        assert table is not None
        whole = torch.equal(x.index.flatten(), torch.arange(x.index.numel()))
        if x.of is not self.input or not whole or x.scale != 1:
            raise Unsupported("an embedding of anything but all of the input")
        length = x.index.numel() // SAMPLES
        layer = EmbeddingLayer([], tokens(table.shape[1], length), Parameters(weight=table), self._name(table))
        return self._given(self._put(layer), x.index)

    def _name(self, table: Tensor) -> str:
        return self.names.get(id(table), "")

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

    def _memory_order(self) -> list[int]:
        """Return the dimensions of an operation's first tensor from the widest stride to the narrowest."""
        strides = self.node.args[0].meta["val"].stride()
        sizes = [s.node.hint if isinstance(s, torch.SymInt) else s for s in strides]
        return sorted(range(len(sizes)), key=lambda d: -sizes[d])

    def _op_add(self, x: Any, y: Any, alpha: float = 1) -> Places:
        if alpha != 1:
            y = self._scaled(y, float(alpha))
        if not self._is_tokens(x):
            x, y = y, x
        rows = self._all(self._rows(x))
        if not self._is_tokens(y):
            return self._table_added(rows, y)
        left, right = self._alike(rows, self._all(self._rows(y)))
        layer = NormLayer([left.value, right.value], tokens(left.channels, left.value.width))
        return self._given(self._put(layer), left.ids)

    def _op_sub(self, x: Any, y: Any, alpha: float = 1) -> Places:
        return self._op_add(x, y, -alpha)

    def _op_div(self, x: Any, y: Any) -> Places:
        if not isinstance(y, int | float):
            raise Unsupported("a quotient of two tensors")
        return self._scaled(x, 1 / y)

    def _is_tokens(self, x: Any) -> bool:
        return isinstance(x, Places) and not isinstance(x.of, Tensor)

    def _alike(self, left: TokenRows, right: TokenRows) -> tuple[TokenRows, TokenRows]:
        if left.channels != right.channels or left.ids.shape != right.ids.shape:
            raise Unsupported("tensors of other shapes, one repeated for the other")
        if not torch.equal(left.ids, right.ids):
            raise Unsupported("tokens that stand in other places than those that they meet")
        return left, right

    def _table_added(self, rows: TokenRows, y: Any) -> Places:
        """Add rows of a parameter or of a constant, which each sample's tokens share."""
        if isinstance(y, Tensor) and y.dim():
            y = self._places(y.detach().float().contiguous())
        if not isinstance(y, Places) or not isinstance(y.of, Tensor):
            raise Unsupported("a sum with a number")
        index = y.index.expand(*rows.ids.shape, rows.channels)
        row = index[..., 0] // rows.channels
        if y.of.numel() % rows.channels or not torch.equal(
            index, (row * rows.channels).unsqueeze(-1) + torch.arange(rows.channels)
        ):
            raise Unsupported("a sum with a parameter whose numbers are not rows of channels")
        length = rows.value.width
        by_token = torch.empty(SAMPLES * length, dtype=torch.int64)
        by_token[rows.ids.flatten()] = row.flatten()
        if not torch.equal(by_token[:length], by_token[length:]):
            raise Unsupported("a parameter that is added to some samples alone")
        module, value = Parameters(weight=y.of), tokens(rows.channels, length)
        layer = EmbeddingLayer([rows.value], value, module, self._name(y.of), by_token[:length])
        return self._given(self._put(layer), rows.ids)

    def _op_mul(self, x: Any, y: Any) -> Places:
        if isinstance(y, int | float):
            return self._scaled(x, float(y))
        if not self._is_tokens(x) or not self._is_tokens(y):
            raise Unsupported("a product with a parameter, apart from linear layers")
        left, right = self._alike(self._all(self._rows(x)), self._all(self._rows(y)))
        layer = ElementProductLayer([left.value, right.value], tokens(left.channels, left.value.width))
        return self._given(self._put(layer), left.ids)

    def _scaled(self, x: Any, number: float) -> Places:
        """A product with a number is left to who takes it: attention has one of its own."""
        if not isinstance(x, Places) or isinstance(x.of, Tensor):
            raise Unsupported("a product of a parameter with a number")
        return replace(x, scale=x.scale * number)

    def _unscaled(self, x: Any) -> Any:
        if not self._is_tokens(x) or x.scale == 1:
            return x
        rows = self._rows(x)
        return self._given(rows.value, rows.ids)

    _op_neg = partialmethod(_scaled, number=-1.0)

    def _op_mean(self, x: Any, dims: Sequence[int], keepdim: bool = False) -> Places:
        rows = self._all(self._rows(x))
        length = rows.value.width
        plain = rows.ids.dim() == 2 and torch.equal(rows.ids.flatten(), torch.arange(SAMPLES * length))
        if not plain or [d % 3 for d in dims] != [1]:
            raise Unsupported("a mean that is not over the tokens of [n, length, channels]")
        value = self._put(MeanLayer([rows.value], tokens(rows.channels, 1)))
        return self._given(value, torch.arange(SAMPLES).view(SAMPLES, *[1] * keepdim))

    def _op_cat(self, parts: Sequence[Any], dim: int = 0) -> Places:
        """Tokens one behind another; those of a parameter are the same in every sample."""
        parts = [self._unscaled(part) for part in parts]
        last = max(part.index.dim() for part in parts) - 1
        values = {id(part.of): part.of for part in parts if self._is_tokens(part)}
        if dim in (-1, last) or len(values) != 1:
            raise Unsupported("a concatenation that is not one of tokens and parameters")
        (value,) = values.values()
        if value is self.input:
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
