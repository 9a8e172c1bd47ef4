"""An ordinary model, read with ``torch.fx`` as a list of layers that the kernels know, and of those they do not."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn


class Unsupported(Exception):
    """A model that cannot be lowered at all, and why."""


@dataclass(eq=False)
class Value:
    """What a layer gives: [n, channels, height, width]; features have height and width 1."""

    channels: int
    height: int = 1
    width: int = 1
    flat: bool = False
    """Whether the model sees it as [n, features]."""


@dataclass(eq=False)
class Layer:
    """One step of the model: its inputs and its output."""

    inputs: list[Value]
    output: Value


@dataclass(eq=False)
class Product(Layer):
    """A convolution or a linear layer, with its bias and a ReLU behind it."""

    module: nn.Conv2d | nn.Linear
    name: str
    relu: bool = False

    @property
    def kernel(self) -> int:
        """The kernel's width; 1 for a linear layer."""
        return int(self.module.kernel_size[0]) if isinstance(self.module, nn.Conv2d) else 1

    @property
    def stride(self) -> int:
        """The stride; 1 for a linear layer."""
        return int(self.module.stride[0]) if isinstance(self.module, nn.Conv2d) else 1

    @property
    def padding(self) -> int:
        """The padding; 0 for a linear layer."""
        return int(self.module.padding[0]) if isinstance(self.module, nn.Conv2d) else 0


@dataclass(eq=False)
class Norm(Layer):
    """relu(batch_norm(y) + add), each of the three optional; ``inputs`` holds y, and add where there is one."""

    module: nn.BatchNorm2d | None = None
    name: str = ""
    relu: bool = False


@dataclass(eq=False)
class Pool(Layer):
    """A maximum or a mean over windows."""

    kernel: int = 1
    stride: int = 1
    padding: int = 0
    average: int = 0
    """0: maximum; 1: mean over the window's area; 2: over its part inside the map."""


@dataclass(eq=False)
class Flatten(Layer):
    """[n, c, h, w] to [n, c h w]."""


@dataclass(eq=False)
class Foreign(Layer):
    """Anything else: run by PyTorch, sample first."""

    call: Callable[..., Tensor] = field(default=lambda *x: x[0])
    modules: dict[str, nn.Module] = field(default_factory=dict)
    name: str = ""


@dataclass
class Graph:
    """A model's layers in order, from ``input`` to the logits, ``output``."""

    input: Value
    output: Value
    layers: list[Layer]

    @property
    def foreign(self) -> list[str]:
        """The layers that run dense, by name."""
        return [layer.name for layer in self.layers if isinstance(layer, Foreign)]

    def users(self, value: Value) -> list[Layer]:
        """Return the layers that read a value."""
        return [layer for layer in self.layers if value in layer.inputs]


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, name: str) -> bool:
        return isinstance(m, nn.Conv2d | nn.Linear | nn.BatchNorm2d) or super().is_leaf_module(m, name)


class _Shapes(fx.Interpreter):
    """Notes every node's shape and type (``torch.fx.passes.shape_prop`` does, and imports half a second of more)."""

    def run_node(self, n: fx.Node) -> Any:
        found = super().run_node(n)
        n.meta["value"] = (tuple(found.shape), found.dtype) if isinstance(found, Tensor) else ((), None)
        return found


def read(model: nn.Module, shape: tuple[int, ...]) -> Graph:
    """Return the layers of a model for samples of ``shape``. Raises Unsupported where it cannot be traced."""
    was = [m for m in model.modules() if m.training]
    try:
        model.eval()
        traced = fx.GraphModule(model, _Tracer().trace(model))
        with torch.no_grad():
            _Shapes(traced).run(torch.zeros(2, *shape))
    except Exception as error:
        raise Unsupported(f"the model cannot be traced ({str(error).splitlines()[0]})") from error
    finally:
        for m in was:
            m.training = True
    return _Reader(model, traced).graph()


