"""What cannot be as data, partition, setting or method is one line before anything runs."""

import math
from collections.abc import Callable
from dataclasses import make_dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fedsieve import Data, Method, Run, Task, local, open_run, rounds
from fedsieve.engine.federation import described
from fedsieve.methods import FLASH, FedAvg, TopK, ZeroFL
from fedsieve.recipes import apply_settings
from fedsieve.runs.execution import Execution
from fedsieve.runs.recorder import manifest_of
from fedsieve.types import InputError
from refusals import refused
from tasks import GOOD, X, Y, small
from tiny import TinyNet, blobs, last, tiny_run


def failing() -> Any:
    raise ValueError("no weights")


def data(**changes: Any) -> Callable[[], object]:
    return lambda: open_run(Run(FedAvg(), Task(small, replace(GOOD, **changes), 4), rounds=1, per_round=2))


def labels(y: Any) -> Callable[[], object]:
    return lambda: data(train=Data(X, y))()


def owner(**changes: Any) -> Callable[[], object]:
    return lambda: open_run(Run(FedAvg(), Task(**{"model": small, "dataset": GOOD, "clients": 4} | changes), 1, 2))


def dealt(*shards: Any) -> Callable[[], object]:
    return owner(clients=2, partition=[*shards])


def settings(**changes: Any) -> Callable[[], object]:
    some = {"method": FedAvg(), "task": Task(small, GOOD, 4), "rounds": 1, "per_round": 2}
    return lambda: open_run(Run(**some | changes))  # type: ignore[arg-type]


def own(bases: tuple[type, ...] = (FedAvg,), **parts: Any) -> Any:
    return make_dataclass("Own", [("thing", object, None)], bases=bases, namespace=parts, frozen=True)()


def trained(method: Any) -> Callable[[], object]:
    return lambda: last(Run(method, Task(small, GOOD, 4), 1, 2))


def written(method: Any) -> Callable[[], object]:
    return lambda: manifest_of(open_run(Run(method, Task(small, GOOD, 4), 1, 2)), "mine", Execution(), {})


