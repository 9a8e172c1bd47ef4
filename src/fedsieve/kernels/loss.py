"""Losses that the kernels do not have: computed by PyTorch, with the gradient at the outputs, between native calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fedsieve.kernels.abi import FeatureMap
from fedsieve.kernels.checks import Unsupported
from fedsieve.kernels.fallback import Passage
from fedsieve.kernels.graph import Graph
from fedsieve.kernels.products import StepContext
from fedsieve.kernels.program import Step
from fedsieve.types import Examples, compute_loss, logits_of

OTHERS = "a loss of one's own, of a model of tokens that returns more than one tensor"
"""What is computed by PyTorch alone."""


def token_ignored(loss: object, graph: Graph) -> int | None:
    """Return the label that the native cross-entropy of tokens leaves out; None where it is not the loss."""
    output = graph.token_output
    if output is None or not output.labels:
        return None
    if loss is F.cross_entropy and len(output.shape) == 1:
        return -1
    ignored: int | None = getattr(loss, "ignored_token", None)
    return ignored if len(output.shape) == 2 else None


def of_graph(loss: object, graph: Graph) -> bool:
    """Tell whether a graph has all of a model's output that a loss needs: beside other tensors, logits alone."""
    whole = graph.token_output is None or graph.token_output.only
    return whole or F.cross_entropy in (loss, getattr(loss, "func", None)) or getattr(loss, "of_logits", False)


class TorchLoss:
    """A loss in a training step: a function of what the model returns for the valid samples, and of the targets."""

    def __init__(self, step: StepContext, loss: Callable[[Any, Any], Tensor], value: Tensor):
        self.step, self.loss, self.value = step, loss, value
        if not of_graph(loss, step.graph):
            raise Unsupported(OTHERS)
        self.target: Examples = torch.empty(0)
        """The targets of the step."""

    def lower(self, outputs: Sequence[FeatureMap], grads: Sequence[FeatureMap]) -> Step:
        """Return the call that reads the graph's outputs, and writes their gradients and the loss, into ``value``."""
        values, layout = self.step.graph.outputs, self.step.graph.token_output
        self.passages = [
            (Passage(self.step, value, output, layout), Passage(self.step, value, grad, layout))
            for value, output, grad in zip(values, outputs, grads, strict=True)
        ]
        return self._run

    def _run(self) -> None:
        graph = self.step.graph
        leaves = [output.read().requires_grad_() for output, _ in self.passages]
        with torch.enable_grad():
            tensors = dict(zip(graph.outputs, (one.clone() for one in leaves), strict=True))  # which may be changed
            output: Any = tensors[graph.output]
            if graph.model_output is not None:
                output = graph.model_output.tensors(tensors)
            elif graph.token_output is not None and graph.token_output.only:
                output = graph.token_output.whole(output)
            if getattr(self.loss, "func", None) is F.cross_entropy:
                output = logits_of(output)
            loss = compute_loss(self.loss, output, self.target)
            grads = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
        self.value.copy_(loss.detach().view(()))
        for grad, (_, into) in zip(grads, self.passages, strict=True):
            into.write(grad)
