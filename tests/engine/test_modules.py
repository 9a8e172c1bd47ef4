"""Every module of torch.nn that has weights: policies reach them, and the shipped model computes what was trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engines import pickled
from fedsieve import Data, Dataset, Run, Task, methods
from fedsieve.client.training import load_, params_of
from fedsieve.engine import local, rounds
from fedsieve.engine.setup import open_run
from fedsieve.sparse.masks import topk_count
from fedsieve.sparse.policy import select_weights, weights_of
from fedsieve.types import InputError, Method


class Around(nn.Module):
    """A module between reshaped inputs [b, 8, 6] and a linear head: ``call`` makes [b, ...] of both."""

    def __init__(self, inner: nn.Module, call: Callable[[nn.Module, Tensor], Tensor], width: int):
        super().__init__()
        self.inner, self.call, self.head = inner, call, nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.call(self.inner, x.view(-1, 8, 6)).flatten(1))
        return logits


class HuggingFaceConv1D(nn.Module):
    """A linear layer with its weight transposed, held as a bare parameter."""

    def __init__(self, inner: int, outer: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(inner, outer) / 4), nn.Parameter(torch.zeros(outer))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class Bare(nn.Module):
    """A class token and a position table, which are no weights; experts and an adapter, which are."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.positions = nn.Parameter(torch.randn(1, 1, 6)), nn.Parameter(torch.randn(1, 9, 6))
        self.experts, self.scale = nn.Parameter(torch.randn(2, 6, 6) / 3), nn.Parameter(torch.ones(6, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(len(x), 1, 6), x], 1) + self.positions
        return ((x @ self.experts[0]).relu() @ self.experts[1]) * self.scale.view(6)


class TiedHead(nn.Module):
    """An embedding whose weight is the head's as well."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.out = nn.Embedding(10, 6), nn.Linear(6, 10, bias=False)
        self.out.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out(self.embedding(ids(x)).mean(1))
        return y


def ids(x: Tensor) -> Tensor:
    return (x[:, :, 0].abs() * 7).long() % 10


def plain(module: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = module(x)
    return y


def sequence(module: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = module(x)[0]
    return y


def image(module: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = module(x[:, None])
    return y


def itself(module: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = module(x, x, x, need_weights=False)[0]
    return y


def encoder(**settings: Any) -> nn.Module:
    return nn.TransformerEncoderLayer(6, 2, 12, batch_first=True, dropout=0.0, **settings)


MODULES: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module, Tensor], Tensor], int, tuple[str, ...]]] = {
    "Conv1d": (lambda: nn.Conv1d(8, 5, 3), plain, 20, ("weight",)),
    "Conv1d, depthwise": (lambda: nn.Conv1d(8, 16, 3, groups=8), plain, 64, ("weight",)),
    "Conv2d, circular": (lambda: nn.Conv2d(1, 3, 3, padding=1, padding_mode="circular"), image, 144, ("weight",)),
    "Conv3d": (lambda: nn.Conv3d(1, 3, (1, 3, 3)), lambda m, x: m(x[:, None, None]), 72, ("weight",)),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(8, 4, 2), plain, 28, ("weight",)),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(1, 2, 2), image, 126, ("weight",)),
    "Bilinear": (lambda: nn.Bilinear(6, 6, 4), lambda m, x: m(x, x), 32, ("weight",)),
    "Embedding": (lambda: nn.Embedding(10, 5), lambda m, x: m(ids(x)), 40, ("weight",)),
    "EmbeddingBag": (lambda: nn.EmbeddingBag(10, 5), lambda m, x: m(ids(x)), 5, ("weight",)),
    "RNN": (lambda: nn.RNN(6, 5, batch_first=True), sequence, 40, ("weight_ih_l0", "weight_hh_l0")),
    "LSTM, projected": (
        lambda: nn.LSTM(6, 5, 2, batch_first=True, proj_size=3),
        sequence,
        24,
        tuple(f"weight_{kind}_l{layer}" for layer in (0, 1) for kind in ("ih", "hh", "hr")),
    ),
    "GRU, both ways": (
        lambda: nn.GRU(6, 5, batch_first=True, bidirectional=True),
        sequence,
        80,
        ("weight_ih_l0", "weight_hh_l0", "weight_ih_l0_reverse", "weight_hh_l0_reverse"),
    ),
    "LSTMCell": (lambda: nn.LSTMCell(6, 5), lambda m, x: m(x[:, 0])[0], 5, ("weight_ih", "weight_hh")),
    "MultiheadAttention": (
        lambda: nn.MultiheadAttention(6, 2, batch_first=True, add_bias_kv=True),
        itself,
        48,
        ("in_proj_weight", "out_proj.weight"),
    ),
    "MultiheadAttention, other keys": (
        lambda: nn.MultiheadAttention(6, 2, batch_first=True, kdim=4, vdim=4),
        lambda m, x: m(x, x[..., :4], x[..., 2:])[0],
        48,
        ("q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"),
    ),
    "TransformerEncoderLayer": (
        encoder,
        plain,
        48,
        ("self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight"),
    ),
    "TransformerDecoderLayer": (
        lambda: nn.TransformerDecoderLayer(6, 2, 12, batch_first=True, dropout=0.0),
        lambda m, x: m(x, x),
        48,
        (
            *(f"{a}.{w}" for a in ("self_attn", "multihead_attn") for w in ("in_proj_weight", "out_proj.weight")),
            *("linear1.weight", "linear2.weight"),
        ),
    ),
    "Conv1D of Hugging Face": (lambda: HuggingFaceConv1D(6, 5), plain, 40, ("weight",)),
    "bare parameters": (Bare, plain, 54, ("experts",)),
    "tied": (TiedHead, plain, 10, ("embedding.weight",)),
}

pytestmark = [
    pytest.mark.filterwarnings("ignore:LSTM with projections"),
    pytest.mark.filterwarnings("ignore:the global cut at density"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

METHODS: dict[str, Method[Any]] = {
    "pdst": methods.PDST(density=0.3, policy="all"),
    "flash": methods.FLASH(density=0.3, c_d=2, E_d=2, policy="all"),
    "nst": methods.NST(density=0.3, deployment="pruned", policy="all"),
    "topk": methods.TopK(sparsity=0.7, deployment="pruned", policy="all"),
    "feddst": methods.FedDST(density=0.3, interval=1, end=1.0, policy="all"),
    "zerofl": methods.ZeroFL(0.7, policy="all", period=2, activations="where_possible"),
    "sparsefedpp": methods.SparseFedPP(0.7, deployment="pruned", activations="where_possible"),
}


class Make:
    """A model's factory that other processes may be sent."""

    def __init__(self, name: str):
        self.name = name

    def __call__(self) -> nn.Module:
        make, call, width, _ = MODULES[self.name]
        return Around(make(), call, width)


