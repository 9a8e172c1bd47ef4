"""Models that cannot be trained are one line before anything runs; odd models that can be train."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm
from torch.utils.checkpoint import checkpoint

from fedsieve import Run, Task, local, open_run
from fedsieve.methods import PDST, FedAvg
from fedsieve.runs.recorder import record_run
from refusals import refused
from tasks import GOOD, X, small
from tiny import alike, last


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
    refused(lambda: open_run(Run(FedAvg(), Task(given, GOOD, 4), rounds=1, per_round=2)), line)


def test_parametrisations_train_densely_and_are_named_where_a_layer_is_to_be_sparse() -> None:
    model = nn.Sequential(nn.Linear(4, 5), parametrizations.weight_norm(nn.Linear(5, 2)))
    run_ = Run(FedAvg(), Task(model, GOOD, 4), rounds=1, per_round=2)
    assert last(run_).accuracy is not None
    line = r"layer 1 has no .*remove_parametrizations\(layer, 'weight'\) first, or leave the layer out"
    refused(lambda: open_run(replace(run_, method=PDST(0.5, "all"))), line)
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
