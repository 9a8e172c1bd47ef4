"""A model's layers for inference: what stands behind a product (BatchNorm, a sum, a ReLU) becomes part of it."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from fedsieve.kernels.graph import FusedProduct, Graph, NormLayer, ProductLayer


def fuse_batchnorm(graph: Graph) -> Graph:
    """Return the graph with running statistics in the products' weights and biases, wherever a product is alone."""
    fused = Graph(graph.input, graph.output, [])
    for layer in graph.layers:
        if isinstance(layer, ProductLayer):
            weight, bias = layer.module.weight.detach().flatten(), layer.module.bias
            positions = weight.nonzero().squeeze(1)
            bias = None if bias is None else bias.detach().clone()
            geometry = layer.shape, layer.stride, layer.padding, layer.groups, layer.relu
            values = weight[positions]
            fused.layers.append(FusedProduct(layer.inputs, layer.output, *geometry, bias, values, positions))
        elif isinstance(layer, NormLayer) and (product := _fusible(graph, fused, layer)):
            fused.layers.remove(product)
            fused.layers.append(_fuse(product, layer))
        else:
            fused.layers.append(layer)
    return fused


def _fusible(graph: Graph, fused: Graph, norm: NormLayer) -> FusedProduct | None:
    """Return the product that a norm can become part of: it gives one of its terms, and to nobody else."""
    if isinstance(norm.module, nn.GroupNorm):
        return None
    for value in norm.inputs[: 1 if norm.module else 2]:
        maker = fused.maker(value)
        alone = len(graph.users(value)) == 1 and norm.inputs.count(value) == 1 and value is not graph.output
        if isinstance(maker, FusedProduct) and alone and not maker.relu and len(maker.inputs) == 1:
            return maker
    return None


def _fuse(product: FusedProduct, norm: NormLayer) -> FusedProduct:
    """Return a product with what stands behind it: its sum, its ReLU, and the running statistics of its BatchNorm."""
    inputs = product.inputs + [value for value in norm.inputs if value is not product.output]
    product = replace(product, inputs=inputs, output=norm.output, relu=norm.relu)
    if norm.module is None:
        return product
    mean, variance = (running.double() for running in norm.running)
    scale = norm.module.weight.detach().double() / (variance + norm.module.eps).sqrt()
    mean = mean - (0 if product.bias is None else product.bias.double())
    values = product.values * scale[product.positions // torch.Size(product.shape[1:]).numel()]
    return replace(product, bias=(norm.module.bias.detach() - mean * scale).float(), values=values.float())
