"""Whole training steps in the layout of the kernels."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fedsieve.kernels.graph import Graph, read
from fedsieve.kernels.plan import Plan
from fedsieve.kernels.program import Loss, Pack, Program, Sgd, at
from fedsieve.kernels.weights import Weights


class Trainer:
    """Trains a model on frozen masks: stochastic gradient descent on cross-entropy."""

    def __init__(
        self,
        model: nn.Module,
        mask: Mapping[str, Tensor],
        batch: int,
        *,
        lr: float,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        storage: str = "fp32",
        graph: Graph | None = None,
    ):
        self.model, self.mask, self.batch = model, mask, batch
        self.lr, self.momentum, self.weight_decay, self.packed = lr, momentum, weight_decay, storage == "bf16"
        self._ready = False
        if graph:
            self._build(graph)

    def begin(self, lr: float, momentum: float = 0.0, weight_decay: float = 0.0) -> None:
        """Start anew, at rest, with the model's weights of now; momentum stays none where it was none."""
        self.lr, self.momentum, self.weight_decay = lr, momentum, weight_decay
        if self._ready:
            for op in self.rated:
                op.rate, op.momentum, op.decay = lr, momentum, weight_decay
            if self.weights.velocity is not None:
                self.weights.velocity.zero_()
            self.read_()

    def read_(self) -> None:
        """Take the model's weights, and go on."""
        if self._ready:
            self.weights.read()
            self.start.run()

    def follow_(self, other: Trainer) -> None:
        """Take over the momentum of another trainer of this model, where both have a weight."""
        self.weights.follow(other.weights)

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        """Train on samples [n, ...] and labels [n]; returns their mean loss."""
        if not self._ready:
            self._build(read(self.model, tuple(x.shape[1:])))
        n = len(x)
        x = x.float().contiguous()
        y = y.contiguous()
        for op in self.plan.sized:
            (op.of if hasattr(op, "of") else op).samples = n
        self.pack.plain, self.loss.label = x.data_ptr(), y.data_ptr()
        self.program.run()
        return self.result.clone()

    def write_(self) -> None:
        """Give the trained weights back to the model."""
        self.weights.write()

    def _build(self, graph: Graph) -> None:
        self.weights = weights = Weights(graph, self.model, self.mask, self.momentum)
        self.plan = plan = Plan(graph, weights, self.batch, self.packed)
        self.result = torch.zeros(())
        first = plan.act[graph.input] = plan.room(graph.input, plan.halo(graph.input))
        plan.arena.step(lambda: self._pack(plan, first), first)
        plan.forward()
        logits = plan.act[graph.output]
        g = plan.grad[graph.output] = plan.room(graph.output, plan.gradient_halo(graph.output))
        plan.arena.step(lambda: self._loss(plan, logits, g), logits, g)
        plan.backward()
        self.program = plan.arena.settle()
        self.program.steps += weights.update(self.lr, self.momentum, self.weight_decay)
        self.rated = [op for op in self.program.steps if isinstance(op, Sgd)]
        self.start = Program([weights.transpose()])
        self.start.run()
        self._ready = True

    def _pack(self, plan: Plan, room: object) -> Pack:
        self.pack = Pack(map=plan.arena.map(room), unpack=0)  # type: ignore[arg-type]
        return plan._sized(self.pack)  # type: ignore[no-any-return]

    def _loss(self, plan: Plan, logits: object, g: object) -> Loss:
        self.loss = Loss(logits=plan.arena.map(logits), grad=plan.arena.map(g), loss=at(self.result))  # type: ignore[arg-type]
        return plan._sized(self.loss)  # type: ignore[no-any-return]
