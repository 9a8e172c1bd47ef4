"""Small transformers as outsiders write them, their examples and masks, and their training by PyTorch."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedsieve.client.losses import NextToken
from fedsieve.client.vector_models import CharGPT, ViTTiny
from fedsieve.types import apply_model
from padding_models import PADDING, first_label
from sequence_models import SEQUENCES

VOCABULARY, LENGTH = 13, 7


class Llama(nn.Module):
    """RMSNorm before each part, queries that share keys, a gated perceptron in one product, tied weights."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, 16)
        self.norm1, self.norm2, self.norm = (nn.RMSNorm(16, eps=1e-5) for _ in range(3))
        self.q, self.k, self.v = (nn.Linear(16, n, bias=False) for n in (16, 8, 8))
        self.proj, self.up, self.down = nn.Linear(16, 16), nn.Linear(16, 48), nn.Linear(24, 16)
        self.head = nn.Linear(16, VOCABULARY, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids)
        y = self.norm1(x)
        q, k, v = (part(y).unflatten(-1, (-1, 4)).transpose(1, 2) for part in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3, enable_gqa=True)
        x = x + self.proj(y.transpose(1, 2).flatten(2))
        gate, up = self.up(self.norm2(x)).chunk(2, -1)
        y = self.down(F.silu(gate) * up)
        y += x
        logits: Tensor = self.head(self.norm(y))
        return logits


class Conv1D(nn.Module):
    """A linear layer with its weight the other way round, as GPT-2's."""

    def __init__(self, inner: int, out: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(0.3 * torch.randn(inner, out)), nn.Parameter(torch.zeros(out))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], -1)


class GPT2(nn.Module):
    """Conv1D, a split, an attention mask that is the causal one, constants that are added, classes before places."""

    causal: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.norm = nn.Embedding(VOCABULARY, 12), nn.LayerNorm(12)
        self.qkv, self.proj, self.head = Conv1D(12, 36), Conv1D(12, 12), nn.Linear(12, VOCABULARY)
        self.register_buffer("waves", torch.arange(LENGTH * 12).view(1, LENGTH, 12).sin())
        self.register_buffer("causal", torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril())

    def forward(self, ids: Tensor) -> Tensor:
        n, t = ids.shape
        x = self.tokens(ids) + self.waves[:, :t]
        q, k, v = (y.view(n, t, 3, 4).transpose(1, 2) for y in self.qkv(self.norm(x)).split(12, 2))
        y = F.scaled_dot_product_attention(q, k, v, self.causal[:t, :t])
        x = x + self.proj(y.transpose(1, 2).contiguous().view(n, t, 12))
        return self.head(F.gelu(x, approximate="tanh")).transpose(1, 2)  # type: ignore[no-any-return]


class Series(nn.Module):
    """nn.TransformerEncoder on numbers [n, length, 3]: a mean of the tokens, or the last."""

    def __init__(self, pool: str = "mean", p: float = 0.0, **how: Any):
        super().__init__()
        layer = nn.TransformerEncoderLayer(12, 3, 20, batch_first=True, **{"dropout": 0.0} | how)
        self.stem, self.encoder = nn.Linear(3, 12), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.dropout, self.head, self.pool = nn.Dropout(p), nn.Linear(12, 4), pool

    def forward(self, x: Tensor) -> Tensor:
        x = self.encoder(self.dropout(self.stem(x)))
        logits: Tensor = self.head(x.mean(1) if self.pool == "mean" else x[:, -1])
        return logits


