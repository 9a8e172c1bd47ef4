"""Whole training steps in the layout of the kernels."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias

import torch.nn.functional as F
from torch import Tensor, nn

from fedsieve.kernels import checks
from fedsieve.kernels.checks import Unsupported
from fedsieve.kernels.graph import Graph, ProductLayer
from fedsieve.kernels.inputs import Inputs
from fedsieve.kernels.loss import TorchLoss
from fedsieve.kernels.program import trim_memory
from fedsieve.kernels.token_ops import TokenLossOp
from fedsieve.kernels.tokens import EmbeddingLayer
from fedsieve.kernels.trace import read_graph
from fedsieve.kernels.training import TrainingStep
from fedsieve.kernels.updates import UpdateRule
from fedsieve.kernels.weights import Weights
from fedsieve.sparse.policy import norm_parameters
from fedsieve.types import Correction, Examples, InputError
from fedsieve.types.optimizers import SGD, AdamW

OptimizerState: TypeAlias = tuple[dict[ProductLayer | None, list[Tensor]], int]
"""An optimizer's moments, and the number of its steps."""


class Trainer:
    """Trains a model on frozen masks, or by the rule of its SWAT or powerpropagation layers.

    ``optimizer``: None for SGD, or ``types.optimizers``' SGD or AdamW; ``momentum`` is SGD's. ``correction``: what is
    added to gradients, which ``clip_norm`` then cuts to a norm, 0 to none.
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
        optimizer: SGD | AdamW | None = None,
        clip_norm: float = 0.0,
        correction: Correction | None = None,
    ):
        checks.model(model, mask)
        self.model, self.mask, self.batch = model, mask, checks.integer("batch", batch, 1)
        self.lr, self.momentum, self.weight_decay, self.packed = lr, momentum, weight_decay, checks.is_bf16(storage)
        self.low_memory, self.fallbacks, self.norm_weight_decay = low_memory, list[str](), norm_weight_decay
        self.loss, self.correction = loss, correction
        clip_norm = checks.norm("clip_norm", clip_norm)
        self.rule = UpdateRule.of(checks.optimizer(optimizer), momentum, clip_norm, correction)
        self._ready, self._steps, self._samples, self._products = False, 0, 0, (0.0, 0.0)
        if low_memory:
            trim_memory()  # what making the model and its mask left
        if graph:
            self._build(graph)

    def step(self, x: Examples, y: Examples) -> Tensor:
        """Train on samples [n, ...] and labels [n], or what else the loss takes; returns their mean loss.

        Models of tokens take several tensors as well, or tensors by name.
        """
        if not self._ready:
            self._build(read_graph(self.model, Inputs.of(x if isinstance(x, Mapping | tuple) else checks.samples(x))))
        tensors, y = self._checked(x, y)
        n = len(tensors[0])
        loss = self.lowered.run(self._steps, tensors, y)
        self._steps += 1
        real, dense = self.lowered.multiply_adds(n)
        self._products = (self._products[0] + real, self._products[1] + dense)
        self._samples += n
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
        norms = [memory for pair in self.lowered.group_norms.values() for memory in pair]
        norms += self.lowered.token_steps.memory
        tensors = [self.lowered.arena.memory, self.lowered.updates.sums, *self.weights.tensors, *scratch, *norms]
        return sum({t.data_ptr(): t.numel() * t.element_size() for t in tensors}.values())

    def begin(self, lr: float, momentum: float, weight_decay: float, correction: Correction | None = None) -> None:
        """Read the model's weights anew, the optimizer at rest, selections exact at the next step."""
        own = self.rule.optimizer, momentum or self.rule.momentum, self.rule.clip_norm, correction
        if UpdateRule.of(*own) != self.rule:
            if momentum and not self.rule.moments:
                raise InputError(f"momentum must be 0, as this trainer was made without, got {momentum}")
            raise InputError("correction must have a shift, or mu, where the trainer was made with it, and only there")
        self.correction = correction
        self.lr, self.momentum, self.weight_decay = lr, momentum, weight_decay
        self._steps, self._samples, self._products = 0, 0, (0.0, 0.0)
        if self._ready:
            self.lowered.set_optimizer(lr, momentum, weight_decay, correction.mu if correction else 0)
            self.weights.read()
            self.weights.rest()
            self._correct()
            self.lowered.start.run()
            if self.low_memory:
                self.weights.release()
                gc.collect()
                trim_memory()

    def state(self) -> OptimizerState:
        """Return what the optimizer remembers."""
        return self.weights.all_moments(), self.lowered.updates.done

    def set_state(self, state: OptimizerState) -> None:
        """Go on with what the optimizer of a trainer on another mask remembered: what was off it is at rest."""
        moments, self.lowered.updates.done = state
        self.weights.set_all_moments(moments)

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
        self.fallbacks = graph.fallbacks
        self.weights = Weights(graph, self.mask, self.rule.moments, self.rule.apart)
        for name in self.mask.keys() - self.weights.names:
            raise Unsupported(f"the mask of {name}, which no sparse layer has")
        self.mask = {}
        norms = [] if self.norm_weight_decay else norm_parameters(self.model)
        how = self.packed, self.low_memory, self.loss, self.rule, norms
        self.lowered = TrainingStep(graph, self.weights, self.batch, *how)
        self._ready = True
        self.begin(self.lr, self.momentum, self.weight_decay, self.correction)

    def _correct(self) -> None:
        """Take over what is added to the gradients of the training that begins."""
        if self.rule.proximal:
            for storage in self.weights.storages:
                assert storage.start is not None
                storage.start.copy_(storage.trained)
        if self.rule.shifted and self.correction:
            shift = self.correction.shift
            named = [(name, w) for name, w in self.model.named_parameters() if name in shift]
            own = {id(w): checks.floats(f"the shift of {name}", shift[name], *w.shape) for name, w in named}
            self.weights.put("shift", own)

    def _checked(self, batch: Examples, y: Examples) -> tuple[list[Tensor], Examples]:
        graph = self.lowered.graph
        given = zip(graph.input_names, graph.inputs, graph.tensors(batch), strict=True)
        x = [checks.tensor(name, one, value.dtype, None, *value.sizes) for name, value, one in given]
        n = checks.integer("the number of samples", len(x[0]), 1, self.batch)
        for name, one in zip(graph.input_names, x, strict=True):
            checks.tensor(name, one, one.dtype, n, *one.shape[1:])
        for layer in graph.layers:
            if isinstance(layer, EmbeddingLayer) and layer.of in graph.inputs:
                checks.between(graph.name_of(layer.of), x[graph.inputs.index(layer.of)], len(layer.module.weight))
        if any(n * norm.output.height * norm.output.width == 1 for norm in self.weights.norms):
            raise InputError("BatchNorm needs more than one value a channel: the batch has one sample")
        if isinstance(self.lowered.loss, TorchLoss):
            return x, y
        if isinstance(self.lowered.loss, TokenLossOp):
            sizes = graph.token_output.shape[:-1]
            return x, checks.labels("y", y, n, *sizes, classes=graph.output.channels, ignored=self.lowered.loss.ignored)
        return x, checks.labels("y", y, n, classes=graph.output.channels)
