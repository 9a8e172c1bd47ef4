"""Layers that the kernels do not have: run by PyTorch, with its autograd and its chance, between native calls."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedsieve.kernels.graph import Foreign, Unsupported, Value
from fedsieve.kernels.program import Pack, Program

if TYPE_CHECKING:
    from fedsieve.kernels.arena import Room
    from fedsieve.kernels.plan import Plan
    from fedsieve.kernels.weights import Weights


class Call:
    """A foreign layer in a step: it sees the valid samples alone, as ordinary tensors, and the weights of the step."""

    def __init__(self, layer: Foreign, mask: Mapping[str, Tensor]):
        self.layer = layer
        self.parameters = {} if layer.module is None else dict(layer.module.named_parameters())
        named = {name: mask.get(f"{layer.name}.{name}") for name in self.parameters}
        self.masks = {name: m.clone() for name, m in named.items() if m is not None}

    def forward(self, plan: Plan, ins: list[Room], out: Room) -> None:
        """Make what the forward call needs."""
        self.given = [_Passage(plan, value, room) for value, room in zip(self.layer.inputs, ins, strict=True)]
        self.result = _Passage(plan, self.layer.output, out)
        self.moving = [plan.moving[value] for value in self.layer.inputs]

    def backward(self, plan: Plan, g: Room, into: list[Room]) -> None:
        """Make what the backward call needs."""
        values = [value for value, moving in zip(self.layer.inputs, self.moving, strict=True) if moving]
        self.grad = _Passage(plan, self.layer.output, g)
        self.into = [_Passage(plan, value, room) for value, room in zip(values, into, strict=True)]

    def run(self, weights: Weights) -> None:
        """Call the layer, in training."""
        x = [passage.out().requires_grad_(moving) for passage, moving in zip(self.given, self.moving, strict=True)]
        own = {name: weights.view(p).requires_grad_() for name, p in self.parameters.items()}
        module = self.layer.module
        training = module is not None and module.training
        with torch.enable_grad():
            try:
                if module is not None:
                    module.train()
                y = self.layer([given.clone() for given in x], own)  # a copy: it may be changed in place
            finally:
                if module is not None:
                    module.train(training)
        if y.shape != self.result.shape or y.dtype != torch.float32:
            raise Unsupported(f"{self.layer.name} gives {tuple(y.shape)}, not {tuple(self.result.shape)}")
        self.result.in_(y.detach())
        leaves = [given for given in x if given.requires_grad]
        self.graph = (y, leaves, own)

    def run_backward(self, weights: Weights) -> None:
        """Find the gradients of the layer's moving inputs, and of its parameters."""
        y, leaves, own = self.graph
        found = list(torch.autograd.grad(y, [*leaves, *own.values()], self.grad.out(), allow_unused=True))
        del self.graph
        for passage in self.into:
            passage.in_(_or_zero(found.pop(0), passage.shape))
        for (name, parameter), g in zip(self.parameters.items(), found, strict=True):
            kept = _or_zero(g, parameter.shape)
            weights.view(parameter, weights.grad).copy_(kept * self.masks[name] if name in self.masks else kept)


class _Passage:
    """The way from a map to samples [n, ...], and back."""

    def __init__(self, plan: Plan, value: Value, room: Room):
        self.each = (value.channels,) if value.flat else (value.channels, value.height, value.width)
        self.op = plan.sized_(Pack(map=plan.arena.map(room)))
        self.program = Program([self.op])

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.op.samples, *self.each)

    def out(self) -> Tensor:
        """Return what the map holds."""
        x = torch.empty(self.shape)
        self.op.plain, self.op.unpack = x.data_ptr(), 1
        self.program.run()
        return x

    def in_(self, x: Tensor) -> None:
        """Fill the map."""
        x = x.contiguous()
        self.op.plain, self.op.unpack = x.data_ptr(), 0
        self.program.run()


def _or_zero(g: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    return torch.zeros(shape) if g is None else g
