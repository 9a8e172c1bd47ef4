"""Reading a model of tokens by ``torch.export``: a list of layers that the kernels know, or one line on why not.

What only moves numbers (views, splits, transposes, heads, slices) is run on the places of the numbers instead of the
numbers. A layer then looks which tokens, and which of their channels, it was given, whatever way they came.
"""

from __future__ import annotations

import operator
from collections import ChainMap, Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_unflatten

from fedsieve.kernels.batch_sizes import check_any_size, check_same, is_constant
from fedsieve.kernels.checks import Unsupported
from fedsieve.kernels.exporting import export_program
from fedsieve.kernels.expressions import Expression, RowNoise
from fedsieve.kernels.graph import Graph, Layer, Value
from fedsieve.kernels.input_calls import InputCalls
from fedsieve.kernels.input_numbers import InputNumbers
from fedsieve.kernels.inputs import Inputs
from fedsieve.kernels.places import SAMPLES, Places, arguments_of, indices
from fedsieve.kernels.token_expressions import EXPRESSIONS
from fedsieve.kernels.tokens import (
    EmbeddingLayer,
    LayerNormLayer,
    Parameters,
    ScaleLayer,
    TokenOutput,
    TokenProduct,
    masks_of,
)
from fedsieve.types import InputError, logits_of

MOVES = {
    "view", "reshape", "_unsafe_view", "transpose", "permute", "unsqueeze", "squeeze", "expand", "expand_as", "select",
    "slice", "split", "split_with_sizes", "chunk", "unbind", "flatten", "unflatten", "contiguous", "clone", "t",
    "movedim", "swapaxes", "swapdims", "mT", "numpy_T",
    "alias", "narrow", "repeat", "repeat_interleave", "stack", "roll", "flip", "unfold", "index",
    "index_select",
}  # fmt: skip
"""Operations that only move numbers."""


def read_exported(
    model: nn.Module, shape: tuple[int, ...] | Inputs, dtype: torch.dtype = torch.float32, training: bool = True
) -> Graph:
    """Return the layers of a model for samples of ``shape``. Raises Unsupported if that cannot be done."""
    inputs = shape if isinstance(shape, Inputs) else Inputs((shape,), (dtype,))
    program = export_program(model, inputs, training)
    try:
        graph = _ExportReader(model, program, inputs).graph()
        graph.form = shape if isinstance(shape, Inputs) else None
    except Unsupported:
        raise
    except Exception as error:  # such as a shape that holds for one size of the batch alone
        line = (str(error).strip() or repr(error)).splitlines()[0]
        raise Unsupported(f"the model cannot be followed ({line})") from error
    used = {program.graph_signature.inputs_to_parameters.get(n.name) for n in program.graph.nodes if n.users}
    _owned(model, graph, training, {name for name in used if name})
    return graph


def _owned(model: nn.Module, graph: Graph, training: bool, used: set[str]) -> None:
    """Raise Unsupported unless every parameter is of one layer that runs once, or unused; in training, some trained."""
    weights = {id(layer.module.weight) for layer in graph.layers if isinstance(layer, TokenProduct)}
    later = set[int]()
    for layer in reversed(graph.layers):
        if isinstance(layer, EmbeddingLayer):
            table = id(layer.module.weight)
            layer.tied = table in weights and layer.rows is None
            layer.shared = table in later
            later.add(table)
    others = [one for one in graph.layers if isinstance(one, EmbeddingLayer) and (one.tied or one.shared)]
    modules = [getattr(layer, "module", None) for layer in graph.layers if layer not in others]
    parts = [one for one in graph.layers if isinstance(one, TokenProduct) and one.numel < one.module.weight.numel()]
    for name in dict.fromkeys(part.parameter for part in parts):
        own = sorted((part for part in parts if part.parameter == name), key=lambda part: part.first)
        ends = [0, *(part.first + part.output.channels for part in own)]
        if ends != [*(part.first for part in own), len(own[0].module.weight)]:
            raise Unsupported(f"products with parts of {name} that are not all of its rows, each once")
        for part in own[1:]:
            modules.remove(part.module)
    users = Counter(id(p) for m in modules if m is not None for p in m.parameters())
    for name, parameter in model.named_parameters():
        uses = users[id(parameter)]
        if not uses and name not in used:
            graph.unused[name] = parameter
        elif uses > 1 or uses < training:
            raise Unsupported(f"{name} is used more than once" if uses else f"no layer uses {name}")
    if training and not graph.needs_grad[graph.output]:
        raise Unsupported("no parameter is trained (requires_grad is False of all)")


