"""What is trained, as the kernels hold it: the entries of every mask, biases, scales, in one vector; and their step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fedsieve.kernels.graph import Foreign, Graph, Norm, Product
from fedsieve.kernels.program import Dot, Gather, NormBackward, Sgd, Step, Take, at, native
from fedsieve.kernels.program import Norm as NormOp

if TYPE_CHECKING:
    from fedsieve.kernels.plan import Arena, Plan, Room


@dataclass
class Entries:
    """A layer's weights on its mask: where they stand in the vectors, and the lists that the products walk."""

    start: int
    count: int
    mask: Tensor
    """uint8 [out, in, k, k]"""
    row: Tensor
    index: Tensor
    offset: Tensor
    back_row: Tensor
    back_offset: Tensor


class Weights:
    """The trained numbers of a graph: ``w``, ``grad`` and ``velocity``, first all entries, then all small vectors."""

    def __init__(self, graph: Graph, model: nn.Module, mask: Mapping[str, Tensor], momentum: float = 0):
        self.model, self.hold = model, list[Any]()
        self.products = [layer for layer in graph.layers if isinstance(layer, Product)]
        self.norms = [layer for layer in graph.layers if isinstance(layer, Norm) and layer.module is not None]
        self.entries: dict[Product, Entries] = {}
        start = 0
        for layer in self.products:
            self.entries[layer] = e = _entries(layer, mask.get(f"{layer.name}.weight"), start)
            start += e.count
        self.sparse, self.small = start, dict[int, int]()
        for vector in self._vectors():
            self.small[id(vector)] = start
            start += vector.numel()
        self.w, self.grad = torch.zeros(start), torch.zeros(start)
        self.velocity = torch.zeros(start) if momentum else None
        self.back_value = torch.zeros(self.sparse)
        self.back_order = torch.arange(self.sparse, dtype=torch.int32)
        self.stats = {layer: torch.zeros(4, layer.output.channels) for layer in self.norms}
        """[mean, 1 / std, running mean, running variance] of every BatchNorm."""
        self.read()

    @torch.no_grad()
    def read(self) -> None:
        """Take the model's weights."""
        for layer, e in self.entries.items():
            self.w[e.start : e.start + e.count] = layer.module.weight.reshape(-1)[e.index.long()]
        for vector in self._vectors():
            at_ = self.small[id(vector)]
            self.w[at_ : at_ + vector.numel()] = vector
        for layer in self.norms:
            assert layer.module is not None
            self.stats[layer][2] = layer.module.running_mean
            self.stats[layer][3] = layer.module.running_var

    @torch.no_grad()
    def write(self) -> None:
        """Give the weights back to the model: zero off the masks."""
        for layer, e in self.entries.items():
            flat = layer.module.weight.view(-1)
            if e.count < flat.numel():
                flat.zero_()
            flat[e.index.long()] = self.w[e.start : e.start + e.count]
        for vector in self._vectors():
            at_ = self.small[id(vector)]
            vector.copy_(self.w[at_ : at_ + vector.numel()])
        for layer in self.norms:
            assert layer.module is not None
            layer.module.running_mean.copy_(self.stats[layer][2])  # type: ignore[union-attr]
            layer.module.running_var.copy_(self.stats[layer][3])  # type: ignore[union-attr]

    def follow(self, other: Weights) -> None:
        """Take over the momentum of other weights of this graph, where both have an entry."""
        if self.velocity is None or other.velocity is None:
            return
        for layer, e in self.entries.items():
            was, moving = other.entries[layer], torch.zeros(e.mask.numel())
            moving[was.index.long()] = other.velocity[was.start : was.start + was.count]
            self.velocity[e.start : e.start + e.count] = moving[e.index.long()]
        self.velocity[self.sparse :] = other.velocity[other.sparse :]

    def locate(self, layer: Product, x: Room) -> None:
        """Fill a layer's lists for an input of this room."""
        e = self.entries[layer]
        out, inner, k = e.mask.shape[0], e.mask.shape[1], layer.kernel
        native().fs_entries(
            at(e.mask), out, inner, k, x.channel, x.line, x.halo - layer.padding, at(e.row), at(e.index), at(e.offset)
        )

    def forward(self, plan: Plan, layer: Product, x: Room, out: Room) -> None:
        """Add a product's forward."""
        self.locate(layer, x)
        plan.arena.step(lambda: self._gather(plan.arena, layer, x, out), x, out)

    def backward(self, plan: Plan, layer: Product, x: Room, g: Room) -> None:
        """Add the gradient of a product's weights."""
        e = self.entries[layer]
        plan.arena.step(lambda: Dot(self._gather(plan.arena, layer, x, g), at(self.grad, e.start)), x, g)

    def input_gradient(self, plan: Plan, layer: Product, g: Room, into: Room, more: bool) -> None:
        """Add the gradient of a product's input, for each parity of the stride."""
        e, k, s = self.entries[layer], layer.kernel, layer.stride
        inner = e.mask.shape[1]
        native().fs_transposed(
            at(e.index), e.count, inner, k, s, layer.padding, g.channel, g.line, g.halo,
            at(e.back_row), at(e.back_offset), at(self.back_order, e.start),
        )  # fmt: skip
        self.back_order[e.start : e.start + e.count] += e.start

        def make(top: int, left: int) -> Gather:
            op = Gather(in_=plan.arena.map(g), out=plan.arena.map(into), rows=inner, stride_in=1, stride_out=s)
            op.row, op.offset = at(e.back_row, (top * s + left) * inner), at(e.back_offset)
            op.value, op.top, op.left = at(self.back_value, e.start), top, left
            op.height, op.width = -(-(into.height - top) // s), -(-(into.width - left) // s)
            if more:
                op.add = _held(self.hold, plan.arena.map(into))
            return op

        for top in range(s):
            for left in range(s):
                if top < into.height and left < into.width:
                    plan.arena.step(lambda t=top, l=left: make(t, l), g, into)  # type: ignore[misc]

    def norm(self, arena: Arena, layer: Norm, ins: list[Room], out: Room, training: int) -> NormOp:
        """Return a Norm's forward."""
        op = NormOp(y=arena.map(ins[0]), out=arena.map(out), training=training, relu=int(layer.relu))
        if len(ins) == 2:
            op.add = _held(self.hold, arena.map(ins[1]))
        if layer.module is not None:
            stats = self.stats[layer]
            op.mean, op.invstd, op.running_mean, op.running_var = (at(stats, i * stats.shape[1]) for i in range(4))
            op.gamma, op.beta = self._at(layer.module.weight), self._at(layer.module.bias)
            op.momentum, op.eps = layer.module.momentum or 0, layer.module.eps
        return op

    def norm_backward(
        self, arena: Arena, layer: Norm, ins: list[Room], out: Room, g: Room, into: Room
    ) -> NormBackward:
        """Return a Norm's backward."""
        op = NormBackward(of=self.norm(arena, layer, ins, out, 1), grad=arena.map(g), grad_y=arena.map(into))
        if layer.module is not None:
            op.grad_gamma = self._at(layer.module.weight, self.grad)
            op.grad_beta = self._at(layer.module.bias, self.grad)
        return op

    def bias_backward(self, arena: Arena, layer: Product, out: Room, g: Room) -> NormBackward:
        """Return what a bias and a ReLU behind a product do to the gradient, in place."""
        op = NormBackward(grad=arena.map(g), grad_y=arena.map(g))
        op.of = NormOp(y=arena.map(out), out=arena.map(out), training=1, relu=int(layer.relu))
        op.grad_beta = None if layer.module.bias is None else self._at(layer.module.bias, self.grad)
        return op

    def update(self, rate: float, momentum: float, decay: float) -> list[Step]:
        """Return the step of all weights, and the copies for the next one."""
        step = Sgd(at(self.w), at(self.velocity), at(self.grad), self.w.numel(), rate, momentum, decay, 1.0)
        return [step, self.transpose()]

    def transpose(self) -> Take:
        """Return the copy of the entries for the input gradients."""
        return Take(at(self.w), at(self.back_order), at(self.back_value), self.sparse)

    def foreign(self, plan: Plan, layer: Foreign, ins: list[Room], out: Room) -> Step:
        """Return a call of PyTorch's."""
        raise NotImplementedError

    def foreign_backward(self, plan: Plan, layer: Foreign, g: Room, into: list[Room]) -> Step:
        """Return the backward of a call of PyTorch's."""
        raise NotImplementedError

    def _gather(self, arena: Arena, layer: Product, x: Room, out: Room) -> Gather:
        e = self.entries[layer]
        op = Gather(in_=arena.map(x), out=arena.map(out), rows=out.channels, height=out.height, width=out.width)
        op.row, op.offset, op.value = at(e.row), at(e.offset), at(self.w, e.start)
        op.stride_in, op.stride_out, op.relu = layer.stride, 1, int(layer.relu)
        if layer.module.bias is not None:
            op.bias = self._at(layer.module.bias)
        return op

    def _vectors(self) -> list[nn.Parameter]:
        biases = [layer.module.bias for layer in self.products if layer.module.bias is not None]
        return biases + [v for layer in self.norms for v in (layer.module.weight, layer.module.bias)]  # type: ignore[union-attr]

    def _at(self, vector: nn.Parameter, where: Tensor | None = None) -> int | None:
        return at(self.w if where is None else where, self.small[id(vector)])


def _entries(layer: Product, mask: Tensor | None, start: int) -> Entries:
    w = layer.module.weight
    shape = tuple(w.shape) if w.dim() == 4 else (*w.shape, 1, 1)
    support = torch.ones(shape, dtype=torch.uint8) if mask is None else mask.view(shape).to(torch.uint8).contiguous()
    count = int(support.count_nonzero())
    rows = layer.stride**2 * shape[1] + 1
    empty = [torch.empty(n, dtype=torch.int32) for n in (shape[0] + 1, count, count, rows, count)]
    e = Entries(start, count, support, *empty)
    native().fs_entries(at(support), shape[0], shape[1], shape[2], 0, 0, 0, at(e.row), at(e.index), at(e.offset))
    return e


def _held(pointers: list[Any], map_: Any) -> Any:
    from ctypes import pointer

    pointers.append(pointer(map_))
    return pointers[-1]
