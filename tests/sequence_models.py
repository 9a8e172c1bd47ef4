"""Small transformers with attention between two sequences, as outsiders write it."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY, LENGTH = 13, 7
"""As in token_models."""
SOURCE = 4
"""The tokens of the first sequence; the rest is the second."""


class Cross(nn.Module):
    """Attention of queries to the keys of another sequence, written out or by PyTorch's operation."""

    def __init__(self, written_out: bool = False, **how: Any):
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(12, 12) for _ in range(4))
        self.written_out, self.how = written_out, how

    def forward(self, x: Tensor, y: Tensor, barred: Tensor | None = None) -> Tensor:
        q, k, v = (
            part(of).unflatten(-1, (3, 4)).transpose(1, 2) for part, of in ((self.q, x), (self.k, y), (self.v, y))
        )
        if self.written_out:
            scores = q @ k.mT / 2
            scores = scores if barred is None else scores.masked_fill(barred, -1e9)
            z = F.dropout(scores.softmax(-1), 0.2, self.training) @ v
        else:
            z = F.scaled_dot_product_attention(q, k, v, None if barred is None else ~barred, **self.how)
        out: Tensor = self.out(z.transpose(1, 2).flatten(2))
        return out


class Translator(nn.Module):
    """An encoder and a decoder of one table, also the head's where it is ``tied``; source padding is left out."""

    def __init__(self, written_out: bool = False, tied: bool = False):
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCABULARY, 12), nn.Embedding(LENGTH, 12)
        self.encode, self.decode, self.cross = Cross(), Cross(is_causal=True), Cross(written_out)
        self.norm, self.head = nn.LayerNorm(12), nn.Linear(12, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        source, target = ids[:, :SOURCE], ids[:, SOURCE:]
        x = self.tokens(source) + self.places(torch.arange(SOURCE))
        x = x + self.encode(x, x)
        y = self.tokens(target) + self.places(torch.arange(LENGTH - SOURCE))
        y = y + self.decode(y, y)
        first = torch.arange(SOURCE) == 0
        y = y + self.cross(y, x, ((source < 3) & ~first)[:, None, None])
        logits: Tensor = self.head(self.norm(y))
        return logits


class Seq2Seq(nn.Module):
    """nn.Transformer, whose attention to another sequence has parts of its in-projection; a product in two parts."""

    def __init__(self, norm_first: bool = False):
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, 12)
        with warnings.catch_warnings():  # of nested tensors, which are not used
            warnings.simplefilter("ignore")
            self.transformer = nn.Transformer(12, 3, 1, 1, 20, 0.1, batch_first=True, norm_first=norm_first)
        self.both, self.head = nn.Linear(12, 24, bias=norm_first), nn.Linear(12, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        source, target = ids[:, :SOURCE], ids[:, SOURCE:]
        later = nn.Transformer.generate_square_subsequent_mask(LENGTH - SOURCE) < 0
        first = torch.arange(SOURCE) == 0
        barred = (source < 3) & ~first
        y = self.transformer(
            self.tokens(source), self.tokens(target), tgt_mask=later, src_key_padding_mask=barred,
            memory_key_padding_mask=barred,
        )  # fmt: skip
        bias = self.both.bias
        y = y + F.linear(y, self.both.weight[:12], None if bias is None else bias[:12])
        y = y + F.linear(y.relu(), self.both.weight[12:], None if bias is None else bias[12:])
        logits: Tensor = self.head(y)
        return logits


class Pooler(nn.Module):
    """Queries that are parameters attend to all tokens (attention pooling); then a class token alone does."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.latents = nn.Linear(3, 12), nn.Parameter(torch.randn(2, 12))
        self.pool, self.last, self.head = Cross(), Cross(is_causal=True), nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.latents.expand(x.shape[0], -1, -1)
        y = self.pool(y, x)
        z = x[:, :1] + self.last(x[:, :1], x)
        logits: Tensor = self.head(torch.cat([y.mean(1), z[:, 0]], -1))
        return logits


def second_part(output: Tensor, target: Tensor) -> Tensor:
    """Return the loss of the second sequence's targets."""
    return F.cross_entropy(output.flatten(0, 1), target[:, SOURCE:].flatten())


SEQUENCES: dict[str, tuple[Callable[[], nn.Module], str, Callable[[Tensor, Tensor], Tensor]]] = {
    "translator": (Translator, "text", second_part),
    "translator, written out": (lambda: Translator(True), "text", second_part),
    "translator, tied": (lambda: Translator(tied=True), "text", second_part),
    "nn.Transformer": (Seq2Seq, "text", second_part),
    "nn.Transformer, norms first": (lambda: Seq2Seq(True), "text", second_part),
    "pooler": (Pooler, "series", F.cross_entropy),
}
"""The models, what they are given, and their losses."""