def dataset() -> Dataset:
    torch.manual_seed(0)
    x, y = torch.randn(48, 48), torch.arange(48) % 4
    return Dataset("modules", Data(x, y), Data(x[:16], y[:16]), tuple("abcd"))


def run_of(name: str, method: Method[Any], **settings: Any) -> Run:
    task = Task(model=Make(name), dataset=dataset, clients=3, partition="iid")
    return Run(
        task=task, method=method, **{"rounds": 2, "per_round": 2, "epochs": 2, "batch": 8, "lr": 0.1, **settings}
    )


def test_every_module_that_has_weights_is_here() -> None:
    def has_weights(kind: Any) -> bool:
        return isinstance(kind, type) and issubclass(kind, nn.Module) and kind.__module__.startswith("torch.nn.modules")

    names = {name for name in dir(nn) if has_weights(getattr(nn, name)) and not name.startswith(("Lazy", "_"))}
    families = ("Conv", "Linear", "Bilinear", "Embedding", "RNN", "LSTM", "GRU", "MultiheadAttention", "Transformer")
    others = {name for name in names if not any(one in name for one in families)}
    for name in sorted(others):  # what is left has no weights, or is a norm, or activations' slopes
        try:
            module = getattr(nn, name)(*{"PReLU": (4,)}.get(name, ()))
        except TypeError:
            continue
        assert not weights_of(nn.ModuleDict({"inner": module})), name


@pytest.mark.parametrize("name", MODULES)
def test_a_policy_reaches_the_weights_and_nothing_else(name: str) -> None:
    model, (*_, wanted) = Make(name)(), MODULES[name]
    assert select_weights("all", model) == (*(f"inner.{one}" for one in wanted), "head.weight")
    assert select_weights("inner*", model) == select_weights("flash", model) == tuple(f"inner.{one}" for one in wanted)
    assert select_weights(f"inner.{wanted[-1]}", model) == (f"inner.{wanted[-1]}",)
    with pytest.raises(InputError, match=r"policy 'other' matches no layer; the layers are inner"):
        select_weights("other", model)


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("method", METHODS)
def test_trained_on_masks_it_reaches_the_density_and_ships_what_it_trained(method: str, name: str) -> None:
    run = run_of(name, METHODS[method])
    *_, final = rounds(run, local())
    *_, other = rounds(run, pickled())
    assert all(torch.equal(v, other.model[n]) for n, v in final.model.items())
    assert not final.refused
    names = final.state.sparse
    assert names == select_weights("all", Make(name)())
    kept, total = (sum(int(f(final.model[n])) for n in names) for f in (torch.count_nonzero, torch.numel))
    exact = (total,) if method in ("topk", "sparsefedpp") else [final.model[n].numel() for n in names]
    assert 0.2 * total < kept <= sum(topk_count(0.3, n) for n in exact) + (2 if method == "feddst" else 1) * len(names)
    moved = params_of(open_run(run).model())
    assert any(not torch.equal(v, moved[n]) for n, v in final.model.items())


@pytest.mark.parametrize("name", MODULES)
def test_masked_in_training_and_in_eval_it_computes_the_same(name: str) -> None:
    """The weights that a client trains are the model's own: fused paths read them as well."""
    *_, final = rounds(run_of(name, METHODS["pdst"], rounds=1), local())
    model = load_(Make(name)(), final.model)
    x = dataset().test.x
    with torch.no_grad():
        logits = [mode(model)(x) for mode in (nn.Module.train, nn.Module.eval)]
    assert torch.allclose(*logits, atol=1e-5)
    zeroed = {n: float((v == 0).float().mean()) for n, v in model.named_parameters() if n in final.state.sparse}
    assert min(zeroed.values()) > 0.5


def test_swat_and_powerpropagation_take_products_alone_and_say_what_is_left() -> None:
    for method in (methods.ZeroFL(0.5, policy="all"), methods.SparseFedPP(0.5), methods.Swat(0.5, policy="all")):
        run = run_of("LSTM, projected", method)
        federation = open_run(run)
        assert federation.run.method.init(federation.model(), torch.Generator()).sparse == ("head.weight",)
        assert any("inner.weight_ih_l0" in line for line in federation.remarks)
    with pytest.raises(InputError, match="inner"):
        open_run(replace(run_of("RNN", methods.ZeroFL(0.5)), method=methods.ZeroFL(0.5, policy="inner*")))
