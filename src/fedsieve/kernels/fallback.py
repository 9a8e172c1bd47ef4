"""Layers that the kernels do not have: run by PyTorch, with its autograd and its generator, between native calls."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedsieve.kernels.abi import FeatureMap, PackOp, address
from fedsieve.kernels.checks import Unsupported
from fedsieve.kernels.graph import FallbackLayer, Value
from fedsieve.kernels.products import StepContext
from fedsieve.kernels.program import Program, Step
from fedsieve.kernels.token_ops import TokenPackOp
from fedsieve.kernels.tokens import TokenOutput


class Fallback:
    """A layer in a training step: it sees the valid samples alone, as ordinary tensors, and the weights of the step."""

    def __init__(self, step: StepContext, layer: FallbackLayer):
        self.step, self.layer, self.parameters = step, layer, layer.parameters
        self.needs_grad = [step.graph.needs_grad[value] for value in layer.inputs]

    def forward(self, ins: Sequence[FeatureMap], out: FeatureMap) -> Step:
        """Return the forward call."""
        self.inputs = [Passage(self.step, *pair) for pair in zip(self.layer.inputs, ins, strict=True)]
        self.output = Passage(self.step, self.layer.output, out)
        return self._run

    def backward(self, g: FeatureMap, into: Sequence[FeatureMap]) -> Step:
        """Return the backward call, whose results are the gradients of the inputs that need one, in order."""
        values = [value for value, needs in zip(self.layer.inputs, self.needs_grad, strict=True) if needs]
        self.grad = Passage(self.step, self.layer.output, g)
        self.into = [Passage(self.step, *pair) for pair in zip(values, into, strict=True)]
        return self._run_backward

    def _run(self) -> None:
        x = [passage.read().requires_grad_(needs) for passage, needs in zip(self.inputs, self.needs_grad, strict=True)]
        own = {name: self.step.weights.view(p).requires_grad_() for name, p in self.parameters.items()}
        module = self.layer.module
        training = module is not None and module.training
        with torch.enable_grad():
            try:
                if module is not None:
                    module.train()
                y = self.layer([one.clone() for one in x], own)  # a copy: it may be changed in place
            finally:
                if module is not None:
                    module.train(training)
        if y.shape != self.output.shape or y.dtype != torch.float32:
            raise Unsupported(f"{self.layer.name} gives {tuple(y.shape)}, not {tuple(self.output.shape)}")
        self.output.write(y.detach())
        self.graph = (y, [one for one in x if one.requires_grad], own)

    def _run_backward(self) -> None:
        y, leaves, own = self.graph
        grads = list(torch.autograd.grad(y, [*leaves, *own.values()], self.grad.read(), materialize_grads=True))
        del self.graph
        for passage in self.into:
            passage.write(grads.pop(0))
        weights = self.step.weights
        for parameter, grad in zip(self.parameters.values(), grads, strict=True):
            mask = weights.masks.get(id(parameter))
            weights.view(parameter, weights.grad).copy_(grad if mask is None else grad * mask)


class Passage:
    """The way from a map to samples [n, ...], and back; of tokens in another ``layout`` where they have one."""

    def __init__(self, step: StepContext, value: Value, place: FeatureMap, layout: TokenOutput | None = None):
        self.sizes: tuple[int, ...] = value.sizes
        self.length = value.width
        self.op: PackOp | TokenPackOp = PackOp(map=place)
        if value.tokens:
            layout = layout or TokenOutput.plain(value)
            self.sizes = tuple(layout.shape)
            start = torch.arange(step.batch)[:, None] * torch.Size(self.sizes).numel()
            self.offsets = (start + layout.token).flatten(), layout.channel.contiguous()
            self.op = step.counted(TokenPackOp(place, None, *map(address, self.offsets)), value.width)
        else:
            step.sized_(self.op)
        self.program = Program([self.op])

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the valid samples."""
        tokens = isinstance(self.op, TokenPackOp)
        return (self.op.tokens // self.length if tokens else self.op.samples, *self.sizes)

    def read(self) -> Tensor:
        """Return what the map holds."""
        x = torch.empty(self.shape)
        self.op.plain, self.op.unpack = x.data_ptr(), 1
        self.program.run()
        return x

    def write(self, x: Tensor) -> None:
        """Fill the map."""
        x = x.contiguous()
        self.op.plain, self.op.unpack = x.data_ptr(), 0
        self.program.run()
