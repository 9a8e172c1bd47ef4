"""Transformers by the kernels: how they are read, that they train as by PyTorch, and what is refused, in one line."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engines import pickled
from fedsieve import InputError, LoRA, Run, Task, local, rounds
from fedsieve.client.losses import NextToken
from fedsieve.client.training import params_of
from fedsieve.client.vector_models import CharGPT, ViTTiny
from fedsieve.kernels import Predictor, Trainer, unavailable_reason
from fedsieve.kernels.abi import GatherOp
from fedsieve.kernels.checks import Unsupported
from fedsieve.kernels.tokens import AttentionLayer, EmbeddingLayer, TokenProduct
from fedsieve.kernels.trace import read_graph
from fedsieve.methods import FLASH, NST, PDST, FedAvg, SparseFedPP, ZeroFL
from fedsieve.sparse.layers import powerprop_, swat_
from fedsieve.types.optimizers import SGD, AdamW
from outside_models import texts

pytestmark = pytest.mark.skipif(bool(unavailable_reason()), reason=str(unavailable_reason()))
VOCABULARY, LENGTH = 13, 7
EPS = 1e-4
"""Of AdamW, where two ways to sum are compared: with 1e-8 it makes whole steps of what is only rounding."""


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
        layer = nn.TransformerEncoderLayer(12, 3, 20, dropout=0.0, batch_first=True, **how)
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
    "vit": (vit, "images", F.cross_entropy),
    "encoder": (Series, "series", F.cross_entropy),
    "encoder, norms first": (lambda: Series("last", norm_first=True, activation="gelu"), "series", F.cross_entropy),
    "shared": (Shared, "series", F.cross_entropy),
    "dropout": (lambda: Series(p=0.4), "series", F.cross_entropy),
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
    tied = {name for name in params_of(model) if isinstance(model, Llama) and name == "tokens.weight"}
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
            value = loss(model.train()(x), y)
        value.backward()
        for name, mask in masks.items():
            named[name].grad.mul_(mask)  # type: ignore[union-attr]
        optimizer.step()
        for name, mask in masks.items():
            named[name].data.mul_(mask)
        losses.append(float(value.detach()))
    return losses


@pytest.mark.parametrize("adam", [False, True], ids=["sgd", "adamw"])
@pytest.mark.parametrize("case", CASES)
def test_a_step_is_pytorchs(case: str, adam: bool, native: None) -> None:
    """Two batches, the second smaller, all matrices on masks; a trainer begun anew does it again to the bit."""
    make, kind, loss = CASES[case]
    ours, theirs = made(make), made(make)
    masks = masks_of(ours, 0.5)
    with torch.no_grad():
        for model in (ours, theirs):
            for name, mask in masks.items():
                model.get_parameter(name).mul_(mask)
    x, y = examples(kind)
    batches = [(x, y), (x[1:4], y[1:4])]
    parameters = [*theirs.parameters()]
    optimizer: torch.optim.Optimizer = torch.optim.SGD(parameters, 0.02, 0.9, weight_decay=0.01)
    if adam:
        optimizer = torch.optim.AdamW(parameters, 0.02, eps=EPS, weight_decay=0.01)
    torch.manual_seed(7)
    want = dense_steps(theirs, masks, optimizer, loss, batches)
    how: dict[str, Any] = {"optimizer": AdamW(eps=EPS)} if adam else {"optimizer": SGD(), "momentum": 0.9}
    start = copy.deepcopy(ours.state_dict())
    trainer = Trainer(ours, masks, 5, lr=0.02, weight_decay=0.01, loss=loss, **how)
    results = []
    for _ in range(2):
        ours.load_state_dict(start)
        if results:
            trainer.begin(0.02, 0.0 if adam else 0.9, 0.01)
        torch.manual_seed(7)
        got = [float(trainer.step(*batch)) for batch in batches]
        trainer.write_()
        results.append(copy.deepcopy(params_of(ours)))
    assert got == pytest.approx(want, rel=1e-5)
    for name, value in theirs.named_parameters():
        torch.testing.assert_close(results[0][name], value.detach(), rtol=0, atol=1e-5)
        assert torch.equal(results[0][name], results[1][name])
    assert not trainer.fallbacks
    gathers = [op for op in trainer.lowered.program.steps if isinstance(op, GatherOp)]
    assert case == "dropout" or {op.width for op in gathers} <= {-(-3 * n // 16) for n in (1, 7, 64, 65)}
    assert float(trainer.step(x, y)) < got[0] if case != "dropout" else True


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


class Refused(nn.Module):
    """A model of tokens with one thing that the kernels do not have."""

    calls: Tensor
    rows: Tensor

    def __init__(self, what: str):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("rows", torch.ones(1, 2, 8))
        self.what, self.tokens, self.norm = what, nn.Embedding(VOCABULARY, 8), nn.LayerNorm(8)
        self.proj, self.scale = nn.Linear(8, 8), nn.Parameter(torch.ones(8))
        self.wide = nn.Linear(8 * LENGTH, 3)
        self.conv, self.unused = nn.Conv1d(8, 8, 3, padding=1), nn.Linear(2, 2)

    def forward(self, ids: Tensor) -> Any:
        x = self.proj(self.norm(self.tokens(ids)))
        q = x.unflatten(-1, (2, 4)).transpose(1, 2)
        if self.what == "mask":
            bias = torch.arange(LENGTH).float().neg().expand(LENGTH, LENGTH)
            return F.scaled_dot_product_attention(q, q, q, bias)
        if self.what == "dropout":
            return F.scaled_dot_product_attention(q, q, q, dropout_p=0.5)
        if self.what == "scores":
            return (q @ q.transpose(-1, -2)).softmax(-1) @ q
        if self.what == "scale":
            return x * self.scale
        if self.what == "conv":
            return self.conv(x.transpose(1, 2))
        if self.what == "mixed":
            return x + x[:, [1, 0, *range(2, LENGTH)]].roll(1, 0)
        if self.what == "shuffled":
            return self.proj(x.unflatten(-1, (2, 4)).transpose(-1, -2).flatten(-2))
        if self.what == "batch":
            return x.view(3, LENGTH, 8) if x.shape[0] == 3 else x
        if self.what == "flattened":
            return self.wide(x.flatten(1))
        if self.what == "copy":
            y = x.clone()
            y += self.proj(x)
            return x + y
        if self.what == "noise":
            return x + torch.randn(LENGTH, 8)
        if self.what == "soft mask":
            return F.scaled_dot_product_attention(q, q, q, -torch.ones(LENGTH, LENGTH).triu(1))
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
        return (x, x) if self.what == "two" else (x,) if self.what == "tuple" else x


@pytest.mark.parametrize(
    ("what", "line"),
    [
        ("mask", "attention with a mask other than the causal one"),
        ("dropout", "attention with dropout"),
        ("scores", "a matrix product of two activations, apart from scaled_dot_product_attention"),
        ("scale", "a product with a parameter, apart from linear layers"),
        ("conv", "conv: the kernels do not know conv1d"),
        ("mixed", "tokens that stand in other places than those that they meet"),
        ("shuffled", "proj: channels in another order than they were made"),
        ("branch", "the model cannot be exported"),
        ("batch", "view in a way that cannot be followed (shape '[3, 7, 8]' is invalid for input of size 112)"),
        ("copy", "a change in place of a tensor that is used under another name, or of a part of one"),
        ("noise", "random numbers apart from the samples (randn)"),
        ("soft mask", "attention with a mask other than the causal one"),
        ("counter", "a buffer that changes from call to call (add_)"),
        ("repeated", "attention of queries, keys and values of other sizes"),
        ("samples", "cat in a way that cannot be followed"),
        ("constant", "cat in a way that cannot be followed"),
        ("tuple", "a model of tokens that returns more than one tensor"),
        ("scalar", "mean in a way that cannot be followed"),
        ("flattened", "wide: several tokens as the channels of one"),
        ("two", "a model of tokens that returns more than one tensor"),
        ("rest", "scale: no layer uses it"),
    ],
)
def test_what_the_kernels_do_not_have_is_named(what: str, line: str) -> None:
    model = made(lambda: Refused(what))
    with pytest.raises(Unsupported) as error:
        read_graph(model, (LENGTH,), torch.int64)
    assert not model.get_buffer("calls").any()
    assert line in str(error.value) or (what == "rest" and "no layer uses" in str(error.value))
    assert "\n" not in str(error.value)


def test_bad_tokens_and_labels_are_named() -> None:
    x, y = examples("text")
    trainer = Trainer(made(gpt), {}, 5, lr=0.1, loss=NextToken())
    trainer.step(x, y)
    for bad, line in (
        ((x + 9, y), "x must be of 0 to 12, got "),
        ((x, y - 5), "y must be of 0 to 12, got -"),
        ((x[:, :3], y), "x must be a int64 tensor [any, 7] on the CPU, got int64 [5, 3] on cpu"),
        ((x.float(), y), "x must be a int64 tensor [any, 7] on the CPU, got float32 [5, 7] on cpu"),
        ((x, y[:3]), "y must be a int64 tensor [5, 7] on the CPU, got int64 [3, 7] on cpu"),
    ):
        with pytest.raises(InputError) as error:
            trainer.step(*bad)
        assert line in str(error.value)
    mask = {"tokens.weight": torch.ones(VOCABULARY, 16, dtype=torch.bool).tril()}
    trainer = Trainer(made(Llama), mask, 5, lr=0.1, loss=NextToken())
    with pytest.raises(Unsupported, match=r"a mask on tokens.weight, the weight of an embedding and of a product"):
        trainer.step(x, y)


class TinyGPT(CharGPT):
    def __init__(self) -> None:
        super().__init__(8, 40, 16, 2, 2)


@pytest.mark.parametrize(
    "method",
    [FedAvg(), FLASH(density=0.3, c_d=2), PDST(0.4), NST(density=0.4), SparseFedPP(sparsity=0.5), ZeroFL(0.5)],
    ids=lambda method: type(method).__name__,
)
def test_a_federation_ends_where_dense_training_ends(method: Any, one_thread: None) -> None:
    """Every kind of mask, SWAT and powerpropagation, with AdamW; and to the bit by a worker that is sent everything."""
    task = Task(TinyGPT, texts, 3, loss=NextToken())
    run_ = Run(method, task, rounds=2, per_round=3, epochs=1, batch=4, lr=0.001, optimizer=AdamW(eps=EPS))
    engines = local(kernels="dense"), local(kernels="sparse"), pickled("sparse")
    dense, sparse, there = ([*rounds(run_, engine)][-1] for engine in engines)
    assert [*sparse.kernels] == ["sparse"]
    assert sparse.multiply_adds == pytest.approx(dense.multiply_adds, rel=1e-3)
    assert sparse.multiply_adds_dense == dense.multiply_adds_dense
    for name, value in dense.model.items():
        torch.testing.assert_close(sparse.model[name], value, rtol=0, atol=1e-5)
        assert torch.equal(sparse.model[name], there.model[name])


def test_threads_and_storage(native: None) -> None:
    """Two threads give the bits of one; bfloat16 storage the losses of float32 to its precision."""
    x, y = examples("images", 4)
    results = {}
    for threads, storage in ((1, "fp32"), (2, "fp32"), (1, "bf16")):
        torch.set_num_threads(threads)
        model = made(vit)
        trainer = Trainer(model, masks_of(model, 0.4), 4, lr=0.05, storage=storage, optimizer=AdamW(eps=EPS))  # type: ignore[arg-type]
        losses = [float(trainer.step(x, y)) for _ in range(3)]
        trainer.write_()
        results[threads, storage] = losses, params_of(model)
    torch.set_num_threads(1)
    for name, value in results[1, "fp32"][1].items():
        assert torch.equal(value, results[2, "fp32"][1][name])
    assert results[1, "bf16"][0] == pytest.approx(results[1, "fp32"][0], rel=2e-2)


@pytest.mark.parametrize("case", CASES)
def test_inference_is_pytorchs(case: str, native: None) -> None:
    """More samples than a pass takes, one, none; with tokens that there are not."""
    make, kind, _ = CASES[case]
    model = made(make).eval()
    for name, mask in masks_of(model, 0.5).items():
        model.get_parameter(name).data.mul_(mask)
    predictor, x = Predictor(model, 4), examples(kind, 9)[0]
    with torch.no_grad():
        want = model(x)
    for n in (9, 1, 0):
        torch.testing.assert_close(predictor(x[:n]), want[:n], rtol=1e-5, atol=2e-6)
    assert predictor.reason is None
    if kind == "text":
        with pytest.raises(InputError, match="x must be of 0 to 12, got 13"):
            predictor(x + (x == 3) * 10)


def test_adapters_train_on_a_frozen_sparse_base(native: None) -> None:
    """The base's zeros cost nothing, and it stays as it is; biases and norms are frozen, too."""
    model, other = (LoRA(rank=2, alpha=1.0).attach_(made(gpt)) for _ in range(2))
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for one in (model, other):
            for name, w in one.named_parameters():
                if name.endswith("lora_B.weight"):
                    w.copy_(torch.randn(w.shape, generator=generator.manual_seed(len(name))))
                elif w.dim() == 2 and "blocks" in name and "lora" not in name:
                    w.mul_(torch.rand(w.shape, generator=generator.manual_seed(w.numel())) < 0.3)
    x, y = examples("text")
    start = copy.deepcopy(other.state_dict())
    adapters = [w for w in other.parameters() if w.requires_grad]
    dense_steps(other, {}, torch.optim.AdamW(adapters, 0.02, eps=EPS), NextToken(), [(x, y)] * 2)
    trainer = Trainer(model, {}, 5, lr=0.02, loss=NextToken(), optimizer=AdamW(eps=EPS), weight_decay=0.01)
    for _ in range(2):
        trainer.step(x, y)
    real, dense = trainer.multiply_adds
    assert real < 0.6 * dense
    trainer.write_()
    for name, w in other.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), w, rtol=0, atol=1e-5)
        assert w.requires_grad or torch.equal(model.get_parameter(name), start[name])


