"""Small tasks of every kind, each learnt in a few rounds: inputs and targets of several tensors among them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedsieve import Data, Dataset, Method, Run, Task
from fedsieve.client.losses import BinaryCrossEntropy, CrossEntropy, NextToken, Regression
from fedsieve.client.metrics import Metric
from fedsieve.types import logits_of


def dataset(x: Any, y: Any, classes: Any = ()) -> Dataset:
    """Return a dataset that tests on a third of the examples."""
    data = Data(x, y)
    n = len(data) * 2 // 3
    return Dataset("own", data.subset(torch.arange(n)), data.subset(torch.arange(n, len(data))), classes)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


X, Y = torch.randn(60, 4, generator=generator()), torch.arange(60) % 2
GOOD = Dataset("good", Data(X, Y), Data(X, Y), 2)
"""Two classes of four numbers, with nothing amiss: what tests of refusals change one thing of."""


def small() -> nn.Module:
    """Return a network for it."""
    return nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 2))


def numbers() -> Dataset:
    """A plane with noise, float32 targets [n]."""
    x = torch.randn(180, 5, generator=generator())
    return dataset(x, x @ torch.tensor([1.0, -2.0, 0.5, 0.0, 1.0]) + 0.3)


def labels() -> Dataset:
    """Three labels, each of one direction."""
    x = torch.randn(180, 5, generator=generator())
    return dataset(x, (x[:, :3] + 0.2 * x[:, 3:4] > 0).float(), 3)


def maps() -> Dataset:
    """A class for every pixel, int64 [n, 6, 6]: whether it is bright; a border that does not count."""
    x = torch.randn(120, 2, 6, 6, generator=generator())
    y = (x[:, 0] > 0).long()
    y[:, 0] = 255
    return dataset(x, y, 2)


def text() -> Dataset:
    """Tokens that count up, mostly, and those that follow."""
    steps = (torch.rand(90, 9, generator=generator()) < 0.9).long()
    tokens = (torch.randint(7, (90, 1), generator=generator()) + steps.cumsum(1)) % 7
    return dataset(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), 7)


def columns() -> Dataset:
    """A category and some numbers, by name; targets of two tensors, one of which is regressed."""
    kind = torch.randint(4, (180,), generator=generator())
    x = torch.randn(180, 3, generator=generator())
    return dataset({"x": x, "kind": kind}, {"value": x.sum(1) + kind, "weight": torch.rand(180, generator=generator())})


class Maps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 8, 3, padding=1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.b(self.a(x).relu())}


@dataclass
class Answer:
    hidden: Tensor
    logits: Tensor


class Text(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.a, self.b = nn.Embedding(7, 8), nn.Linear(8, 16), nn.Linear(16, 7)

    def forward(self, tokens: Tensor) -> Answer:
        h = self.a(self.embedding(tokens)).relu()
        return Answer(h, self.b(h))


class Columns(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kinds, self.a, self.b = nn.Embedding(4, 3), nn.Linear(6, 16), nn.Linear(16, 1)

    def forward(self, kind: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.cat([self.kinds(kind), x], 1)
        return self.b(self.a(h).relu()).squeeze(1), h


def weighted(output: tuple[Tensor, Tensor], target: dict[str, Tensor]) -> Tensor:
    """A loss of a user's own: squares with weights, and a little of what goes in."""
    return (target["weight"] * (output[0] - target["value"]) ** 2).mean() + 1e-3 * output[1].square().mean()


def off_by(output: tuple[Tensor, Tensor], target: dict[str, Tensor]) -> Tensor:
    return (output[0] - target["value"]).abs()


def perceptron(outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, outputs))


TASKS: dict[str, tuple[Callable[[], Dataset], Callable[[], nn.Module], dict[str, Any]]] = {
    "regression": (numbers, partial(perceptron, 1), {"loss": Regression()}),
    "labels": (labels, partial(perceptron, 3), {"loss": BinaryCrossEntropy(pos_weight=(1.0, 2.0, 1.0))}),
    "segmentation": (maps, Maps, {"loss": CrossEntropy(weight=(1.0, 1.5), label_smoothing=0.1, ignore_index=255)}),
    "next token": (text, Text, {"loss": NextToken()}),
    "columns": (columns, Columns, {"loss": weighted, "metrics": {"off_by": Metric(off_by, higher_is_better=False)}}),
}
"""By name: data, model, and the settings of ``Task``."""


def task_run(name: str, method: Method[Any], **changes: Any) -> Run:
    """Six clients, three a round, which hold out a tenth."""
    data, model, settings = TASKS[name]
    own = changes.pop("task", {})
    task = Task(model, data, 6, "iid", 0.1, **(settings | own))
    return Run(method, task, **({"rounds": 3, "per_round": 3, "batch": 8, "lr": 0.1, "lr_end": 0.05} | changes))


def plain_loss(name: str) -> Callable[[Any, Any], Tensor]:
    """Return a task's loss, written down again with PyTorch's functions."""
    one, two = torch.tensor([1.0, 2.0, 1.0]), torch.tensor([1.0, 1.5])
    return {
        "regression": lambda output, y: F.mse_loss(output[:, 0], y),
        "labels": lambda output, y: F.binary_cross_entropy_with_logits(output, y, pos_weight=one),
        "segmentation": lambda output, y: F.cross_entropy(
            output["logits"], y, two, ignore_index=255, label_smoothing=0.1
        ),
        "next token": lambda output, y: F.cross_entropy(output.logits.transpose(1, 2), y),
        "columns": weighted,
    }[name]


def nothing(output: Any, target: Any) -> Tensor:
    """Return no number at all, of which the mean is NaN."""
    return logits_of(output).new_zeros(0)


class RSquared:
    """A metric as torchmetrics has them."""

    higher_is_better = True

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.y, self.output = list[Tensor](), list[Tensor]()

    def update(self, output: Tensor, target: Tensor) -> None:
        self.output.append(output[:, 0])
        self.y.append(target)

    def compute(self) -> Tensor:
        y, output = torch.cat(self.y), torch.cat(self.output)
        return 1 - (output - y).square().sum() / (y - y.mean()).square().sum()
