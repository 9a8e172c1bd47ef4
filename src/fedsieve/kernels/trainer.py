"""Whole training steps in the layout of the kernels."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from fedsieve.kernels import checks
from fedsieve.kernels.checks import Unsupported
from fedsieve.kernels.graph import Graph
from fedsieve.kernels.loss import TorchLoss
from fedsieve.kernels.program import trim_memory
from fedsieve.kernels.trace import read_graph
from fedsieve.kernels.training import TrainingStep
from fedsieve.kernels.weights import Weights
from fedsieve.sparse.policy import norm_parameters
from fedsieve.types import Examples, InputError


class Trainer:
    """Trains a model on frozen masks, or by the rule of its SWAT or powerpropagation layers, by SGD.

    ``loss``: a function of what the model returns for a batch, and of its targets, to a tensor of one number; PyTorch
    computes it and its gradient at the outputs, unless it is ``F.cross_entropy`` itself of logits [n, classes].
    Without ``norm_weight_decay`` the parameters of norms are not decayed. ``storage`` "bf16": activations and their
    gradients are kept as bfloat16, two to a word; sums, weights and their gradients stay float32. ``low_memory``: the
    least memory, for some more time: residual sums are computed again for backward, too, and the masked layers of the
    model have no weights of their own until ``write_``.
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
        norm_weight_decay: bool = True,
        storage: Literal["fp32", "bf16"] = "fp32",
        low_memory: bool = False,
        graph: Graph | None = None,
        loss: Callable[[Any, Any], Tensor] = F.cross_entropy,
    ):
        checks.model(model, mask)
        self.model, self.mask, self.batch = model, mask, checks.integer("batch", batch, 1)
        self.lr, self.momentum, self.weight_decay, self.packed = lr, momentum, weight_decay, checks.is_bf16(storage)
        self.low_memory, self.fallbacks, self.norm_weight_decay = low_memory, list[str](), norm_weight_decay
        self.loss = loss
        self._ready, self._steps, self._samples, self._products = False, 0, 0, (0.0, 0.0)
        self._shape: tuple[int, ...] = ()
        if low_memory:
            trim_memory()  # what making the model and its mask left
        if graph:
            self._build(graph)

    def step(self, x: Tensor, y: Examples) -> Tensor:
        """Train on samples [n, ...] and labels [n], or what else the loss takes; returns their mean loss."""
        if not self._ready:
            self._build(read_graph(self.model, tuple(checks.samples(x).shape[1:])))
        x, y = self._checked(x, y)
        loss = self.lowered.run(self._steps, x, y)
        self._steps += 1
        real, dense = self.lowered.multiply_adds(len(x))
        self._products = (self._products[0] + real, self._products[1] + dense)
        self._samples += len(x)
        return loss

    @property
    def multiply_adds(self) -> tuple[float, float]:
        """Those of a full batch's step: at the real densities since ``begin``, and were all dense."""
        batches = self._samples / self.batch
        return self._products[0] / batches, self._products[1] / batches

    @property
    def bytes(self) -> int:
        """What the trainer holds: activations, indices, weights and scratch."""
        scratch = [value for value in vars(self.lowered.scratch).values() if isinstance(value, Tensor)]
        tensors = [self.lowered.arena.memory, *self.weights.tensors, *scratch]
        return sum({t.data_ptr(): t.numel() * t.element_size() for t in tensors}.values())

    def begin(self, lr: float, momentum: float, weight_decay: float) -> None:
        """Read the model's weights anew, momentum at rest, selections exact at the next step."""
        if momentum and not self.momentum:
            raise InputError(f"momentum must be 0, as this trainer was made without, got {momentum}")
        self.lr, self.momentum, self.weight_decay = lr, momentum, weight_decay
        self._steps, self._samples, self._products = 0, 0, (0.0, 0.0)
        if self._ready:
            self.lowered.set_optimizer(lr, momentum, weight_decay)
            self.weights.read()
            self.weights.rest()
            self.lowered.start.run()
            if self.low_memory:
                self.weights.release()
                gc.collect()
                trim_memory()

    def read_(self) -> None:
        """Take the model's weights, and go on as if they had been there."""
        if self._ready:
            self.weights.read(self._steps)
            self.lowered.start.run()

    def write_(self) -> None:
        """Copy the trained weights into the model."""
        if self._ready:
            self.weights.write(self._steps)

    def _build(self, graph: Graph) -> None:
        self._shape = graph.input.sizes
        self.fallbacks = graph.fallbacks
        self.weights = Weights(graph, self.mask, self.momentum)
        for name in self.mask.keys() - self.weights.names:
            raise Unsupported(f"the mask of {name}, which no sparse layer has")
        self.mask = {}
        norms = [] if self.norm_weight_decay else norm_parameters(self.model)
        self.lowered = TrainingStep(graph, self.weights, self.batch, self.packed, self.low_memory, norms, self.loss)
        self._ready = True
        self.begin(self.lr, self.momentum, self.weight_decay)

    def _checked(self, x: Tensor, y: Examples) -> tuple[Tensor, Examples]:
        x = checks.floats("x", x, None, *self._shape)
        n = checks.integer("the number of samples", len(x), 1, self.batch)
        if any(n * norm.output.height * norm.output.width == 1 for norm in self.weights.norms):
            raise InputError("BatchNorm needs more than one value a channel: the batch has one sample")
        if isinstance(self.lowered.loss, TorchLoss):
            return x, y
        return x, checks.labels("y", y, n, self.lowered.graph.output.channels)