class _Reader:
    def __init__(self, model: nn.Module, traced: fx.GraphModule):
        self.model, self.nodes = model, list(traced.graph.nodes)
        self.values: dict[fx.Node, Value] = {}
        self.layers: list[Layer] = []

    def graph(self) -> Graph:
        """Read node by node, each into a layer, or into the layer before it."""
        given, output = None, None
        for node in self.nodes:
            if node.op == "placeholder":
                if given is not None:
                    raise Unsupported("the model takes more than one input")
                given = self.values[node] = _value(node)
            elif node.op == "get_attr":
                raise Unsupported(f"the model uses {node.target} outside a layer")
            elif node.op == "output":
                output = self.values.get(node.args[0])
            else:
                self.values[node] = self._layer(node)
        if given is None or output is None or not output.flat:
            raise Unsupported("the model does not map [n, ...] to logits [n, classes]")
        return Graph(given, output, self.layers)

    def _layer(self, node: fx.Node) -> Value:
        module = self.model.get_submodule(str(node.target)) if node.op == "call_module" else None
        ins = [self.values[a] for a in node.args if isinstance(a, fx.Node)]
        kind = module if module is not None else node.target
        name = str(node.target) if module is not None else str(node.name)
        if _is_product(module):
            assert isinstance(module, nn.Conv2d | nn.Linear)
            if isinstance(module, nn.Conv2d) or ins[0].flat:
                return self._add(Product(ins, _value(node), module, name))
        elif isinstance(module, nn.BatchNorm2d) and module.affine and module.track_running_stats:
            if module.momentum is not None:
                return self._add(Norm(ins, _value(node), module, name))
        elif _is_relu(kind):
            return self._relu(node, ins[0])
        elif kind in (operator.add, operator.iadd, torch.add) and len(ins) == 2 and _same(*ins) and not node.kwargs:
            return self._sum(node, ins)
        elif (window := _pool(kind, node, ins)) is not None:
            return self._add(Pool(ins, _value(node), *window))
        elif _is_flatten(kind, node):
            return self._add(Flatten(ins, _value(node)))
        elif isinstance(module, nn.Identity) or (isinstance(module, nn.Dropout) and module.p == 0):
            return ins[0]
        return self._foreign(node, module, name)

    def _add(self, layer: Layer) -> Value:
        module = getattr(layer, "module", None)
        if module is not None and any(getattr(other, "module", None) is module for other in self.layers):
            raise Unsupported(f"{layer.name} is used more than once")  # type: ignore[attr-defined]
        self.layers.append(layer)
        return layer.output

    def _relu(self, node: fx.Node, x: Value) -> Value:
        maker = self._maker(x)
        alone = len(_args(node, x, self.values).users) == 1
        if alone and ((isinstance(maker, Norm) and not maker.relu) or _has_bias(maker)):
            maker.relu = True  # type: ignore[union-attr]
            return x
        return self._add(Norm([x], _value(node), relu=True))

    def _sum(self, node: fx.Node, ins: list[Value]) -> Value:
        for x, other in (ins, ins[::-1]):
            maker = self._maker(x)
            alone = len(_args(node, x, self.values).users) == 1
            if alone and isinstance(maker, Norm) and not maker.relu and len(maker.inputs) == 1 and x is not other:
                self.layers.remove(maker)
                maker.inputs.append(other)
                return self._add(maker)
        return self._add(Norm(ins, _value(node)))

    def _maker(self, x: Value) -> Layer | None:
        return next((layer for layer in self.layers if layer.output is x), None)

    def _foreign(self, node: fx.Node, module: nn.Module | None, name: str) -> Value:
        inputs = [a for a in node.args if isinstance(a, fx.Node)]
        if any(isinstance(a, fx.Node) for a in node.kwargs.values()) or any(
            isinstance(b, fx.Node) for a in node.args if isinstance(a, tuple | list) for b in a
        ):
            raise Unsupported(f"{name} takes its inputs in a way that cannot be followed")

        def call(*given: Tensor) -> Tensor:
            rest = iter(given)
            args = [next(rest) if isinstance(a, fx.Node) else a for a in node.args]
            if module is not None:
                target: Callable[..., Any] = module
            elif node.op == "call_method":
                target = getattr(args.pop(0), str(node.target))
            else:
                assert callable(node.target)
                target = node.target
            out: Tensor = target(*args, **node.kwargs)
            return out

        modules = {name: module} if module is not None else {}
        return self._add(Foreign([self.values[a] for a in inputs], _value(node), call, modules, name))


