"""Whole training steps in the layout of the kernels."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fedsieve.kernels.graph import read
from fedsieve.kernels.plan import Plan
from fedsieve.kernels.program import Loss, Pack, Step, at
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
    ):
        self.model, self.mask, self.batch = model, mask, batch
        self.lr, self.momentum, self.weight_decay, self.packed = lr, momentum, weight_decay, storage == "bf16"
        self._ready = False

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        """Train on samples [n, ...] and labels [n]; returns their mean loss."""
        if not self._ready:
            self._build(tuple(x.shape[1:]))
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

    def _build(self, shape: tuple[int, ...]) -> None:
        graph = read(self.model, shape)
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
        start: list[Step] = [weights.transpose()]
        type(self.program)(start).run()
        self._ready = True

    def _pack(self, plan: Plan, room: object) -> Pack:
        self.pack = Pack(map=plan.arena.map(room), unpack=0)  # type: ignore[arg-type]
        return plan._sized(self.pack)  # type: ignore[no-any-return]

    def _loss(self, plan: Plan, logits: object, g: object) -> Loss:
        self.loss = Loss(logits=plan.arena.map(logits), grad=plan.arena.map(g), loss=at(self.result))  # type: ignore[arg-type]
        return plan._sized(self.loss)  # type: ignore[no-any-return]
