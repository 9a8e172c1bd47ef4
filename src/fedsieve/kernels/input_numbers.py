"""What a model computes of its inputs alone (masks, positions, weights of tokens): by PyTorch, in each step."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from fedsieve.kernels.checks import Unsupported
from fedsieve.kernels.graph import Value
from fedsieve.kernels.places import SAMPLES, arguments_of

NEVER = -1e30
"""What is added to a score that may not count is at most this; the softmax of float32 then is 0."""


LOW = -1e4
"""Where the most that is added to a query's scores is below this, float32 has little room for the scores beside it."""
TRIALS = 16
"""Batches at most on which it is tried whether samples' numbers are their own."""
OTHER_SAMPLES = "numbers of the inputs that depend on other samples, or on how many there are"


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


FACTORS: dict[str, Callable[[Tensor], Tensor]] = {
    "times": lambda x: x,
    "over": lambda x: 1 / x,
    "bar": lambda x: ~x.bool(),
}
"""What numbers are multiplied by that are to be multiplied, or divided, or 0 where a mask is true."""


def example_inputs(
    values: Sequence[Value], n: int = SAMPLES, seed: int = 0, among: Sequence[float] = ()
) -> list[Tensor]:
    """Return inputs of n samples to try what is computed of them on: small numbers, or some ``among`` others."""
    chance = torch.Generator().manual_seed(seed)
    return [_example(value, n, chance, among) for value in values]


def _example(value: Value, n: int, chance: torch.Generator, among: Sequence[float]) -> Tensor:
    sizes = (n, *value.sizes)
    if value.dtype == torch.bool:
        return torch.randint(2, sizes, generator=chance).bool()
    pool = torch.tensor([x for x in among or (0, 1, 2) if x == x or value.dtype == torch.float32], dtype=torch.float64)
    choice = pool[torch.randint(len(pool), sizes, generator=chance)]
    if value.dtype != torch.float32:
        return choice.to(value.dtype)
    if not among:
        return torch.rand(sizes, generator=chance)
    vectors = torch.randint(3, (*sizes[:-1], 1), generator=chance)  # some of one number, such as padding's
    x = torch.where(vectors == 0, choice[..., :1], torch.randn(sizes, generator=chance, dtype=torch.float64))
    return torch.where((vectors == 1) & (torch.rand(sizes, generator=chance) < 0.3), choice, x).float()


class InputFunction:
    """A tensor of a batch [n * k, ...], of the model's inputs, whose k rows of a sample depend on that alone.

    ``how``: a key of FACTORS, for what tokens are multiplied by; "": its numbers as they are.
    """

    def __init__(
        self,
        program: Any,
        constants: dict[str, Tensor],
        of: InputNumbers,
        nodes: frozenset[fx.Node],
        inputs: Sequence[Value],
        how: str,
    ):
        """Make it of the ``nodes`` of a program that are needed."""
        if of.example.is_complex():
            raise Unsupported("complex numbers of the inputs")
        self.how, kind = how, torch.float32 if how else _kind(of.example.dtype)
        self.value = Value(0, plain=tuple(of.example.shape[1:]), dtype=kind)
        self._compute = _part(program, constants, of.node, nodes)
        try:
            _check_apart(program, nodes)
            self._check(inputs, {*_compared(nodes, constants)})
        except Unsupported:
            raise
        except Exception as error:
            line = (str(error).strip() or repr(error)).splitlines()[0]
            raise Unsupported(f"numbers of the inputs that cannot be followed ({line})") from error

    def __call__(self, inputs: Sequence[Tensor]) -> Tensor:
        """Return its numbers of a batch: float32, int64 or bool."""
        with torch.no_grad():
            x: Tensor = self._compute(*inputs)
        return (FACTORS[self.how](x) if self.how else x).to(self.value.dtype).contiguous()

    def _check(self, inputs: Sequence[Value], compared: set[float]) -> None:
        """Raise Unsupported where a sample's numbers depend on others, or on how many there are.

        That is tried on small numbers, and on some about those that they are ``compared`` with, which may be too large.
        """
        self._check_batch(example_inputs(inputs, SAMPLES + 1))
        for seed, number in enumerate([math.nan, *sorted({0.0, *compared}, key=abs, reverse=True)][:TRIALS]):
            batch = example_inputs(inputs, SAMPLES + 1 + seed % 3, seed, (number, number + 1, seed % 3))
            with suppress(IndexError, RuntimeError):
                self._check_batch(batch)

    def _check_batch(self, batch: Sequence[Tensor]) -> None:
        whole, n = self(batch), len(batch[0])
        for i in range(n):
            alone = self([one[i : i + 1] for one in batch])
            own = whole.view(n, -1, *whole.shape[1:])[i]
            if alone.shape != own.shape or not torch.allclose(alone.double(), own.double(), 1e-4, 1e-5, equal_nan=True):
                raise Unsupported(OTHER_SAMPLES)


