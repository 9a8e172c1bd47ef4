"""From a model's layers to a step's operations and the memory that they need.

What a step needs is known before it runs. What BatchNorm and ReLU gave is computed again for backward, not kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from fedsieve.kernels.arena import Arena, Room
from fedsieve.kernels.cuts import Cutting, Scratch
from fedsieve.kernels.graph import Flatten, Foreign, Graph, Layer, Norm, Pool, Product, Unsupported, Value
from fedsieve.kernels.program import Copy, Step, Wide, at
from fedsieve.kernels.program import Pool as PoolOp
from fedsieve.kernels.weights import Frozen, Weights

T = TypeVar("T")


class Plan:
    """The forward and backward passes of a graph, as steps of an arena."""

    def __init__(self, graph: Graph, weights: Weights, batch: int, packed: bool, lean: bool = False):
        self.graph, self.weights, self.batch, self.lean = graph, weights, batch, lean
        self.blocks = -(-batch // (32 if packed else 16))
        self.arena = Arena(packed, lean)
        self.sized: list[Any] = []
        """Operations whose field ``samples`` is the batch's."""
        self.cuts: list[Cutting] = []
        self.wide: list[Wide] = []
        self.scratch = Scratch()
        self.act: dict[Value, Room] = {}
        self.grad: dict[Value, Room] = {}
        self._again: set[Value] = set()
        self.moving = self._moving()

    def room(self, value: Value, halo: int) -> Room:
        """Return a new room for a value or its gradient."""
        room = Room(value.channels, self.blocks, value.height, value.width, halo)
        if room.words >= 2**31:
            raise Unsupported("a map of more than 2^31 words")
        return room

    def forward(self) -> None:
        """Add the forward pass; ``act`` holds every value's room."""
        for layer in self.graph.layers:
            self.act[layer.output] = self.room(layer.output, self.halo(layer.output))
            self.run(layer, self.act[layer.output])

    def run(self, layer: Layer, out: Room, again: bool = False) -> None:
        """Add a layer's forward; ``again``: as it was, for backward."""
        ins = [self.act[value] for value in layer.inputs]
        if isinstance(layer, Product):
            self.weights.lists[layer].forward(self, ins[0], out)
        elif isinstance(layer, Norm):
            self.arena.step(lambda: self.sized_(self.weights.norm(self.arena, layer, ins, out, 1 + again)), *ins, out)
        elif isinstance(layer, Pool):
            self.arena.step(lambda: self._pool(layer, ins[0], out), ins[0], out)
        elif isinstance(layer, Flatten):
            self.arena.step(lambda: self._copy(ins[0], out, 2), ins[0], out)
        elif isinstance(layer, Foreign):
            self.arena.step(lambda: self.weights.foreign(self, layer, ins, out), *ins, out)

    def backward(self) -> None:
        """Add the backward pass, from the gradient of the logits that stands in ``grad``."""
        for layer in reversed(self.graph.layers):
            g = self.grad.pop(layer.output, None)
            if g is None or not self.moving[layer.output]:
                continue
            if isinstance(layer, Product):
                self._product_backward(layer, g)
            elif isinstance(layer, Norm):
                self._norm_backward(layer, g)
            elif isinstance(layer, Pool):
                x = layer.inputs[0]
                if not layer.window.average:
                    self.recall(x)
                into, more = self._gradient(x)
                values = (into, g) if layer.window.average else (self.act[x], self.act[layer.output])
                used = (*values, g, into)
                self.arena.step(lambda r=used, p=layer, m=more: self._pool(p, *r, more=m), *used)  # type: ignore[misc]
            elif isinstance(layer, Flatten):
                self._deliver(layer.inputs[0], lambda to, g=g: self._copy(g, to, 3), g)  # type: ignore[misc]
            elif isinstance(layer, Foreign):
                self._foreign_backward(layer, g)

    def halo(self, value: Value) -> int:
        """Return the border that the value's readers need."""
        return max((u.padding for u in self.graph.users(value) if isinstance(u, Product)), default=0)

    def gradient_halo(self, value: Value) -> int:
        """Return the border that the gradient's readers need; a room may be handed on from value to value."""
        maker = self._maker(value)
        if isinstance(maker, Product) and self.moving[maker.inputs[0]]:
            return self.reach(maker)
        if isinstance(maker, Norm):
            return max(self.gradient_halo(v) for v in maker.inputs)
        return 0

    def reach(self, layer: Product) -> int:
        """Return how far beyond the border of its output a product's input gradient looks."""
        k, s, p, x, y = layer.kernel, layer.stride, layer.padding, layer.inputs[0], layer.output
        below = -min((top + p - tap) // s for top in range(s) for tap in range(k) if (top + p - tap) % s == 0)
        above = max((x.height - 1 + p) // s - (y.height - 1), (x.width - 1 + p) // s - (y.width - 1))
        return max(below, above, 0)

    def cut(self, cutting: Cutting) -> None:
        """Note an operation that selects."""
        cutting.op.cut.threshold, cutting.op.cut.found = at(cutting.threshold), at(cutting.found)
        self.cuts.append(cutting)

    def begin(self, step: int, samples: int, threads: int) -> None:
        """Set what changes from step to step: the number of samples, and which cuts are exact."""
        for op in self.sized:
            (op.of if hasattr(op, "of") else op).samples = samples
        for one in self.cuts:
            one.op.cut.count, one.op.cut.exact = one.count(samples), int(step % one.period == 0)
            if hasattr(one.op, "samples"):
                one.op.samples = samples
        if (self.cuts or self.wide) and self.scratch.grow(threads):
            for one in self.cuts:
                one.op.cut.work = at(self.scratch.work)
            for wide in self.wide:
                wide.sums = at(self.scratch.sums)

    def work(self, samples: int) -> tuple[float, float]:
        """Return the multiply-adds of the step just done, at its densities, and were all dense."""
        fixed = sum(own.fixed * (2 + self.moving[layer.inputs[0]]) for layer, own in self.weights.lists.items())
        dense = sum(own.products * (2 + self.moving[layer.inputs[0]]) for layer, own in self.weights.lists.items())
        return samples * fixed + sum(one.work(samples) for one in self.cuts), samples * dense

    def recall(self, value: Value) -> None:
        """Compute a value again that forward did not keep: BatchNorm, sum and ReLU of what is kept."""
        maker = self._maker(value)
        if (
            isinstance(maker, Norm)
            and maker.module is not None
            and len(maker.inputs) <= 1 + self.lean
            and value not in self._again
        ):
            self._first(maker.inputs[0])
            borrowed = {other for other in maker.inputs[1:] if other not in self._again}
            for other in borrowed:
                self.recall(other)
            self.act[value] = self.room(value, self.halo(value))
            self.run(maker, self.act[value], again=True)
            self._again = (self._again - borrowed) | {value}

    def _first(self, value: Value) -> None:
        """To be lean, compute the first layer's product again for its BatchNorm: it is large, and little work."""
        maker = self._maker(value)
        own = self.weights.lists[maker] if isinstance(maker, Product) else None
        given = self.graph.input
        if self.lean and isinstance(own, Frozen) and own.layer.inputs[0] is given and value not in self._again:
            x, room = self.act[given], self.room(value, self.halo(value))
            self.act[value], self._again = room, self._again | {value}
            self.arena.step(lambda: own.gather(self, x, room), x, room)

    def _maker(self, value: Value) -> Layer | None:
        return next((layer for layer in self.graph.layers if layer.output is value), None)

    def _product_backward(self, layer: Product, g: Room) -> None:
        x, out = layer.inputs[0], self.act[layer.output]
        if layer.relu or layer.module.bias is not None:
            self.arena.step(lambda: self.sized_(self.weights.bias_backward(self.arena, layer, out, g)), out, g)
        self.recall(x)
        self.weights.lists[layer].backward(self, self.act[x], g)
        if self.moving[x]:
            into, more = self._gradient(x)
            self.weights.input_gradient(self, layer, g, into, more)

    def _norm_backward(self, layer: Norm, g: Room) -> None:
        y, out = layer.inputs[0], self.act[layer.output]
        if layer.module is not None:
            self._first(y)
        ins = [self.act[v] for v in layer.inputs]

        def make(to: Room) -> Step:
            return self.sized_(self.weights.norm_backward(self.arena, layer, ins, out, g, to))

        used = [ins[0]] if layer.module is not None else []
        used += [out] if layer.relu and (len(ins) == 2 or layer.module is None) else []
        if len(ins) == 1 and y not in self.grad:
            self.arena.step(lambda: make(g), *used, g)
            self.grad[y] = g
            return
        self._deliver(y, make, g, *used)
        if len(ins) == 2 and self.moving[layer.inputs[1]]:
            other = layer.inputs[1]
            if other in self.grad:
                to = self.grad[other]
                self.arena.step(lambda: self._copy(g, to, 1), g, to)
            else:
                self.grad[other] = g

    def _foreign_backward(self, layer: Foreign, g: Room) -> None:
        moving = [v for v in layer.inputs if self.moving[v]]
        fresh = [self.room(v, 0) for v in moving]
        self.arena.step(lambda: self.weights.foreign_backward(self, layer, g, fresh), g, *fresh)
        for value, room in zip(moving, fresh, strict=True):
            self._deliver(value, lambda to, r=room: self._copy(r, to, 0), room)  # type: ignore[misc]

    def _deliver(self, value: Value, make: Callable[[Room], Step], *used: Room) -> None:
        """Add an operation that writes a gradient: into a room of its own and from there, where others wrote before."""
        if not self.moving[value]:
            unused = self.room(value, 0)
            self.arena.step(lambda: make(unused), *used, unused)
            return
        into, more = self._gradient(value)
        if not more:
            self.arena.step(lambda: make(into), *used, into)
            return
        between = self.room(value, 0)
        self.arena.step(lambda: make(between), *used, between)
        self.arena.step(lambda: self._copy(between, into, 1), between, into)

    def _gradient(self, value: Value) -> tuple[Room, bool]:
        """Return the room of a value's gradient, and whether something stands in it already."""
        if value in self.grad:
            return self.grad[value], True
        self.grad[value] = self.room(value, self.gradient_halo(value))
        return self.grad[value], False

    def _moving(self) -> dict[Value, bool]:
        """Tell which values depend on something that is trained."""
        moving = {self.graph.input: False}
        for layer in self.graph.layers:
            module = getattr(layer, "module", None)
            own = module is not None and any(True for _ in module.parameters())
            moving[layer.output] = own or any(moving[v] for v in layer.inputs)
        return moving

    def sized_(self, op: T) -> T:
        """Note an operation that is told how many samples there are."""
        self.sized.append(op)
        return op

    def _copy(self, x: Room, to: Room, mode: int) -> Copy:
        return Copy(self.arena.map(x), self.arena.map(to), mode)

    def _pool(
        self, p: Pool, x: Room, out: Room, g: Room | None = None, into: Room | None = None, more: bool = False
    ) -> PoolOp:
        w, op = p.window, PoolOp(in_=self.arena.map(x), out=self.arena.map(out))
        op.kernel, op.stride, op.padding, op.average = w.kernel, w.stride, w.padding, w.average
        op.backward, op.accumulate = int(g is not None), int(more)
        if g is not None and into is not None:
            op.grad_out, op.grad_in = self.arena.map(g), self.arena.map(into)
        return op
