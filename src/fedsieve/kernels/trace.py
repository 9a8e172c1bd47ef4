"""Reading an ordinary model with ``torch.fx``, as a list of layers that the kernels know and of those they do not."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.func import functional_call

from fedsieve.kernels.checks import Unsupported, changed_calls
from fedsieve.kernels.graph import (
    FallbackLayer,
    FlattenLayer,
    Graph,
    Layer,
    ModelOutput,
    NormLayer,
    PoolLayer,
    ProductLayer,
    Value,
    Window,
)
from fedsieve.sparse.layers import PowerConv2d, PowerLinear, SwatConv2d, SwatLinear

CONVOLUTIONS = (nn.Conv2d, SwatConv2d, PowerConv2d)
LINEARS = (nn.Linear, SwatLinear, PowerLinear)


class _Proxy(fx.Proxy):
    """Tells ``x += y``, which every other name of x sees, from ``x = x + y``."""


def _in_place(function: Any) -> Any:
    return lambda self, other: self.tracer.create_proxy("call_function", function, (self, other), {})


for _function in (operator.iadd, operator.isub, operator.imul, operator.itruediv):
    setattr(_Proxy, f"__{_function.__name__}__", _in_place(_function))


class _Tracer(fx.Tracer):
    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, name: str) -> bool:
        return isinstance(m, nn.Conv2d | nn.Linear | nn.BatchNorm2d) or super().is_leaf_module(m, name)


class _Shapes(fx.Interpreter):
    """Notes every node's shape and type (``torch.fx.passes.shape_prop`` does, and imports half a second of more)."""

    def propagate(self, shape: tuple[int, ...]) -> None:
        """Run two samples through the model: without numbers, unless a layer asks for them."""
        try:
            self._walk(torch.empty(2, *shape, device="meta"))
        except Exception:
            self.call_module = super().call_module  # type: ignore[method-assign]
            with torch.random.fork_rng(devices=[]):
                self._walk(torch.zeros(2, *shape))

    def _walk(self, x: Tensor) -> None:
        """Run every node, as ``run`` does, without its progress bar: tqdm makes a semaphore, left over after Ctrl-C."""
        self.env, self.args_iter = {}, iter([x])
        for node in self.graph.nodes:
            self.env[node] = self.run_node(node)

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module = self.fetch_attr(target)
        tensors: dict[str, Tensor] = dict(chain(module.named_parameters(), module.named_buffers()))
        own = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}
        if isinstance(module, nn.Conv2d):
            return nn.Conv2d._conv_forward(module, args[0], own["weight"], own.get("bias"))
        if isinstance(module, nn.Linear):
            return F.linear(args[0], own["weight"], own.get("bias"))
        return functional_call(module, own, args, kwargs)

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        n.meta["value"] = (tuple(result.shape), result.dtype) if isinstance(result, Tensor) else ((), None)
        return result


def read_graph(model: nn.Module, shape: tuple[int, ...], training: bool = True) -> Graph:
    """Return the layers of a model for samples of ``shape``. Raises Unsupported if that cannot be done."""
    if why := changed_calls(model):
        raise Unsupported(why)
    states = [(m, dict(vars(m)), dict(m._buffers)) for m in model.modules()]
    try:
        try:
            traced = fx.GraphModule(model, _Tracer().trace(model.train(training)))
        finally:
            attribute = _put_back(states)
        if attribute:
            raise Unsupported(f"the model keeps {attribute} from one call to the next")
        for node in traced.graph.find_nodes(op="get_attr"):
            raise Unsupported(f"the model uses {node.target} outside a layer")
        model.eval()
        with torch.no_grad():
            _Shapes(traced).propagate(shape)
    except Unsupported:
        raise
    except Exception as error:
        raise Unsupported(f"the model cannot be traced ({(str(error) or repr(error)).splitlines()[0]})") from error
    finally:
        for m, attributes, _ in states:
            m.training = attributes["training"]
    graph = _Reader(model, traced, training).graph()
    _owned(model, graph, training)
    return graph


