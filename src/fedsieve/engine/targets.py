"""Whether a dataset's targets, and what a model returns, are such as the task's loss and metrics take."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fedsieve.client.losses import BinaryCrossEntropy, CrossEntropy, Loss, NextToken
from fedsieve.client.metrics import Accumulator
from fedsieve.data import Dataset
from fedsieve.data.dataset import type_name
from fedsieve.data.mapped import chunks
from fedsieve.engine.federation import Federation
from fedsieve.engine.models import first_line
from fedsieve.types import Examples, InputError, logits_of


def check_targets(loss: Loss, dataset: Dataset) -> None:
    """Raise InputError unless there are examples, all finite, and their targets are such as the loss takes."""
    if (dataset.train.mean, dataset.train.std) != (dataset.test.mean, dataset.test.std):
        raise InputError(f"{dataset.name}: its training and test examples differ in mean or std: give both the same")
    for what, data in (("training", dataset.train), ("test", dataset.test)):
        if not len(data):
            raise InputError(f"{dataset.name} has no {what} example")
        labels = f"{dataset.name}: {what} labels"
        if isinstance(loss, CrossEntropy | NextToken | BinaryCrossEntropy) and not isinstance(data.y, Tensor):
            raise InputError(f"{labels} must be one tensor, they are several: give a loss of your own, task.loss")
        if isinstance(loss, CrossEntropy | NextToken) and isinstance(data.y, Tensor):
            _check_labels(labels, data.y, len(dataset.classes), loss.ignore_index)
        if isinstance(loss, BinaryCrossEntropy) and isinstance(data.y, Tensor):
            _check_truths(labels, data.y)
        floats = filter(Tensor.is_floating_point, data.tensors)
        if not all(bool(rows.isfinite().all()) for one in floats for rows in chunks(one)):
            raise InputError(f"{dataset.name}: a {what} example holds NaN or infinity: take it out")


def _check_truths(what: str, y: Tensor) -> None:
    """Raise InputError unless the targets of several labels are numbers from 0 to 1."""
    if any(bool(((rows < 0) | (rows > 1)).any()) for rows in chunks(y)):
        raise InputError(f"{what} must be 0 or 1, or between, got {float(y.min()):g} to {float(y.max()):g}")


def _check_labels(what: str, y: Tensor, classes: int, ignored: int) -> None:
    """Raise InputError unless targets are numbers of classes, or that of what is ignored."""
    if not classes:
        raise InputError(f"{what} have no classes: name them, Dataset(classes=...), or give another task.loss")
    if y.dim() == 2 and y.shape[1] == classes > 1:
        raise InputError(
            f"{what} must be one whole number for each example, they have the shape {list(y.shape)}: of a one-hot y "
            "give y.argmax(1), of probabilities a loss of your own, task.loss"
        )
    extremes = [ends.aminmax() for rows in chunks(y) if (ends := rows[rows != ignored].long()).numel()]
    low, high = min((int(one.min) for one in extremes), default=0), max((int(one.max) for one in extremes), default=0)
    if y.dtype != torch.int64 or low < 0 or high >= classes:
        regression = "; of a regression say task.loss=regression" if y.is_floating_point() else ""
        raise InputError(
            f"{what} must be int64 from 0 to {classes - 1} ({classes} classes), got {y.dtype} from {low} to {high}"
            f"{regression}{'' if y.is_floating_point() or y.dtype == torch.int64 else ': give y.long()'}"
        )


def check_loss(federation: Federation, output: object, y: Examples, fits: str) -> None:
    """Raise InputError unless loss and metrics take a model's output, for the targets ``y``, and give numbers."""
    loss, classes = federation.run.task.loss, len(federation.dataset.classes)
    if isinstance(loss, CrossEntropy | NextToken) and isinstance(y, Tensor):
        try:
            logits = logits_of(output)
        except InputError as error:
            raise InputError(f"{fits}: {error}") from None
        needed = (*y.shape, classes) if isinstance(loss, NextToken) else (len(y), classes, *y.shape[1:])
        if tuple(logits.shape) != needed:
            answers = f"{fits}: it answers {list(logits.shape)} for {len(y)} examples of {classes} classes"
            raise InputError(answers if y.dim() == 1 else f"{answers}, targets of {list(y.shape[1:])}")
        if isinstance(loss, CrossEntropy) and loss.weight and len(loss.weight) != classes:
            raise InputError(f"task.loss.weight has {len(loss.weight)} numbers for the {classes} classes: one each")
    weights = loss.pos_weight if isinstance(loss, BinaryCrossEntropy) else ()
    if isinstance(y, Tensor) and len(weights) not in (0, 1, y.shape[-1]):
        raise InputError(f"task.loss.pos_weight has {len(weights)} numbers for the {y.shape[-1]} labels: one each")
    functions: dict[str, Any] = {f"task.metrics[{n!r}]": m.function for n, m in federation.metrics.items()}
    for what, function in ({"task.loss": loss} | functions).items():
        call_ = function.update if isinstance(function, Accumulator) else function
        try:
            value: Any = call_(output, y)
        except Exception as error:
            raise InputError(f"{what} does not fit {federation.dataset.name}: {first_line(error)}") from error
        if isinstance(function, Accumulator):
            continue
        value = value[0] if isinstance(value, tuple) and what != "task.loss" else value
        if what == "task.loss" and isinstance(value, Tensor) and not value.dim() and not bool(value.isfinite()):
            raise InputError(
                f"task.loss is {float(value):.3g} on the first examples of {federation.dataset.name}, before training: "
                "see to targets and weights"
            )
        if not isinstance(value, Tensor) or (what == "task.loss" and value.dim()):
            got = f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else type_name(value)
            needs = "a tensor of one number" if what == "task.loss" else "a tensor"
            raise InputError(f"{what} must give {needs}, it gives {got}")
