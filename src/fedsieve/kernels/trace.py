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

from fedsieve.kernels.calls import (
    activation_of,
    concatenated,
    is_flatten,
    is_identity,
    is_in_place,
    is_norm,
    is_product,
    is_sum,
    pool_window,
    relu_of,
)
from fedsieve.kernels.checks import Unsupported, changed_calls
from fedsieve.kernels.exported import read_exported
from fedsieve.kernels.graph import (
    ActivationLayer,
    ConcatenationLayer,
    FallbackLayer,
    FlattenLayer,
    Graph,
    Layer,
    ModelOutput,
    NormLayer,
    PoolLayer,
    ProductLayer,
    Value,
)
from fedsieve.kernels.inputs import Inputs


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


def read_graph(
    model: nn.Module, shape: tuple[int, ...] | Inputs, dtype: torch.dtype = torch.float32, training: bool = True
) -> Graph:
    """Return the layers of a model for samples of ``shape``, or inputs. Raises Unsupported if that cannot be done.

    A model of maps is traced; one of tokens, which cannot be, exported.
    """
    if why := changed_calls(model):
        raise Unsupported(why)
    recurrent = next((name for name, m in model.named_modules() if isinstance(m, nn.RNNBase)), None)
    if isinstance(shape, Inputs) and shape.alone:
        dtype, shape = shape.dtypes[0], shape.shapes[0]
    if isinstance(shape, Inputs) or dtype != torch.float32:
        if recurrent is not None:  # to export one takes half a minute
            raise Unsupported(f"{recurrent}: the kernels do not know recurrent layers")
        return read_exported(model, shape, dtype, training)
    try:
        return _traced(model, shape, training)
    except Unsupported as error:
        if recurrent is not None:
            raise
        if any(isinstance(m, nn.LayerNorm | nn.RMSNorm | nn.MultiheadAttention) for m in model.modules()):
            return read_exported(model, shape, dtype, training)
        if not str(error).startswith(("the model cannot be traced", "the model uses")):
            raise
        try:
            return read_exported(model, shape, dtype, training)
        except Unsupported as also:
            raise Unsupported(f"{error}; as a model of tokens: {also}") from None


def _traced(model: nn.Module, shape: tuple[int, ...], training: bool) -> Graph:
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
    """Raise Unsupported unless every parameter is unused, or of one layer that runs once, and trained, in training."""
    modules = [getattr(layer, "module", None) for layer in graph.layers]
    users = Counter(id(p) for m in modules if m is not None for p in m.parameters())
    for name, parameter in model.named_parameters():
        if not (uses := users[id(parameter)]):
            graph.unused[name] = parameter
        elif uses > 1:
            raise Unsupported(f"{name} is used more than once")
        elif training and not parameter.requires_grad:
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
        parts = [self.values.get(part) for part in concatenated(kind, node)]
        if parts and all(parts):
            self.values[node] = self._add(ConcatenationLayer([part for part in parts if part], _value(node)))
            return
        first = self.values.get(node.args[0]) if node.args and isinstance(node.args[0], fx.Node) else None
        value = self.values[node] = self._fallback(node, kind) if first is None else self._layer(node, kind, first)
        if first is not None and is_in_place(kind, node):
            self.values |= {other: value for other, old in self.values.items() if old is first}

    def _layer(self, node: fx.Node, kind: Any, x: Value) -> Value:
        """Add the layer of a module, function or method (``kind``), and return what it gives."""
        if is_product(kind) and (isinstance(kind, nn.Conv2d) or len(x.sizes) == 1):
            return self._add(ProductLayer([x], _value(node), kind, str(node.target)))
        if is_norm(kind) and not x.flat:
            return self._add(NormLayer([x], _value(node), kind))
        if which := relu_of(kind, node):
            return self._rectified(node, x, which)
        if function := activation_of(kind, node):
            return self._add(ActivationLayer([x], _value(node), function))
        other = self.values.get(node.args[1]) if is_sum(kind, node) else None  # type: ignore[arg-type]
        if other is not None and vars(x) == vars(other):
            return self._sum(node, x, other)
        if not x.flat and (pool := pool_window(kind, node, x.height, x.width)) is not None:
            return self._add(PoolLayer([x], _value(node), pool))
        if is_flatten(kind) and (value := _value(node)).flat and value.channels == x.channels * x.height * x.width:
            if not x.flat:
                return self._add(FlattenLayer([x], value))
            return x if x.sizes == value.sizes else self._fallback(node, kind)
        return x if is_identity(kind, self.training) else self._fallback(node, kind)

    def _add(self, layer: Layer) -> Value:
        self.layers.append(layer)
        return layer.output

    def _rectified(self, node: fx.Node, x: Value, which: int) -> Value:
        maker = self._maker(x)
        biased = isinstance(maker, ProductLayer) and maker.module.bias is not None
        if self._users(x) == 1 and ((isinstance(maker, NormLayer) or biased) and not maker.relu):
            maker.relu = which
            return x
        return self._add(NormLayer([x], _value(node), relu=which))

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