def _owned(model: nn.Module, graph: Graph, training: bool) -> None:
    """Raise Unsupported unless every parameter belongs to one layer that runs once; and is trained, in training."""
    modules = [getattr(layer, "module", None) for layer in graph.layers]
    users = Counter(id(p) for m in modules if m is not None for p in m.parameters())
    for name, parameter in model.named_parameters():
        uses = users[id(parameter)]
        if uses > 1 or uses < training:
            raise Unsupported(f"{name} is used more than once" if uses else f"no layer uses {name}")
        if training and not parameter.requires_grad:
            raise Unsupported(f"{name} is not trained (requires_grad is False)")


class _Reader:
    def __init__(self, model: nn.Module, traced: fx.GraphModule, training: bool):
        self.training = training
        self.model, self.nodes = model, list(traced.graph.nodes)
        self.values: dict[fx.Node, Value] = {}
        self.layers: list[Layer] = []

    def graph(self) -> Graph:
        """Read node by node, each into a layer, or into the layer before it."""
        model_input, form = None, None
        for node in self.nodes:
            if node.op == "placeholder":
                if model_input is not None:
                    raise Unsupported("the model takes more than one input")
                model_input = self.values[node] = _value(node)
            elif node.op == "output":
                form = node.args[0]
            elif node.meta["value"][1] is not None:  # else a size, for a view
                self._read(node)
        outputs = [*dict.fromkeys(self._returned(form))]
        plain = isinstance(form, fx.Node) and len(outputs) == 1 and outputs[0].flat and not outputs[0].single
        if model_input is None or not outputs or not (plain or self.training):
            what = "tensors" if self.training else "logits [n, classes]"
            raise Unsupported(f"the model does not map [n, ...] to {what}")
        form_of_output = None if plain else ModelOutput(form, self.values)
        return Graph(model_input, outputs[0], self.layers, outputs, form_of_output)

    def _returned(self, form: Any) -> list[Value]:
        """Return the values that a model returns, which may stand in tuples, lists, dictionaries and dataclasses."""
        if isinstance(form, fx.Node):
            if form in self.values:
                return [self.values[form]]
            if not isinstance(form.target, type) or form.args:
                raise Unsupported(f"the model returns {form.name}, which is no tensor")
            form = form.kwargs
        parts = form.values() if isinstance(form, Mapping) else form if isinstance(form, tuple | list) else ()
        return [value for part in parts for value in self._returned(part)]

    def _read(self, node: fx.Node) -> None:
        kind = self.model.get_submodule(str(node.target)) if node.op == "call_module" else node.target
        first = self.values.get(node.args[0]) if node.args and isinstance(node.args[0], fx.Node) else None
        value = self.values[node] = self._fallback(node, kind) if first is None else self._layer(node, kind, first)
        if first is not None and _is_in_place(kind, node):
            self.values |= {other: value for other, old in self.values.items() if old is first}

    def _layer(self, node: fx.Node, kind: Any, x: Value) -> Value:
        """Add the layer of a module, function or method (``kind``), and return what it gives."""
        if _is_product(kind) and (isinstance(kind, nn.Conv2d) or len(x.sizes) == 1):
            return self._add(ProductLayer([x], _value(node), kind, str(node.target)))
        if _is_norm(kind):
            return self._add(NormLayer([x], _value(node), kind))
        if _is_relu(kind):
            return self._relu(node, x)
        other = self.values.get(node.args[1]) if _is_sum(kind, node) else None  # type: ignore[arg-type]
        if other is not None and vars(x) == vars(other):
            return self._sum(node, x, other)
        if not x.flat and (pool := _pool_window(kind, node, x.height, x.width)) is not None:
            return self._add(PoolLayer([x], _value(node), pool))
        if _is_flatten(kind) and (value := _value(node)).flat and value.channels == x.channels * x.height * x.width:
            if not x.flat:
                return self._add(FlattenLayer([x], value))
            return x if x.sizes == value.sizes else self._fallback(node, kind)
        return x if _is_nothing(kind, self.training) else self._fallback(node, kind)

    def _add(self, layer: Layer) -> Value:
        self.layers.append(layer)
        return layer.output

    def _relu(self, node: fx.Node, x: Value) -> Value:
        maker = self._maker(x)
        biased = isinstance(maker, ProductLayer) and maker.module.bias is not None
        if self._users(x) == 1 and ((isinstance(maker, NormLayer) or biased) and not maker.relu):
            maker.relu = True
            return x
        return self._add(NormLayer([x], _value(node), relu=True))

    def _sum(self, node: fx.Node, left: Value, right: Value) -> Value:
        for x, other in ((left, right), (right, left)):
            maker = self._maker(x)
            plain = isinstance(maker, NormLayer) and not maker.relu and len(maker.inputs) == 1
            if plain and self._users(x) == 1 and x is not other:
                self.layers.remove(maker)
                maker.inputs.append(other)
                return self._add(maker)
        return self._add(NormLayer([left, right], _value(node)))

    def _maker(self, x: Value) -> Any:
        return next((layer for layer in self.layers if layer.output is x), None)

    def _users(self, x: Value) -> int:
        """Return how many nodes read a value, under any of its names."""
        names = {node for node, value in self.values.items() if value is x}
        return len({user for node in names for user in node.users} - names)

    def _fallback(self, node: fx.Node, kind: Any) -> Value:
        module, name = (kind, str(node.target)) if isinstance(kind, nn.Module) else (None, node.name)
        if not all(source in self.values for source in node.all_input_nodes):
            raise Unsupported(f"{name} takes its inputs in a way that cannot be followed")
        inputs = [self.values[source] for source in node.all_input_nodes]
        return self._add(FallbackLayer(inputs, _value(node), node, module, name))


