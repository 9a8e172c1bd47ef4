"""Every module of torch.nn that has weights, between inputs and a linear head, and examples for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fedsieve import Data, Dataset


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
