"""Attention as models write it: one operation of PyTorch's, or products, a mask, a softmax and dropout one by one."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fedsieve.kernels.checks import Unsupported
from fedsieve.kernels.expressions import Expression, factored
from fedsieve.kernels.graph import Value
from fedsieve.kernels.input_numbers import LOW, NEVER, InputMask, InputNumbers
from fedsieve.kernels.places import SAMPLES, Places, TokenRows, head_rows
from fedsieve.kernels.token_calls import TokenCalls
from fedsieve.kernels.tokens import AttentionLayer, tokens


@dataclass(frozen=True)
class Scores:
    """The products of queries and keys [n, heads, length, size], or what a softmax has made of them."""

    q: Places
    k: Places
    scale: float
    bias: Tensor | None = None
    """Is added, [heads or 1, queries, keys]."""
    weights: bool = False
    """Whether the softmax has been taken."""
    p: float = 0.0
    """Of dropout."""
    masks: tuple[InputMask, ...] = ()


class AttentionCalls(TokenCalls):
    """The layers of a model so far, attention among them."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self._scores: dict[Value, Scores] = {}
        self._masks: dict[tuple[Value, str, float], InputMask] = {}
        """Those of the inputs, by their numbers and what is done with them: layers share one."""

    def _rows(self, x: Any, whole: bool = True) -> TokenRows:
        if self._scores_of(x):
            raise Unsupported("attention's scores or weights in an operation that is not attention's")
        return super()._rows(x, whole)

    def _layer_of(self, x: Expression) -> Places:
        if x.of in self._scores:
            raise Unsupported("attention's scores or weights in an operation that is not attention's")
        return super()._layer_of(x)

    def _scores_of(self, x: Any) -> Scores | None:
        """Return the scores that a tensor is, in their order; None of other tensors."""
        if not isinstance(x, Places) or x.of not in self._scores:
            return None
        x, number = factored(x)
        if isinstance(x, Expression):
            raise Unsupported("attention's scores or weights in an operation that is not attention's")
        if not torch.equal(x.index.flatten(), torch.arange(x.index.numel())):
            raise Unsupported("attention's scores or weights in another order, or a part of them")
        scores = self._scores[x.of]
        return scores if number == 1 else self._times(scores, number)

    def _times(self, scores: Scores, number: float) -> Scores:
        if scores.weights:
            raise Unsupported("attention's weights in a product with a number")
        barred = scores.bias is not None and bool((scores.bias == -math.inf).any())
        if (scores.masks or barred) and number < 0.01:
            raise Unsupported(f"attention's scores that were masked, times {number:g}")
        bias = None if scores.bias is None else scores.bias * number
        masks = tuple(replace(mask, scale=mask.scale * number) for mask in scores.masks)
        return replace(scores, scale=scores.scale * number, bias=bias, masks=masks)

    def _put_scores(self, scores: Scores, like: Tensor) -> Places:
        value = Value(0)
        self._scores[value] = scores
        return Places(value, torch.arange(like.numel()).view(like.shape))

    def _op_matmul(self, x: Any, y: Any) -> Places:
        if not (self._is_tokens(x) and self._is_tokens(y)):
            return super()._op_matmul(self.settled(x), y)
        if scores := self._scores_of(x):
            y = self.settled(y)
            if not scores.weights:
                raise Unsupported("a product of attention's scores without a softmax")
            if scores.p and self.noise is not scores:
                raise Unsupported("attention's weights that are used again after dropout")
            self.noise = None if scores.p else self.noise
            own = scores.scale, scores.bias, False, scores.p, scores.masks
            out = self._attend(scores.q, scores.k, _by_head(y), *own, written_out=True)
            return replace(out, index=out.index.reshape(*x.index.shape[:-1], y.index.shape[-1]))
        if self._scores_of(y) or x.index.dim() < 3 or x.index.dim() != y.index.dim():
            raise Unsupported("a matrix product of two activations that is not attention's")
        (x, left), (y, right) = self._factored(x), self._factored(y)
        scores = Scores(_by_head(x), _by_head(replace(y, index=y.index.mT)), left * right)
        return self._put_scores(scores, torch.empty(*x.index.shape[:-1], y.index.shape[-1], device="meta"))

    _op_bmm = _op_matmul

    def _op_baddbmm(self, add: Any, x: Any, y: Any, beta: float = 1, alpha: float = 1) -> Any:
        scores = self._op_mul(self._op_matmul(x, y), alpha)
        return self._op_add(scores, add, beta) if beta else scores

    def _op_einsum(self, equation: str, operands: Any, path: Any = None) -> Places:
        """A product of two activations over one letter, with the same leading letters; that of attention."""
        left, _, out = equation.replace(" ", "").partition("->")
        names = left.split(",")
        if len(names) != 2 or not all(self._is_tokens(x) for x in operands) or "." in equation:
            raise Unsupported(f"einsum of {equation}")
        inner = [c for c in names[0] if c in names[1] and c not in out]
        both = [c for c in out if c in names[0] and c in names[1]]
        rows, columns = ([c for c in own if c not in both and c not in inner] for own in names)
        if not len(inner) == len(rows) == len(columns) == 1 or sorted(out) != sorted(both + rows + columns):
            raise Unsupported(f"einsum of {equation}")
        x, y = (
            replace(x, index=x.index.permute([own.index(c) for c in order]))
            for x, own, order in zip(operands, names, (both + rows + inner, both + inner + columns), strict=True)
        )
        product = self._op_matmul(x, y)
        return replace(product, index=product.index.permute([(both + rows + columns).index(c) for c in out]))

    def _op_add(self, x: Any, y: Any, alpha: float = 1) -> Any:
        x, y = (y, x) if self._scores_of(y) and alpha == 1 else (x, y)
        scores = self._scores_of(x)
        if not scores:
            return super()._op_add(x, y, alpha)
        if isinstance(y, InputNumbers):
            return self._masked(scores, y, x.index, "add", alpha)
        if scores.weights or not isinstance(y, Tensor | int | float):
            raise Unsupported("a sum of attention's scores with what the model computes or trains")
        add = self._for_heads(alpha * torch.as_tensor(y, dtype=torch.float32), x.index)
        return self._put_scores(replace(scores, bias=add if scores.bias is None else scores.bias + add), x.index)

    def _op_masked_fill(self, x: Any, mask: Any, number: Any) -> Any:
        """Scores that may not count, or tokens that are 0."""
        return self._filled(x, mask, number, "bar")

    def _op_where(self, mask: Any, x: Any, y: Any) -> Any:
        keep = isinstance(x, Places)
        return self._filled(x, mask, y, "keep") if keep else self._filled(y, mask, x, "bar")

    def _filled(self, x: Any, mask: Any, number: Any, how: str) -> Any:
        """Return a tensor that is a number where a mask is true ("bar"), or where it is not ("keep")."""
        if not isinstance(mask, Tensor | InputNumbers) or not isinstance(number, Tensor | int | float):
            raise Unsupported("a choice by what the model computes or trains, or between two tensors")
        scores = self._scores_of(x)
        if not scores and not bool(torch.as_tensor(number).any()):
            if isinstance(mask, InputNumbers):
                return self._by_numbers(x, mask, "bar" if how == "bar" else "times")
            return self._op_mul(x, (mask != (how == "bar")).float())
        if not scores or scores.weights:
            raise Unsupported("a choice between a tensor and a number other than 0, and no attention's scores")
        if float(number) > -1e4:
            raise Unsupported(f"attention's scores filled with {float(number):g}, which still counts")
        if isinstance(mask, InputNumbers):
            return self._masked(scores, mask, x.index, how)
        mask = mask if how == "bar" else ~mask
        barred = self._for_heads(mask, x.index)
        bias = torch.zeros(barred.shape) if scores.bias is None else scores.bias
        return self._put_scores(replace(scores, bias=torch.where(barred, -math.inf, bias)), x.index)

    def _masked(self, scores: Scores, numbers: InputNumbers, like: Tensor, how: str, scale: float = 1) -> Places:
        """Return scores that numbers of the inputs mask, or are added to."""
        if scores.weights:
            raise Unsupported("attention's weights in a sum, or masked")
        masks = (*scores.masks, self._input_mask(numbers, like.shape, how, scale))
        return self._put_scores(replace(scores, masks=masks), like)

    def _input_mask(self, numbers: InputNumbers, sizes: torch.Size, how: str, scale: float = 1) -> InputMask:
        """Return the mask of scores [n, heads, length, length], or [n * heads, length, length]."""
        own, heads = numbers.example.shape, sizes[:-2].numel() // SAMPLES
        count = own[:-2].numel() // SAMPLES
        whole = len(own) == len(sizes) and count in (1, heads) and own[0] == SAMPLES * (count if len(own) == 3 else 1)
        if not whole or any(n not in (1, size) for n, size in zip(own[-2:], sizes[-2:], strict=True)):
            raise Unsupported(f"attention with a mask {[*own]} of the inputs for scores {[*sizes]} ({SAMPLES} samples)")
        value = self._value_of(numbers)
        return self._masks.setdefault((value, how, scale), InputMask(value, count, how, scale))

    def _for_heads(self, constant: Tensor, like: Tensor) -> Tensor:
        """Return a constant that scores meet, [heads or 1, length, length]."""
        whole = constant.expand(like.shape).reshape(SAMPLES, -1, *like.shape[-2:])
        if not torch.equal(whole[0], whole[1]):
            raise Unsupported("attention with a mask that differs from sample to sample")
        same = bool((whole[0] == whole[0, :1]).all())
        return whole[0, :1] if same else whole[0]

    def _op_softmax(self, x: Any, dim: int, dtype: Any = None, half_to_float: bool = False) -> Places:
        scores = self._scores_of(x)
        if not scores or scores.weights or dim not in (-1, x.index.dim() - 1):
            raise Unsupported("a softmax that is not that of attention's keys")
        if scores.bias is not None and bool(_attends_to_none(scores.bias).any()):
            raise Unsupported("attention with a query that may attend to no key, whose softmax is NaN")
        return self._put_scores(replace(scores, weights=True), x.index)

    _op__softmax = _op_softmax

    def _op_dropout(self, x: Any, p: float, train: bool) -> Places:
        scores = self._scores_of(x)
        if not scores or not train or not p:
            return super()._op_dropout(x, p, train)
        if not scores.weights or scores.p:
            raise Unsupported("dropout of attention's scores, or twice of its weights")
        self._some_kept(p)
        if self._memory_order() != [*range(x.index.dim())]:
            raise Unsupported("dropout of attention's weights that do not lie in their order in memory")
        dropped = replace(scores, p=p)
        self._draws(dropped)
        return self._put_scores(dropped, x.index)

    def _op_scaled_dot_product_attention(
        self, q: Any, k: Any, v: Any, mask: Any = None, p: float = 0.0, causal: bool = False,
        scale: float | None = None, enable_gqa: bool = False,
    ) -> Places:  # fmt: skip
        self._some_kept(p)
        bias: Tensor | None = None
        masks: tuple[InputMask, ...] = ()
        (q, left), (k, right) = self._factored(q), self._factored(k)
        sizes = torch.Size([*q.index.shape[:-1], k.index.shape[-2]])
        if isinstance(mask, InputNumbers):
            masks = (self._input_mask(mask, sizes, "keep" if mask.example.dtype == torch.bool else "add"),)
        elif mask is not None:
            if not isinstance(mask, Tensor):
                raise Unsupported("attention with a mask that the model computes or trains")
            barred = torch.zeros(mask.shape).masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else mask
            bias = self._for_heads(barred.float(), torch.empty(sizes, device="meta"))
        scale = q.index.shape[-1] ** -0.5 if scale is None else scale
        return self._attend(q, k, self.settled(v), scale * left * right, bias, causal, p, masks)

    def _factored(self, x: Any) -> tuple[Any, float]:
        """Return a tensor without the number that all of it is multiplied by, and that number: attention has one."""
        plain, number = factored(x)
        return self.settled(plain), number

    def _head_rows(self, x: Any, length: int) -> tuple[Value, int, int, Tensor]:
        """Return where heads stand; of those that lie otherwise among the channels, after they were put in order."""
        try:
            return head_rows(x, length)
        except Unsupported:
            if not self._is_tokens(x) or x.index.dim() != 4 or self._scores_of(x):
                raise
            rows = self._all(self._rows(Places(x.of, x.index.transpose(1, 2).flatten(2))))
            given = self._given(rows.value, rows.ids)
            heads = given.index.view(*given.index.shape[:2], -1, x.index.shape[-1])
            return head_rows(Places(given.of, heads.transpose(1, 2)), length)

    def _attend(
        self, q: Any, k: Any, v: Any, scale: float, bias: Tensor | None, causal: bool, p: float,
        masks: tuple[InputMask, ...] = (), written_out: bool = False,
    ) -> Places:  # fmt: skip
        (length, size), keys = q.index.shape[-2:], k.index.shape[-2]
        if v.index.shape[-2] != keys:
            raise Unsupported("attention of queries, keys and values of other sizes")
        parts = [self._head_rows(x, x.index.shape[-2]) for x in (q, k, v)]
        (q_value, q_first, heads, ids), (k_value, k_first, kv_heads, _), (v_value, v_first, same, _) = parts
        if heads != q.index.shape[1] or kv_heads != same or heads % kv_heads or v.index.shape[-1] != size:
            raise Unsupported("attention of queries, keys and values of other sizes")
        if causal and keys != length:
            bias, causal = torch.zeros(1, length, keys) if bias is None else bias, False
            bias = bias.masked_fill(torch.ones(length, keys, dtype=torch.bool).triu(1), -math.inf)
        if bias is not None:
            causal, bias = _plain(bias, causal)
        if p:
            self._draws()
        value = tokens(heads * size, length)
        firsts, inputs = (q_first, k_first, v_first), [q_value, k_value, v_value]
        sizes = heads, kv_heads, size, causal, scale
        layer = AttentionLayer(inputs, value, firsts, *sizes, bias, p, masks, written_out)
        channel = torch.arange(heads * size).view(1, heads, 1, size)
        return Places(self._put(layer), ids[:, None, :, None] * value.channels + channel)


def _by_head(x: Places) -> Places:
    """Return [n * heads, length, size] as [n, heads, length, size]."""
    return x if x.index.dim() == 4 else replace(x, index=x.index.reshape(SAMPLES, -1, *x.index.shape[1:]))


def _attends_to_none(bias: Tensor) -> Tensor:
    """Tell which queries may attend to no key, by what is added to their scores."""
    return (bias == -math.inf).all(-1)


def _plain(bias: Tensor, causal: bool) -> tuple[bool, Tensor | None]:
    """Return whether attention is causal, and what is added beside; None if that is nothing."""
    later = torch.ones(bias.shape[-2:], dtype=torch.bool).triu(1)
    if causal:
        bias = bias.masked_fill(later, -math.inf)
    none = _attends_to_none(bias)
    bias = bias.masked_fill(bias <= NEVER, -math.inf)
    if bool((~none & (bias.amax(-1) <= LOW)).any()):
        raise Unsupported("attention with a query whose keys are all masked, by finite numbers")
    causal = causal or (later.shape[0] == later.shape[1] and bool((bias[:, later] == -math.inf).all()))
    rest = bias.masked_fill(later, 0) if causal else bias
    return causal, rest if bool((rest != 0).any()) else None