def _value(node: fx.Node) -> Value:
    shape, dtype = node.meta["value"]
    if len(shape) not in (1, 2, 4) or shape[0] != 2 or dtype != torch.float32:
        raise Unsupported(f"{node.name} gives {tuple(shape)}: neither [n, c, h, w] nor [n, features] of float32")
    if len(shape) == 4:
        return Value(*shape[1:])
    return Value(shape[1], flat=True) if len(shape) == 2 else Value(1, flat=True, single=True)


def _is_product(kind: Any) -> bool:
    """Tell whether a module is a linear layer, or a convolution that the kernels have; a subclass may be anything."""
    if type(kind) in CONVOLUTIONS:
        k, s, p = kind.kernel_size, kind.stride, kind.padding
        plain = kind.groups == 1 and kind.dilation == (1, 1) and kind.padding_mode == "zeros"
        square = k[0] == k[1] and s[0] == s[1] and not isinstance(p, str) and p[0] == p[1]
        return bool(plain and square and k[0] % 2 == 1 and s[0] in (1, 2) and int(p[0]) < k[0])
    return type(kind) in LINEARS


def _is_norm(kind: Any) -> bool:
    """Tell whether a module is a BatchNorm of maps that is trained and keeps running statistics."""
    return type(kind) is nn.BatchNorm2d and kind.affine and kind.track_running_stats and kind.momentum is not None


