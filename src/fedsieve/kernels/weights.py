"""What is trained, as the kernels hold it: vectors of numbers, and the lists that the sparse products walk."""

from __future__ import annotations

from collections.abc import Mapping
from ctypes import pointer
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fedsieve.kernels.cuts import Cutting, give_back, zeros
from fedsieve.kernels.foreign import Call
from fedsieve.kernels.graph import Foreign, Graph, Norm, Product
from fedsieve.kernels.program import WORDS, Dot, Gather, NormBackward, Prune, Sgd, Step, Take, at, native
from fedsieve.kernels.program import Norm as NormOp
from fedsieve.sparse.layers import PowerConv2d, PowerLinear, SwatConv2d, SwatLinear, powerprop_weight
from fedsieve.sparse.topk import topk_count

if TYPE_CHECKING:
    from fedsieve.kernels.arena import Arena, Room
    from fedsieve.kernels.plan import Plan

SMALL = 8
"""The widest map whose border is worth leaving out of a 3x3 kernel's products."""


class Lists:
    """A product's entries by output channel (``row``, ``offset``, ``value``), and by input channel (``back_*``)."""

    def __init__(self, layer: Product):
        w = layer.module.weight
        self.layer, self.shape = layer, tuple(w.shape) if w.dim() == 4 else (*w.shape, 1, 1)
        self.products = layer.output.height * layer.output.width * w.numel()
        """Multiply-adds of a sample's dense forward."""
        self.fixed = 0.0
        """Those of a sample's product with what does not change from step to step, for each of its products."""
        self.row = torch.empty(self.shape[0] + 1, dtype=torch.int32)
        self.back_row = torch.empty(layer.stride**2 * self.shape[1] + 1, dtype=torch.int32)
        self.offset = self.back_offset = torch.empty(0, dtype=torch.int32)
        self.tap: Tensor | None = None
        self.back_tap: Tensor | None = None
        """Where each tap's entries begin, for 3x3 kernels on small maps."""
        self.velocity: Tensor | None = None
        """Where it is not among that of all weights."""
        self.value: int | None = None
        self.back_value: int | None = None
        """Addresses."""

    def gather(self, plan: Plan, x: Room, out: Room) -> Gather:
        """Return the forward product."""
        op = Gather(in_=plan.arena.map(x), out=plan.arena.map(out), rows=out.channels, stride_in=self.layer.stride)
        op.row, op.offset, op.value = at(self.row), at(self.offset), self.value
        op.height, op.width, op.stride_out, op.relu = out.height, out.width, 1, int(self.layer.relu)
        op.bias, op.tap = plan.weights.at(self.layer.module.bias), at(self.tap)
        return op

    def back(self, plan: Plan, g: Room, into: Room, parity: tuple[int, int], more: bool) -> Gather:
        """Return the input's gradient at the positions of one parity of the stride."""
        (top, left), s, inner = parity, self.layer.stride, self.shape[1]
        op = Gather(in_=plan.arena.map(g), out=plan.arena.map(into), rows=inner, stride_in=1, stride_out=s)
        op.row, op.offset = at(self.back_row, (top * s + left) * inner), at(self.back_offset)
        op.value, op.top, op.left, op.tap = self.back_value, top, left, at(self.back_tap)
        op.height, op.width = -(-(into.height - top) // s), -(-(into.width - left) // s)
        if more:
            op.add = plan.weights.held(plan.arena.map(into))
        return op


class Frozen(Lists):
    """A layer on a mask that stays as it is: its weights stand in the vectors from ``start`` on."""

    def __init__(self, layer: Product, mask: Tensor | None, start: int):
        super().__init__(layer)
        module, self.start = layer.module, start
        self.power = module.a if isinstance(module, PowerConv2d | PowerLinear) else 1.0
        self.prune = isinstance(module, PowerConv2d | PowerLinear) and module.prune
        if mask is None and self.power != 1:
            mask = module.weight != 0
        self.numel = module.weight.numel()
        if mask is None:
            mask = torch.ones(self.shape, dtype=torch.bool)
        self.mask = mask.detach().contiguous().view(self.shape).view(torch.uint8)
        """Needed until the lists are made."""
        self.count = int(self.mask.count_nonzero())
        self.offset, self.back_offset = (torch.empty(self.count, dtype=torch.int32) for _ in range(2))
        self.fixed = self.products * self.count / self.numel

    def index(self) -> Tensor:
        """Return the flat positions of the entries in the module's weight, int64 [entries]."""
        _, inner, k, _ = self.shape
        channel, line, shift = self.place
        c, rest = self.offset.long() // channel, self.offset.long() % channel
        tap = (rest // line - shift) * k + rest % line // WORDS - shift
        out = torch.arange(self.shape[0]).repeat_interleave(self.row.long().diff())
        return (out * inner + c) * k * k + tap

    def read(self, weights: Weights) -> None:
        """Take the module's weights, if it has any."""
        if self.layer.module.weight.stride(0) == 0:
            return
        own = slice(self.start, self.start + self.count)
        weights.w[own] = self.layer.module.weight.reshape(-1)[self.index()]
        if weights.effective is not weights.w:
            weights.effective[own] = powerprop_weight(weights.w[own], self.power)

    def write(self, weights: Weights) -> None:
        """Give them back, zero off the mask."""
        weight = self.layer.module.weight
        if weight.stride(0) == 0:
            weight.data = torch.empty(weight.shape)
        flat = weight.view(-1) if weight.is_contiguous() else torch.empty(self.numel)
        if self.count < self.numel:
            flat.zero_()
        flat[self.index()] = weights.w[self.start : self.start + self.count]
        if not weight.is_contiguous():
            weight.copy_(flat.view(self.layer.module.weight.shape))

    def momentum(self, velocity: Tensor) -> Tensor:
        """Return the weights' own velocity out of all, 0 off the mask."""
        own = velocity[self.start : self.start + self.count]
        return torch.zeros(self.numel).index_copy_(0, self.index(), own)

    def move(self, velocity: Tensor, own: Tensor) -> None:
        """Put the weights' own velocity among all."""
        velocity[self.start : self.start + self.count] = own[self.index()]

    def release(self) -> None:
        """Leave the module a weight without memory, until ``write``."""
        if self.count < self.numel:
            self.layer.module.weight.data = torch.zeros(()).expand(self.layer.module.weight.shape)

    def forward(self, plan: Plan, x: Room, out: Room) -> None:
        """Add the forward product."""
        self.place = x.channel, x.line, x.halo - self.layer.padding
        layer, (o, i, k, _) = self.layer, self.shape
        if (k, layer.stride, layer.padding) == (3, 1, 1) and x.width <= SMALL:
            self.tap, self.back_tap = (torch.empty(n * 9 + 1, dtype=torch.int32) for n in (o, i))
        native().fs_entries(at(self.mask), o, i, k, *self.place, at(self.row), at(self.offset), at(self.tap))
        self.mask = torch.empty(0, dtype=torch.uint8)
        if plan.lean:
            self.read(plan.weights)
            self.release()
            give_back()
        self.value = at(plan.weights.effective, self.start)
        plan.arena.step(lambda: self.gather(plan, x, out), x, out)

    def backward(self, plan: Plan, x: Room, g: Room) -> None:
        """Add the weights' gradient, from the largest inputs alone where the layer prunes them."""
        kept = x
        if self.prune and self.count < self.numel:
            kept = plan.room(self.layer.inputs[0], x.halo)
            plan.arena.step(lambda: self._prune(plan, x, kept), x, kept)
        grad, halves = at(plan.weights.grad, self.start), 3 * self.count < x.words
        if halves:
            plan.scratch.need(second=self.count)
        plan.arena.step(
            lambda: Dot(self.gather(plan, kept, g), grad, at(plan.scratch.second) if halves else None), kept, g
        )

    def _prune(self, plan: Plan, x: Room, kept: Room) -> Step:
        op = Prune(in_=plan.arena.map(x), out=plan.arena.map(kept))
        share, each = self.count / self.numel, x.channels * x.height * x.width
        plan.cut(Cutting(op, 1, lambda n: topk_count(max(share, 1 / (n * each)), n * each), lambda n: 0))
        return op

    def input_gradient(self, plan: Plan, g: Room) -> None:
        """Fill the lists of the input's gradient."""
        weights, layer = plan.weights, self.layer
        order = weights.order[self.start : self.start + self.count]
        index = self.index().int()
        native().fs_transposed(
            at(index), self.count, self.shape[1], layer.kernel, layer.stride, layer.padding,
            g.channel, g.line, g.halo, at(self.back_row), at(self.back_offset), at(order), at(self.back_tap),
        )  # fmt: skip
        order += self.start
        self.back_value = at(weights.back_value, self.start)


class Weights:
    """The trained numbers of a graph: ``w``, ``grad`` and ``velocity``, first all entries, then all small vectors."""

    def __init__(self, graph: Graph, model: nn.Module, mask: Mapping[str, Tensor], momentum: float = 0):
        from fedsieve.kernels.swat import Dense

        self.model, self.holds = model, list[Any]()
        self.products = [layer for layer in graph.layers if isinstance(layer, Product)]
        self.norms = [layer for layer in graph.layers if isinstance(layer, Norm) and layer.module is not None]
        self.calls = {layer: Call(layer, mask) for layer in graph.layers if isinstance(layer, Foreign)}
        self.lists: dict[Product, Frozen | Dense] = {}
        start = 0
        for layer in self.products:
            if isinstance(layer.module, SwatConv2d | SwatLinear):
                self.lists[layer] = Dense(layer, bool(momentum))
            else:
                self.lists[layer] = own = Frozen(layer, mask.get(f"{layer.name}.weight"), start)
                start += own.count
        self.sparse, self.small = start, dict[int, int]()
        for vector in self._vectors():
            self.small[id(vector)] = start
            start += vector.numel()
        self.w, self.grad = zeros(start), zeros(start)
        self.velocity = zeros(start) if momentum else None
        powers = any(isinstance(own, Frozen) and own.power != 1 for own in self.lists.values())
        self.effective = zeros(self.sparse) if powers else self.w
        self.back_value, self.order = zeros(self.sparse), zeros(self.sparse).view(torch.int32)
        self.stats = {layer: torch.zeros(4, layer.output.channels) for layer in self.norms}
        """[mean, 1 / std, running mean, running variance] of every BatchNorm."""

    @torch.no_grad()
    def read(self, steps: int = 0) -> None:
        """Take the model's weights, as they are after so many steps."""
        for own in self.lists.values():
            own.read(self)
        for vector in self._vectors():
            self.view(vector).copy_(vector)
        for call in self.calls.values():
            for name, mask in call.masks.items():
                self.view(call.parameters[name]).mul_(mask)
        for layer in self.norms:
            for i, kept in enumerate(layer.running, start=2):
                self.stats[layer][i] = kept
        self.tracked = {layer: int(layer.tracked) - steps for layer in self.norms}

    def rest(self) -> None:
        """Forget all momentum."""
        for held in (self, *self.lists.values()):
            if held.velocity is not None:
                held.velocity.zero_()

    @torch.no_grad()
    def write(self, steps: int) -> None:
        """Give the weights back to the model after so many steps: zero off the masks."""
        for own in self.lists.values():
            own.write(self)
        for vector in self._vectors():
            vector.copy_(self.view(vector))
        for layer in self.norms:
            for i, kept in enumerate(layer.running, start=2):
                kept.copy_(self.stats[layer][i])
            layer.tracked.fill_(self.tracked[layer] + steps)

    def momenta(self) -> dict[Product | None, Tensor]:
        """Return the velocity of every product's weights, and (None) of all small vectors; nothing without momentum."""
        if self.velocity is None:
            return {}
        found: dict[Product | None, Tensor] = {None: self.velocity[self.sparse :].clone()}
        return found | {layer: own.momentum(self.velocity) for layer, own in self.lists.items()}

    def move(self, momenta: Mapping[Product | None, Tensor]) -> None:
        """Take over what ``momenta`` of this graph returned, as far as the masks reach."""
        if self.velocity is not None and momenta:
            for layer, own in self.lists.items():
                own.move(self.velocity, momenta[layer])
            self.velocity[self.sparse :] = momenta[None]

    def masked(self) -> set[str]:
        """Return the names of the parameters that heed a mask."""
        frozen = {f"{layer.name}.weight" for layer, own in self.lists.items() if isinstance(own, Frozen)}
        return frozen | {f"{layer.name}.{name}" for layer, call in self.calls.items() for name in call.masks}

    def release(self) -> None:
        """Free what the masked layers of the model hold, until ``write``."""
        for own in self.lists.values():
            if isinstance(own, Frozen):
                own.release()

    def input_gradient(self, plan: Plan, layer: Product, g: Room, into: Room, more: bool) -> None:
        """Add the gradient of a product's input, for each parity of the stride."""
        own, s = self.lists[layer], layer.stride
        own.input_gradient(plan, g)
        for parity in ((top, left) for top in range(min(s, into.height)) for left in range(min(s, into.width))):
            plan.arena.step(lambda p=parity: own.back(plan, g, into, p, more), g, into)  # type: ignore[misc]

    def norm(self, arena: Arena, layer: Norm, ins: list[Room], out: Room, training: int) -> NormOp:
        """Return a Norm's forward."""
        op = NormOp(y=arena.map(ins[0]), out=arena.map(out), training=training, relu=int(layer.relu))
        if len(ins) == 2:
            op.add = self.held(arena.map(ins[1]))
        if layer.module is not None:
            stats = self.stats[layer]
            op.mean, op.invstd, op.running_mean, op.running_var = (at(stats, i * stats.shape[1]) for i in range(4))
            op.gamma, op.beta = self.at(layer.module.weight), self.at(layer.module.bias)
            op.momentum, op.eps = layer.module.momentum or 0, layer.module.eps
        return op

    def norm_backward(self, arena: Arena, layer: Norm, ins: list[Room], out: Room, g: Room, into: Room) -> NormBackward:
        """Return a Norm's backward."""
        op = NormBackward(of=self.norm(arena, layer, ins, out, 1), grad=arena.map(g), grad_y=arena.map(into))
        if layer.module is not None:
            op.grad_gamma = self.at(layer.module.weight, self.grad)
            op.grad_beta = self.at(layer.module.bias, self.grad)
        return op

    def bias_backward(self, arena: Arena, layer: Product, out: Room, g: Room) -> NormBackward:
        """Return what a bias and a ReLU behind a product do to the gradient, in place."""
        op = NormBackward(grad=arena.map(g), grad_y=arena.map(g))
        op.of = NormOp(y=arena.map(out), out=arena.map(out), training=1, relu=int(layer.relu))
        op.grad_beta = self.at(layer.module.bias, self.grad)
        return op

    def update(self, rate: float, momentum: float, decay: float) -> list[Step]:
        """Return the step of all vectors, and the copies for the next one."""
        powers = [own for own in self.lists.values() if isinstance(own, Frozen) and own.power != 1]
        cuts = sorted({0, self.sparse, self.w.numel()} | {p for o in powers for p in (o.start, o.start + o.count)})
        steps: list[Step] = []
        for start, end in pairwise(cuts):
            op = Sgd(at(self.w, start), None, at(self.grad, start), end - start, rate, momentum, decay)
            op.velocity = None if self.velocity is None else at(self.velocity, start)
            op.power = next((o.power for o in powers if o.start <= start < o.start + o.count), 1.0)
            if start < self.sparse and self.effective is not self.w:
                op.value = at(self.effective, start)
            steps.append(op)
        return [*steps, self.transpose()]

    def transpose(self) -> Take:
        """Return the copy of the entries for the input gradients."""
        return Take(at(self.effective), at(self.order), at(self.back_value), self.sparse)

    def foreign(self, plan: Plan, layer: Foreign, ins: list[Room], out: Room) -> Step:
        """Return a call of PyTorch's."""
        self.calls[layer].forward(plan, ins, out)
        return partial(self.calls[layer].run, self)

    def foreign_backward(self, plan: Plan, layer: Foreign, g: Room, into: list[Room]) -> Step:
        """Return the backward of a call of PyTorch's."""
        self.calls[layer].backward(plan, g, into)
        return partial(self.calls[layer].run_backward, self)

    def view(self, vector: Tensor, where: Tensor | None = None) -> Tensor:
        """Return a small vector in ``w`` (or ``where``), shaped as the model has it."""
        return (self.w if where is None else where)[self.small[id(vector)] :][: vector.numel()].view(vector.shape)

    def at(self, vector: Tensor | None, where: Tensor | None = None) -> int | None:
        """Return the address of a small vector in ``w`` (or ``where``)."""
        return None if vector is None else at(self.w if where is None else where, self.small[id(vector)])

    def held(self, map_: Any) -> Any:
        """Return a pointer to a map that stays alive."""
        self.holds.append(pointer(map_))
        return self.holds[-1]

    def _vectors(self) -> list[Tensor]:
        biases = [layer.module.bias for layer in self.products if layer.module.bias is not None]
        modules = [layer.module for layer in self.norms if layer.module is not None]
        foreign = [p for call in self.calls.values() for p in call.parameters.values()]
        return [*biases, *foreign, *(v for m in modules for v in (m.weight, m.bias))]
