"""Losses, metrics and optimizers that cannot be are one line, and those that can are told apart."""

import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedsieve import Data, Dataset, InputError, Run, Task, local, open_run
from fedsieve.client.losses import BinaryCrossEntropy, CrossEntropy, Regression
from fedsieve.client.metrics import Metric
from fedsieve.engine.federation import fingerprint
from fedsieve.methods import PDST, FedAvg, TopK
from fedsieve.runs.execution import Execution
from fedsieve.runs.record import read_rows
from fedsieve.runs.recorder import record_run
from fedsieve.types.optimizers import SGD, AdamW
from tasks import RSquared, nothing, numbers, off_by, task_run
from tiny import last


def squared(output: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    return (weight * (output[:, 0] - target) ** 2).mean()


class Powered(nn.Module):
    def __init__(self, power: float):
        super().__init__()
        self.power = power

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return (output[:, 0] - target).abs().pow(self.power).mean()


def test_losses_and_metrics_of_every_kind_are_recorded_and_told_apart(tmp_path: Path) -> None:
    losses = [partial(squared, weight=torch.tensor(w)) for w in (1.0, 2.0)] + [Powered(p) for p in (1.5, 2.0)]
    runs = [task_run("regression", FedAvg(), task={"loss": loss, "metrics": {"r2": RSquared()}}) for loss in losses]
    [*record_run(tmp_path, open_run(runs[0]), local(), "own")]
    with pytest.raises(InputError, match="the model is one layer, which has no name"):
        TopK(0.5, policy="all").init(nn.Linear(6, 1), torch.Generator())
    assert all("r2" in row for row in read_rows(tmp_path))
    assert len({fingerprint(open_run(run_)) for run_ in runs}) == 4
    with pytest.raises(InputError, match=r"holds another run \(task.loss"):
        [*record_run(tmp_path, open_run(runs[1]), local(), "own", Execution(resume=True))]


def test_numbers_may_come_as_tensors_and_arrays() -> None:
    assert CrossEntropy(torch.tensor([1.0, 2.0])).weight == CrossEntropy(np.float32([1, 2])).weight == (1.0, 2.0)
    assert CrossEntropy(None).weight == ()  # type: ignore[arg-type]
    assert task_run("regression", FedAvg(), lr_schedule=lambda s: torch.tensor(0.5)).lr_at(2) == 0.05
    assert math.isnan(Metric(off_by, of_mean="sqrt").of_sum(-1.0, 2.0))
    for wrong in (lambda: Metric(off_by, of_mean="log"), lambda: CrossEntropy((0, 0))):  # type: ignore[arg-type]
        with pytest.raises(InputError, match=r"must be exp or sqrt|not all 0"):
            wrong()


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (
            {"task": {"loss": CrossEntropy()}},
            r"own: training labels have no classes: name them, Dataset\(classes=...\)",
        ),
        ({"task": {"loss": 3}}, r"task.loss must be CrossEntropy\(\), NextToken\(\), .* got 3"),
        (
            {"task": {"loss": lambda o, y: o - y[:, None]}},
            r"task.loss must give a tensor of one number, it gives a tensor",
        ),
        ({"task": {"loss": lambda o, y: 1.0}}, "task.loss must give a tensor of one number, it gives float"),
        ({"task": {"loss": lambda o, y: o.logits}}, r"task.loss does not fit own: 'Tensor' object has no"),
        (
            {"task": {"metrics": {"r 2": off_by}}},
            r"task.metrics: a name is of letters, digits and underscores, got 'r 2'",
        ),
        ({"task": {"metrics": {"a": off_by}}}, r"task.metrics\['a'\] does not fit own: "),
        ({"task": {"metrics": {"density": Metric(nothing)}}}, "task.metrics: density is the name of another column"),
        ({"task": {"metrics": [off_by]}}, "task.metrics must be functions by name"),
        (
            {"task": {"metrics": {"a": 3}}},
            r"task.metrics\['a'\] must be a function of output and targets, or have .* got 3",
        ),
        ({"task": {"metrics": {"a": off_by, "a_clients": off_by}}}, "a_clients is the name of another column"),
        (
            {"task": {"loss": BinaryCrossEntropy((1, 2))}},
            "own: training labels must be 0 or 1, or between, got",
        ),
        ({"optimizer": torch.optim.SGD([torch.zeros(1)])}, "or a function that makes one, got a finished SGD$"),
        ({"lr_schedule": lambda s: 1 / 0}, r"lr_schedule\(0\) must be a number of 0 or more, got division by zero"),
        ({"optimizer": "adam"}, r"optimizer must be SGD\(\), AdamW\(\), or a function that makes one, got 'adam'"),
        ({"optimizer": AdamW(), "momentum": 0.9}, "momentum is SGD's, of AdamW leave it out"),
        ({"optimizer": SGD(nesterov=True)}, "optimizer.nesterov needs momentum"),
        ({"lr_warmup": 3}, "lr_warmup must be from 0 to 2, rounds less 1, got 3"),
        ({"lr_schedule": "step"}, "lr_schedule must be exponential, cosine, linear or a function, got 'step'"),
        ({"clip_norm": -1.0}, r"clip_norm must be 0 \(off\) or more, got -1.0"),
    ],
)
def test_what_cannot_be_is_one_line(change: dict[str, Any], line: str) -> None:
    with pytest.raises(InputError, match=line):
        open_run(task_run("regression", FedAvg(), **change))


