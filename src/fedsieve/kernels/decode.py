"""A causal model of tokens, a token at a time: what earlier tokens were is kept as attention's keys and values.

A value is a row of floats, one a channel, in a map of one channel; a product walks the non-zeros of its weight alone.
"""

from __future__ import annotations

import ctypes

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedsieve.kernels import library
from fedsieve.kernels.abi import WORDS, ActivationOp, MapPointer, NormOp, address
from fedsieve.kernels.checks import Unsupported
from fedsieve.kernels.decode_ops import CachedAttentionOp, SlicedLinearOp, TableRowOp, VectorCombinationOp, VectorNormOp
from fedsieve.kernels.graph import ActivationLayer, ConcatenationLayer, Layer, NormLayer, Value
from fedsieve.kernels.program import Arena, Buffer
from fedsieve.kernels.single import line_buffer
from fedsieve.kernels.token_ops import MultiplyOp
from fedsieve.kernels.tokens import (
    AttentionLayer,
    ChannelsLayer,
    CombinationLayer,
    ElementProductLayer,
    EmbeddingLayer,
    LayerNormLayer,
    RearrangedLayer,
    RelaidLayer,
    ScaleLayer,
    TokenProduct,
)
from fedsieve.kernels.trace import read_graph
from fedsieve.sparse.layers import SparseLayer
from fedsieve.types import InputError

INPUTS = 1 << 16
"""Channels that a list of non-zeros can name."""

ROOM = 64
"""Attention's caches are for a multiple of so many tokens."""

SHARED = 1e6
"""As many multiply-adds of a token are worth more than one thread."""


class NotCausal(Unsupported):
    """A model that the kernels know, whose tokens depend on others in more ways than by causal attention."""


