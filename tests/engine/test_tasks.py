"""Tasks other than classification, with any optimizer: against plain PyTorch, and the same on all engines."""

import math
import re
from dataclasses import replace
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from engines import pickled
from fedsieve import Data, Dataset, InputError, Run, Task, local, open_run, rounds
from fedsieve.client.losses import BinaryCrossEntropy, CrossEntropy, Regression, metrics_of
from fedsieve.client.metrics import Metric
from fedsieve.engine import cohort
from fedsieve.engine.federation import fingerprint
from fedsieve.engine.measures import NoNumber
from fedsieve.methods import FLASH, NST, PDST, FedAvg, SparseFedPP, TopK, ZeroFL
from fedsieve.runs.execution import Execution
from fedsieve.runs.progress import show_run
from fedsieve.runs.record import read_rows, read_summary
from fedsieve.runs.recorder import record_run, row_of
from fedsieve.runs.stopping import parse_stop_rule
from fedsieve.types import apply_model, logits_of, map_examples
from fedsieve.types.optimizers import SGD, AdamW
from tasks import TASKS, numbers, off_by, plain_loss, task_run
from tiny import assert_same, last, tiny_run

CENTRAL = {"rounds": 1, "per_round": 1, "epochs": 2, "lr": 0.05, "lr_end": 0.05}


def trained(run_: Run, optimizer: Any, clip: float = 0.0) -> tuple[dict[str, Tensor], nn.Module, Data]:
    """Return what a plain loop of PyTorch makes of the one client of a run."""
    federation = open_run(run_)
    model, device = federation.model(), federation.device(1, 0, federation.model(), "cpu", {})
    step, loss = optimizer(model.parameters()), plain_loss(next(n for n in TASKS if TASKS[n][0] is run_.task.dataset))
    model.train()
    for _ in range(run_.epochs):
        for index in torch.randperm(len(device.data), generator=device.rng).split(run_.batch):
            x, y = (map_examples(lambda one, i=index: one[i], part) for part in (device.data.x, device.data.y))
            step.zero_grad()
            loss(apply_model(model, x), y).backward()
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            step.step()
    return {name: v.detach() for name, v in model.state_dict().items()}, model.eval(), federation.dataset.test


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize(
    ("settings", "optimizer"),
    [
        ({"momentum": 0.9, "weight_decay": 0.01}, lambda p: torch.optim.SGD(p, 0.05, 0.9, weight_decay=0.01)),
        (
            {"momentum": 0.9, "optimizer": SGD(nesterov=True), "clip_norm": 0.5},
            lambda p: torch.optim.SGD(p, 0.05, 0.9, nesterov=True),
        ),
        ({"optimizer": AdamW(), "weight_decay": 0.1}, lambda p: torch.optim.AdamW(p, 0.05, weight_decay=0.1)),
        (
            {"optimizer": AdamW(0.8, 0.99, 1e-6, decoupled=False), "weight_decay": 0.1, "clip_norm": 0.3},
            lambda p: torch.optim.Adam(p, 0.05, (0.8, 0.99), 1e-6, weight_decay=0.1),
        ),
        ({"optimizer": torch.optim.RMSprop}, lambda p: torch.optim.RMSprop(p, 0.05)),
    ],
    ids=["sgd", "nesterov, clip", "adamw", "adam, clip", "rmsprop"],
)
def test_one_client_trains_as_a_plain_loop_does(name: str, settings: dict[str, Any], optimizer: Any) -> None:
    run_ = task_run(name, FedAvg(), **CENTRAL, **settings)
    run_ = replace(run_, task=replace(run_.task, clients=1))
    wanted, model, test = trained(run_, optimizer, run_.clip_norm)
    final = last(run_)
    for key, value in wanted.items():
        torch.testing.assert_close(final.model[key], value, rtol=1e-5, atol=5e-6)
    assert final.accuracy is None or name in ("segmentation", "next token")
    with torch.no_grad():
        output = apply_model(model, test.x)
    scores = {"accuracy": final.accuracy, **final.scores}
    for metric, value in plain_metrics(name, output, test.y).items():
        assert scores[metric] == pytest.approx(value, rel=1e-5)


def plain_metrics(name: str, output: Any, y: Any) -> dict[str, float]:
    if name == "regression":
        error = output[:, 0] - y
        return {"mse": float(error.square().mean()), "mae": float(error.abs().mean())}
    if name == "labels":
        return {"label_accuracy": float(((output > 0) == y.bool()).float().mean())}
    if name == "segmentation":
        return {"accuracy": float((output["logits"].argmax(1) == y)[y != 255].float().mean())}
    if name == "next token":
        return {
            "perplexity": math.exp(plain_loss(name)(output, y)),
            "accuracy": float((output.logits.argmax(2) == y).float().mean()),
        }
    return {"off_by": float((output[0] - y["value"]).abs().mean())}


