"""What cannot be as model, data, method or setting is one line before anything runs; what odd things can be, works."""

import math
import re
from collections.abc import Callable
from dataclasses import make_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from fedsieve import Data, Dataset, Method, Run, Task, local, open_run
from fedsieve.engine.federation import described
from fedsieve.engine.loop import rounds
from fedsieve.methods import FLASH, PDST, FedAvg, TopK, ZeroFL
from fedsieve.recipes import apply_settings
from fedsieve.runs.execution import Execution
from fedsieve.runs.recorder import manifest_of, record_run
from fedsieve.types import InputError
from tiny import alike, last


def text(make: Callable[[], object]) -> str:
    with pytest.raises(InputError) as said:
        make()
    assert "\n" not in str(said.value)
    return str(said.value)


X, Y = torch.randn(60, 4), torch.arange(60) % 2
GOOD = Dataset("good", Data(X, Y), Data(X, Y), 2)


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 2))


class Gives(nn.Module):
    """Something else than logits."""

    def __init__(self, how: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.fc, self.how = nn.Linear(4, 2), how

    def forward(self, x: Tensor) -> Any:
        return self.how(self.fc(x))


def reentrant(y: Tensor) -> Any:
    return checkpoint(torch.tanh, y, use_reentrant=True)


class Renamed(nn.Linear):
    """A layer whose state bears other names."""

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return {f"other.{name}": v for name, v in super().state_dict(*args, **kwargs).items()}


class Complex(nn.Linear):
    """A layer with a number that no message holds."""

    def __init__(self) -> None:
        super().__init__(4, 2)
        self.phase = nn.Parameter(torch.zeros(2, dtype=torch.complex64))


def pruned() -> nn.Module:
    model = small()
    prune.l1_unstructured(model[0], "weight", 0.5)
    return model


def pruned_lstm() -> nn.Module:
    model = Gives(lambda y: y)
    model.lstm = nn.LSTM(4, 4)
    prune.random_unstructured(model.lstm, "weight_hh_l0", 0.5)
    return model


def used() -> nn.Module:
    """Until it is called, the old spectral_norm leaves a plain tensor."""
    model = last_is(lambda layer: spectral_norm(layer))()
    model(X)
    return model


def meta() -> nn.Module:
    with torch.device("meta"):
        return nn.Linear(4, 2)


def quantised() -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(4, 2)), {nn.Linear}, torch.qint8)


def aliased(keep: Callable[[Tensor], object]) -> nn.Module:
    """A model that has a weight's numbers once more."""
    model = Keeps(torch.zeros(5))
    del model.kept
    model.kept = keep(model.fc.weight)
    return model


class Keeps(nn.Module):
    """A model with a buffer, and what it does with it in training."""

    def __init__(self, buffer: Tensor, change: Callable[..., object] = lambda m, y: None, **how: bool) -> None:
        super().__init__()
        self.fc, self.out, self.change = nn.Linear(4, 5), nn.Linear(5, 2), change
        self.register_buffer("kept", buffer, **how)

    def forward(self, x: Tensor) -> Any:
        y = self.fc(x)
        if self.training:
            self.change(self, y)
        return self.out(y - self.kept)


