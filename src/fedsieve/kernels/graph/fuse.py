"""A model's layers for inference: what stands behind a product (BatchNorm, a sum, a ReLU) becomes part of it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from fedsieve.kernels.graph.layers import Graph, Layer, NormLayer, ProductLayer


@dataclass(eq=False)
class FusedProduct(Layer):
    """relu(product(x) + bias + add), the last two optional; ``inputs`` holds x, and add where there is one."""

    shape: tuple[int, int, int, int]
    stride: int
    padding: int
    relu: bool
    bias: Tensor | None
    values: Tensor
    """The weight's non-zeros [entries]."""
    positions: Tensor
    """Where each stands in the flat weight, int64 [entries], ascending."""
    indices: dict[tuple[object, ...], Any] = field(default_factory=dict)
    """Indices of the entries, by the layout of the maps that they are for."""

    @property
    def kernel(self) -> int:
        """The kernel's width; 1 for a linear layer."""
        return self.shape[-1]


def fuse_batchnorm(graph: Graph) -> Graph:
    """Return the graph with running statistics in the products' weights and biases, wherever a product is alone."""
    fused = Graph(graph.input, graph.output, [])
    for layer in graph.layers:
        if isinstance(layer, ProductLayer):
            fused.layers.append(_product(layer))
        elif isinstance(layer, NormLayer) and (maker := _maker(graph, fused, layer)):
            fused.layers.remove(maker)
            fused.layers.append(_behind(maker, layer))
        else:
            fused.layers.append(layer)
    return fused


def _product(p: ProductLayer) -> FusedProduct:
    weight, bias = p.module.weight.detach().flatten(), p.module.bias
    positions = weight.nonzero().squeeze(1)
    bias = None if bias is None else bias.detach().clone()
    return FusedProduct(p.inputs, p.output, p.shape, p.stride, p.padding, p.relu, bias, weight[positions], positions)


def _maker(graph: Graph, fused: Graph, norm: NormLayer) -> FusedProduct | None:
    """Return the product that a norm can become part of: it gives one of its terms, and to nobody else."""
    for value in norm.inputs[: 1 if norm.module else 2]:
        maker = fused.maker(value)
        alone = len(graph.users(value)) == 1 and norm.inputs.count(value) == 1 and value is not graph.output
        if isinstance(maker, FusedProduct) and alone and not maker.relu and len(maker.inputs) == 1:
            return maker
    return None


def _behind(maker: FusedProduct, norm: NormLayer) -> FusedProduct:
    inputs = maker.inputs + [value for value in norm.inputs if value is not maker.output]
    bias, values = (maker.bias, maker.values) if norm.module is None else _scaled(maker, norm.module)
    return replace(maker, inputs=inputs, output=norm.output, relu=norm.relu, bias=bias, values=values)


def _scaled(maker: FusedProduct, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Return the bias and the non-zeros behind running statistics."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = norm.weight.detach().double() / (norm.running_var.double() + norm.eps).sqrt()
    mean = norm.running_mean.double() - (0 if maker.bias is None else maker.bias.double())
    values = maker.values * scale[maker.positions // torch.Size(maker.shape[1:]).numel()]
    return (norm.bias.detach() - mean * scale).float(), values.float()
