"""How transformers are read, and what is refused, in one line."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedsieve.kernels import unavailable_reason
from fedsieve.kernels.checks import Unsupported
from fedsieve.kernels.tokens import AttentionLayer, EmbeddingLayer, TokenProduct
from fedsieve.kernels.trace import read_graph
from token_models import GPT2, LENGTH, VOCABULARY, Llama, Series, made, vit

pytestmark = pytest.mark.skipif(bool(unavailable_reason()), reason=str(unavailable_reason()))


def test_what_the_reader_sees() -> None:
    graph = read_graph(made(Llama), (LENGTH,), torch.int64)
    (attention,) = (layer for layer in graph.layers if isinstance(layer, AttentionLayer))
    assert (attention.heads, attention.kv_heads, attention.size, attention.causal) == (4, 2, 4, True)
    (table,) = (layer for layer in graph.layers if isinstance(layer, EmbeddingLayer))
    assert table.tied
    assert graph.token_output.labels
    assert graph.output.sizes == (LENGTH, VOCABULARY)
    graph = read_graph(made(GPT2), (LENGTH,), torch.int64)
    names = [layer.weight_name for layer in graph.layers if isinstance(layer, TokenProduct) and layer.transposed]
    assert names == ["qkv.weight", "proj.weight"]
    assert not graph.token_output.labels
    graph = read_graph(made(Series), (LENGTH, 3))
    assert graph.layers[1].weight_name == "stem.weight"  # type: ignore[attr-defined]
    named = [layer.weight_name for layer in graph.layers if isinstance(layer, TokenProduct)]
    assert "encoder.layers.0.self_attn.in_proj_weight" in named
    model = made(vit)
    model.train(False)
    read_graph(model, (3, 32, 32))
    assert not any(module.training for module in model.modules())


SCORES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "no softmax": lambda q, scores, _: scores @ q,
    "no key": lambda q, scores, _: (
        scores.masked_fill(torch.ones(LENGTH, LENGTH).triu() > 0, -torch.inf).softmax(-1) @ q
    ),
    "softmax over queries": lambda q, scores, _: scores.softmax(-2) @ q,
    "weights times 2": lambda q, scores, _: (scores.softmax(-1) * 2) @ q,
    "turned weights": lambda q, scores, _: scores.softmax(-1).mT @ q,
    "scores alone": lambda q, scores, _: scores.softmax(-1).flatten(1, 2),
    "trained bias": lambda q, scores, scale: (scores + scale).softmax(-1) @ q,
    "filled with 0": lambda q, scores, _: scores.masked_fill(torch.eye(LENGTH) > 0, 0).softmax(-1) @ q,
    "minus scores": lambda q, scores, _: (
        (-scores.masked_fill(torch.ones(LENGTH, LENGTH).triu(1) > 0, -1e9)).softmax(-1) @ q
    ),
    "low": lambda q, scores, _: (scores - 1e9 * (torch.arange(LENGTH) == 1)[:, None]).softmax(-1) @ q,
    "mask of a sample": lambda q, scores, _: scores.masked_fill(scores > 0, -torch.inf).softmax(-1) @ q,
    "dropout of scores": lambda q, scores, _: F.dropout(scores, 0.5).softmax(-1) @ q,
    "all dropped": lambda q, scores, _: F.dropout(scores.softmax(-1), 1.0) @ q,
    "dropout used twice": lambda q, scores, _: (lambda weights: weights @ q + weights @ (2 * q))(
        F.dropout(scores.softmax(-1))
    ),
    "dropout late": lambda q, scores, _: (lambda weights, x: weights @ x.unflatten(-1, (2, 4)).transpose(1, 2))(
        F.dropout(scores.softmax(-1)), F.dropout(q.transpose(1, 2).flatten(2))
    ),
    "sum": lambda q, scores, _: (scores + scores).softmax(-1) @ q,
    "three factors": lambda q, scores, _: torch.einsum("nhqk,nhkd,nhkd->nhqd", scores.softmax(-1), q, q),
}
"""Attention as it is not: of queries, their products with themselves, and a parameter."""


SIZES: dict[str, Callable[[Tensor], float]] = {
    "len": len,
    "root of the batch": lambda ids: math.sqrt(ids.shape[0]),
    "batch of 3": lambda ids: 2 if ids.shape[0] == 3 else 1,
    "larger batch": lambda ids: 2 if ids.shape[0] > 3 else 1,
    "odd batch": lambda ids: 2 if ids.shape[0] % 2 else 1,
    "tokens of the batch": lambda ids: 2 if ids.numel() > 3 * LENGTH else 1,
}
"""Numbers that depend on how many samples there are."""


def by_samples(ids: Tensor) -> Tensor:
    """Return numbers of each sample by a constant that all samples have changed."""
    one = torch.zeros(LENGTH, dtype=torch.int64)
    one.copy_(ids.sum(0))
    return ids * one


INPUTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "of all samples": lambda x, ids: x * (ids.float().mean() / ids.float().mean(1))[:, None, None],
    "of each place": lambda x, ids: x * ids.float().mean(0)[:, None],
    "samples in another order": lambda x, ids: x * ids.flip(0)[..., None],
    "an input changed in place": lambda x, ids: x * ids.fill_(1)[..., None],
    "a constant changed by samples": lambda x, ids: x * by_samples(ids)[..., None],
    "largest of all": lambda x, ids: x * (ids / ids.max())[..., None],
    "one number of all": lambda x, ids: x * ids.max().item(),
    "as many as there are": lambda x, ids: x * ids[ids != 0].shape[0],
    "a token of others": lambda x, ids: x * (1 + (ids == 9).flip(0))[..., None],
    "a quarter of the batch": lambda x, ids: x * (ids * (1 + ids.shape[0] // 4))[..., None],
    "noise by an input": lambda x, ids: x * torch.bernoulli(ids / 9)[..., None],
    "chosen": lambda x, ids: torch.where((ids == 0)[..., None], x, 2.0),
    "picked twice": lambda x, ids: x[torch.arange(ids.shape[0]), ids.argmax(1), ids.argmax(1)],
    "picked of others": lambda x, ids: x[torch.zeros_like(ids[:, 0]), ids.argmax(1)],
    "computed": lambda x, ids: x.masked_fill(x > 0, 0.0),
}  # fmt: skip
"""What is computed of the inputs alone, in ways that are not of each sample, or for what the kernels have nothing."""


class Refused(nn.Module):
    """A model of tokens with one thing that the kernels do not have."""

    calls: Tensor
    rows: Tensor

    def __init__(self, what: str):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("rows", torch.ones(1, 2, 8))
        self.count, self.lengths, self.last = 0, list[int](), torch.zeros(1)
        self.what, self.tokens, self.norm = what, nn.Embedding(VOCABULARY, 8), nn.LayerNorm(8)
        self.proj, self.scale = nn.Linear(8, 8), nn.Parameter(torch.ones(8))
        self.wide, self.other = nn.Linear(8 * LENGTH, 3), nn.Linear(8, 4)
        self.conv, self.unused = nn.Conv1d(8, 8, 3, padding=1), nn.Linear(2, 2)

    def forward(self, ids: Tensor) -> Any:
        x = self.proj(self.norm(self.tokens(ids)))
        q = x.unflatten(-1, (2, 4)).transpose(1, 2)
        if self.what == "mask":
            barred = torch.ones(LENGTH, LENGTH).triu() * torch.finfo(torch.float32).min
            return F.scaled_dot_product_attention(q, q, q, barred)
        if self.what in INPUTS:
            return INPUTS[self.what](x, ids)
        if self.what == "a buffer changed by an input":
            return x * self.calls.copy_(ids[0, 0])
        if self.what == "trained mask":
            return F.scaled_dot_product_attention(q, q, q, self.scale[:LENGTH].expand(LENGTH, LENGTH))
        if self.what in SCORES:
            return SCORES[self.what](q, q @ q.transpose(-1, -2), self.scale[:LENGTH])
        if self.what == "part of a weight":
            return F.linear(x, self.wide.weight[1:, :8], self.wide.bias[1:])
        if self.what == "some rows":
            return F.linear(x, self.other.weight[2:], self.other.bias[2:])
        if self.what == "scale":
            return x * self.scale[:1]
        if self.what == "softplus":
            return (1 + x**2) ** 0.5
        if self.what == "spread":
            return x / x.std(-1, keepdim=True)
        if self.what == "late":
            noise = x.new_empty(x.shape[0], 1, 1).bernoulli_(0.5)
            return F.dropout(x) * noise
        if self.what == "centred":
            return x - x.mean(-1, keepdim=True)
        if self.what == "set":
            return {"features": x}
        if self.what == "conv":
            return self.conv(x.transpose(1, 2))
        if self.what == "mixed":
            return x + x[:, [1, 0, *range(2, LENGTH)]].roll(1, 0)
        if self.what == "shuffled":
            return self.proj(torch.stack([x[:, 0, [0, 3, 1, 2, 5, 4, 7, 6]], x[:, 1]], 1))
        if self.what == "batch":
            return x.view(3, LENGTH, 8) if x.shape[0] == 3 else x
        if self.what == "flattened":
            return self.wide(x[:, [0, 0, *range(2, LENGTH)]].flatten(1))
        if self.what == "copy":
            y = x.clone()
            y += self.proj(x)
            return x + y
        if self.what == "noise":
            return x + torch.randn(LENGTH, 8)
        if self.what == "padded place":
            return x + F.embedding(torch.arange(LENGTH), self.tokens.weight, 0)
        if self.what == "table in another shape":
            return F.embedding(ids, self.tokens.weight.view(-1, 4))
        if self.what == "share of the batch":
            return x / ids.shape[0]
        if self.what == "quarter of the batch":
            return x * (1 + ids.shape[0] // 4)
        if self.what == "sum of the batch":
            return x + torch.ones(ids.shape[0], LENGTH, 8).sum(0)
        if self.what in SIZES:
            return x * SIZES[self.what](ids)
        if self.what == "count":
            self.count += 1
            return x * self.count
        if self.what == "list":
            self.lengths.append(1)
            return x * len(self.lengths)
        if self.what == "memory":
            self.last, last = x.detach(), self.last
            return x + last.mean()
        if self.what == "counter":
            self.calls += 1
            return x * self.calls
        if self.what == "repeated":
            h = x.unsqueeze(1).expand(-1, 3, -1, -1)
            return F.scaled_dot_product_attention(h, h, h)
        if self.what in ("samples", "constant"):
            other = x if self.what == "samples" else self.rows.expand(len(x), -1, -1)
            return torch.cat([other, x], 0 if self.what == "samples" else 1)
        if self.what == "scalar":
            return x * x.mean()
        if self.what == "branch" and x.sum() > 0:
            return x
        return x


@pytest.mark.parametrize(
    ("what", "line"),
    [
        ("mask", "attention with a query whose keys are all masked, by finite numbers"),
        ("no key", "attention with a query that may attend to no key, whose softmax is NaN"),
        ("trained mask", "attention with a mask that the model computes or trains"),
        ("of each place", "numbers of the inputs whose first dimension is not the samples'"),
        *(
            (what, "numbers of the inputs that depend on other samples")
            for what in ("of all samples", "samples in another order")
        ),
        ("an input changed in place", "a change in place of what the model is given, or keeps"),
        ("a buffer changed by an input", "a change in place of what the model is given, or keeps"),
        ("a constant changed by samples", "numbers of the inputs that depend on other samples"),
        ("noise by an input", "random numbers apart from the samples (bernoulli)"),
        ("chosen", "a choice between a tensor and a number other than 0, and no attention's scores"),
        ("picked twice", "an index that is not x[torch.arange(n), places], of tokens and of numbers of the inputs"),
        ("picked of others", "an index that is not x[torch.arange(n), places], of tokens and of numbers of the inputs"),
        ("computed", "the kernels do not know gt"),
        ("largest of all", "numbers of the inputs that depend on other samples"),
        ("one number of all", "sizes that depend on numbers of the inputs"),
        ("as many as there are", "sizes that depend on numbers of the inputs"),
        ("a token of others", "numbers of the inputs that depend on other samples"),
        ("a quarter of the batch", "numbers of the inputs that depend on other samples, or on how many there are"),
        ("minus scores", "attention's scores that were masked, times -1"),
        ("low", "attention with a query whose keys are all masked, by finite numbers"),
        ("no softmax", "a product of attention's scores without a softmax"),
        ("softmax over queries", "a softmax that is not that of attention's keys"),
        ("weights times 2", "attention's weights in a product with a number"),
        ("turned weights", "attention's scores or weights in another order, or a part of them"),
        ("scores alone", "attention's scores or weights in an operation that is not attention's"),
        ("trained bias", "a sum of attention's scores with what the model computes or trains"),
        ("filled with 0", "attention's scores filled with 0, which still counts"),
        ("mask of a sample", "the kernels do not know gt"),
        ("dropout of scores", "dropout of attention's scores, or twice of its weights"),
        ("all dropped", "dropout of everything (p is 1)"),
        ("dropout used twice", "attention's weights that are used again after dropout"),
        ("dropout late", "random numbers that others are drawn before they are used, or that are not used"),
        ("sum", "a sum of attention's scores with what the model computes or trains"),
        ("three factors", "einsum of nhqk,nhkd,nhkd->nhqd"),
        ("part of a weight", "a product with a part of a weight that is not some of its rows"),
        ("some rows", "products with parts of other.weight that are not all of its rows, each once"),
        ("scale", "a product with a parameter that has not one number a channel"),
        ("softplus", "a function of each number that the kernels do not have"),
        ("spread", "the kernels do not know std"),
        ("late", "random numbers that others are drawn before they are used, or that are not used"),
        ("centred", "a mean that is not over the tokens of [n, length, channels]"),
        ("set", "a model of tokens, and the model returns dict, where a tensor is needed, or what has logits"),
        ("conv", "conv: the kernels do not know conv1d"),
        ("mixed", "tokens that stand in other places than those that they meet"),
        ("shuffled", "proj: channels in another order than they were made, each in its own way"),
        ("branch", "the model cannot be exported"),
        ("batch", "a batch of another size is computed otherwise"),
        ("copy", "a change in place of a tensor that is used under another name, or of a part of one"),
        ("noise", "random numbers apart from the samples (randn)"),
        ("count", "the model keeps count from one call to the next"),
        ("list", "the model keeps lengths from one call to the next"),
        ("memory", "the model keeps last from one call to the next"),
        ("counter", "a buffer that changes from call to call (add_)"),
        ("repeated", "attention of queries, keys and values of other sizes"),
        ("samples", "cat in a way that cannot be followed"),
        ("constant", "a batch of another size is computed otherwise"),
        ("scalar", "mean in a way that cannot be followed"),
        ("flattened", "wide: several tokens as the channels of one, some of them twice"),
        ("padded place", "constant numbers of an embedding, one of which is its padding_idx"),
        ("table in another shape", "an embedding in a table of another shape than its parameter has"),
        ("share of the batch", "numbers that depend on the batch's size"),
        ("sum of the batch", "numbers that depend on the batch's size"),
        ("quarter of the batch", "numbers that depend on the batch's size"),
        *((what, "a batch of another size is computed otherwise") for what in SIZES),
    ],
)
def test_what_the_kernels_do_not_have_is_named(what: str, line: str, capfd: pytest.CaptureFixture[str]) -> None:
    model = made(lambda: Refused(what))
    with pytest.raises(Unsupported) as error:
        read_graph(model, (LENGTH,), torch.int64)
    assert not model.get_buffer("calls").any()
    assert (model.count, model.lengths, model.last) == (0, [], torch.zeros(1))
    assert line in str(error.value)
    assert "\n" not in str(error.value)
    assert capfd.readouterr() == ("", "")  # PyTorch prints what it had exported