def _value(node: fx.Node) -> Value:
    shape, dtype = node.meta["value"]
    if len(shape) not in (2, 4) or shape[0] != 2 or dtype != torch.float32:
        raise Unsupported(f"{node.name} gives {tuple(shape)}: neither [n, c, h, w] nor [n, features] of float32")
    return Value(*shape[1:]) if len(shape) == 4 else Value(shape[1], flat=True)


def _args(node: fx.Node, value: Value, values: dict[fx.Node, Value]) -> fx.Node:
    return next(a for a in node.args if isinstance(a, fx.Node) and values[a] is value)


def _same(a: Value, b: Value) -> bool:
    return (a.channels, a.height, a.width, a.flat) == (b.channels, b.height, b.width, b.flat)


def _is_product(module: nn.Module | None) -> bool:
    if isinstance(module, nn.Conv2d):
        k, s, p = module.kernel_size, module.stride, module.padding
        plain = module.groups == 1 and module.dilation == (1, 1) and module.padding_mode == "zeros"
        square = k[0] == k[1] and s[0] == s[1] and not isinstance(p, str) and p[0] == p[1]
        return plain and square and k[0] % 2 == 1 and s[0] in (1, 2) and int(p[0]) < k[0]
    return isinstance(module, nn.Linear)


def _has_bias(layer: Layer | None) -> bool:
    return isinstance(layer, Product) and layer.module.bias is not None and not layer.relu


def _is_relu(kind: Any) -> bool:
    return isinstance(kind, nn.ReLU) or kind in (F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_")


def _is_flatten(kind: Any, node: fx.Node) -> bool:
    if isinstance(kind, nn.Flatten):
        return kind.start_dim == 1 and kind.end_dim in (-1, 3)
    rest = [*node.args[1:], *node.kwargs.values()]
    return kind in ("flatten", torch.flatten) and rest in ([1], [1, -1])


def _pool(kind: Any, node: fx.Node, ins: list[Value]) -> tuple[int, int, int, int] | None:
    """Return kernel, stride, padding and the kind of mean of a pool that the kernels know."""
    if not ins or ins[0].flat:
        return None
    if kind in ("mean", torch.mean):
        args: list[Any] = [*node.args[1:], *node.kwargs.values()]
        whole = bool(args) and sorted(d % 4 for d in args[0]) == [2, 3] and args[1:] in ([], [True])
        return (ins[0].height, ins[0].height, 0, 1) if whole and ins[0].height == ins[0].width else None
    if isinstance(kind, nn.AdaptiveAvgPool2d) or kind is F.adaptive_avg_pool2d:
        size = kind.output_size if isinstance(kind, nn.AdaptiveAvgPool2d) else node.args[1]
        square = ins[0].height == ins[0].width and size in (1, (1, 1), [1, 1])
        return (ins[0].height, ins[0].height, 0, 1) if square else None
    if isinstance(kind, nn.MaxPool2d | nn.AvgPool2d):
        given = dict(vars(kind))
    elif kind in (F.max_pool2d, torch.max_pool2d) or getattr(kind, "__name__", "") == "boolean_dispatch":
        names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
        given = dict(zip(names, node.args[1:], strict=False)) | node.kwargs
    elif kind is F.avg_pool2d:
        names = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
        given = dict(zip(names, node.args[1:], strict=False)) | node.kwargs
    else:
        return None
    average = isinstance(kind, nn.AvgPool2d) or kind is F.avg_pool2d
    k, s, p = (_one(given.get(name)) for name in ("kernel_size", "stride", "padding"))
    odd = given.get("ceil_mode") or given.get("return_indices") or given.get("divisor_override")
    sizes = (k, s, p, _one(given.get("dilation", 1)))
    if k is None or odd or -1 in sizes or sizes[3] != 1 or (p or 0) * 2 > k:
        return None
    return k, s or k, p or 0, (1 if given.get("count_include_pad", True) else 2) if average else 0


def _one(value: Any) -> int | None:
    """Return the number that a square size stands for."""
    if isinstance(value, tuple | list):
        return int(value[0]) if len(set(value)) == 1 else -1
    return None if value is None else int(value)
