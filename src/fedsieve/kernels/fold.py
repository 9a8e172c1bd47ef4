"""A model's layers for inference: what stands behind a product (BatchNorm, a sum, a ReLU) becomes part of it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from fedsieve.kernels.graph import Graph, Layer, Norm, Product


@dataclass(eq=False)
class Fused(Layer):
    """relu(product(x) + bias + add), the last two optional; ``inputs`` holds x, and add where there is one."""

    kernel: int
    stride: int
    padding: int
    relu: bool
    bias: Tensor | None
    value: Tensor
    """The weight's non-zeros [entries]."""
    index: Tensor
    """Where each stands in a row of the weight, int64 [entries]."""
    row: Tensor
    """Where each output channel's begin, and where the last one's end, int32 [out + 1]."""
    tap: Tensor | None = None
    """Where each tap's entries begin in every row, if they are sorted so, int32 [out kernel^2 + 1]."""
    known: dict[tuple[int, ...], Tensor] = field(default_factory=dict)
    """What ``offsets`` has found."""

    def offsets(self, channel: int, taps: list[int]) -> Tensor:
        """Return where each non-zero's input lies, from the distances between channels and to each tap."""
        key = (channel, *taps)
        if key not in self.known:
            inner, tap = self.index // len(taps), self.index % len(taps)
            self.known[key] = (inner * channel + torch.tensor(taps)[tap]).to(torch.int32)
        return self.known[key]

    @cached_property
    def by_tap(self) -> Fused:
        """The same product, each row's entries sorted by tap."""
        area, rows = self.kernel**2, torch.arange(len(self.row) - 1)
        key = rows.repeat_interleave(self.row.diff()) * area + self.index % area
        order, tap = key.argsort(stable=True), torch.zeros(len(rows) * area + 1, dtype=torch.int32)
        tap[1:] = key.bincount(minlength=len(rows) * area).cumsum(0)
        return replace(self, value=self.value[order], index=self.index[order], tap=tap, known={})


def fold(graph: Graph) -> Graph:
    """Return the graph with running statistics in the products' weights and biases, wherever a product is alone."""
    folded = Graph(graph.input, graph.output, [])
    for layer in graph.layers:
        if isinstance(layer, Product):
            folded.layers.append(_product(layer))
        elif isinstance(layer, Norm) and (maker := _maker(graph, folded, layer)):
            folded.layers.remove(maker)
            folded.layers.append(_behind(maker, layer))
        else:
            folded.layers.append(layer)
    return folded


def _product(p: Product) -> Fused:
    weight = p.module.weight.detach().flatten(1)
    place, bias = weight.nonzero(), p.module.bias
    row = torch.zeros(len(weight) + 1, dtype=torch.int32)
    row[1:] = weight.count_nonzero(1).cumsum(0)
    value, index = weight[place[:, 0], place[:, 1]], place[:, 1].clone()
    bias = None if bias is None else bias.detach().clone()
    return Fused(p.inputs, p.output, p.kernel, p.stride, p.padding, p.relu, bias, value, index, row)


def _maker(graph: Graph, folded: Graph, norm: Norm) -> Fused | None:
    """Return the product that a Norm can become part of: it gives one of its terms, and to nobody else."""
    for value in norm.inputs[: 1 if norm.module else 2]:
        maker = next((layer for layer in folded.layers if layer.output is value), None)
        alone = len(graph.users(value)) == 1 and norm.inputs.count(value) == 1 and value is not graph.output
        if isinstance(maker, Fused) and alone and not maker.relu and len(maker.inputs) == 1:
            return maker
    return None


def _behind(maker: Fused, norm: Norm) -> Fused:
    add = [value for value in norm.inputs if value is not maker.output]
    bias, value = (maker.bias, maker.value) if norm.module is None else _scaled(maker, norm.module)
    sizes = (maker.kernel, maker.stride, maker.padding)
    return Fused(maker.inputs + add, norm.output, *sizes, norm.relu, bias, value, maker.index, maker.row)


def _scaled(maker: Fused, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Return the bias and the non-zeros behind running statistics."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = norm.weight.detach().double() / (norm.running_var.double() + norm.eps).sqrt()
    mean = norm.running_mean.double() - (0 if maker.bias is None else maker.bias.double())
    value = maker.value * scale.repeat_interleave(maker.row.diff())
    return (norm.bias.detach() - mean * scale).float(), value.float()