def last_is(wrap: Callable[[nn.Linear], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Linear(4, 5), wrap(nn.Linear(5, 2)))


def failing() -> Any:
    raise ValueError("no weights")


def hooked() -> nn.Module:
    """Return a layer of whose weight half is to keep its value."""
    layer = nn.Linear(4, 2)
    layer.weight.register_hook(lambda gradient: gradient * torch.tensor([[0], [1]]))
    return layer


MODELS: dict[str, tuple[Callable[[], Any], str]] = {
    "a list of lists": (lambda: Gives(lambda y: [[y]]), "the model returns list, where a tensor is needed"),
    "a dictionary without": (lambda: Gives(lambda y: {"y": y}), "the model returns dict, where a tensor is needed, or"),
    "an error of its own": (lambda: Gives(lambda y: {}["x"]), r"given examples of shape \[4\] it fails \('x'\)"),
    "without a gradient": (lambda: Gives(lambda y: y.detach()), "a training step on 2 examples fails"),
    "checkpointed": (lambda: Gives(reentrant), r"a training step on 2 examples fails \(.*\.grad\(\)"),
    "probabilities of one": (lambda: nn.Linear(4, 1), r"it answers \[2, 1\] for 2 examples of 2 classes"),
    "a class with arguments": (nn.Linear, "task.model: Linear needs arguments"),
    "a function's number": (lambda: 3, "must give a torch.nn.Module, its function gives int"),
    "a number": (3, "must be a name, a module, or a function that gives one: int"),  # type: ignore[dict-item]
    "pruned": (pruned, r"layer 0 has no parameter 'weight' of its own.*prune.remove\(layer, 'weight'\) first"),
    "pruned elsewhere": (pruned_lstm, r"layer lstm has no .*prune.remove\(layer, 'weight_hh_l0'\) first"),
    "weight_norm": (last_is(lambda layer: weight_norm(layer)), r"layer 1 .*remove_weight_norm\(layer, 'weight'\)"),
    "spectral_norm": (used, r"layer 1 .*remove_spectral_norm\(layer, 'weight'\)"),
    "half": (lambda: nn.Linear(4, 2).half(), "weight is of torch.float16, where float32 is trained: give model.float"),
    "double": (lambda: nn.Linear(4, 2).double(), "weight is of torch.float64"),
    "complex": (Complex, r"phase is complex \(torch.complex64\), where float32 is trained: give a model of real"),
    "meta": (meta, "weight is on the meta device"),
    "a buffer on meta": (lambda: Keeps(torch.zeros(5, device="meta")), "kept is on the meta device, without numbers"),
    "quantised": (quantised, r"holds 0\._packed_params\.dtype, which is no tensor \(is it quantised\?\)"),
    ".data": (lambda: aliased(lambda w: [w.data]), r"kept holds the numbers of fc.weight beside the .*\.data"),
    "a view": (lambda: aliased(lambda w: {"rows": w.detach()[:2]}), "kept holds the numbers of fc.weight beside"),
    "lazy": (lambda: nn.LazyLinear(2), "weight has no shape yet: call the lazy model"),
    "scripted": (lambda: torch.jit.trace(nn.Linear(4, 2), X), "compiled by TorchScript"),
    "compiled": (lambda: torch.compile(nn.Linear(4, 2)), r"wrapped \(OptimizedModule\): .* model._orig_mod"),
    "DataParallel": (lambda: nn.DataParallel(nn.Linear(4, 2)), "give what is inside, model.module"),
    "other names": (lambda: Renamed(4, 2), "the model's state_dict has no bias"),
    "infinite": (lambda: Keeps(torch.full((5,), -torch.inf)), "its kept holds NaN or infinity, .* persistent=False"),
    "expanded": (lambda: Keeps(torch.zeros(1).expand(5)), r"kept is expanded .* give it .contiguous\(\)"),
    "counting": (lambda: Keeps(torch.tensor(0), lambda m, y: m.kept.add_(1)), "changes its buffer kept, which is not"),
    "a secret": (lambda: Keeps(torch.zeros(5), lambda m, y: m.kept.add_(1.0), persistent=False), "is not sent"),
    "a scripted layer": (lambda: nn.Sequential(torch.jit.script(nn.Linear(4, 2))), "layer 0 is compiled by Torch"),
    "a hook": (hooked, "weight has a hook, which copies of the model lose: put what it does into the model's forward"),
    "frozen": (lambda: nn.Linear(4, 2).requires_grad_(False), "it has no parameter to train"),
}  # fmt: skip


FORMS, NO_OBJECT = ("object", "function"), ("a class with arguments", "a function's number", "a number")


@pytest.mark.filterwarnings(
    "ignore::FutureWarning",
    "ignore::DeprecationWarning",
    "ignore:None of the inputs have requires_grad",
    "ignore:torch.quantize_per_tensor",
)
@pytest.mark.parametrize(
    ("name", "form"), [(n, f) for n in MODELS for f in FORMS if f == "function" or n not in NO_OBJECT]
)
def test_a_model_that_cannot_be_is_one_line(name: str, form: str) -> None:
    make, line = MODELS[name]
    given = make() if form == "object" else make
    assert re.search(line, text(lambda: open_run(Run(FedAvg(), Task(given, GOOD, 4), rounds=1, per_round=2))))


def test_parametrisations_train_densely_and_are_named_where_a_layer_is_to_be_sparse() -> None:
    model = nn.Sequential(nn.Linear(4, 5), parametrizations.weight_norm(nn.Linear(5, 2)))
    run_ = Run(FedAvg(), Task(model, GOOD, 4), rounds=1, per_round=2)
    assert last(run_).accuracy is not None
    said = text(lambda: open_run(replace(run_, method=PDST(0.5, "all"))))
    assert re.search(r"layer 1 has no .*remove_parametrizations\(layer, 'weight'\) first, or leave the layer out", said)
    assert open_run(replace(run_, method=PDST(0.5, "0")))


def test_a_model_may_replace_its_buffers_and_hold_one_twice(tmp_path: Path) -> None:
    model = Keeps(torch.zeros(5), lambda m, y: setattr(m, "kept", 0.9 * m.kept + y.detach().mean(0)))
    model.fc.register_buffer("mask", mask := torch.ones(5, dtype=torch.bool))
    model.out.register_buffer("mask", mask)
    for method in (FedAvg(), PDST(0.5, "out")):
        out = tmp_path / method.name
        federation = open_run(Run(method, Task(model, GOOD, 4), rounds=1, per_round=2))
        assert len([*record_run(out, federation, local(), "mine")]) == 1
        shipped = load_file(out / "model.safetensors")
        assert shipped["fc.mask"].all()
        assert shipped["kept"].any()


def test_sparse_gradients_bear_weight_decay() -> None:
    def run_(sparse: bool) -> Run:
        model = nn.Sequential(Tokens(), nn.Embedding(9, 4, sparse=sparse), nn.Flatten(), nn.Linear(16, 2))
        model.load_state_dict({name: torch.full_like(v, 0.1) for name, v in model.state_dict().items()})
        return Run(FedAvg(), Task(model, GOOD, 4), rounds=1, per_round=2, weight_decay=0.1)

    assert alike(last(run_(True)), last(run_(False)))


class Tokens(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.abs().long().clamp(max=8)


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
    "a model that fails": (owner(model=failing), r"failing fails \(ValueError: no weights, test_fit.py line \d+\)$"),
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
    assert re.search(line, text(make))


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
