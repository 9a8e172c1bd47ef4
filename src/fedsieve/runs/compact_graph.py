"""Weights in an ONNX graph as few bytes, by standard operators that onnxruntime folds when it opens the file.

A sparse weight is its non-zeros (float32 or int8) and, a byte each, the gaps between their positions:

    position = CumSum(Cast(gaps, int32)) - 1, where the first gap is 1 + the first position
    weight = Reshape(ScatterElements(ConstantOfShape([numel]), position, values), shape)

A gap above 255 is cut by entries whose value is 0. ONNX's own sparse_initializer takes eight bytes for a position.
Quantised weights are int8 with a float32 scale for each output channel: DequantizeLinear(weight, scale, axis=0).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsieve.types import InputError
from fedsieve.types.errors import package

WEIGHTS = ("float32", "int8")
SMALLEST = 256
"""The numbers of a weight below which it stays as it is: nodes of a graph take bytes, too."""
GAP = 255
"""The largest number of a byte."""


def check_weights(weights: str) -> None:
    """Raise InputError unless weights can be stored so."""
    if weights not in WEIGHTS:
        raise InputError(f"--weights must be one of {', '.join(WEIGHTS)}, got {weights!r}")


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return a weight [out, ...] as int8 and the scale of each output channel, float32 [out]: symmetric, to nearest."""
    flat = weight.detach().reshape(len(weight), -1)
    largest = flat.abs().amax(1)
    scale = torch.where(largest > 0, largest / 127, 1.0)
    return (flat / scale[:, None]).round().clamp(-127, 127).to(torch.int8).view(weight.shape), scale


def dequantize(weight: Tensor) -> Tensor:
    """Return a weight as its int8 numbers stand for it."""
    numbers, scale = quantize(weight)
    return numbers.float() * scale.view(-1, *[1] * (weight.dim() - 1))


def byte_gaps(positions: NDArray[np.int64]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Return positions (ascending) as gaps of at most 255, and which entry each position is: others are fillers."""
    gaps = np.diff(positions, prepend=-1)
    fillers = (gaps - 1) // GAP
    entries = np.cumsum(fillers + 1) - 1
    result = np.full(int(entries[-1]) + 1 if len(entries) else 0, GAP, np.uint8)
    result[entries] = gaps - fillers * GAP
    return result, entries


def compact_(graph: Any, weights: str = "float32") -> None:
    """Store the weights of a graph sparse where that is smaller, and by ``weights`` in int8."""
    onnx = package("onnx", "onnx")
    own, nodes = [*graph.initializer], list[Any]()
    del graph.initializer[:]
    for tensor in own:
        plain = onnx.numpy_helper.to_array(tensor)
        if plain.dtype != np.float32 or plain.ndim < 2 or plain.size < SMALLEST:
            graph.initializer.append(tensor)
            continue
        name, values, scaled = tensor.name, plain, list[Any]()
        if weights == "int8":
            numbers, scale = quantize(torch.from_numpy(plain.copy()))
            name, values, factor = f"{tensor.name}.int8", numbers.numpy(), f"{tensor.name}.scale"
            graph.initializer.append(onnx.numpy_helper.from_array(scale.numpy(), factor))
            scaled = [onnx.helper.make_node("DequantizeLinear", [name, factor], [tensor.name], axis=0)]
        positions = np.flatnonzero(values)
        gaps, entries = byte_gaps(positions)
        if len(gaps) * (1 + values.itemsize) < values.nbytes:
            nonzeros = np.zeros(len(gaps), values.dtype)
            nonzeros[entries] = values.reshape(-1)[positions]
            nodes += _scatter(graph, name, nonzeros, gaps, values.shape)
        else:
            graph.initializer.append(onnx.numpy_helper.from_array(values, name))
        nodes += scaled
    others = [*graph.node]
    del graph.node[:]
    graph.node.extend([*nodes, *others])


def _scatter(
    graph: Any, name: str, nonzeros: NDArray[Any], gaps: NDArray[np.uint8], shape: tuple[int, ...]
) -> list[Any]:
    """Add what a sparse weight is stored as, and return the nodes that compute it."""
    onnx = package("onnx", "onnx")
    node, array = onnx.helper.make_node, onnx.numpy_helper.from_array
    numel = int(np.prod(shape))
    stored = {
        "values": nonzeros,
        "gaps": gaps,
        "axis": np.array(0, np.int32),
        "one": np.array([1], np.int32),
        "numel": np.array([numel], np.int64),
        "shape": np.array(shape, np.int64),
    }
    graph.initializer.extend(array(value, f"{name}.{part}") for part, value in stored.items())
    part = {one: f"{name}.{one}" for one in (*stored, "steps", "ends", "positions", "zeros", "flat")}
    zero = array(np.zeros(1, nonzeros.dtype), "zero")
    return [
        node("Cast", [part["gaps"]], [part["steps"]], to=onnx.TensorProto.INT32),
        node("CumSum", [part["steps"], part["axis"]], [part["ends"]]),
        node("Sub", [part["ends"], part["one"]], [part["positions"]]),
        node("ConstantOfShape", [part["numel"]], [part["zeros"]], value=zero),
        node("ScatterElements", [part["zeros"], part["positions"], part["values"]], [part["flat"]], axis=0),
        node("Reshape", [part["flat"], part["shape"]], [name]),
    ]