class _ExportReader(InputCalls):
    def __init__(self, model: nn.Module, program: Any, inputs: Inputs):
        pairs = zip(inputs.shapes, inputs.dtypes, strict=True)
        super().__init__(model, [Value(0, plain=sizes, dtype=kind) for sizes, kind in pairs], program)

    def graph(self) -> Graph:
        """Read node by node."""
        signature = self.program.graph_signature
        self.program.graph.eliminate_dead_code()
        parameters, constants = signature.inputs_to_parameters, signature.inputs_to_lifted_tensor_constants
        buffers, inputs = signature.inputs_to_buffers, list(signature.user_inputs)
        last = {source: node for node in self.program.graph.nodes for source in node.all_input_nodes}
        for node in self.program.graph.nodes:
            if node.op == "placeholder":
                if node.name in parameters:
                    self.env[node] = self._places(self.model.get_parameter(parameters[node.name]))
                elif node.name in buffers:
                    self.env[node] = self._stored(node, self.model.get_buffer(buffers[node.name]).detach().clone())
                elif node.name in constants:
                    self.env[node] = self._stored(node, self.program.constants[constants[node.name]])
                else:
                    own = self.inputs[inputs.index(node.name)]
                    numbers = torch.arange(SAMPLES * torch.Size(own.sizes).numel())
                    self.env[node] = Places(own, numbers.view(SAMPLES, *own.sizes))
                    check_any_size(node.meta["val"].shape[0])
            elif node.op == "get_attr":
                self.env[node] = self._stored(node, getattr(self.program.graph_module, str(node.target)))
            elif node.op == "call_function":
                self.env[node] = self._call(node, self.env)
                self._follow_larger(node)
                for source in node.all_input_nodes:
                    if last[source] is node:  # places take more memory than the model
                        del self.env[source]
            elif node.op == "output":
                return self._returned(node)
            else:
                raise Unsupported(f"the model uses {node.op} {node.target}")
        raise Unsupported("the model returns nothing")

    def _follow_larger(self, node: fx.Node) -> None:
        """Note what a constant or a size is for a larger batch, if it depends on that."""
        if isinstance(own := node.meta.get("val"), torch.SymInt | torch.SymFloat):
            if own.node.hint is None:
                raise Unsupported(f"{self._where(node)}sizes that depend on numbers of the inputs")
            self.larger[node] = own.node.hint  # the model was exported with one sample more
        elif any(source in self.larger for source in node.all_input_nodes) and is_constant(self.env[node]):
            self.larger[node] = self._call(node, ChainMap(self.larger, self.env))

    def _call(self, node: fx.Node, env: Mapping[fx.Node, Any]) -> Any:
        args: Any
        kwargs: Any
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), env.__getitem__)
        self.node = node
        flat = [*arguments_of([args, kwargs])]
        places = [x for x in flat if isinstance(x, Places)]
        if any(isinstance(x, fx.GraphModule) for x in flat):
            return self._inner(node, args, places)
        target: Any = node.target
        if node.target is operator.getitem and not isinstance(args[0], Places | InputNumbers):
            return args[0][args[1]]
        name = target.__name__.partition(".")[0] if callable(target) else str(target)
        name = name.strip("_") if name.startswith("__") else name  # such as __and__
        try:
            return self._result(node, name, args, kwargs, places)
        except Unsupported as error:
            raise Unsupported(f"{self._where(node)}{error}") from None
        except Exception as error:
            line = (str(error).strip() or repr(error)).splitlines()[0]
            raise Unsupported(f"{self._where(node)}{name} in a way that cannot be followed ({line})") from error

    def _result(self, node: fx.Node, name: str, args: Any, kwargs: Any, places: list[Places]) -> Any:
        target: Any = node.target
        if name.startswith("_assert"):
            return None
        if name in ("empty", "new_empty") and _by_sample(node.args[name == "new_empty"]):
            return RowNoise()
        given = [*arguments_of([args[1:], kwargs])]  # such as the places of an index
        moves = name in MOVES and not any(isinstance(x, Places) for x in given)
        numbers = self._numbers(node, moves)
        if numbers is not None:
            return numbers
        if not places and not any(isinstance(x, RowNoise | InputNumbers) for x in arguments_of([args, kwargs])):
            self._check_changes(node, name, args)
            return _constant(target, name, args, kwargs)
        if name in ("sym_size", "sym_numel", "sym_stride"):
            return target(*indices(args), **kwargs)
        check_same(name, [(one, self.env[one], self.larger[one]) for one in node.all_input_nodes if one in self.larger])
        alone = len({id(one.of) for one in places}) == 1
        several = any(isinstance(x, InputNumbers) for x in arguments_of([args, kwargs]))
        if moves and alone and not several and not (name == "stack" and len(places) < len(args[0])):
            if name in ("view", "_unsafe_view"):
                target = torch.ops.aten.reshape.default  # the places have strides of their own
            if any(isinstance(x, Expression) for x in places):
                return self._moved(target, args, kwargs, places)
            moved = target(*indices(args), **indices(kwargs))
            return _placed(moved, places[0].of)
        if name in ("to", "type_as") and self._is_of_type(args, kwargs):
            return args[0]
        own: Callable[..., Places] | None = getattr(self, f"_op_{name.removesuffix('_')}", None)
        if own is None:
            raise Unsupported(f"the kernels do not know {name}")
        if name.removesuffix("_") in EXPRESSIONS:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), self._argument)
        else:
            args, kwargs = self.settled(args), self.settled(kwargs)
        y = own(*args, **kwargs)
        if name.endswith("_") and not isinstance(y, RowNoise):
            self._renamed(node.args[0], args[0], y)
        return y

    def _is_of_type(self, args: Any, kwargs: Any) -> bool:
        """Tell whether a tensor has the type already that it is given."""
        kinds = {x for x in (*args[1:], *kwargs.values()) if isinstance(x, torch.dtype)}
        return kinds <= {args[0].of.dtype}

    def _inner(self, node: fx.Node, args: Any, places: list[Places]) -> Any:
        """Compute the constants of a part of the model that runs without gradients, or without autocast."""
        known = "wrap_with_set_grad_enabled", "wrap_with_autocast"
        if (
            places
            or any(isinstance(x, InputNumbers) for x in args)
            or str(getattr(node.target, "_name", node.target)) not in known
        ):
            raise Unsupported(f"{self._where(node)}a part without gradients, or with numbers of lower precision")
        (module,) = (x for x in args if isinstance(x, fx.GraphModule))
        given = iter(args[args.index(module) + 1 :])
        env: dict[fx.Node, Any] = {}
        for inner in module.graph.nodes:
            if inner.op == "placeholder":
                env[inner] = next(given)
            elif inner.op == "get_attr":
                env[inner] = getattr(module, str(inner.target))
            elif inner.op == "call_function":
                own, named = fx.node.map_arg((inner.args, inner.kwargs), env.__getitem__)
                if any(isinstance(x, fx.GraphModule) for x in own):
                    env[inner] = self._inner(inner, own, [])
                else:
                    name = inner.target.__name__.partition(".")[0]
                    self._check_changes(inner, name, own)
                    env[inner] = _constant(inner.target, name, own, named)
            else:
                return fx.node.map_arg(inner.args[0], env.__getitem__)
        raise AssertionError

    def _renamed(self, node: Any, old: Places, new: Places) -> None:
        """Let a tensor that was changed in place be what it became; others of its numbers may be views or copies."""
        others = [x for one, x in self.env.items() if one is not node and isinstance(x, Places) and x.of is old.of]
        if others or not torch.equal(old.index, new.index):
            raise Unsupported("a change in place of a tensor that is used under another name, or of a part of one")
        self.env[node] = new

    def _where(self, node: fx.Node) -> str:
        """Return the module that a node is of, with a colon; "" for the model itself."""
        stack = [*(node.meta.get("nn_module_stack") or {}).values()]
        path = str(stack[-1][0]) if stack else ""
        return f"{path}: " if path else ""

    def _returned(self, node: fx.Node) -> Graph:
        returned: Any = node.args[0]
        spec = self.program.call_spec.out_spec
        x = self.settled(self.env.get(returned[_logits_among(spec)]))
        if not isinstance(x, Places) or isinstance(x.of, Tensor):
            raise Unsupported("a model of tokens that returns none of their numbers")
        self._draws()
        dim = -1
        if x.index.dim() == 3 and int(x.index[0, 0, -1] - x.index[0, 0, 0]) != x.index.shape[-1] - 1:
            dim = 1  # [n, classes, length]
        rows = self._all(self._rows(replace(x, index=x.index.movedim(dim, -1))))
        flat, each = rows.ids.flatten(), rows.value.width
        if rows.ids.shape[0] != SAMPLES or not torch.equal(flat // each, torch.arange(SAMPLES).repeat_interleave(each)):
            raise Unsupported("a model that does not return the samples in order")
        shape = tuple(x.index.shape[1:])
        offsets = torch.arange(torch.Size(shape).numel()).view(shape).movedim(min(dim, 0), -1)
        token = torch.empty(each, dtype=torch.int64)
        token[flat[:each]] = offsets.flatten(0, -2)[:, 0] if offsets.dim() > 1 else torch.zeros(1, dtype=torch.int64)
        channel = offsets.flatten(0, -2)[0] if offsets.dim() > 1 else offsets
        labels = dim == -1 and torch.equal(flat, torch.arange(SAMPLES * each))
        output = TokenOutput(shape, token, channel - channel[0], labels, None if spec.is_leaf() else spec)
        first, *more = self.inputs
        layers = self._needed(rows.value)
        used = {own for layer in layers for own in (getattr(layer, "of", None), *masks_of(layer))}
        functions = {own.value: own for own in self.functions.values() if own.value in used}
        return Graph(
            first, rows.value, layers, [rows.value], more_inputs=more, token_output=output, functions=functions
        )

    def _needed(self, output: Value) -> list[Layer]:
        """Return the layers that the output needs; a scale behind a norm that has none is the norm's own."""
        users = Counter(id(value) for layer in self.layers for value in layer.inputs)
        needed, values = list[Layer](), {output}
        for layer in reversed(self.layers):
            if layer.output in values:
                needed.insert(0, layer)
                values |= {*layer.inputs}
        for scale in [layer for layer in needed if isinstance(layer, ScaleLayer)]:
            norm: Any = next((layer for layer in needed if layer.output is scale.inputs[0]), None)
            alone = isinstance(norm, LayerNormLayer) and users[id(norm.output)] == 1 and norm.output is not output
            if alone and not [*norm.module.buffers(), *norm.module.parameters()]:
                norm.module, norm.output = Parameters(weight=scale.module.weight, bias=None), scale.output
                needed.remove(scale)
        return needed


def _logits_among(spec: Any) -> int:
    """Return which of the tensors that a model returns are the logits."""
    if spec.is_leaf():
        return 0
    tensors = [torch.tensor(i) for i in range(spec.num_leaves)]
    try:
        return int(logits_of(tree_unflatten(tensors, spec)))
    except InputError as error:
        raise Unsupported(f"a model of tokens, and {error}") from None


def _constant(target: Any, name: str, args: Any, kwargs: Any) -> Any:
    """Compute what has nothing of the samples in it. Raises Unsupported where that is not the same in every step."""
    if name == "dropout" and not (args[1] and args[2]):
        return args[0]
    if torch.Tag.nondeterministic_seeded in getattr(target, "tags", ()):
        raise Unsupported(f"random numbers apart from the samples ({name})")
    return target(*args, **kwargs)


def _by_sample(size: Any) -> bool:
    """Tell whether a tensor's size is one number for each sample: [n, 1, ...]."""
    return bool(size) and isinstance(size[0], fx.Node) and all(one == 1 for one in size[1:])


def _placed(x: Any, of: Value | Tensor) -> Any:
    """Return one tensor of places, or several."""
    return Places(of, x) if isinstance(x, Tensor) else type(x)(_placed(one, of) for one in x)
