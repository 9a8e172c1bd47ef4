"""What tells how good a model is: means over the test examples of a function of output and target, batch by batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from fedsieve.types import InputError, logits_of

Values: TypeAlias = Callable[[Any, Any], "Tensor | tuple[Tensor, Tensor]"]
"""A function of a batch's output and targets to numbers, any shape, of which the mean over all batches is taken, also
with their weights, shaped alike; or to one number [], the batch's own mean."""


@runtime_checkable
class Accumulator(Protocol):
    """A metric that is no mean, as the package ``torchmetrics`` has them: it sees batch after batch."""

    def reset(self) -> None:
        """Forget all batches."""

    def update(self, output: Any, target: Any, /) -> None:
        """Take in a batch."""

    def compute(self) -> Any:
        """Return the metric of all batches since ``reset``."""


@dataclass(frozen=True)
class Metric:
    """A number that tells how good a model is."""

    function: Values | Accumulator
    higher_is_better: bool = True
    of_mean: Literal["", "exp", "sqrt"] = ""
    """What is applied to the mean: perplexity is exp of the mean loss of a token, RMSE the root of a mean square."""

    def __post_init__(self) -> None:
        if self.of_mean not in ("", "exp", "sqrt"):
            raise InputError(f"Metric(of_mean=...) must be exp or sqrt, or left out, got {self.of_mean!r}")

    @classmethod
    def of(cls, metric: Metric | Values | Accumulator) -> Metric:
        """Return what a user gives as a metric as one; torchmetrics' say themselves whether higher is better."""
        if isinstance(metric, Metric):
            return metric
        return cls(metric, getattr(metric, "higher_is_better", None) is not False)

    def add_up(self, output: Any, target: Any, n: int) -> Tensor:
        """Return what the values of a batch of ``n`` examples add up to, and their weights: float64 [2]."""
        assert not isinstance(self.function, Accumulator)
        result = self.function(output, target)
        values, weights = result if isinstance(result, tuple) else (result, None)
        values = values.detach().double()
        if values.dim() == 0:
            return torch.stack([values * n, torch.full_like(values, n)])
        weights = torch.ones_like(values) if weights is None else weights.double()
        return torch.stack([torch.where(weights == 0, 0.0, values * weights).sum(), weights.sum()])

    def of_sum(self, total: float, weight: float) -> float:
        """Return the metric of all batches; NaN where nothing counts, or a mean has no root."""
        if not weight:
            return math.nan
        mean = total / weight
        if self.of_mean:
            if self.of_mean == "sqrt":
                return math.sqrt(mean) if mean >= 0 else math.nan
            return math.exp(min(mean, 700.0))
        return mean


def correct(output: Any, target: Tensor, ignore_index: int = -100) -> tuple[Tensor, Tensor]:
    """Return whether each target, a class, has the largest logit, and whether it counts, as all but one number do.

    Logits are [n, classes, ...] for targets [n, ...], or [n, T, vocabulary] for tokens [n, T].
    """
    logits = logits_of(output)
    return logits.argmax(-1 if logits.shape[:-1] == target.shape else 1) == target, target != ignore_index


def token_loss(output: Any, target: Tensor, ignore_index: int = -100) -> tuple[Tensor, Tensor]:
    """Return the cross-entropy of every token, and whether it counts, as all but one number do."""
    logits, target = logits_of(output), target.reshape(-1)
    logits = logits.reshape(-1, logits.shape[-1]).float()
    return F.cross_entropy(logits, target, ignore_index=ignore_index, reduction="none"), target != ignore_index


def label_correct(output: Any, target: Tensor) -> Tensor:
    """Return whether each label's logit is on its side of 0."""
    return (logits_of(output).reshape(target.shape) > 0) == (target > 0.5)


def squared_error(output: Any, target: Tensor) -> Tensor:
    """Return the square of every error."""
    return (logits_of(output).reshape(target.shape) - target) ** 2


def absolute_error(output: Any, target: Tensor) -> Tensor:
    """Return every error, without its sign."""
    return (logits_of(output).reshape(target.shape) - target).abs()
