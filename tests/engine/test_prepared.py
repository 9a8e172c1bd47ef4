"""Layers that a method replaces: each is called through its own forward, or refused by name before the run."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedsieve import Method, Run, Task, local, open_run
from fedsieve.client.training import load_
from fedsieve.engine.loop import rounds
from fedsieve.methods import FLASH, NST, PDST, FedAvg, SparseFedPP, Swat, TopK, ZeroFL
from fedsieve.types import InputError
from tiny import blobs, tiny_run


class Net(nn.Module):
    """Six steps of twelve numbers, a layer ``a`` used in some way, and their mean told apart."""

    def __init__(self, a: nn.Module, use: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.start, self.a, self.use, self.out = nn.Linear(12, 8), a, use, nn.Linear(8, 3)
        self.gain = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        h = self.use(self, self.start(x.flatten(1).view(-1, 6, 12)))
        logits: Tensor = self.out(h.mean(1))
        return logits


def attention() -> nn.Module:
    return nn.MultiheadAttention(8, 2, batch_first=True)


def encoder() -> nn.Module:
    return nn.TransformerEncoderLayer(8, 2, 16, dropout=0.2, batch_first=True)


NETS: dict[str, tuple[Callable[[], nn.Module], Callable[[Any, Tensor], Tensor], list[str]]] = {
    "attention": (attention, lambda m, h: m.a(h, h, h)[0], ["a.out_proj"]),
    "encoder layer": (encoder, lambda m, h: m.a(h), ["a.self_attn.out_proj"]),
    "encoder": (
        lambda: nn.TransformerEncoder(encoder(), 2),  # type: ignore[arg-type]
        lambda m, h: m.a(h),
        ["a.layers.0.self_attn.out_proj", "a.layers.1.self_attn.out_proj"],
    ),
    "a weight as a function's": (lambda: nn.Linear(8, 8), lambda m, h: F.linear(h, m.a.weight).relu(), ["a"]),
    "a weight transposed": (lambda: nn.Linear(8, 8), lambda m, h: m.a(h).relu() @ m.a.weight.T, ["a"]),
    "a weight behind a gain of zero": (lambda: nn.Linear(8, 8), lambda m, h: h + m.gain * (h @ m.a.weight), ["a"]),
    "only in training": (lambda: nn.Linear(8, 8), lambda m, h: m.a(h).relu() + h if m.training else h, []),
    "only in testing": (lambda: nn.Linear(8, 8), lambda m, h: h if m.training else F.linear(h, m.a.weight), ["a"]),
    "never": (lambda: nn.Linear(8, 8), lambda m, h: h, []),
    "a norm in the way": (
        lambda: nn.Linear(8, 8),
        lambda m, h: m.a(h).relu() + 0 * m.a.weight.square().sum().sqrt(),
        [],
    ),
    "recurrent": (lambda: nn.LSTM(8, 8, batch_first=True), lambda m, h: m.a(h)[0], []),
}
REPLACING: list[Any] = [Swat(0.5, "all"), SparseFedPP(0.5)]


def made(name: str, method: Method[Any]) -> Run:
    layer, use, _ = NETS[name]
    base = tiny_run(method, rounds=1)
    return replace(base, task=replace(base.task, model=lambda: Net(layer(), use)))


@pytest.mark.parametrize(
    ("name", "method"),
    [*((name, method) for name in NETS for method in REPLACING), ("encoder", ZeroFL(0.5, policy="all"))],
)
def test_what_is_trained_is_what_is_shipped_or_refused_by_name(name: str, method: Any) -> None:
    if wrong := NETS[name][2]:
        with pytest.raises(
            InputError, match=f"uses the weight of {', '.join(wrong)} without .* -s method.policy=start"
        ) as said:
            open_run(made(name, method))
        method = replace(method, policy=str(said.value).rpartition("policy=")[2])  # as the line says
    federation = open_run(made(name, method))
    *_, final = rounds(federation, local())
    trained = load_(method.prepare(federation.model()), final.state.params).eval()
    shipped = load_(federation.model(), final.model).eval()
    x, _ = blobs().test.batch(slice(0, 50))
    with torch.no_grad():
        torch.testing.assert_close(trained(x), shipped(x))
        assert float(shipped(x).std()) > 0


@pytest.mark.parametrize(
    "method", [TopK(0.5, policy="all"), PDST(0.5, "all"), NST(0.5, policy="all"), FLASH(0.5, 2, 2, policy="all")]
)
def test_masks_reach_a_weight_however_it_is_used(method: Any) -> None:
    for name in ("attention", "encoder layer", "a weight as a function's"):
        *_, final = rounds(open_run(made(name, method)), local())
        weight = final.model[f"{NETS[name][2][0]}.weight"]
        assert 0 < int(weight.count_nonzero()) < weight.numel()


def test_dense_training_refuses_none() -> None:
    for name in NETS:
        open_run(made(name, FedAvg()))


class Cosine(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, F.normalize(self.weight), self.bias)


class Standardised(nn.Conv2d):
    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x, weight - weight.mean((1, 2, 3), keepdim=True), bias)


class Named(nn.Linear):
    """Nothing but another name."""


def with_a(change: Callable[[nn.Module], object]) -> Callable[[], nn.Module]:
    layer = nn.Linear(8, 8)
    change(layer)
    return lambda: layer


OWN: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "a forward": (lambda: Cosine(8, 8), "its own forward"),
    "a convolution's forward": (lambda: Standardised(1, 1, 3, padding=1), "its own forward"),
    "an object's forward": (with_a(lambda a: setattr(a, "forward", lambda x: x * 2)), "its own forward"),
    "a hook": (with_a(lambda a: a.register_forward_hook(lambda a, x, y: 2 * y)), "its hooks"),
    "a hook before": (with_a(lambda a: a.register_forward_pre_hook(lambda a, x: (2 * x[0],))), "its hooks"),
    "a parameter": (with_a(lambda a: a.register_parameter("gain", nn.Parameter(torch.ones(1)))), "its own gain"),
    "a buffer": (with_a(lambda a: a.register_buffer("mask", torch.ones(8))), "its own mask"),
    "a part": (with_a(lambda a: a.add_module("drop", nn.Dropout())), "its own drop"),
}


@pytest.mark.parametrize("method", REPLACING, ids=lambda m: m.name)
@pytest.mark.parametrize("name", OWN)
def test_a_layer_that_is_more_than_a_plain_one_is_not_replaced(name: str, method: Any) -> None:
    layer, what = OWN[name]
    base = tiny_run(method)

    def run_(make: Callable[[], nn.Module]) -> Run:
        return replace(base, task=replace(base.task, model=lambda: Net(make(), lambda m, h: m.a(h[:, None])[:, 0])))

    with pytest.raises(InputError, match=f"layer a cannot .* would lack {what}: leave it out of method.policy, or"):
        open_run(run_(layer))
    open_run(replace(run_(layer), method=replace(method, policy="start")))
    open_run(replace(run_(layer), method=TopK(0.5, policy="all")))
    open_run(run_(lambda: Named(8, 8)))


def test_where_no_other_layer_is_left_other_methods_are_named() -> None:
    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(72, 3)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x.flatten(1), self.fc.weight, self.fc.bias)

    base = tiny_run(SparseFedPP())
    with pytest.raises(
        InputError, match=r"uses the weight of fc without .* cannot replace it: take flash, pdst, nst or topk"
    ):
        open_run(replace(base, task=Task(One, blobs, 6)))