METHODS = {
    "flash": FLASH(density=0.3, c_d=2, policy="all"),
    "zerofl": ZeroFL(sparsity=0.5, policy="all"),
    "pdst": PDST(density=0.3, policy="all"),
    "nst": NST(density=0.3, policy="all"),
    "topk": TopK(sparsity=0.3, policy="all"),
    "sparsefedpp": SparseFedPP(sparsity=0.5, policy="all"),
}


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize(("method", "optimizer"), [(m, o) for m in METHODS for o in (SGD(), AdamW())])
def test_all_engines_train_any_task_alike(name: str, method: str, optimizer: Any, one_thread: None) -> None:
    momentum = 0.5 if isinstance(optimizer, SGD) else 0.0
    lr = {"lr": 0.05, "lr_end": 0.02, "lr_schedule": "cosine", "clip_norm": 1.0}
    run_ = task_run(name, METHODS[method], rounds=2, momentum=momentum, optimizer=optimizer, **lr)
    first = [*rounds(run_, local())]
    for engine in (pickled(), cohort(2)):
        for a, b in zip(first, rounds(run_, engine), strict=True):
            assert_same(a, b)
            assert a.scores == b.scores
    assert not any(round_.refused for round_ in first)
    assert all(value is not None for value in first[-1].scores.values())


def test_a_mask_keeps_what_adam_remembers_on_it() -> None:
    """Adam on a frozen mask, with clipping, is Adam on the non-zeros alone: the norm is theirs."""
    run_ = tiny_run(PDST(density=0.2), optimizer=AdamW(), lr=0.02, lr_end=0.02, weight_decay=0.1, clip_norm=0.5)
    run_ = replace(run_, rounds=1, per_round=1, task=replace(run_.task, clients=1, validation=0.0), batch=40)
    federation = open_run(run_)
    state = run_.method.init(federation.model(), torch.Generator())
    final = [*rounds(federation, local(kernels="dense"))][-1]
    model, device = federation.model(), federation.device(1, 0, federation.model(), "cpu", {})
    masks = {name: v != 0 for name, v in final.model.items() if name in state.sparse}
    start = dict(federation.model().named_parameters())
    with torch.no_grad():
        for name, w in model.named_parameters():
            w.copy_(start[name] * masks.get(name, 1))
    weights = dict(model.named_parameters())
    m = {name: torch.zeros_like(w) for name, w in weights.items()}
    v = {name: torch.zeros_like(w) for name, w in weights.items()}
    for step, index in enumerate(torch.randperm(len(device.data), generator=device.rng).split(40), start=1):
        x, y = device.data.batch(index)
        model.zero_grad()
        nn.functional.cross_entropy(model.train()(x), y).backward()
        grads = {name: w.grad * masks.get(name, 1) for name, w in weights.items()}  # type: ignore[operator]
        norm = math.sqrt(sum(float(g.square().sum()) for g in grads.values()))
        for name, w in weights.items():
            g = grads[name] * min(1.0, 0.5 / norm)
            m[name] = 0.9 * m[name] + 0.1 * g
            v[name] = 0.999 * v[name] + 0.001 * g * g
            update = (m[name] / (1 - 0.9**step)) / ((v[name] / (1 - 0.999**step)).sqrt() + 1e-8)
            with torch.no_grad():
                w.copy_((w - 0.02 * 0.1 * w - 0.02 * update) * masks.get(name, 1))
    for name, w in weights.items():
        torch.testing.assert_close(final.model[name], w.detach(), rtol=1e-4, atol=1e-5)
    assert all(0 < float(mask.float().mean()) < 1 for mask in masks.values())


def test_schedules() -> None:
    run_ = tiny_run(FedAvg(), rounds=10, lr=0.1, lr_end=0.01, lr_schedule="cosine")
    wanted = [0.01 + 0.09 * (1 + math.cos(math.pi * t / 10)) / 2 for t in range(10)]
    assert [run_.lr_at(t) for t in range(1, 11)] == pytest.approx(wanted)
    assert [replace(run_, lr_schedule="linear").lr_at(t) for t in (1, 6)] == pytest.approx([0.1, 0.055])
    warm = replace(run_, lr_schedule="linear", lr_warmup=2)
    assert [warm.lr_at(t) for t in (0, 1, 2, 3, 7)] == pytest.approx([0.1, 0.1 / 3, 0.2 / 3, 0.1, 0.055])
    own = replace(run_, lr_schedule=lambda s: 1 - s / 2)
    assert [own.lr_at(t) for t in (1, 6, 11)] == pytest.approx([0.1, 0.075, 0.05])
    with pytest.raises(InputError, match=r"lr_schedule\(0\) must be a number of 0 or more, got 'x'"):
        replace(run_, lr_schedule=lambda s: "x").lr_at(1)