IDS = torch.arange(30)
WRONG: dict[str, tuple[Callable[[], object], str]] = {
    "one-hot": (labels(torch.eye(2)[Y]), r"have the shape \[60, 2\]: of a one-hot y give y.argmax\(1\)"),
    "float labels": (labels(Y.float()), "labels must be int64 from 0 to 1 .*got torch.float32"),
    "NaN labels": (labels(Y / 0), "got torch.float32"),
    "negative": (labels(Y - 1), "labels must be int64 .* from -1 to 0"),
    "too short": (labels(Y[:-1]), "60 examples but 59 labels"),
    "inputs of nothing": (lambda: Data({}, [0, 1]), "^data: x is empty: give a tensor, or several in a tuple"),
    "a list of inputs": (lambda: Data([torch.ones(2, 3)] * 2, [0, 1]), "x is a list of tensors: torch.stack "),  # type: ignore[arg-type]
    "ragged": (lambda: Data([[1.0], [1.0, 2.0]], [0, 1]), "x must be a tensor, an array or a list of numbers"),  # type: ignore[arg-type]
    "one number": (lambda: Data(torch.ones(()), torch.zeros(1).long()), "no examples but 1 labels"),
    "NaN examples": (data(train=Data(X / 0, Y)), "a training example holds NaN or infinity"),
    "complex": (lambda: Data(X + 1j, Y), "x must hold plain real numbers, .* got torch.complex64"),
    "sparse": (lambda: Data(X.to_sparse(), Y), "x must hold plain real numbers, .* torch.sparse_coo"),
    "masked": (lambda: Data(np.ma.masked_less(X.numpy(), 0), Y), "x must hold plain real numbers, all of them"),  # type: ignore[arg-type]
    "unsigned labels": (labels(Y.to(torch.uint64)), "labels must be int64 from 0 to 1 .*got torch.uint64"),
    "a mean of NaN": (lambda: Data(X, Y, (math.nan,)), r"mean must be finite, got \(nan,\)"),
    "a mean in words": (lambda: Data(X, Y, "0.5"), "mean must be a number, or one a channel, got '0.5'"),  # type: ignore[arg-type]
    "means that differ": (data(train=Data(X, Y, (1.0,))), "training and test examples differ in mean or std"),
    "a test set of its own shape": (data(test=Data(X[:, :3], Y)), r"given test examples of shape \[3\] it fails"),
    "std of zero": (lambda: Data(X, Y, std=(0.0,)), r"std must be above 0, got \(0.0,\)"),
    "no class": (data(classes=0), "classes must be the classes' names, or their number, got 0"),
    "classes in a word": (data(classes="ab"), "classes must be the classes' names"),
    "pairs": (data(train=(X, Y)), r"dataset good: train must be fedsieve.Data\(x, y\), got tuple"),
    "a short group": (data(group=torch.arange(3)), r"owner of each of the 60 .* it has the shape \[3\]"),
    "TensorDataset": (owner(dataset=TensorDataset(X, Y)), r"fedsieve.Dataset\(name, Data\(x, y\).*: TensorDataset"),
    "DataLoader": (owner(dataset=DataLoader(TensorDataset(X, Y))), "gives one: DataLoader"),
    "a function's pair": (owner(dataset=lambda: (X, Y)), "gives one: tuple"),
    "a model that fails": (owner(model=failing), r"failing fails \(ValueError: no weights, \w+_checks.py line \d+\)$"),
    "a dataset that fails": (owner(dataset=failing), r"^task.dataset: failing fails \(ValueError: no weights, "),
    "a partition that fails": (owner(partition=lambda *a: failing()), r"^partition: .*lambda> fails \(ValueError: no "),
    "a dataset with arguments": (owner(dataset=lambda path: GOOD), "task.dataset: function needs arguments"),
    "an unknown dataset": (owner(dataset="imagenet"), "no dataset is called 'imagenet'"),
    "a share alone": (owner(tiers=0.5), "task.tiers must be shares that add up to 1"),
    "half a client": (owner(clients=2.5), "task.clients must be a whole number, got 2.5"),
    "a method's class": (lambda: Run(FedAvg, Task(small, GOOD, 4), 1, 2), r"needs FedAvg\(\), not FedAvg"),  # type: ignore[arg-type]
    "no task": (lambda: Run(FedAvg(), small, 1, 2), "needs a Task"),  # type: ignore[arg-type]
    "rounds in words": (lambda: Run(FedAvg(), Task(small, GOOD, 4), "10", 2), "rounds must be a whole number"),  # type: ignore[arg-type]
    "too few shards": (dealt(IDS), "holds the indices of 1 clients, but task.clients is 2"),
    "an empty shard": (dealt(IDS, []), "client 1 has no example"),
    "out of range": (dealt(IDS, IDS + 31), "client 1 has example 60 of 60"),
    "below zero": (dealt(IDS - 1, IDS), "client 0 has example -1 of 60"),
    "twice": (dealt(IDS, [3, 4, 3]), "client 1 has example 3 twice"),
    "a mask": (dealt(IDS, X[:, 0] > 0), r"got torch.bool \[60\], of a mask give mask.nonzero"),
    "floats": (dealt(IDS, IDS / 2), "whole and in one dimension"),
    "words": (dealt(IDS, ["a"]), "client 1 has no list of whole numbers"),
    "one number for all": (owner(partition=torch.tensor(3)), "a list of indices for each client is needed, got Tensor"),
    "bytes": (owner(partition=b"iid"), "a list of indices for each client is needed, got bytes"),
    "a function of a word": (owner(partition=lambda d, n, s: "iid"), "a list of indices .* got str"),
    "a function's dictionary": (owner(partition=lambda d, n, s: {0: IDS}), "a list of indices .* got dict"),
    "a function of two": (owner(partition=lambda d, n: [IDS] * n), "a function takes dataset, clients and seed"),
    "owners in words": (data(group=["a"] * 60), "group must number the examples' owners"),
    "shares in words": (owner(tiers=("1.0",)), r"shares that add up to 1, such as \(0.5, 0.5\), got"),
    "a share in words": (owner(validation="0.1"), "task.validation must be a number, got '0.1'"),
    "an unknown change": (owner(augment="flip"), "task.augment must be one of none, crop_flip, got 'flip'"),
    "an unknown draw": (owner(initialisation="xavier"), "task.initialisation must be one of model, truncated_normal"),
    "lr in words": (settings(lr="0.1"), "lr must be a number, got '0.1'"),
    "lr of a tensor": (settings(lr=torch.tensor(0.1)), r"lr must be a number, got tensor\(0.1"),
    "true decay": (settings(weight_decay=True), "weight_decay must be a number, got True"),
    "unknown values": (settings(values="fp16"), "values must be one of f32, bf16, int8, int4, got 'fp16'"),
    "a mean's name": (settings(mean="median"), r"mean must be one of Plain\(\), Clipped\(\), Median\(\), .*, got"),
    "a bound's name": (settings(bound="off"), r"bound must be one of Off\(\), .*, got 'off'"),
    "no method": (settings(method=None), "needs a method: NoneType is no subclass of fedsieve.Method"),
    "a method's name": (settings(method="fedavg"), "needs a method: str is no subclass of fedsieve.Method"),
    "a share of a method in words": (lambda: ZeroFL("0.9"), r"sparsity must lie in \[0, 1\), got '0.9'"),  # type: ignore[arg-type]
    "an unknown upload": (lambda: settings(method=ZeroFL(upload="all"))(), "method.upload must be one of full, "),  # type: ignore[arg-type]
    "layers in a list": (lambda: settings(method=TopK(policy=["0"]))(), "method.policy must be a text"),  # type: ignore[arg-type]
    "half a warm-up": (lambda: settings(method=FLASH(c_d=2.5))(), "method.c_d must be a whole number"),  # type: ignore[arg-type]
    "no functions": (lambda: own((Method,), client=None), "Own is no whole method, it lacks aggregate, br.*, init: "),
    "a name of no text": (settings(method=own(name=3)), "Own: name must be a text, got 3"),
    "a policy of no text": (settings(method=own(policy=None)), "Own: policy must be a text, got None"),
    "a warm-up of a half": (settings(method=own(warm_up=0.5)), "warm_up must be a whole number, .*got 0.5"),
    "a size in words": (settings(method=own(paper_bytes=lambda s, m: "1 kB")), "paper_bytes must return a number"),
    "no state": (settings(method=own(init=lambda s, m, r: {})), "init must return a fedsieve.ServerState with params"),
    "no deployed model": (settings(method=own(deploy=lambda s, state: None)), "deploy must return .* got NoneType"),
    "no update": (trained(own(client=lambda s, down, device: None)), "client must return an Update"),
    "a set in a method": (written(replace(own(), thing={1})), "holds set, which run.json cannot: give numbers"),
    "a name that is none": (owner(partition="dirichlet"), "write iid, lda:ALPHA"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_is_one_line(name: str) -> None:
    make, line = WRONG[name]
    refused(make, line)


def test_arrays_lists_and_numbers_are_taken() -> None:
    mean = torch.arange(4) / 3
    assert Data(X, Y, np.float32(0.5), torch.tensor(2)).mean == (0.5,)  # type: ignore[arg-type]
    assert Data(X, Y, mean).mean == tuple(map(float, mean))  # type: ignore[arg-type]
    assert Data(X, Y, (0.1307,)).mean == (0.1307,)
    a = Data(X.double().numpy(), Y.tolist(), 0.5, 2)  # type: ignore[arg-type]
    assert (a.x.dtype, a.y.dtype, a.mean, a.std) == (torch.float32, torch.int64, (0.5,), (2,))
    assert Data(np.zeros((3, 1), np.uint8), np.arange(3)).x.dtype == torch.uint8  # type: ignore[arg-type]
    assert GOOD.classes == ("0", "1")
    task = Task(small, replace(GOOD, classes=["no", "yes"]), 2, [range(0, 60, 2), np.arange(20)])  # type: ignore[arg-type]
    federation = open_run(Run(FedAvg(), task, 1, 2))
    assert federation.dataset.classes == ("no", "yes")
    assert [len(shard) for shard in federation.shards] == [30, 20]  # clients may share examples
    assert next(iter(rounds(federation, local()))).t == 1
    assert (
        described(apply_settings(Run(FedAvg(), task, 1, 2), ["task.partition=lda:0.5"]))["task"]["partition"]
        == "lda:0.5"
    )


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"per_round": 7}, "per_round is 7 but there are only 6 clients"),
        ({"rounds": 0}, "rounds must be at least 1"),
        ({"batch": 0}, "batch must be at least 1"),
        ({"lr": 0.0}, "lr and lr_end must be positive"),
        ({"lr_end": float("nan")}, "lr and lr_end must be positive"),
        ({"lr": 1e300}, "at most 1e6"),
        ({"batch": 2**31}, "batch must be below"),
        ({"momentum": 1.0}, "momentum must lie"),
        ({"weight_decay": -1.0}, "weight_decay must be"),
        ({"lr_offset": 2}, "lr_offset must be -1, 0 or 1, got 2"),
        ({"lr_milestones": (5, 3)}, r"lr_milestones must be rounds that rise, such as \(50, 100\), got \(5, 3\)"),
        ({"lr_milestones": (0, 3)}, "lr_milestones must be rounds that rise"),
        ({"lr_milestones": (2.0,)}, "lr_milestones must be rounds that rise"),
        ({"lr_milestones": 3}, "lr_milestones must be rounds that rise, .*, got 3"),
        ({"lr_milestones": (3,), "lr_rounds": 5}, "lr_milestones and lr_rounds are two ways"),
        ({"norm_weight_decay": 1}, "norm_weight_decay must be true or false, got 1"),
        ({"lr_rounds": -1}, r"lr_rounds must be 0 \(all rounds\) or more, got -1"),
    ],
)
def test_impossible_runs_are_refused(change: dict[str, Any], line: str) -> None:
    with pytest.raises(InputError, match=line):
        tiny_run(FedAvg(), **change)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"clients": 0}, "task.clients must be at least 1"),
        ({"validation": 1.0}, "task.validation must lie"),
        ({"tiers": (0.5, 0.4)}, "task.tiers must be positive shares that add up to 1"),
        ({"tiers": (0.5, float("nan"))}, "task.tiers must be positive shares that add up to 1"),
        ({"tiers": (0.05, 0.95)}, "leave a tier without a client among 6"),
        ({"model": "resnet19"}, "unknown model 'resnet19'; the models are resnet18"),
        ({"test_limit": -1}, "task.test_limit"),
        ({"tier_by": "round "}, "task.tier_by must be one of client, round"),
        ({"input_mean": 0.5}, r"task.input_mean must be numbers, one or one a channel, such as \(0.5,\), got 0.5"),
        ({"input_mean": (0.5, float("inf"))}, "task.input_mean must be numbers"),
        ({"input_std": (0.5, 0.0)}, r"task.input_std must be positive numbers, .* got \(0.5, 0.0\)"),
        ({"input_std": "1"}, "task.input_std must be positive numbers, .* got '1'"),
    ],
)
def test_impossible_tasks_are_refused(change: dict[str, Any], line: str) -> None:
    with pytest.raises(InputError, match=line):
        replace(Task(TinyNet, blobs, 6), **change)


