"""What is minimised: the losses of classification, segmentation, language models, regression and several labels.

A loss is a function of a model's output for a batch, and the targets, to a tensor of one number, the mean over the
batch; those here are PyTorch's, applied to the output's logits. What else a user gives as one is called as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, ClassVar, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from fedsieve.client.metrics import Metric, absolute_error, correct, label_correct, squared_error, token_loss
from fedsieve.types import InputError, logits_of
from fedsieve.types.errors import check_interval


@dataclass(frozen=True)
class CrossEntropy:
    """Softmax cross-entropy of logits [n, classes, ...] with int64 targets [n, ...]: classification, segmentation."""

    of_logits: ClassVar = True
    """It takes nothing else of an output."""
    weight: tuple[float, ...] = ()
    """The weight of every class; empty: all alike."""
    label_smoothing: float = 0.0
    """The share of the target that is spread evenly over all classes."""
    ignore_index: int = -100
    """The target of what does not count."""

    def __post_init__(self) -> None:
        check_interval("task.loss.label_smoothing", self.label_smoothing, "[0, 1)")
        object.__setattr__(self, "weight", _numbers(self.weight))
        good = all(isinstance(w, int | float) and 0 <= w < float("inf") for w in self.weight)
        if not good or not any(self.weight or (1,)):
            what = "numbers of 0 or more, one a class, not all 0"
            raise InputError(f"task.loss.weight must be {what}, got {self.weight}")

    def __call__(self, output: Any, target: Tensor) -> Tensor:
        """Return the mean over the targets that count; 0 where none does."""
        logits = logits_of(output)
        weight = _constant(self.weight, logits.device) if self.weight else None
        return _cross_entropy(logits, target, self.ignore_index, weight, self.label_smoothing)

    @property
    def metrics(self) -> Mapping[str, Metric]:
        """What tells how good the model is: the share of targets that have the largest logit."""
        return {"accuracy": Metric(partial(correct, ignore_index=self.ignore_index))}


@dataclass(frozen=True)
class NextToken:
    """Cross-entropy of logits [n, T, vocabulary] with the int64 numbers of the tokens that follow [n, T]."""

    of_logits: ClassVar = True
    """It takes nothing else of an output."""
    ignore_index: int = -100
    """The target of what does not count: padding."""

    def __call__(self, output: Any, target: Tensor) -> Tensor:
        """Return the mean over all tokens that count; 0 where none does."""
        logits = logits_of(output)
        return _cross_entropy(logits.reshape(-1, logits.shape[-1]), target.reshape(-1), self.ignore_index)

    @property
    def ignored_token(self) -> int | None:
        """The target that does not count, for the kernels, which compute this loss alone; None of a class of it."""
        return self.ignore_index if type(self) is NextToken else None

    @property
    def metrics(self) -> Mapping[str, Metric]:
        """The perplexity, and the share of tokens that have the largest logit."""
        return {
            "perplexity": Metric(partial(token_loss, ignore_index=self.ignore_index), False, "exp"),
            "accuracy": Metric(partial(correct, ignore_index=self.ignore_index)),
        }


@dataclass(frozen=True)
class BinaryCrossEntropy:
    """Binary cross-entropy of logits [n, labels] with targets 0 or 1 (or between), shaped alike: several labels."""

    of_logits: ClassVar = True
    """It takes nothing else of an output."""
    pos_weight: tuple[float, ...] = ()
    """The weight of each label's ones; empty: that of its zeros."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "pos_weight", _numbers(self.pos_weight))
        if not all(isinstance(w, int | float) and 0 < w < float("inf") for w in self.pos_weight):
            raise InputError(f"task.loss.pos_weight must be positive numbers, one a label, got {self.pos_weight}")

    def __call__(self, output: Any, target: Tensor) -> Tensor:
        """Return the mean over examples and labels."""
        logits = logits_of(output)
        weight = _constant(self.pos_weight, logits.device) if self.pos_weight else None
        return F.binary_cross_entropy_with_logits(_shaped(logits, target), target.to(logits), pos_weight=weight)

    @property
    def metrics(self) -> Mapping[str, Metric]:
        """The share of labels that are on the right side of 0."""
        return {"label_accuracy": Metric(label_correct)}


