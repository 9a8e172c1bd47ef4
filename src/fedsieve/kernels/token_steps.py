"""The operations of a training step's layers of tokens: the gradients of what ``token_forward`` computes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from fedsieve.kernels.abi import CopyOp, DotOp, address
from fedsieve.kernels.gradients import Gradients
from fedsieve.kernels.graph import Layer, Value
from fedsieve.kernels.program import Buffer
from fedsieve.kernels.token_forward import TokenForward
from fedsieve.kernels.token_ops import (
    AttentionBackwardOp,
    EmbeddingBackwardOp,
    LayerNormBackwardOp,
    MultiplyOp,
)
from fedsieve.kernels.tokens import (
    AttentionLayer,
    ChannelsLayer,
    CombinationLayer,
    DropoutLayer,
    ElementProductLayer,
    EmbeddingLayer,
    LayerNormLayer,
    MeanLayer,
    PickedLayer,
    RearrangedLayer,
    RelaidLayer,
    RowDropoutLayer,
    ScaleLayer,
    TokenFactorLayer,
    TokenOutput,
    tokens,
)


class TokenSteps(TokenForward):
    """What a training step does with its layers of tokens."""

    def __init__(self, step: Gradients):
        super().__init__(step)
        self.step = step

    def backward(self, layer: Layer, g: Buffer) -> None:
        """Add a layer's gradients, from that of its output."""
        if isinstance(layer, AttentionLayer | LayerNormLayer | ElementProductLayer | ScaleLayer):
            for value in layer.inputs:
                self.step.recompute(value)
        getattr(self, f"_{type(layer).__name__.removesuffix('Layer').lower()}_backward")(layer, g)

    def _embedding_backward(self, layer: EmbeddingLayer, g: Buffer) -> None:
        table, weights, arena = layer.module.weight, self.step.weights, self.step.arena

        def make() -> EmbeddingBackwardOp:
            place = weights.address(table, weights.grad)
            op = EmbeddingBackwardOp(grad=g, grad_table=place, rows=len(table.view(-1, g.channels)))
            op.padding = layer.padding
            op.clear = int(not layer.tied and not layer.shared)  # another layer's gradient stands there already
            if self._statistics[layer]:
                op.row = address(self._statistics[layer][0])
            else:
                self.reads(op, layer)
            return self.step.counted(op, layer.output.width)

        if table.requires_grad:
            arena.step(make, g)
            if (mask := weights.masks.get(id(table))) is not None:
                arena.step(lambda: partial(self._mask_gradient, table, mask))
        for value in layer.inputs:
            self.step.hand_on(value, g)

    def _mask_gradient(self, table: Tensor, mask: Tensor) -> None:
        self.step.weights.view(table, self.step.weights.grad).mul_(mask)

    def _layernorm_backward(self, layer: LayerNormLayer, g: Buffer) -> None:
        x, weights, module = self.step.activations[layer.inputs[0]], self.step.weights, layer.module

        def make(to: Buffer) -> LayerNormBackwardOp:
            op = LayerNormBackwardOp(of=self._norm(layer, x, x), grad=g, grad_x=to)
            op.grad_gamma = weights.address(module.weight, weights.grad)
            op.grad_beta = weights.address(module.bias, weights.grad)
            return op

        self.step.change(layer.inputs[0], g, make, x)

    def _attention_backward(self, layer: AttentionLayer, g: Buffer) -> None:
        ins, out = [self.step.activations[value] for value in layer.inputs], self.step.activations[layer.output]
        into = {value: self.step.buffer(value) for value in layer.inputs}
        places: list[
            tuple[Buffer, int]
        ] = []  # where each gradient goes: in one buffer, unless two were the same channels
        sums: list[tuple[Buffer, Value, int]] = []
        channels = {value: set[int]() for value in into}
        for value, first, n in zip(layer.inputs, layer.first, layer.channels, strict=True):
            if channels[value].isdisjoint(range(first, first + n)):
                places.append((into[value], first))
                channels[value] |= {*range(first, first + n)}
            else:
                own = self.step.buffer(tokens(n, value.width))
                places.append((own, 0))
                sums.append((own, value, first))
        for value, buffer in into.items():
            if len(channels[value]) < value.channels:
                self.step.arena.step(lambda b=buffer: CopyOp(b, b, CopyOp.ZERO), buffer)  # type: ignore[misc]

        def make() -> AttentionBackwardOp:
            parts = [buffer.part(first, n) for (buffer, first), n in zip(places, layer.channels, strict=True)]
            op = self.step.sized_(AttentionBackwardOp(self._attend(layer, ins, out), g, *parts))
            self.follow_masks(layer, op.of)
            return op

        self.step.arena.step(make, *ins, out, g, *into.values(), *(own for own, _, _ in sums))
        for own, value, first in sums:
            self.step.arena.step(
                lambda own=own, to=into[value], n=first: CopyOp(own, to.part(n, own.channels), CopyOp.ADD),  # type: ignore[misc]
                *(own, into[value]),
            )
        for value, buffer in into.items():
            self.step.hand_on(value, buffer)

    def _rearranged_backward(self, layer: RearrangedLayer, g: Buffer) -> None:
        (source,) = self._statistics[layer]
        self._place_gradient(layer.inputs[0], g, source, layer.output.width, True, layer.scale)

    def _mean_backward(self, layer: MeanLayer, g: Buffer) -> None:
        length, (source,) = layer.inputs[0].width, self._statistics[layer]
        self._place_gradient(layer.inputs[0], g, source, length, False, 1 if layer.total else 1 / length)

    def _picked_backward(self, layer: PickedLayer, g: Buffer) -> None:
        self._place_gradient(layer.inputs[0], g, self._statistics[layer][0], 1, True)

    def _place_gradient(
        self, value: Value, g: Buffer, source: Tensor, each: int, scatter: bool, scale: float = 1
    ) -> None:
        self.step.deliver(value, lambda to: self._place(g, to, source, each, scatter, scale), g)

    def _channels_backward(self, layer: ChannelsLayer, g: Buffer) -> None:
        arena, (value,) = self.step.arena, layer.inputs
        if not self.step.graph.needs_grad[value]:
            return
        into, more = self.step.gradient(value)
        if not more:
            arena.step(lambda: CopyOp(into, into, CopyOp.ZERO), into)
        arena.step(lambda: CopyOp(g, into.part(layer.first, g.channels), CopyOp.ADD), g, into)

    def _relaid_backward(self, layer: RelaidLayer, g: Buffer) -> None:
        (value,) = layer.inputs
        plain = torch.zeros(self.batch, value.width * value.channels)  # stays 0 where no other token has the number
        self.relay(plain, layer, g, True)
        self.step.deliver(value, lambda to: self.copied(plain, TokenOutput.plain(value), to, False))

    def _elementproduct_backward(self, layer: ElementProductLayer, g: Buffer) -> None:
        left, right = (self.step.activations[value] for value in layer.inputs)
        for value, other in zip(layer.inputs, (right, left), strict=True):
            make: Callable[[Buffer], MultiplyOp] = lambda to, other=other: MultiplyOp(g, other, to)  # type: ignore[misc] # noqa: E731
            self.step.deliver(value, make, g, other)

    def _combination_backward(self, layer: CombinationLayer, g: Buffer) -> None:
        table = self._tables[layer].transposed(layer.inputs[0].channels)
        self.memory += table.tensors
        self.step.deliver(layer.inputs[0], lambda to: table.op(g, to), g)

    def _rowdropout_backward(self, layer: RowDropoutLayer | TokenFactorLayer, g: Buffer) -> None:
        self.step.deliver(layer.inputs[0], lambda to: self._tables[layer].op(g, to), g)

    _tokenfactor_backward = _rowdropout_backward

    def _scale_backward(self, layer: ScaleLayer, g: Buffer) -> None:
        (value,), weight, weights = layer.inputs, layer.module.weight, self.step.weights
        x = self.step.activations[value]
        if weight.requires_grad:
            grad = weights.address(weight, weights.grad)
            self.step.arena.step(lambda: DotOp(self._scaled(layer, x, g), grad), x, g)
        self.step.deliver(value, lambda to: self._scaled(layer, g, to), g)

    def _dropout_backward(self, layer: DropoutLayer, g: Buffer) -> None:
        noise = self._noise[layer]
        self.step.change(layer.inputs[0], g, lambda to: MultiplyOp(g, noise, to), noise)