def test_a_loss_checks_its_settings() -> None:
    for make, line in (
        (lambda: Regression(kind="cubic"), "task.loss.kind must be squared, absolute or huber, got 'cubic'"),  # type: ignore[arg-type]
        (lambda: Regression("huber", 0.0), "task.loss.delta must be positive"),
        (lambda: CrossEntropy(label_smoothing=1.0), r"task.loss.label_smoothing must lie in \[0, 1\)"),
        (lambda: CrossEntropy(weight=(-1.0,)), "task.loss.weight must be numbers of 0 or more"),
        (lambda: BinaryCrossEntropy((0.0,)), "task.loss.pos_weight must be positive numbers"),
        (lambda: AdamW(beta1=1.0), "optimizer.beta1 must lie in"),
    ):
        with pytest.raises(InputError, match=line):
            make()  # type: ignore[no-untyped-call]


def test_a_factory_that_makes_no_optimizer_is_one_line() -> None:
    for factory, line in (
        (lambda groups, lr: 3, "gives int, which is no torch"),
        (lambda p: p, "cannot be made of"),
        (torch.optim.LBFGS, "a step of LBFGS without a closure, on the gradients alone, fails"),
        (torch.optim.SparseAdam, "a step of SparseAdam .* fails"),
    ):
        with pytest.raises(InputError, match=f"optimizer: .*{line}"):
            open_run(task_run("regression", FedAvg(), optimizer=factory))


def test_targets_that_do_not_fit_the_loss_are_one_line() -> None:
    model = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 3))
    run_ = Run(FedAvg(), Task(model, numbers, 6, loss=Regression()), 1, 3)
    with pytest.raises(InputError, match=r"answers \[2, 3\] for targets of shape \[2\]"):
        open_run(run_)
    y = torch.rand(30)
    floats = Dataset("own", Data(torch.rand(30, 5), y), Data(torch.rand(30, 5), y), 3)
    with pytest.raises(InputError, match=r"got torch.float32 .*; of a regression say task.loss=regression"):
        open_run(replace(run_, task=Task(model, floats, 6)))
    y = torch.arange(30) % 3
    whole = Dataset("own", Data(torch.rand(30, 5), y), Data(torch.rand(30, 5), y), 3)
    run_ = replace(run_, task=Task(model, whole, 6, loss=CrossEntropy((1.0, 2.0))))
    with pytest.raises(InputError, match=r"task.loss.weight has 2 numbers for the 3 classes: one each"):
        open_run(run_)


def test_a_loss_that_fails_or_is_nan_is_one_line() -> None:
    def odd(output: Tensor, target: Tensor) -> Tensor:
        if len(output) > 2:
            raise ValueError("boom\nand more")
        return output.sum() * 0

    for kernels in ("dense", "auto"):
        with pytest.raises(InputError, match=r"task.loss fails in training \(ValueError: boom\)$"):
            last(task_run("regression", PDST(density=0.3, policy="all"), task={"loss": odd}), local(kernels=kernels))
    with pytest.raises(InputError, match=r"task.loss is nan on the first examples of own, before training"):
        open_run(task_run("regression", FedAvg(), task={"loss": lambda o, y: (o.sum() * 0).log() * 0}))