@pytest.mark.parametrize("method", [FedAvg(), FLASH(density=0.5, c_d=2)], ids=["fedavg", "flash"])
def test_a_federation_of_adapters(method: Any, one_thread: None) -> None:
    task = Task(TinyGPT, texts, 3, loss=NextToken(), adapters=LoRA(rank=2))
    run_ = Run(method, task, rounds=2, per_round=3, epochs=1, batch=4, lr=0.001, optimizer=AdamW(eps=EPS))
    dense, sparse = ([*rounds(run_, local(kernels=kernels))][-1] for kernels in ("dense", "sparse"))
    assert [*sparse.kernels] == ["sparse"]
    assert sparse.multiply_adds == pytest.approx(dense.multiply_adds)
    for name, value in dense.model.items():
        torch.testing.assert_close(sparse.model[name], value, rtol=0, atol=1e-5)


@pytest.mark.parametrize("rule", ["swat", "power"])
def test_what_is_selected_anew_in_smaller_batches(rule: str, native: None) -> None:
    """SWAT's activations, and those that powerpropagation's layers keep: of the tokens that there are."""
    chance = torch.Generator().manual_seed(4)
    x, y = torch.randn(6, LENGTH, 3, generator=chance), torch.randint(4, (6,), generator=chance)
    batches = [(x, y), (x[1:3], y[1:3]), (x[3:], y[3:])]
    models = []
    for _ in range(2):
        model = made(Series)
        names = (
            "encoder.layers.0.linear1.weight",
            "encoder.layers.0.linear2.weight",
            "encoder.layers.1.linear1.weight",
        )
        if rule == "swat":
            models.append(swat_(model, dict.fromkeys(names, 0.4), 1))
        else:
            with torch.no_grad():
                for name in names:  # some zeros, and nothing near them: powerpropagation has no slope there
                    w = model.get_parameter(name)
                    w.add_(w.sign(), alpha=0.1).mul_(torch.rand(w.shape, generator=chance.manual_seed(1)) < 0.6)
            models.append(powerprop_(model, names, 1.25, True, cached=False))
    ours, theirs = models
    want = dense_steps(theirs, {}, torch.optim.SGD(theirs.parameters(), 0.02), F.cross_entropy, batches)
    trainer = Trainer(ours, {}, 6, lr=0.02)
    got = [float(trainer.step(*batch)) for batch in batches]
    trainer.write_()
    assert got == pytest.approx(want, rel=1e-5)
    for name, value in theirs.named_parameters():
        torch.testing.assert_close(ours.get_parameter(name), value.detach(), rtol=0, atol=1e-5)
