"""Tasks other than classification, with any optimizer: against plain PyTorch, and the same on all engines."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engines import pickled
from fedsieve import Data, Dataset, InputError, Run, Task, local, open_run, rounds
from fedsieve.engine import cohort
from fedsieve.methods import FLASH, NST, PDST, FedAvg, SparseFedPP, TopK, ZeroFL
from fedsieve.runs.execution import Execution
from fedsieve.runs.record import read_rows
from fedsieve.runs.recorder import record_run
from fedsieve.types import apply_model, map_examples
from fedsieve.types.optimizers import SGD, AdamW
from tasks import TASKS, plain_loss, task_run
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
