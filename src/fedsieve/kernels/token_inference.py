"""A model of tokens in eval mode, by the operations that training has: forward alone, zeros left out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedsieve.kernels.abi import ActivationOp, CopyOp, MapPointer, NormOp
from fedsieve.kernels.checks import Unsupported, between
from fedsieve.kernels.fallback import Passage
from fedsieve.kernels.graph import ActivationLayer, ConcatenationLayer, Graph, Layer, NormLayer, ProductLayer
from fedsieve.kernels.library import get_num_threads
from fedsieve.kernels.products import MaskedProduct, StepContext
from fedsieve.kernels.program import Buffer
from fedsieve.kernels.token_forward import TokenForward
from fedsieve.kernels.tokens import EmbeddingLayer
from fedsieve.kernels.weights import MaskedWeights, Weights
from fedsieve.types import Examples

TOGETHER = 2048
"""Tokens of a pass: the maps of more do not stay in a cache."""


class TokenPass(StepContext):
    """A forward pass of up to ``batch`` samples, with the weights as they are now."""

    def __init__(self, graph: Graph, batch: int, packed: bool = False):
        tied = {layer.parameter for layer in graph.layers if isinstance(layer, EmbeddingLayer) and layer.tied}
        products = [layer for layer in graph.layers if isinstance(layer, ProductLayer)]
        mask = {p.weight_name: p.module.weight.detach() != 0 for p in products if p.weight_name not in tied}
        super().__init__(graph, Weights(graph, mask), batch, packed, low_memory=False)
        self.token_steps = TokenForward(self)
        for layer in graph.layers:
            out = self.activations[layer.output] = self.buffer(layer.output)
            self._lower(layer, [self.activations[value] for value in layer.inputs], out)
        output = self.activations[graph.output]
        self.arena.step(lambda: self._read, output)
        self.program = self.arena.settle()
        self.fit_widths(self.program)
        self._passage = Passage(self, graph.output, output, graph.token_output)
        self.weights.read()

    def __call__(self, inputs: Sequence[Tensor]) -> Tensor:
        """Return what the model makes of up to ``batch`` samples. Raises InputError for tokens that there are not."""
        x = dict(zip(self.graph.inputs, (one.contiguous() for one in inputs), strict=True))
        for layer in self.graph.layers:
            if isinstance(layer, EmbeddingLayer) and layer.of in x:
                between(self.graph.name_of(layer.of), x[layer.of], len(layer.module.weight))
        self.begin(0, len(inputs[0]), get_num_threads())
        self.token_steps.begin([*x.values()])
        self.program.run()
        return self._output

    def _read(self) -> None:
        self._output = self._passage.read()

    def _lower(self, layer: Layer, ins: list[Buffer], out: Buffer) -> None:
        if isinstance(layer, ProductLayer):
            own = self.weights.layers[layer]
            if not isinstance(own, MaskedWeights) or own.power != 1:
                raise Unsupported(f"{layer.name} computes with other weights than it has")
            MaskedProduct(self, layer, own).forward(ins[0], out)
        elif isinstance(layer, NormLayer):
            self.arena.step(lambda: NormOp(ins[0], out, *map(MapPointer, ins[1:]), relu=layer.relu), *ins, out)
        elif isinstance(layer, ActivationLayer):
            self.arena.step(lambda: ActivationOp.of(layer.function, ins[0], out), *ins, out)
        elif isinstance(layer, ConcatenationLayer):
            for x, first in zip(ins, layer.starts, strict=True):
                self.arena.step(lambda x=x, n=first: CopyOp(x, out.part(n, x.channels), CopyOp.COPY), x, out)  # type: ignore[misc]
        else:
            self.token_steps.forward(layer, ins, out)


class TokenPredictor:
    """Forward passes for any number of samples, each for a power of two, of ``batch`` at most and so many tokens."""

    def __init__(self, graph: Graph, batch: int, packed: bool = False):
        length = max(layer.output.width for layer in graph.layers)
        self.graph, self.batch, self.packed = graph, min(batch, max(1, TOGETHER // length)), packed
        self._passes: dict[int, TokenPass] = {}

    def __call__(self, x: Examples) -> Tensor:
        """Return what the model makes of samples [n, ...]."""
        inputs = self.graph.tensors(x)
        if not len(inputs[0]):
            return torch.empty(0, *self.graph.token_output.shape)
        parts = zip(*(torch.split(one, self.batch) for one in inputs), strict=True)
        return torch.cat([self._pass(len(part[0]))(part) for part in parts])

    def prepare(self, samples: int) -> None:
        """Make the pass for so many. Raises Unsupported if that cannot be done."""
        self._pass(min(samples, self.batch))

    def _pass(self, n: int) -> TokenPass:
        size = min(self.batch, 1 << (n - 1).bit_length())
        if size not in self._passes:
            self._passes[size] = TokenPass(self.graph, size, self.packed)
        return self._passes[size]
