"""Whole training steps in the layout of the kernels."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from fedsieve.kernels import checks, library
from fedsieve.kernels.arena import Room
from fedsieve.kernels.cuts import give_back
from fedsieve.kernels.graph import Graph, Unsupported, read
from fedsieve.kernels.plan import Plan
from fedsieve.kernels.program import Loss, Pack, Program, Sgd, at
from fedsieve.kernels.weights import Weights
from fedsieve.types import InputError


class Trainer:
    """Trains a model on frozen masks, or by the rule of its SWAT or powerpropagation layers: SGD on cross-entropy.

    ``storage`` "bf16": activations and their gradients are kept as bfloat16, two to a word; sums, weights and their
    gradients stay float32. ``lean``: the least memory, for some more time: residual sums are computed again for
    backward, too, and the masked layers of the model have no weights of their own until ``write_``.
    """

    def __init__(
        self,
        model: nn.Module,
        mask: Mapping[str, Tensor],
        batch: int,
        *,
        lr: float,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        storage: Literal["fp32", "bf16"] = "fp32",
        lean: bool = False,
        graph: Graph | None = None,
    ):
        checks.model(model, mask)
        self.model, self.mask, self.batch = model, mask, checks.integer("batch", batch, 1)
        self.lr, self.momentum, self.weight_decay, self.packed = lr, momentum, weight_decay, checks.packed(storage)
        self.lean, self.foreign = lean, list[str]()
        self._ready, self._steps, self.seen, self.done = False, 0, 0, (0.0, 0.0)
        self._shape: tuple[int, ...] = ()
        if lean:
            give_back()  # what making the model and its mask left
        if graph:
            self._build(graph)

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        """Train on samples [n, ...] and labels [n]; returns their mean loss."""
        if not self._ready:
            self._build(read(self.model, tuple(checks.samples(x).shape[1:])))
        x, y = self._checked(x, y)
        self.plan.begin(self._steps, len(x), library.threads())
        self._steps += 1
        self.pack.plain, self.loss.label = x.data_ptr(), y.data_ptr()
        self.program.run()
        real, dense = self.plan.work(len(x))
        self.done = (self.done[0] + real, self.done[1] + dense)
        self.seen += len(x)
        return self.result.clone()

    @property
    def multiply_adds(self) -> tuple[float, float]:
        """Those of a full batch's step: at the real densities since ``begin``, and were all dense."""
        batches = self.seen / self.batch
        return self.done[0] / batches, self.done[1] / batches

    @property
    def bytes(self) -> int:
        """What the trainer holds: activations, lists, weights and scratch."""
        held = [self.plan.arena.memory, *_tensors(self.weights), *_tensors(self.plan.scratch)]
        held += [t for own in self.weights.lists.values() for t in _tensors(own)]
        return sum({t.data_ptr(): t.numel() * t.element_size() for t in held}.values())

    def begin(self, lr: float, momentum: float, weight_decay: float) -> None:
        """Read the model's weights anew, momentum at rest, cuts exact at the next step."""
        if momentum and not self.momentum:
            raise InputError(f"momentum must be 0, as this trainer was made without, got {momentum}")
        self.lr, self.momentum, self.weight_decay = lr, momentum, weight_decay
        self._steps, self.seen, self.done = 0, 0, (0.0, 0.0)
        if self._ready:
            for op in (*self.updates, *self.plan.wide):
                op.rate, op.momentum, op.decay = lr, momentum, weight_decay
            self.weights.read()
            self.weights.rest()
            self.start.run()
            if self.lean:
                self.weights.release()
                gc.collect()
                give_back()

    def read_(self) -> None:
        """Take the model's weights, and go on as if they had been there."""
        if self._ready:
            self.weights.read(self._steps)
            self.start.run()

    def write_(self) -> None:
        """Give the trained weights back to the model."""
        if self._ready:
            self.weights.write(self._steps)

    def _build(self, graph: Graph) -> None:
        given = graph.input
        self._shape = (given.channels,) if given.flat else (given.channels, given.height, given.width)
        self.foreign = graph.foreign
        self.weights = weights = Weights(graph, self.model, self.mask, self.momentum)
        for name in self.mask.keys() - weights.masked():
            raise Unsupported(f"the mask of {name}, which no sparse layer has")
        self.mask = {}
        self.plan = plan = Plan(graph, weights, self.batch, self.packed, self.lean)
        self.result = torch.zeros(())
        first = plan.act[graph.input] = plan.room(graph.input, plan.halo(graph.input))
        plan.arena.step(lambda: self._pack(plan, first), first)
        plan.forward()
        logits = plan.act[graph.output]
        g = plan.grad[graph.output] = plan.room(graph.output, plan.gradient_halo(graph.output))
        plan.arena.step(lambda: self._loss(plan, logits, g), logits, g)
        plan.backward()
        if self.lean:
            give_back()
        plan.scratch.make()
        self.program = plan.arena.settle()
        steps = weights.update(self.lr, self.momentum, self.weight_decay)
        self.updates = [step for step in steps if isinstance(step, Sgd)]
        self.program.steps += steps
        self.start = Program([weights.transpose()])
        self._ready = True
        self.begin(self.lr, self.momentum, self.weight_decay)

    def _checked(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        x = checks.floats("x", x, None, *self._shape)
        n = checks.integer("the number of samples", len(x), 1, self.batch)
        if any(n * norm.output.height * norm.output.width == 1 for norm in self.weights.norms):
            raise InputError("BatchNorm needs more than one value a channel: the batch has one sample")
        return x, checks.labels("y", y, n, self.plan.graph.output.channels)

    def _pack(self, plan: Plan, room: Room) -> Pack:
        self.pack = Pack(map=plan.arena.map(room), unpack=0)
        return plan.sized_(self.pack)

    def _loss(self, plan: Plan, logits: Room, g: Room) -> Loss:
        self.loss = Loss(logits=plan.arena.map(logits), grad=plan.arena.map(g), loss=at(self.result))
        return plan.sized_(self.loss)


def _tensors(thing: object) -> list[Tensor]:
    return [value for value in vars(thing).values() if isinstance(value, Tensor)]