def _kind(dtype: torch.dtype) -> torch.dtype:
    if dtype.is_floating_point:
        return torch.float32
    return torch.bool if dtype == torch.bool else torch.int64


def changes_memory(node: fx.Node) -> bool:
    """Tell whether an operation changes its first argument in place."""
    schema = getattr(node.target, "_schema", None)
    return bool(getattr(schema, "is_mutable", False)) and getattr(schema, "name", "") != "aten::detach_"


def memory_of(node: fx.Node) -> fx.Node:
    """Return the operation that gave the memory which a tensor has, or a part of which."""
    while node.op == "call_function" and node.args and isinstance(node.args[0], fx.Node):
        returns = getattr(getattr(node.target, "_schema", None), "returns", ())
        if node.target is not operator.getitem and not any(one.alias_info is not None for one in returns):
            break
        node = node.args[0]
    return node


def needed_for(node: fx.Node, before: fx.Node) -> frozenset[fx.Node]:
    """Return the operations that give what a node is where ``before`` reads it, with changes in place until then."""
    nodes = [*node.graph.nodes]
    changes = [(one, memory_of(one)) for one in nodes[: nodes.index(before)] if changes_memory(one)]
    needed, stack = {node}, [node]
    while stack:
        one = stack.pop()
        memory = memory_of(one)
        more = {*one.all_input_nodes, *(change for change, changed in changes if changed is memory)} - needed
        needed |= more
        stack += more
    return frozenset(needed)


def _compared(nodes: frozenset[fx.Node], constants: dict[str, Tensor]) -> Iterator[float]:
    """Yield the numbers that operations are given, which inputs may be compared with, and those of small constants."""
    for node in nodes:
        numbers = [x for x in arguments_of([node.args, node.kwargs]) if isinstance(x, int | float)]
        constant = constants.get(node.name)
        if isinstance(constant, Tensor) and constant.numel() <= 16:
            numbers += constant.flatten().tolist()
        yield from (float(x) for x in numbers if abs(x) < 2**40)


def _check_apart(program: Any, nodes: frozenset[fx.Node]) -> None:
    """Raise Unsupported unless all that is computed of the inputs has the samples' dimension, once: no sums over it."""
    names = {*program.graph_signature.user_inputs}
    own = {one for one in program.graph.nodes if one.op == "placeholder" and one.name in names}
    batch = set[Any]().union(*(_symbols(one.meta["val"].shape[0]) for one in own))
    for node in (one for one in program.graph.nodes if one in nodes):
        x = node.meta.get("val")
        of_inputs = own & {memory_of(one) for one in node.all_input_nodes}
        if not of_inputs or (isinstance(x, torch.SymInt) and _symbols(x) <= batch):
            continue  # a constant, or a size
        own.add(memory_of(node))
        parts = [*arguments_of(x)]
        if not all(
            isinstance(part, Tensor) and sum(bool(_symbols(d) & batch) for d in part.shape) == 1 for part in parts
        ):
            raise Unsupported(OTHER_SAMPLES)


def _symbols(size: Any) -> set[Any]:
    """Return the symbols of a size: none of a plain number."""
    return {*size.node.expr.free_symbols} if isinstance(size, torch.SymInt) else set()


def _part(program: Any, constants: dict[str, Tensor], node: fx.Node, needed: frozenset[fx.Node]) -> Callable[..., Any]:
    """Return what computes a node of an exported model, of those ``needed``, from the model's inputs, in order."""
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