def _is_relu(kind: Any) -> bool:
    """Tell whether a module, function or method is ReLU."""
    return type(kind) is nn.ReLU or kind in (F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_")


def _is_sum(kind: Any, node: fx.Node) -> bool:
    """Tell whether a node adds two values."""
    named = kind in (operator.add, operator.iadd, torch.add, "add", "add_")
    return named and len(node.args) == 2 and all(isinstance(a, fx.Node) for a in node.args) and not node.kwargs


def _is_flatten(kind: Any) -> bool:
    """Tell whether a call keeps the order of the numbers, so that its result's shape says all."""
    return type(kind) is nn.Flatten or kind in (torch.flatten, torch.reshape, "flatten", "reshape", "view")


def _is_nothing(kind: Any, training: bool) -> bool:
    """Tell whether a module returns its input."""
    if isinstance(kind, nn.Dropout | nn.Dropout2d):
        return not (training and kind.p)
    return type(kind) is nn.Identity


def _is_in_place(kind: Any, node: fx.Node) -> bool:
    """Tell whether a node changes its first input."""
    name = kind if isinstance(kind, str) else getattr(kind, "__name__", "")
    option = getattr(kind, "inplace", False) or node.kwargs.get("inplace", False)
    option = option or (kind is F.relu and len(node.args) > 1 and node.args[1])
    operators = getattr(kind, "__module__", "") == "_operator" and name in ("iadd", "isub", "imul", "itruediv", "ipow")
    return bool(option or operators or (name.endswith("_") and not name.endswith("__")))


def _pool_window(kind: Any, node: fx.Node, height: int, width: int) -> Window | None:
    """Return the geometry of a pool of maps that the kernels have."""
    rest = node.args[1:]
    if kind in ("mean", torch.mean):
        arguments = dict(zip(("dim", "keepdim"), rest, strict=False)) | node.kwargs
        dims: Any = arguments.get("dim")
        whole = isinstance(dims, tuple | list) and sorted(d % 4 for d in dims) == [2, 3] and not arguments.get("dtype")
        return _adaptive(1, height, width) if whole else None
    if type(kind) is nn.AdaptiveAvgPool2d:
        return _adaptive(kind.output_size, height, width)
    if kind is F.adaptive_avg_pool2d:
        return _adaptive(rest[0] if rest else node.kwargs["output_size"], height, width)
    if type(kind) in (nn.MaxPool2d, nn.AvgPool2d):
        return _window(dict(vars(kind)), type(kind) is nn.AvgPool2d)
    if kind in (F.max_pool2d, torch.max_pool2d):
        names = "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices"
    elif kind is F.avg_pool2d:
        names = "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override"
    else:
        return None
    return _window(dict(zip(names, rest, strict=False)) | node.kwargs, kind is F.avg_pool2d)


def _adaptive(size: Any, height: int, width: int) -> Window | None:
    """Return the window of a mean that leaves ``size`` positions, where all its windows are alike and square."""
    high, wide = size if isinstance(size, tuple | list) else (size, size)
    if high == wide == 1:
        side = max(height, width)
        return Window(side, side, 0, 2)
    if high is None or wide is None or height % high or width % wide or height // high != width // wide:
        return None
    return Window(height // high, height // high, 0, 1)


def _window(arguments: dict[str, Any], average: bool) -> Window | None:
    k, s, p, d = (_one(arguments.get(name)) for name in ("kernel_size", "stride", "padding", "dilation"))
    odd = arguments.get("ceil_mode") or arguments.get("return_indices") or arguments.get("divisor_override")
    if k is None or odd or -1 in (k, s, p, d) or d not in (None, 1):
        return None
    return Window(k, s or k, p or 0, (1 if arguments.get("count_include_pad", True) else 2) if average else 0)


def _one(value: Any) -> int | None:
    """Return the number that a square size stands for; -1 where it is not square."""
    if isinstance(value, tuple | list):
        return int(value[0]) if len(set(value)) == 1 else -1
    return None if value is None else int(value)


def _put_back(states: list[tuple[nn.Module, dict[str, Any], dict[str, Any]]]) -> str:
    """Give modules back the attributes and buffers they had; return one that was different, "" if none was."""
    different = ""
    for m, attributes, buffers in states:
        for now, before in ((vars(m), attributes), (m._buffers, buffers)):
            names = [n for n in now.keys() | before.keys() if now.get(n) is not before.get(n) and n != "training"]
            different = different or min(names, default="")
            now.clear()
            now.update(before)
    return different