class Decoder:
    """Computes a causal model's logits behind each token of one sequence, of up to ``length``, as the token comes.

    The model is copied, as it is now, in eval mode. Raises Unsupported, with the reason, for a model that the kernels
    do not know; and NotCausal.
    """

    def __init__(self, model: nn.Module, length: int):
        if reason := library.unavailable_reason():
            raise Unsupported(reason)
        graph = read_graph(model, (length,), torch.int64, training=False)
        output = graph.token_output
        if output is None or len(output.shape) != 2 or not torch.equal(output.token.argsort(), torch.arange(length)):
            raise NotCausal("a model that does not give logits of each token")
        self.length, self.position = length, 0
        self._state = (ctypes.c_int64 * 2)()  # the token's number, and its position
        self._number = ctypes.addressof(self._state)
        self._place = self._number + ctypes.sizeof(ctypes.c_int64)
        self._arena, self._memory = Arena(packed=False), list[Tensor]()
        self._rows: dict[Value, Buffer] = {}
        self.multiply_adds = self.bytes = 0
        """Of a token's products; and what their lists of non-zeros take."""
        self.vocabulary = 0
        for layer in graph.layers:
            if layer.output.width != length or not layer.output.tokens:
                raise NotCausal("tokens that are added, left out or put together")
            if getattr(layer, "of", None) in graph.functions:
                raise NotCausal("numbers that are computed of all tokens")
            out = self._rows[layer.output] = line_buffer(1, layer.output.channels)
            getattr(self, f"_{type(layer).__name__.removesuffix('Layer').lower()}", self._unknown)(
                layer, [self._rows[value] for value in layer.inputs], out
            )
        self._logits = torch.empty(graph.output.channels)
        self._sum(self._rows[graph.output], None, graph.output.channels, self._logits)
        self._program = self._arena.settle()
        self._order = output.channel.argsort()

    def __call__(self, token: int) -> Tensor:
        """Return the logits [vocabulary] behind the next token. Raises InputError without such a token, or room."""
        if not 0 <= token < self.vocabulary:
            raise InputError(f"tokens are 0 to {self.vocabulary - 1}, got {token}")
        if self.position == self.length:
            raise InputError(f"the model has {self.length} positions, which are all taken: begin anew")
        self._state[:] = [token, self.position]
        self._program.run(1 if self.multiply_adds < SHARED else 0)
        self.position += 1
        return self._logits[self._order]

    def reset(self) -> None:
        """Begin another sequence."""
        self.position = 0

    def _keep(self, x: Tensor | None) -> int | None:
        """Return the address of a copy that lives as long as the decoder."""
        if x is None:
            return None
        self._memory.append(x.detach().clone().contiguous())
        return address(self._memory[-1])

    def _unknown(self, layer: Layer, ins: list[Buffer], out: Buffer) -> None:
        raise NotCausal(f"a layer that is not of each token alone ({type(layer).__name__.removesuffix('Layer')})")

    def _tokenproduct(self, layer: TokenProduct, ins: list[Buffer], out: Buffer) -> None:
        rows, inner = layer.shape[:2]
        if layer.numel < layer.module.weight.numel():
            raise NotCausal(f"{layer.name} is a part of a product")
        if isinstance(layer.module, SparseLayer):
            raise Unsupported(f"{layer.name} computes with other weights than it has")
        if inner > INPUTS:
            raise NotCausal(f"{layer.name} has more than {INPUTS} inputs")
        weight = layer.module.weight.detach()
        weight = weight.t() if layer.transposed else weight.reshape(rows, inner)
        lists = [self._keep(x) for x in sliced(weight)]
        self.multiply_adds += int(weight.count_nonzero())
        self.bytes += sum(x.nbytes for x in self._memory[-3:-1])
        bias = self._keep(layer.module.bias)

        def make() -> SlicedLinearOp:
            start, index, value, order = lists
            return SlicedLinearOp(ins[0].data, out.data, start, index, value, order, bias, rows)

        self._arena.step(make, *ins, out)

    def _embedding(self, layer: EmbeddingLayer, ins: list[Buffer], out: Buffer) -> None:
        width = layer.output.channels
        table = layer.module.weight.detach().reshape(-1, width)
        place, rows = self._keep(table), self._keep(layer.rows)
        if rows is None:
            self.vocabulary = len(table)
        row, position = (self._number, None) if rows is None else (rows, self._place)
        self._arena.step(
            lambda: TableRowOp(ins[0].data if ins else None, out.data, place, row, position, width, 1.0), *ins, out
        )

    def _layernorm(self, layer: LayerNormLayer, ins: list[Buffer], out: Buffer) -> None:
        gamma, beta = self._keep(layer.module.weight), self._keep(layer.module.bias)
        sizes = layer.output.channels, int(layer.rms), layer.eps
        self._arena.step(lambda: VectorNormOp(ins[0].data, out.data, gamma, beta, *sizes), *ins, out)

    def _attention(self, layer: AttentionLayer, ins: list[Buffer], out: Buffer) -> None:
        bias, room, size = layer.bias, -(-self.length // ROOM) * ROOM, layer.size
        later = torch.ones(self.length, self.length, dtype=torch.bool).triu(1)
        if not layer.causal and (bias is None or not bool((bias[:, later] == -torch.inf).all())):
            raise NotCausal("attention that is not causal")
        if layer.masks:
            raise NotCausal("attention whose mask is made of the tokens")
        if layer.p:
            raise Unsupported("dropout where a model is not trained")
        wide = -(-size // WORDS) * WORDS
        caches = [self._keep(torch.zeros(layer.kv_heads, room, n)) for n in (size, wide)]
        table = None if bias is None else self._keep(F.pad(bias, (0, room - self.length)))
        each = 0 if bias is None or len(bias) == 1 else self.length * room
        sizes = table, room, each, layer.heads, layer.kv_heads, size, layer.scale

        def make() -> CachedAttentionOp:
            parts = [x.data + 4 * first for x, first in zip(ins, layer.first, strict=True)]
            return CachedAttentionOp(*parts, out.data, *caches, self._place, *sizes)

        self._arena.step(make, *ins, out)

    def _combination(self, layer: CombinationLayer, ins: list[Buffer], out: Buffer) -> None:
        self._combined(layer.source, layer.factor, ins[0], out)

    def _scale(self, layer: ScaleLayer, ins: list[Buffer], out: Buffer) -> None:
        channels = layer.output.channels
        self._combined(torch.arange(channels)[None], layer.module.weight.reshape(1, channels, 1), ins[0], out)

    def _relaid(self, layer: RelaidLayer, ins: list[Buffer], out: Buffer) -> None:
        wide = layer.inputs[0].channels
        shift = layer.token - torch.arange(self.length) * wide
        source = layer.channel + shift[0]
        if (shift != shift[0]).any() or source.min() < 0 or source.max() >= wide:
            raise NotCausal("channels of several tokens that become one's")
        self._combined(source[None], torch.ones(1, len(source), 1), ins[0], out)

    def _combined(self, source: Tensor, factor: Tensor, x: Buffer, out: Buffer) -> None:
        """Add sums of the channels ``source`` [terms, channels], times ``factor`` [terms, channels, length or 1]."""
        terms, channels, positions = factor.shape
        table, places = self._keep(factor.float().permute(2, 0, 1)), self._keep(source.int())
        position = self._place if positions > 1 else None
        self._arena.step(
            lambda: VectorCombinationOp(x.data, out.data, table, places, position, channels, terms), x, out
        )

    def _norm(self, layer: NormLayer, ins: list[Buffer], out: Buffer) -> None:
        self._arena.step(lambda: NormOp(ins[0], out, *map(MapPointer, ins[1:]), relu=layer.relu), *ins, out)

    def _activation(self, layer: ActivationLayer, ins: list[Buffer], out: Buffer) -> None:
        self._arena.step(lambda: ActivationOp.of(layer.function, ins[0], out), *ins, out)

    def _elementproduct(self, layer: ElementProductLayer, ins: list[Buffer], out: Buffer) -> None:
        self._arena.step(lambda: MultiplyOp(*ins, out), *ins, out)

    def _rearranged(self, layer: RearrangedLayer, ins: list[Buffer], out: Buffer) -> None:
        if not torch.equal(layer.source, torch.arange(self.length)):
            raise NotCausal("tokens that change places")
        self._sum(ins[0], out, layer.output.channels, scale=layer.scale)

    def _channels(self, layer: ChannelsLayer, ins: list[Buffer], out: Buffer) -> None:
        self._sum(ins[0], out, layer.output.channels, first=layer.first)

    def _concatenation(self, layer: ConcatenationLayer, ins: list[Buffer], out: Buffer) -> None:
        for x, value, first in zip(ins, layer.inputs, layer.starts, strict=True):
            self._sum(x, out, value.channels, to=first)

    def _sum(
        self, x: Buffer, out: Buffer | None, channels: int, into: Tensor | None = None, first: int = 0, to: int = 0,
        scale: float = 1.0,
    ) -> None:  # fmt: skip
        """Copy ``channels`` from ``first`` on, times a number, to those from ``to`` on; or to a tensor."""

        def make() -> TableRowOp:
            place = address(into) if out is None else out.data + 4 * to
            return TableRowOp(x.data + 4 * first, place, None, None, None, channels, scale)

        self._arena.step(make, x, *([] if out is None else [out]))


def sliced(weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the non-zeros of a matrix in slices of 16 rows: where each begins, columns, values, the rows' order.

    Rows with as many non-zeros lie together, so that few zeros are added; see SlicedLinear in ``native/abi.h``.
    """
    counts = weight.count_nonzero(1)
    order = counts.argsort(descending=True, stable=True)
    longest = counts[order[::WORDS]]
    start = torch.cat([torch.zeros(1, dtype=torch.int64), (longest * WORDS).cumsum(0)])
    row, column = weight[order].nonzero().T
    sorted_counts = counts[order]
    rank = torch.arange(len(row)) - (sorted_counts.cumsum(0) - sorted_counts)[row]
    place = start[row // WORDS] + rank * WORDS + row % WORDS
    index, value = np.zeros(int(start[-1]), np.uint16), torch.zeros(int(start[-1]))
    index[place.numpy()] = column.numpy()
    value[place] = weight[order][row, column].float()
    return start, torch.from_numpy(index.view(np.int16)), value, order.int()