def test_the_clients_are_measured_each_by_itself(tmp_path: Path) -> None:
    run_ = task_run("regression", FedAvg(), rounds=2)
    run_ = replace(run_, task=replace(run_.task, clients=12, validation=0.3), per_round=4)
    federation = open_run(run_, measure=("clients",))
    *_, final = record_run(tmp_path / "a", federation, local(), "own")
    model = federation.model().eval()
    model.load_state_dict(final.model)
    errors = []
    for index in federation.held_out():
        x, y = federation.dataset.train.batch(index)
        errors.append(float((model(x)[:, 0] - y).square().mean().detach()))
    assert len(errors) == 12
    row = read_rows(tmp_path / "a")[-1]
    assert row["mse_clients"] == pytest.approx(sum(errors) / 12, rel=1e-5)
    assert row["mse_worst_tenth"] == pytest.approx(max(errors), rel=1e-5)
    assert row["mse_spread"] == pytest.approx(float(torch.tensor(errors).std(correction=0)), rel=1e-4)
    with pytest.raises(InputError, match=r"-s task\.validation=0\.1"):
        open_run(replace(run_, task=replace(run_.task, validation=0.0)), measure=("clients",))


def owned() -> Dataset:
    """The plane with noise, of six owners; of the test examples three have none, and one's owner trains nothing."""
    data = numbers()
    owners = torch.arange(len(data.test)) % 5
    owners[:4] = torch.tensor([-1, -1, -1, 7])
    return replace(data, group=torch.arange(len(data.train)) % 6, test_group=owners)


def test_the_clients_are_measured_on_their_own_test_examples() -> None:
    run_ = task_run("regression", FedAvg(), rounds=1)
    run_ = replace(run_, task=replace(run_.task, dataset=owned, partition="group", validation=0.0))
    federation = open_run(run_, measure=("clients",))
    *_, final = rounds(federation, local())
    model, test = federation.model().eval(), owned().test
    model.load_state_dict(final.model)
    errors = (model(test.x)[:, 0] - test.y).square().detach()
    each = [float(errors[owned().test_group == i].mean()) for i in range(5)]  # the sixth owner tests nothing
    assert final.scores["mse_clients"] == pytest.approx(sum(each) / 5, rel=1e-5)
    assert final.scores["mse_worst_tenth"] == pytest.approx(max(each), rel=1e-5)
    with pytest.raises(InputError, match=r"test_group must number the owner of each of the 60 test examples"):
        replace(owned(), test_group=torch.zeros(3))


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


def nothing(output: Any, target: Any) -> Tensor:
    return logits_of(output).new_zeros(0)


def test_metrics_of_ones_own_and_numbers_that_are_none() -> None:
    own = {"r2": RSquared(), "nothing": nothing, "batch_mean": lambda o, y: (o[:, 0] - y).abs().mean()}
    run_ = task_run("regression", FedAvg(), rounds=4, task={"metrics": own})
    assert not metrics_of(run_.task.loss, {"a": Metric(off_by, False)})["a"].higher_is_better
    with pytest.warns(
        NoNumber, match="the metric nothing, nothing_validation is no finite number: rows have null for it"
    ):
        final = last(run_)
    assert final.scores["r2"] > 0.2
    assert final.scores["nothing"] is None
    assert final.accuracy is None
    again = last(replace(run_, task=replace(run_.task, metrics={})))
    assert final.scores["batch_mean"] == pytest.approx(again.scores["mae"], rel=1e-5)


def test_a_run_of_any_task_goes_on_after_a_stop(tmp_path: Path) -> None:
    run_ = task_run("columns", TopK(sparsity=0.5), rounds=4, optimizer=AdamW())
    [*record_run(tmp_path / "whole", open_run(run_), local(), "own")]
    [*record_run(tmp_path / "parts", open_run(run_), local(), "own", Execution(until=2))]
    [*record_run(tmp_path / "parts", open_run(run_), local(), "own", Execution(resume=True))]
    drop = {"seconds", "cpu_seconds", "ms_per_step"}
    whole, parts = (
        [{k: v for k, v in row.items() if k not in drop} for row in read_rows(tmp_path / d)] for d in ("whole", "parts")
    )
    assert whole == parts
    with pytest.raises(InputError, match="optimizer"):
        [
            *record_run(
                tmp_path / "parts", open_run(replace(run_, optimizer=SGD())), local(), "own", Execution(resume=True)
            )
        ]


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