class Shared(nn.Module):
    """Queries that are their own keys, some of their channels values as well; a value that three layers read."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.proj, self.head = nn.Linear(3, 16), nn.Linear(8, 16), nn.Linear(16, 4)
        self.norm = nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x))
        q, v = (x[..., part : part + 8].unflatten(-1, (2, 4)).transpose(1, 2) for part in (0, 4))
        y = self.proj(F.scaled_dot_product_attention(q, q, v).transpose(1, 2).flatten(2))
        logits: Tensor = self.head((x - x * y / 2 - -y * 0.5)[:, 2])
        return logits


class Explicit(nn.Module):
    """Attention in single operations, as nanoGPT and others write it, and PyTorch's with masks."""

    causal: Tensor

    def __init__(self, how: str, p: float = 0.0):
        super().__init__()
        self.how, self.p = how, p
        self.stem, self.qkv, self.proj, self.head = (nn.Linear(*n) for n in ((3, 12), (12, 36), (12, 12), (12, 4)))
        self.attention, self.drop = nn.MultiheadAttention(12, 3, dropout=p, batch_first=True), nn.Dropout(p)
        if "MultiheadAttention" in how:
            self.qkv, self.proj = nn.Identity(), nn.Identity()
        else:
            self.attention = nn.Identity()
        self.register_buffer("causal", torch.ones(LENGTH, LENGTH).tril())

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        n, t, width = x.shape
        logits: Tensor = self.head((x + self.attended(x, n, t, width)).mean(1))
        return logits

    def attended(self, x: Tensor, n: int, t: int, width: int) -> Tensor:
        if "MultiheadAttention" in self.how:
            mask = nn.Transformer.generate_square_subsequent_mask(t) if "masked" in self.how else None
            y: Tensor = self.attention(x, x, x, attn_mask=mask, need_weights="weights" in self.how)[0]
            return y
        q, k, v = (y.view(n, t, 3, 4).transpose(1, 2) for y in self.qkv(x).split(width, dim=2))
        slopes = torch.tensor([0.5, 0.25, 0.1]).view(1, 3, 1, 1)
        distance = slopes * (torch.arange(t)[None] - torch.arange(t)[:, None])
        if self.how == "baddbmm":
            q, k, v = (y.flatten(0, 1) for y in (q, k, v))
            bias = distance.expand(n, 3, t, t).flatten(0, 1)
            scores = torch.baddbmm(bias, q, k.mT, beta=0.5, alpha=0.4)
            y = torch.bmm(scores.softmax(-1), v).view(n, 3, t, 4)
        elif self.how == "nanoGPT":
            scores = (q @ k.transpose(-2, -1)) * 0.5
            scores = scores.masked_fill(self.causal[:t, :t] == 0, -torch.inf)
            y = self.drop(scores.softmax(-1)) @ v
        elif self.how == "einsum":
            scores = torch.einsum("nhqd,nhkd->nhqk", q, k) / 2 + distance
            barred = torch.ones(t, t, dtype=torch.bool).triu(2)
            scores = torch.where(barred, torch.finfo(scores.dtype).min, scores)
            y = torch.einsum("nhqk,nhkd->nhqd", self.drop(scores.softmax(-1, dtype=torch.float32).to(q.dtype)), v)
        else:
            keys = (torch.arange(t)[:, None] - torch.arange(t)[None]).abs() < 3
            mask = keys if self.how == "window" else distance.masked_fill(self.causal == 0, -torch.inf)
            y = F.scaled_dot_product_attention(q, k, v, mask, dropout_p=self.p if self.training else 0.0)
        projected: Tensor = self.proj(y.transpose(1, 2).reshape(n, t, width))
        return projected


EXPLICIT = {
    "nanoGPT": 0.3, "baddbmm": 0.0, "einsum": 0.2, "window": 0.0, "slopes": 0.4, "MultiheadAttention": 0.1,
    "MultiheadAttention with weights": 0.2, "masked MultiheadAttention with weights": 0.0,
}  # fmt: skip
"""Ways to write attention, and dropout of its probabilities."""


class Relaid(nn.Module):
    """Channels in other orders: queries, keys and values head by head, channels by turns, all tokens' as one's."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.qkv, self.proj = nn.Linear(3, 12), nn.Linear(12, 36), nn.Linear(12, 12)
        self.norm, self.head = nn.LayerNorm(12), nn.Linear((LENGTH - 1) * 12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        q, k, v = self.qkv(x).unflatten(-1, (3, 12)).transpose(1, 2).chunk(3, -1)
        y = F.scaled_dot_product_attention(q, k, v)
        x = x + self.proj(y.permute(0, 2, 3, 1).flatten(2))
        logits: Tensor = self.head(self.norm(x)[:, 1:].transpose(1, 2).flatten(1))
        return logits


class Rotary(nn.Module):
    """Rotations of positions in each of the ways in which they are written, beside other arithmetic of channels.

    Queries by complex numbers, keys by pairs, a part of the values by halves; RMSNorm and GELU written out; scales that
    are parameters or constants; a row of the embedding that is padding; a class that is read from all tokens' channels.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.qkv = nn.Embedding(VOCABULARY, 16, padding_idx=2), nn.Linear(16, 32)
        self.gain, self.scale = nn.Parameter(torch.rand(16) + 0.5), nn.Parameter(torch.rand(16))
        self.proj, self.up, self.down, self.head = (
            nn.Linear(16, 16),
            nn.Linear(16, 24),
            nn.Linear(24, 16),
            nn.Linear(32, 13),
        )
        angle = torch.arange(LENGTH)[:, None] / 3.0 ** torch.arange(4)
        self.register_buffer("cos", angle.cos())
        self.register_buffer("sin", angle.sin())

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        x = 4 * self.tokens(ids)
        q, k, v = self.qkv(self.gain * (x * (x.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt())).split([16, 8, 8], -1)
        q, k, v = (y.unflatten(-1, (-1, 8)) for y in (q, k, v))
        cos, sin = self.cos[:, None], self.sin[:, None]
        q = torch.view_as_complex(q.unflatten(-1, (4, 2))) * torch.complex(cos, sin)
        even, odd = k[..., 0::2], k[..., 1::2]
        k = torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)
        turned, rest = v[..., :4], v[..., 4:]
        half = torch.cat([-turned[..., 2:], turned[..., :2]], -1)
        v = torch.cat([turned * cos[..., [0, 1, 0, 1]] + half * sin[..., [0, 1, 0, 1]], rest / 2], -1)
        parts = (y.transpose(1, 2) for y in (torch.view_as_real(q).flatten(-2), k, v))
        y = F.scaled_dot_product_attention(*parts, is_causal=True, enable_gqa=True)
        x = x + self.proj(y.transpose(1, 2).flatten(2)) * self.scale
        y = self.up(x)
        y = 0.5 * y * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (y + 0.044715 * y**3)))
        y = torch.cat([x, torch.tanh(self.down(y))], -1)
        return {"aside": x, "logits": self.head(y)}