def wrong(**changes: Any) -> Any:
    """Return a dataset function with labels (or so) that cannot be."""

    def data() -> Any:
        good = blobs()
        both = ((part, getattr(good, part)) for part in ("train", "test"))
        return replace(good, **{part: replace(d, **{k: v(d) for k, v in changes.items()}) for part, d in both})

    return data


class NormNet(nn.Sequential):
    """BatchNorm over examples alone: one example is none."""

    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(72, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))


@pytest.mark.parametrize(
    ("task", "line"),
    [
        (Task(TinyNet, wrong(y=lambda d: d.y + 1), 6), "training labels must be int64 from 0 to 2"),
        (Task(TinyNet, wrong(y=lambda d: d.y.int()), 6), "got torch.int32"),
        (Task("leaf_cnn", blobs, 6), "model leaf_cnn does not fit blobs: given examples of shape"),
        (Task("digits_net", wrong(x=lambda d: torch.zeros(len(d), 1, 8, 8)), 6), ""),
        (Task(nn.Flatten, blobs, 6), r"it answers \[2, 72\] for 2 examples of 3 classes"),
        (Task(NormNet, blobs, 6, validation=0.0), "batches of 39 leave a client: -s batch=40 leaves none"),
        (Task(NormNet, blobs, 240, validation=0.0), "use fewer clients"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_runs(task: Task, line: str) -> None:
    run_ = replace(tiny_run(FedAvg()), task=task, per_round=1, batch=39)
    if line:
        with pytest.raises(InputError, match=line):
            open_run(run_)
    else:
        open_run(run_)
