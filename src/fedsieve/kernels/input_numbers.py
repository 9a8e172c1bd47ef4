"""What a model computes of its inputs alone (masks, positions, weights of tokens): by PyTorch, in each step."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from fedsieve.kernels.checks import Unsupported
from fedsieve.kernels.graph import Value
from fedsieve.kernels.places import SAMPLES

NEVER = -1e30
"""What is added to a score that may not count is at most this; the softmax of float32 then is 0."""


@dataclass(frozen=True, eq=False)
class InputNumbers:
    """A tensor that depends on the model's inputs, and on nothing that is trained."""

    node: fx.Node
    """What computes it, of the exported model."""
    example: Any
    """What it is of ``example_inputs``: a tensor, or several."""


@dataclass(frozen=True, eq=False)
class InputMask:
    """What is added to the scores of attention, by numbers of the inputs."""

    of: Value
    """The numbers, of a batch of n samples [n * heads, queries or 1, keys or 1], or with the heads apart."""
    heads: int
    """Of the numbers: all of attention's, or 1."""
    how: str
    """"keep": a key counts where they are true; "bar": where they are not; "add": they are added."""
    scale: float = 1.0
    """What numbers that are added are multiplied by."""

    def __call__(self, x: Tensor, n: int) -> Tensor:
        """Return what is added to the scores of n samples, [n, heads, ...]."""
        x = x.view(n, self.heads, *x.shape[-2:])
        if self.how == "add":
            return self.scale * x.float()
        return torch.zeros(x.shape).masked_fill(x.bool() if self.how == "bar" else ~x.bool(), -torch.inf)


def example_inputs(values: Sequence[Value], n: int = SAMPLES) -> list[Tensor]:
    """Return inputs of n samples to try what is computed of them on: small numbers, always the same."""
    chance = torch.Generator().manual_seed(n)
    return [_example(value, n, chance) for value in values]


def _example(value: Value, n: int, chance: torch.Generator) -> Tensor:
    sizes = (n, *value.sizes)
    if value.dtype == torch.float32:
        return torch.rand(sizes, generator=chance)
    return torch.randint(2 if value.dtype == torch.bool else 3, sizes, generator=chance).to(value.dtype)


class InputFunction:
    """A tensor of a batch [n * k, ...], of the model's inputs, whose k rows of a sample depend on that alone."""

    def __init__(self, program: Any, constants: dict[str, Tensor], of: InputNumbers, inputs: Sequence[Value]):
        self.value = Value(0, plain=tuple(of.example.shape[1:]), dtype=_kind(of.example.dtype))
        self._compute = _part(program, constants, of.node)
        try:
            self._check(inputs)
        except Unsupported:
            raise
        except Exception as error:
            line = (str(error).strip() or repr(error)).splitlines()[0]
            raise Unsupported(f"numbers of the inputs that cannot be followed ({line})") from error

    def __call__(self, inputs: Sequence[Tensor]) -> Tensor:
        """Return its numbers of a batch: float32, int64 or bool."""
        with torch.no_grad():
            x: Tensor = self._compute(*inputs)
        return x.to(self.value.dtype).contiguous()

    def _check(self, inputs: Sequence[Value]) -> None:
        """Raise Unsupported where a sample's numbers depend on others, or on how many there are."""
        batch = example_inputs(inputs, SAMPLES + 1)
        whole = self(batch)
        for i in range(SAMPLES + 1):
            alone = self([one[i : i + 1] for one in batch])
            own = whole.view(SAMPLES + 1, -1, *whole.shape[1:])[i]
            if alone.shape != own.shape or not torch.allclose(alone.double(), own.double(), equal_nan=True):
                raise Unsupported("numbers of the inputs that depend on other samples, or on how many there are")


def _kind(dtype: torch.dtype) -> torch.dtype:
    if dtype.is_floating_point:
        return torch.float32
    return torch.bool if dtype == torch.bool else torch.int64


def _part(program: Any, constants: dict[str, Tensor], node: fx.Node) -> Callable[..., Any]:
    """Return what computes a node of an exported model from the model's inputs, in order."""
    needed, stack = {node}, [node]
    while stack:
        more = [one for one in stack.pop().all_input_nodes if one not in needed]
        needed |= {*more}
        stack += more
    root, graph, copies = nn.Module(), fx.Graph(), dict[fx.Node, fx.Node]()
    inputs = {*program.graph_signature.user_inputs}
    for one in program.graph.nodes:
        if one.op == "placeholder" and one.name in inputs:
            copies[one] = graph.placeholder(one.name)
        elif one in needed and (one.op == "placeholder" or isinstance(constants.get(one.name), Tensor)):
            root.register_buffer(one.name, constants[one.name])
            copies[one] = graph.get_attr(one.name)
        elif one in needed:
            copies[one] = graph.node_copy(one, copies.__getitem__)
    graph.output(copies[node])
    return fx.GraphModule(root, graph)


def check_unaliased(node: fx.Node) -> None:
    """Raise Unsupported where an operation changes a tensor in place that others may read."""
    schema = getattr(node.target, "_schema", None)
    if not getattr(schema, "is_mutable", False):
        return
    changed: Any = node.args[0]
    returned = getattr(getattr(changed.target, "_schema", None), "returns", ())
    view = any(one.alias_info is not None for one in returned)
    if changed.op != "call_function" or changed.target is operator.getitem or view or [*changed.users] != [node]:
        raise Unsupported("a change in place of a tensor that is used under another name, or of a part of one")