@dataclass(frozen=True)
class Regression:
    """The squared, absolute or Huber's error of predictions and targets, float32, shaped alike."""

    of_logits: ClassVar = True
    """It takes nothing else of an output."""
    kind: Literal["squared", "absolute", "huber"] = "squared"
    """Which error."""
    delta: float = 1.0
    """Where Huber's error turns from squared to absolute."""

    def __post_init__(self) -> None:
        if self.kind not in ("squared", "absolute", "huber"):
            raise InputError(f"task.loss.kind must be squared, absolute or huber, got {self.kind!r}")
        if not 0 < self.delta < float("inf"):
            raise InputError(f"task.loss.delta must be positive, got {self.delta}")

    def __call__(self, output: Any, target: Tensor) -> Tensor:
        """Return the mean over all numbers."""
        y = logits_of(output)
        y, target = _shaped(y, target), target.to(y)
        if self.kind == "huber":
            return F.huber_loss(y, target, delta=self.delta)
        return F.mse_loss(y, target) if self.kind == "squared" else F.l1_loss(y, target)

    @property
    def metrics(self) -> Mapping[str, Metric]:
        """The mean squared and the mean absolute error."""
        return {
            "mse": Metric(squared_error, higher_is_better=False),
            "mae": Metric(absolute_error, higher_is_better=False),
        }


def _numbers(values: Any) -> tuple[Any, ...]:
    """Return weights, also of a tensor, an array or None, as a tuple; their numbers are not looked at."""
    values = getattr(values, "tolist", lambda: values)()
    return () if values is None else tuple(values) if isinstance(values, Iterable) else (values,)


def _cross_entropy(
    logits: Tensor, target: Tensor, ignored: int, weight: Tensor | None = None, smoothing: float = 0.0
) -> Tensor:
    """Return PyTorch's cross-entropy, of a batch in which nothing counts 0, where PyTorch gives NaN."""
    total = F.cross_entropy(logits, target, weight, ignore_index=ignored, label_smoothing=smoothing, reduction="sum")
    counts = target != ignored
    each = counts.float() if weight is None else weight[target.where(counts, 0)] * counts
    return total / each.sum().clamp(min=1e-12)


@lru_cache(maxsize=16)
def _constant(values: tuple[float, ...], where: torch.device) -> Tensor:
    """Return numbers as a tensor, which lies on a device from the first time on: a captured step copies nothing."""
    return torch.tensor(values, device=where)


def _shaped(output: Tensor, target: Tensor) -> Tensor:
    """Return outputs [n, 1] as targets [n] are. Raises InputError unless both are then shaped alike."""
    if output.shape == (*target.shape, 1):
        output = output.squeeze(-1)
    if output.shape != target.shape:
        raise InputError(
            f"the model answers {list(output.shape)} for targets of shape {list(target.shape)}: they must be alike"
        )
    return output


Loss: TypeAlias = CrossEntropy | NextToken | BinaryCrossEntropy | Regression | Callable[[Any, Any], Tensor]
"""One of those here, or a function of a model's output and targets."""


def metrics_of(loss: Loss, own: Mapping[str, Any]) -> dict[str, Metric]:
    """Return the metrics of a task, the first of which counts: the user's ``own``, or those of the loss.

    Of a loss that is a function, and nothing else, it is the loss.
    """
    if own:
        return {name: Metric.of(metric) for name, metric in own.items()}
    if isinstance(loss, CrossEntropy | NextToken | BinaryCrossEntropy | Regression):
        return dict(loss.metrics)
    return {"test_loss": Metric(loss, higher_is_better=False)}
