"""Reading a model of tokens by ``torch.export``: a list of layers that the kernels know, or one line on why not.

What only moves numbers (views, splits, transposes, heads, slices) is run on the places of the numbers instead of the
numbers. A layer then looks which tokens, and which of their channels, it was given, whatever way they came.
"""

from __future__ import annotations

import logging
import operator
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from fedsieve.kernels.attention_calls import AttentionCalls
from fedsieve.kernels.checks import Unsupported
from fedsieve.kernels.graph import Graph, Value
from fedsieve.kernels.places import SAMPLES, Places, arguments_of, indices
from fedsieve.kernels.tokens import EmbeddingLayer, TokenOutput, TokenProduct
from fedsieve.sparse.layers import SparseLayer

MOVES = {
    "view", "reshape", "_unsafe_view", "transpose", "permute", "unsqueeze", "squeeze", "expand", "expand_as", "select",
    "slice", "split", "split_with_sizes", "chunk", "unbind", "flatten", "unflatten", "contiguous", "clone", "t",
    "movedim", "swapaxes", "swapdims", "mT",
    "alias", "narrow", "repeat", "repeat_interleave", "stack", "roll", "flip", "unfold", "index",
    "index_select",
}  # fmt: skip
"""Operations that only move numbers."""


def read_exported(model: nn.Module, shape: tuple[int, ...], dtype: torch.dtype, training: bool = True) -> Graph:
    """Return the layers of a model for samples of ``shape``. Raises Unsupported if that cannot be done."""
    modes = {m: m.training for m in model.modules()}
    x = torch.zeros(SAMPLES + 1, *shape, dtype=dtype)
    try:
        with _plain_layers(model), torch.random.fork_rng(devices=[]):
            batch = {0: torch.export.Dim.AUTO}
            program = torch.export.export(model.train(training), (x,), dynamic_shapes=(batch,), strict=False)
    except Exception as error:
        line = (str(error).strip() or repr(error)).splitlines()[0]
        raise Unsupported(f"the model cannot be exported ({line})") from error
    finally:
        for m, mode in modes.items():
            m.training = mode
    try:
        graph = _ExportReader(model, program, shape, dtype).graph()
    except Unsupported:
        raise
    except Exception as error:  # such as a shape that holds for one size of the batch alone
        line = (str(error).strip() or repr(error)).splitlines()[0]
        raise Unsupported(f"the model cannot be followed ({line})") from error
    _owned(model, graph, training)
    return graph


@contextmanager
def _plain_layers(model: nn.Module) -> Iterator[None]:
    """Let sparse layers be exported as plain ones, without the hooks that count, and failures without a log."""
    layers = [m for m in model.modules() if isinstance(m, SparseLayer)]
    hooks = [(m, name, getattr(m, name)) for m in model.modules() for name in ("_forward_hooks", "_forward_pre_hooks")]
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    for layer in layers:
        plain = nn.Conv2d.forward if isinstance(layer, nn.Conv2d) else nn.Linear.forward
        layer.forward = partial(plain, layer)  # type: ignore[arg-type]
    for m, name, own in hooks:
        setattr(m, name, type(own)())
    try:
        yield
    finally:
        logging.disable(level)
        for layer in layers:
            del layer.forward
        for m, name, own in hooks:
            setattr(m, name, own)


def _owned(model: nn.Module, graph: Graph, training: bool) -> None:
    """Raise Unsupported unless every parameter belongs to one layer that runs once; in training, some are trained."""
    weights = {id(layer.module.weight) for layer in graph.layers if isinstance(layer, TokenProduct)}
    for layer in graph.layers:
        if isinstance(layer, EmbeddingLayer) and layer.rows is None:
            layer.tied = id(layer.module.weight) in weights
    tied = [layer for layer in graph.layers if isinstance(layer, EmbeddingLayer) and layer.tied]
    modules = [getattr(layer, "module", None) for layer in graph.layers if layer not in tied]
    users = Counter(id(p) for m in modules if m is not None for p in m.parameters())
    for name, parameter in model.named_parameters():
        if users[id(parameter)] > 1 or users[id(parameter)] < training:
            raise Unsupported(f"{name} is used more than once" if users[id(parameter)] else f"no layer uses {name}")
    if training and not graph.needs_grad[graph.output]:
        raise Unsupported("no parameter is trained (requires_grad is False of all)")


