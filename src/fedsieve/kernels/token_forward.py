"""The operations of layers of tokens, forward: of a training step, or of a pass without one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedsieve.kernels.abi import WORDS, CopyOp, GatherOp, MapPointer, address
from fedsieve.kernels.checks import between
from fedsieve.kernels.combinations import AGAIN, CombinationTable
from fedsieve.kernels.draws import bernoulli
from fedsieve.kernels.fallback import Passage
from fedsieve.kernels.graph import Layer, Value
from fedsieve.kernels.input_numbers import LOW, NEVER
from fedsieve.kernels.products import StepContext
from fedsieve.kernels.program import Buffer
from fedsieve.kernels.token_ops import (
    AttentionOp,
    EmbeddingOp,
    LayerNormOp,
    MultiplyOp,
    RearrangeOp,
    TokenPackOp,
)
from fedsieve.kernels.tokens import (
    AttentionLayer,
    ChannelsLayer,
    CombinationLayer,
    DropoutLayer,
    ElementProductLayer,
    EmbeddingLayer,
    InputLayer,
    LayerNormLayer,
    MeanLayer,
    PickedLayer,
    RearrangedLayer,
    RelaidLayer,
    RowDropoutLayer,
    ScaleLayer,
    TokenFactorLayer,
    TokenOutput,
)
from fedsieve.types import InputError

LOG2E = 1.4426950408889634


class TokenForward:
    """The forward operations of layers of tokens, in a training step or without one."""

    def __init__(self, step: StepContext):
        self.context, self.batch = step, step.batch
        self.memory: list[Tensor] = []
        """What operations point to, and what forward keeps for backward."""
        self.inputs: list[tuple[Any, str, Value]] = []
        """The operations that read an input of the model, and their field with its address."""
        self.given: dict[Value, Tensor] = {}
        """The inputs of the step."""
        self._masks: dict[Any, Tensor] = {}
        """What is added to scores, which layers of the same masks share."""
        self._attentions: dict[int, list[AttentionOp]] = {}
        """The operations whose scores it is added to, by its identity."""
        self._statistics: dict[Layer, list[Tensor]] = {}
        self._noise: dict[Layer, Buffer] = {}
        self._tables: dict[Layer, CombinationTable] = {}

    def forward(self, layer: Layer, ins: list[Buffer], out: Buffer) -> None:
        """Add a layer's forward."""
        getattr(self, f"_{type(layer).__name__.removesuffix('Layer').lower()}")(layer, ins, out)

    def _own(self, x: Tensor) -> int | None:
        self.memory.append(x)
        return address(x)

    def _lanes(self, buffer: Buffer) -> int:
        return int(buffer.width) * WORDS * (2 if self.context.arena.packed else 1)

    def _input(self, layer: InputLayer, _: list[Buffer], out: Buffer) -> None:
        size = torch.Size(layer.of.sizes).numel()
        token = (torch.arange(self.batch)[:, None] * size + layer.token).flatten()
        places = self._own(token), self._own(layer.channel.contiguous())

        def make() -> TokenPackOp:
            op = TokenPackOp(map=out, token=places[0], channel=places[1])
            self.inputs.append((op, "plain", layer.of))
            return self.context.counted(op, layer.output.width)

        self.context.arena.step(make, out)

    def _embedding(self, layer: EmbeddingLayer, ins: list[Buffer], out: Buffer) -> None:
        own = None if layer.rows is None else layer.rows.repeat(self.batch)
        if layer.of in self.context.graph.functions:
            self.context.arena.step(lambda: partial(self._check_rows, layer))
        rows = None if own is None else self._own(own)
        self._statistics[layer] = [] if own is None else [own]
        trained = isinstance(layer.module.weight, nn.Parameter)

        def make() -> EmbeddingOp:
            table = layer.module.weight
            place = self.context.weights.address(table) if trained else self._own(table.detach().contiguous())
            op = EmbeddingOp(out=out, table=place, row=rows)
            if ins:
                op.add = MapPointer(ins[0])
            if rows is None:
                self.reads(op, layer)
            return self.context.counted(op, layer.output.width)

        self.context.arena.step(make, *ins, out)

    def _check_rows(self, layer: EmbeddingLayer) -> None:
        assert layer.of is not None
        between(f"rows of {layer.parameter}", self.given[layer.of], len(layer.module.weight))

    def reads(self, op: Any, layer: EmbeddingLayer) -> None:
        """Let an operation have an input's numbers as its rows."""
        assert layer.of is not None
        self.inputs.append((op, "row", layer.of))

    def begin(self, x: Sequence[Tensor]) -> None:
        """Read the next step's inputs from these tensors, which must stay."""
        graph = self.context.graph
        self.given = dict(zip(graph.inputs, x, strict=True))
        self.given |= {value: compute(x) for value, compute in graph.functions.items()}
        for op, name, value in self.inputs:
            setattr(op, name, self.given[value].data_ptr())

    def _layernorm(self, layer: LayerNormLayer, ins: list[Buffer], out: Buffer) -> None:
        self._statistics[layer] = [torch.zeros(self._lanes(out)) for _ in range(2)]
        self.memory += self._statistics[layer]
        self.normalize(layer, ins[0], out)

    def normalize(self, layer: LayerNormLayer, x: Buffer, out: Buffer) -> None:
        """Add a LayerNorm whose statistics have their place."""
        self.context.arena.step(lambda: self._norm(layer, x, out), x, out)

    def _norm(self, layer: LayerNormLayer, x: Buffer, out: Buffer) -> LayerNormOp:
        weights, module = self.context.weights, layer.module
        op = LayerNormOp(x=x, out=out, gamma=weights.address(module.weight), beta=weights.address(module.bias))
        op.mean, op.invstd = map(address, self._statistics[layer])
        op.eps, op.rms = layer.eps, int(layer.rms)
        return op

    def _attention(self, layer: AttentionLayer, ins: list[Buffer], out: Buffer) -> None:
        own = self._statistics[layer] = [torch.zeros(layer.heads, self._lanes(out))]
        length, keys = layer.output.width, layer.inputs[1].width
        line = -(-length // WORDS) * WORDS
        if layer.masks:
            own.append(self._mask_memory(layer, line))
        elif layer.bias is not None:
            own.append(F.pad(layer.bias.mT * LOG2E, (0, line - length)).contiguous())
        if layer.p:
            own.append(torch.zeros(self.batch, layer.heads, keys, line // 8, dtype=torch.uint8))
            self.context.arena.step(lambda: partial(self._draw, layer, own[-1]))
        self.memory += own

        def make() -> AttentionOp:
            op = self.context.sized_(self._attend(layer, ins, out))
            self.follow_masks(layer, op)
            return op

        self.context.arena.step(make, *ins, out)

    def _mask_memory(self, layer: AttentionLayer, line: int) -> Tensor:
        """Return what is added to scores by masks of the inputs, written in each step; layers of the same share it."""
        key = layer.masks, layer.causal, layer.bias
        if key not in self._masks:
            heads = max(1 if layer.bias is None else len(layer.bias), *(mask.heads for mask in layer.masks))
            memory = self._masks[key] = torch.zeros(self.batch, heads, layer.inputs[1].width, line)
            self.context.arena.step(lambda: partial(self._mask, layer, memory))
        return self._masks[key]

    def follow_masks(self, layer: AttentionLayer, op: AttentionOp) -> None:
        """Note an operation whose scores masks of the inputs are added to."""
        if layer.masks:
            self._attentions.setdefault(id(self._statistics[layer][1]), []).append(op)

    def _mask(self, layer: AttentionLayer, by_key: Tensor) -> None:
        """Write what is added to the scores of each sample; attention is causal where that bars all later keys."""
        n, length, keys = self.context.samples, layer.output.width, layer.inputs[1].width
        bias = torch.zeros(1) if layer.bias is None else layer.bias
        for mask in layer.masks:
            bias = bias + mask(self.given[mask.of], n)
        bias = bias.expand(n, -1, length, keys)
        later = torch.ones(length, keys, dtype=torch.bool).triu(1)
        if layer.causal:
            bias = bias.masked_fill(later, -torch.inf)
        most = bias.amax(-1)
        none = most <= LOW
        if bool(none.any()) and (layer.written_out or bool((most[none] > -torch.inf).any())):
            raise InputError(
                "a sample's attention mask leaves a token no token to attend to: let each attend to itself, "
                "or put padding behind the others"
            )
        by_key[:n, ..., :length] = bias.mT * LOG2E
        causal = layer.causal or (length == keys and bool((bias[..., later] <= NEVER).all()))
        for op in self._attentions[id(by_key)]:
            op.causal = int(causal)

    def _draw(self, layer: AttentionLayer, bits: Tensor) -> None:
        """Draw what dropout keeps, as PyTorch does: a number for each sample, head, query and key."""
        n, length, keys = self.context.samples, layer.output.width, layer.inputs[1].width
        kept = bernoulli((n, layer.heads, length, keys), 1 - layer.p)
        by_key = numpy.packbits(kept.mT.contiguous().numpy(), axis=-1, bitorder="little")
        bits[:n, ..., : by_key.shape[-1]] = torch.from_numpy(by_key)

    def _attend(self, layer: AttentionLayer, ins: list[Buffer], out: Buffer) -> AttentionOp:
        parts = [x.part(first, n) for x, first, n in zip(ins, layer.first, layer.channels, strict=True)]
        op = AttentionOp(*parts, out, address(self._statistics[layer][0]))
        op.length, op.keys = layer.output.width, layer.inputs[1].width
        op.heads, op.kv_heads, op.size = layer.heads, layer.kv_heads, layer.size
        op.causal, op.scale, op.factor = int(layer.causal), layer.scale, 1 / (1 - layer.p) if layer.p else 1
        marks = self._statistics[layer][1:]
        if layer.p:
            op.keep = address(marks.pop())
        if marks:
            *_, heads, own, line = marks[0].shape
            op.bias, op.bias_head = address(marks[0]), own * line if heads > 1 else 0
            op.bias_sample = heads * own * line if layer.masks else 0
        return op

    def _rearranged(self, layer: RearrangedLayer, ins: list[Buffer], out: Buffer) -> None:
        start = torch.arange(self.batch)[:, None] * layer.inputs[0].width
        source = torch.where(layer.source < 0, -1, start + layer.source).flatten().int()
        self._statistics[layer] = [source]
        self._own(source)
        self._placed(ins[0], out, source, layer.output.width, False, layer.scale)

    def _mean(self, layer: MeanLayer, ins: list[Buffer], out: Buffer) -> None:
        length = layer.inputs[0].width
        self._statistics[layer] = [torch.arange(self.batch).repeat_interleave(length).int()]
        self._own(self._statistics[layer][0])
        self._placed(ins[0], out, self._statistics[layer][0], length, True, 1 if layer.total else 1 / length)

    def _picked(self, layer: PickedLayer, ins: list[Buffer], out: Buffer) -> None:
        source = torch.zeros(self.batch, dtype=torch.int32)
        self._statistics[layer] = [source]
        self._own(source)
        self.context.arena.step(lambda: partial(self._pick, layer, source))
        self._placed(ins[0], out, source, 1, False)

    def _pick(self, layer: PickedLayer, source: Tensor) -> None:
        own, length = self.given[layer.of].flatten(), layer.inputs[0].width
        own = torch.where(own < 0, own + length, own)
        between("places of tokens", own, length)
        source[: len(own)] = torch.arange(len(own)) * length + own

    def _placed(self, x: Buffer, out: Buffer, source: Tensor, each: int, scatter: bool, scale: float = 1) -> None:
        self.context.arena.step(lambda: self._place(x, out, source, each, scatter, scale), x, out)

    def _place(self, x: Buffer, out: Buffer, source: Tensor, each: int, scatter: bool, scale: float) -> RearrangeOp:
        op = RearrangeOp(x, out, address(source), 0, int(scatter), scale)
        return self.context.counted(op, each)

    def _channels(self, layer: ChannelsLayer, ins: list[Buffer], out: Buffer) -> None:
        def make() -> CopyOp:
            return CopyOp(ins[0].part(layer.first, out.channels), out, CopyOp.COPY)

        self.context.arena.step(make, ins[0], out)

    def _relaid(self, layer: RelaidLayer, ins: list[Buffer], out: Buffer) -> None:
        (value,) = layer.inputs
        plain = torch.zeros(self.batch, value.width * value.channels)
        for other, buffer, unpack in ((TokenOutput.plain(value), ins[0], True), (layer, out, False)):
            self.relay(plain, other, buffer, unpack)

    def relay(self, plain: Tensor, layout: TokenOutput | RelaidLayer, buffer: Buffer, unpack: bool) -> None:
        """Add what copies a map of tokens to a plain tensor of all samples' numbers, or from it."""
        self.context.arena.step(lambda: self.copied(plain, layout, buffer, unpack), buffer)

    def copied(self, plain: Tensor, layout: TokenOutput | RelaidLayer, buffer: Buffer, unpack: bool) -> TokenPackOp:
        """Return the operation that does."""
        token = (torch.arange(self.batch)[:, None] * plain.shape[1] + layout.token).flatten()
        places = map(self._own, (plain, token, layout.channel.contiguous()))
        return self.context.counted(TokenPackOp(buffer, *places, unpack=int(unpack)), len(layout.token))

    def _elementproduct(self, layer: ElementProductLayer, ins: list[Buffer], out: Buffer) -> None:
        self.context.arena.step(lambda: MultiplyOp(*ins, out), *ins, out)

    def _combination(self, layer: CombinationLayer, ins: list[Buffer], out: Buffer) -> None:
        table = self._tables[layer] = CombinationTable.of(layer.source, layer.factor)
        self._combined(table, ins[0], out)

    def _combined(self, table: CombinationTable, x: Buffer, out: Buffer) -> None:
        self.memory += table.tensors
        self.context.arena.step(lambda: table.op(x, out), x, out)

    def _rowdropout(self, layer: RowDropoutLayer, ins: list[Buffer], out: Buffer) -> None:
        def draw() -> Tensor:
            noise = torch.empty(self.context.samples, 1, 1).bernoulli_(layer.p) * layer.scale
            return noise.flatten().repeat_interleave(layer.output.width)

        self._by_factors(layer, draw, ins[0], out)

    def _tokenfactor(self, layer: TokenFactorLayer, ins: list[Buffer], out: Buffer) -> None:
        self._by_factors(layer, lambda: layer.factors(self.given[layer.of]).flatten(), ins[0], out)

    def _by_factors(self, layer: Layer, factors: Callable[[], Tensor], x: Buffer, out: Buffer) -> None:
        """Multiply each token by a number, which are known in each step."""
        channels, lanes = out.channels, self._lanes(out)
        source, row = torch.arange(channels, dtype=torch.int32)[None], torch.zeros(1, channels, dtype=torch.int32)
        table = self._tables[layer] = CombinationTable(torch.zeros(2, lanes + AGAIN), source, row, lanes)

        def write() -> None:
            own = factors()
            table.table[0, : len(own)] = own

        self.context.arena.step(lambda: write)
        self._combined(table, x, out)

    def _scale(self, layer: ScaleLayer, ins: list[Buffer], out: Buffer) -> None:
        self.context.arena.step(lambda: self._scaled(layer, ins[0], out), ins[0], out)

    def _scaled(self, layer: ScaleLayer, x: Buffer, out: Buffer) -> GatherOp:
        """Return the product with a diagonal matrix."""
        row = torch.arange(out.channels + 1, dtype=torch.int32)
        op = GatherOp(in_=x, out=out, rows=out.channels, height=1, width=out.width, stride_in=1, stride_out=1, unit=1)
        op.kernel, op.row, op.offset = 1, self._own(row), self._own(row * x.channel)
        op.value = self.context.weights.address(layer.module.weight)
        return op

    def _dropout(self, layer: DropoutLayer, ins: list[Buffer], out: Buffer) -> None:
        noise = self._noise[layer] = self.context.buffer(layer.output)

        def draw() -> Callable[[], None]:
            passage = Passage(self.context, layer.output, noise)
            return partial(self._draw_noise, layer, passage)

        self.context.arena.step(draw, noise)
        self.context.arena.step(lambda: MultiplyOp(ins[0], noise, out), ins[0], noise, out)

    def _draw_noise(self, layer: DropoutLayer, passage: Passage) -> None:
        sizes = [passage.shape[layer.order.index(d)] for d in range(len(layer.order))]
        passage.write(bernoulli(sizes, 1 - layer.p).float().div_(1 - layer.p).permute(layer.order))