def gpt() -> nn.Module:
    return CharGPT(LENGTH, VOCABULARY, width=16, blocks=2, heads=2)


def vit() -> nn.Module:
    return ViTTiny(3, 4, width=24, blocks=1, heads=3)


def classes_second(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output, target)


Case = tuple[Callable[[], nn.Module], str, Callable[[Any, Any], Tensor]]
CASES: dict[str, Case] = {
    "gpt": (gpt, "text", NextToken()),
    "llama": (Llama, "text", NextToken()),
    "gpt2": (GPT2, "text", classes_second),
    "rotary": (Rotary, "text", NextToken()),
    "relaid": (Relaid, "series", F.cross_entropy),
    "vit": (vit, "images", F.cross_entropy),
    "encoder": (Series, "series", F.cross_entropy),
    "encoder, norms first": (lambda: Series("last", norm_first=True, activation="gelu"), "series", F.cross_entropy),
    "shared": (Shared, "series", F.cross_entropy),
    "dropout": (lambda: Series(p=0.4), "series", F.cross_entropy),
    **{f"padding, {how}": (make, "text", first_label) for how, make in PADDING.items()},
    **SEQUENCES,
    "dropout in attention": (lambda: Series(p=0.1, dropout=0.1), "series", F.cross_entropy),
    **{
        f"attention, {how}": (lambda how=how, p=p: Explicit(how, p), "series", F.cross_entropy)
        for how, p in EXPLICIT.items()
    },
    "another loss": (Series, "series", lambda y, _: y.square().mean()),
}


def examples(kind: str, n: int = 5) -> tuple[Tensor, Tensor]:
    chance = torch.Generator().manual_seed(1)
    if kind == "text":
        x, y = (torch.randint(VOCABULARY, (n, LENGTH), generator=chance) for _ in range(2))
        return x, y
    shape = (3, 32, 32) if kind == "images" else (LENGTH, 3)
    return torch.randn(n, *shape, generator=chance), torch.randint(4, (n,), generator=chance)


def made(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return make()


def masks_of(model: nn.Module, d: float) -> dict[str, Tensor]:
    """Return masks of all matrices, those of tied weights apart."""
    chance = torch.Generator().manual_seed(5)
    products = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    tables = [m.weight for m in model.modules() if isinstance(m, nn.Embedding)]
    tied = {name for name, w in model.named_parameters() if id(w) in products and any(w is table for table in tables)}
    named = [(name, w) for name, w in model.named_parameters() if w.dim() > 1 and name not in tied]
    return {name: torch.rand(w.shape, generator=chance) < d for name, w in named}


def dense_steps(
    model: nn.Module, masks: dict[str, Tensor], optimizer: torch.optim.Optimizer, loss: Any, batches: Any
) -> list[float]:
    losses = []
    named = dict(model.named_parameters())
    for x, y in batches:
        optimizer.zero_grad()
        with torch.enable_grad():
            value = loss(apply_model(model.train(), x), y)
        value.backward()
        for parameter in named.values():  # of what the model does not use: weights decay all the same
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, mask in masks.items():
            named[name].grad.mul_(mask)  # type: ignore[union-attr]
        optimizer.step()
        for name, mask in masks.items():
            named[name].data.mul_(mask)
        losses.append(float(value.detach()))
    return losses