class _ExportReader(AttentionCalls):
    def __init__(self, model: nn.Module, program: Any, shape: tuple[int, ...], dtype: torch.dtype):
        super().__init__(model, Value(0, plain=shape, dtype=dtype))
        self.program = program
        self.env: dict[fx.Node, Any] = {}

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
                    self.env[node] = self.model.get_buffer(buffers[node.name]).detach().clone()
                elif node.name in constants:
                    self.env[node] = self.program.constants[constants[node.name]]
                else:
                    assert inputs == [node.name]
                    numbers = torch.arange(SAMPLES * torch.Size(self.input.sizes).numel())
                    self.env[node] = Places(self.input, numbers.view(SAMPLES, *self.input.sizes))
            elif node.op == "call_function":
                self.env[node] = self._call(node)
                for source in node.all_input_nodes:
                    if last[source] is node:  # places take more memory than the model
                        del self.env[source]
            elif node.op == "output":
                return self._returned(node)
            else:
                raise Unsupported(f"the model uses {node.op} {node.target}")
        raise Unsupported("the model returns nothing")

    def _call(self, node: fx.Node) -> Any:
        args: Any
        kwargs: Any
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self.env.__getitem__)
        self.node = node
        flat = [*arguments_of([args, kwargs])]
        places = [x for x in flat if isinstance(x, Places)]
        target: Any = node.target
        if node.target is operator.getitem and not isinstance(args[0], Places):
            return args[0][args[1]]
        name = target.__name__.partition(".")[0] if callable(target) else str(target)
        try:
            return self._result(node, name, args, kwargs, places)
        except Unsupported as error:
            raise Unsupported(f"{self._where(node)}{error}") from None
        except Exception as error:
            line = (str(error).strip() or repr(error)).splitlines()[0]
            raise Unsupported(f"{self._where(node)}{name} in a way that cannot be followed ({line})") from error

    def _result(self, node: fx.Node, name: str, args: Any, kwargs: Any, places: list[Places]) -> Any:
        target: Any = node.target
        if name.startswith("_assert_"):
            return None
        if not places:
            return _constant(target, name, args, kwargs)
        if name in ("sym_size", "sym_numel", "sym_stride"):
            return target(*indices(args), **kwargs)
        alone = len({(id(one.of), one.scale) for one in places}) == 1
        if name in MOVES and alone and not (name == "stack" and len(places) < len(args[0])):
            if name in ("view", "_unsafe_view"):
                target = torch.ops.aten.reshape.default  # the places have strides of their own
            moved = target(*indices(args), **indices(kwargs))
            return _placed(moved, places[0])
        if name in ("to", "type_as") and self._is_of_type(args, kwargs):
            return args[0]
        own: Callable[..., Places] | None = getattr(self, f"_op_{name.removesuffix('_')}", None)
        if own is None:
            raise Unsupported(f"the kernels do not know {name}")
        y = own(*args, **kwargs)
        if name.endswith("_"):
            self._renamed(node.args[0], args[0], y)
        return y

    def _is_of_type(self, args: Any, kwargs: Any) -> bool:
        """Tell whether a tensor has the type already that it is given."""
        kinds = {x for x in (*args[1:], *kwargs.values()) if isinstance(x, torch.dtype)}
        return kinds <= {self.input.dtype if args[0].of is self.input else torch.float32}

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
        x = self.env.get(returned[0])
        if not self.program.call_spec.out_spec.is_leaf() or not isinstance(x, Places) or isinstance(x.of, Tensor):
            raise Unsupported("a model of tokens that returns more than one tensor")
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
        output = TokenOutput(shape, token, channel - channel[0], labels)
        return Graph(self.input, rows.value, self.layers, [rows.value], token_output=output)


def _constant(target: Any, name: str, args: Any, kwargs: Any) -> Any:
    """Compute what has nothing of the samples in it. Raises Unsupported where that is not the same in every step."""
    if name == "dropout" and not (args[1] and args[2]):
        return args[0]
    if torch.Tag.nondeterministic_seeded in getattr(target, "tags", ()):
        raise Unsupported(f"random numbers apart from the samples ({name})")
    if getattr(getattr(target, "_schema", None), "is_mutable", False) and name != "detach_":
        raise Unsupported(f"a buffer that changes from call to call ({name})")
    return target(*args, **kwargs)


def _placed(x: Any, old: Places) -> Any:
    """Return one tensor of places, or several."""
    return replace(old, index=x) if isinstance(x, Tensor) else type(x)(_placed(one, old) for one in x)