def test_a_metric_that_fails_in_the_middle_is_named() -> None:
    def odd(output: Tensor, target: Tensor) -> Tensor:
        if len(output) > 2:
            raise KeyError("no such thing")
        return output

    with pytest.raises(InputError, match=r"task.metrics\['odd'\] fails on test examples: 'no such thing'"):
        last(task_run("regression", FedAvg(), task={"metrics": {"odd": odd}}))


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


def test_a_run_directory_tells_a_tasks_metrics(tmp_path: Path) -> None:
    run_ = replace(task_run("regression", FedAvg(), rounds=3, evaluate_every=2))
    federation, console = open_run(run_, measure=("clients",)), Console(file=StringIO(), width=150)
    stop = Execution(until="mse<=1000")
    rows = map(row_of, record_run(tmp_path / "a", federation, local(), "own", stop))
    show_run(tmp_path / "a", federation, rows, 3, console)
    text, summary = console.file.getvalue(), read_summary(tmp_path / "a") or {}  # type: ignore[attr-defined]
    assert summary["stopped_at"] == 2
    assert summary["accuracy"] is None
    record = read_rows(tmp_path / "a")[-1]
    assert [summary[n] for n in ("mse", "mae_validation", "mse_spread")] == [
        record[n] for n in ("mse", "mae_validation", "mse_spread")
    ]
    assert f"mse {record['mse']:6.4g}" in text
    assert re.search(rf"mse +{re.escape(format(record['mse'], '.5g'))} +of the deployed model", text)
    assert f"worst tenth {record['mse_worst_tenth']:.5g}" in text
    with pytest.raises(InputError, match=r"mse_validation needs examples that are held out.*or take mse"):
        parse_stop_rule("mse_validation<=1").check(open_run(replace(run_, task=replace(run_.task, validation=0.0))))


def padded() -> Dataset:
    """Tokens that follow, of which whole examples do not count."""
    data = TASKS["next token"][0]()

    def ignored(part: Data) -> Data:
        y = part.y.clone()  # type: ignore[union-attr]
        y[::2], y[1::2, 3:] = -100, -100
        return Data(part.x, y)

    return replace(data, train=ignored(data.train), test=ignored(data.test))


@pytest.mark.parametrize("batch", [1, 8])
def test_what_does_not_count_does_not_train(batch: int) -> None:
    """Also in batches of which nothing counts, where PyTorch's mean is NaN."""
    run_ = replace(task_run("next token", FedAvg(), **CENTRAL), batch=batch)
    run_ = replace(run_, task=replace(run_.task, dataset=padded, clients=1, validation=0.0))
    federation, final = open_run(run_), last(run_)
    model, device = federation.model(), federation.device(1, 0, federation.model(), "cpu", {})
    step = torch.optim.SGD(model.parameters(), 0.05)
    for _ in range(run_.epochs):
        for index in torch.randperm(len(device.data), generator=device.rng).split(batch):
            x, y = device.data.batch(index)
            logits, counts = model(x).logits, y != -100  # type: ignore[operator]
            if counts.any():
                step.zero_grad()
                nn.functional.cross_entropy(logits[counts], y[counts]).backward()  # type: ignore[index]
                step.step()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(final.model[name], value, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        test = federation.dataset.test
        counts = test.y != -100
        right = model(test.x).logits.argmax(2) == test.y
    assert final.accuracy == pytest.approx(float(right[counts].float().mean()))  # type: ignore[index]


def test_labels_that_are_ignored_do_not_count() -> None:
    x, y = torch.randn(60, 5, generator=torch.Generator().manual_seed(0)), torch.arange(60) % 3
    y[:20] = -100
    data = Dataset("own", Data(x, y), Data(x, y), 3)
    run_ = Run(FedAvg(), Task(nn.Linear(5, 3), data, 3), 2, 3, batch=2, lr=0.1, lr_end=0.1)
    final = last(run_)
    assert not final.refused
    right = (x @ final.model["weight"].T + final.model["bias"]).argmax(1) == y
    assert final.accuracy == pytest.approx(float(right[20:].float().mean()))


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
