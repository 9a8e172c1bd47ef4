"""Transformers of torchvision, timm and Hugging Face by the kernels, as they come: steps, threads, inference, runs."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedsieve import Run, local, rounds
from fedsieve.client.losses import NextToken
from fedsieve.client.training import params_of
from fedsieve.kernels import Predictor, Trainer, unavailable_reason
from fedsieve.kernels.checks import Unsupported
from fedsieve.kernels.dispatch import Inference
from fedsieve.kernels.inputs import Inputs, split_examples
from fedsieve.kernels.trace import read_graph
from fedsieve.types import InputError, apply_model, logits_of
from fedsieve.types.optimizers import SGD, AdamW
from outside_models import MODELS, library, run_of
from token_models import VOCABULARY, Rotary, dense_steps, made

pytestmark = pytest.mark.skipif(bool(unavailable_reason()), reason=str(unavailable_reason()))
TABLES = ("embed", "wte", "wpe", "class_token", "cls_token", "pos_embedding")
"""What is no matrix of a product, or a head's as well."""


def masks_of(model: nn.Module) -> dict[str, Tensor]:
    """Return masks of a fifth of all products' weights."""
    chance = torch.Generator().manual_seed(5)
    named = [(name, w) for name, w in model.named_parameters() if w.dim() > 1 and not any(t in name for t in TABLES)]
    return {name: torch.rand(w.shape, generator=chance) < 0.2 for name, w in named}


@pytest.mark.parametrize("name", ["torchvision_vit", "timm_vit", "gpt2", "llama", "bert"])
def test_they_train_and_compute_as_by_pytorch(name: str, native: None) -> None:
    """Batches of changing size, by SGD and AdamW, with dropout and stochastic depth; two threads give the same bits."""
    make, data = MODELS[name]
    model, examples = made(make), data().train
    x, y = split_examples(examples.x, 6)[0], examples.y[:6]  # type: ignore[index]
    loss: Any = NextToken() if y.dim() == 2 else F.cross_entropy
    masks = masks_of(model)
    assert sum(map(Tensor.numel, masks.values())) > 0.6 * sum(w.numel() for w in model.parameters())
    for each, mask in masks.items():
        model.get_parameter(each).data.mul_(mask)
    start, graph = copy.deepcopy(model.state_dict()), read_graph(model, Inputs.of(x))
    batches, eps = [(x, y), (split_examples(x, 3)[1], y[3:])], 1e-4
    for how in ({"optimizer": SGD(), "momentum": 0.9}, {"optimizer": AdamW(eps=eps)}):
        model.load_state_dict(start)
        parameters: Any = [*model.parameters()]
        optimizer: torch.optim.Optimizer = torch.optim.SGD(parameters, 0.02, 0.9, weight_decay=0.01)
        if "momentum" not in how:
            optimizer = torch.optim.AdamW(parameters, 0.02, eps=eps, weight_decay=0.01)
        torch.manual_seed(7)
        want = dense_steps(model, masks, optimizer, lambda output, target: loss(logits_of(output), target), batches)
        theirs, results = params_of(model), []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            model.load_state_dict(start)
            trainer = Trainer(model, masks, 6, lr=0.02, weight_decay=0.01, loss=loss, graph=graph, **how)  # type: ignore[arg-type]
            torch.manual_seed(7)
            got = [float(trainer.step(*batch)) for batch in batches]
            trainer.write_()
            assert got == pytest.approx(want, rel=1e-5)
            results.append(params_of(model))
        torch.set_num_threads(1)
        for each, value in theirs.items():
            torch.testing.assert_close(results[0][each], value, rtol=0, atol=1e-5)
            assert torch.equal(results[0][each], results[1][each])
    real, dense = trainer.multiply_adds
    assert real < 0.5 * dense
    predictor = Predictor(model, 4)
    with torch.no_grad():
        torch.testing.assert_close(predictor(x), logits_of(apply_model(model.eval(), x)), rtol=1e-5, atol=2e-6)
    assert predictor.reason is None


FAMILIES = {
    "Qwen2ForCausalLM": {"num_key_value_heads": 1},
    "GPTNeoXForCausalLM": {},
    "RobertaForSequenceClassification": {"pad_token_id": 1},
    "GPT2ForSequenceClassification": {"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 2},
    "BloomForSequenceClassification": {"pad_token_id": 1},
    "GemmaForCausalLM": {"num_key_value_heads": 1, "head_dim": 16},
    "DistilBertForSequenceClassification": {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64},
}
"""Of Hugging Face: with their own settings."""


@pytest.mark.parametrize("name", FAMILIES)
def test_other_families(name: str, native: None) -> None:
    """Biases of some products alone, rotations of some channels, heads by turns; padding, also behind a causal mask.

    Classes of the last token that is no padding; scales of 1 and a parameter; slopes of distances, GELU by powers.
    """
    module = library("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    own = {} if "dim" in FAMILIES[name] else sizes
    config = getattr(module, f"{name.partition('For')[0]}Config")
    settings = config(vocab_size=40, max_position_embeddings=16, num_labels=4, **own, **FAMILIES[name])
    ours, theirs = (made(lambda: getattr(module, name)(settings)) for _ in range(2))
    ids = torch.randint(40, (3, 8), generator=torch.Generator().manual_seed(2))
    x = {"input_ids": ids, "attention_mask": (torch.arange(8) < torch.tensor([[8], [5], [6]])).long()}
    x["input_ids"] = torch.where(x["attention_mask"] == 1, ids, 1)
    loss, y = (NextToken(), ids) if "Causal" in name else (F.cross_entropy, torch.arange(3))
    optimizer = torch.optim.SGD(theirs.parameters(), 0.1)
    torch.manual_seed(1)
    want = dense_steps(theirs, {}, optimizer, lambda output, target: loss(logits_of(output), target), [(x, y)])
    trainer = Trainer(ours, {}, 3, lr=0.1, loss=loss)  # type: ignore[arg-type]
    torch.manual_seed(1)
    assert float(trainer.step(x, y)) == pytest.approx(want[0], rel=1e-5)
    trainer.write_()
    for each, value in theirs.named_parameters():
        torch.testing.assert_close(ours.get_parameter(each), value, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["timm_vit", "llama", "bert"])
def test_their_runs_end_where_dense_runs_end(name: str, one_thread: None) -> None:
    run: Run = replace(run_of(name, "topk"), lr=0.02)
    dense, sparse = ([*rounds(run, local(kernels=kernels))][-1] for kernels in ("dense", "sparse"))
    assert [*sparse.kernels] == ["sparse"]
    assert sparse.multiply_adds == pytest.approx(dense.multiply_adds, rel=1e-3)
    for each, value in dense.model.items():
        torch.testing.assert_close(sparse.model[each], value, rtol=0, atol=1e-5)


def test_what_else_a_model_returns() -> None:
    """As GPT-2 comes: dataclasses, and no cache. Beside other tensors: for losses of logits alone."""
    module = library("transformers")
    config = module.GPT2Config(
        vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=8, bos_token_id=0, eos_token_id=0
    )
    model, x = module.GPT2LMHeadModel(config), torch.arange(16).view(2, 8) % VOCABULARY
    of_logits: Any = lambda output, _: output.logits.square().mean()  # noqa: E731
    Trainer(model, {}, 2, lr=0.1, loss=of_logits).step(x, x)
    assert config.use_cache
    test = Inference(model.eval(), "auto").of(x, 10**9, 2)
    assert test is not None
    with torch.no_grad():
        torch.testing.assert_close(test(x).logits, model(x).logits, rtol=1e-5, atol=2e-6)
    rotary, x = made(Rotary), x[:, :7]
    graph = read_graph(rotary, (7,), torch.int64)
    assert not graph.token_output.only
    with pytest.raises(Unsupported, match="a loss of one's own, of a model of tokens that returns more than"):
        Trainer(rotary, {}, 2, lr=0.1, graph=graph, loss=of_logits)
    assert Inference(rotary.eval(), "auto").of(x, 10**9, 2) is None


class Padded(nn.Module):
    """Two series, one of which says by its numbers what is padding, a mask of truth values, and a number.

    ``lowest`` is added where a key does not count.
    """

    def __init__(self, lowest: float = -torch.inf) -> None:
        super().__init__()
        self.lowest = lowest
        self.tokens, self.stem, self.qkv = nn.Embedding(VOCABULARY, 8, padding_idx=0), nn.Linear(3, 8), nn.Linear(8, 24)
        self.head, self.age = nn.Linear(8, 4), nn.Linear(1, 8)

    def forward(self, ids: Tensor, *more: Tensor) -> Tensor:
        series, mask, age = more
        x = self.tokens(ids) + self.stem(series)
        q, k, v = (y.unflatten(-1, (2, 4)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        later = torch.ones(7, 7, dtype=torch.bool).tril()
        x = x + F.scaled_dot_product_attention(q, k, v, (ids != 0)[:, None, None] & later).transpose(1, 2).flatten(2)
        barred = torch.zeros_like(mask, dtype=x.dtype).masked_fill(mask == 0, self.lowest)
        x = x + F.scaled_dot_product_attention(q, k, v, barred[:, None]).transpose(1, 2).flatten(2)
        logits: Tensor = self.head(x[:, 0] + self.age(age[:, None]))
        return logits


def test_masks_of_each_sample(native: None) -> None:
    """Of several inputs in order; what they say that cannot be is named. A token that may attend to none has 0."""
    chance = torch.Generator().manual_seed(3)
    ids, series = torch.randint(1, VOCABULARY, (5, 7), generator=chance), torch.randn(5, 7, 3, generator=chance)
    ids[:, 4:] *= torch.arange(5)[:, None] % 2
    ids[2, :3] = 0
    mask = torch.rand(5, 7, 7, generator=chance) < 0.5
    mask[1, 2] = False
    age = torch.rand(5, generator=chance)
    x, y, ours, theirs = (ids, series, mask, age), torch.arange(5) % 4, made(Padded), made(Padded)
    optimizer = torch.optim.SGD(theirs.parameters(), 0.1)
    trainer, losses = Trainer(ours, {}, 5, lr=0.1), []
    for part in (slice(0, 5), slice(1, 4)):
        batch = tuple(one[part] for one in x)
        optimizer.zero_grad()
        with torch.enable_grad():
            loss = F.cross_entropy(theirs(*batch), y[part])
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        assert float(trainer.step(batch, y[part])) == pytest.approx(losses[-1], rel=1e-5)
    trainer.write_()
    for name, value in theirs.named_parameters():
        torch.testing.assert_close(ours.get_parameter(name), value, rtol=0, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(Predictor(ours, 2)(x), theirs(*x), rtol=1e-5, atol=2e-6)
    for bad, line in (
        ((ids, series), "x must be 4 tensors, got tuple"),
        ((ids, series[:3], mask, age), r"x[1] must be a float32 tensor [5, 7, 3] on the CPU"),
        ((ids + 9, series, mask, age), r"x[0] must be of 0 to 12, got "),
    ):
        with pytest.raises(InputError) as error:
            trainer.step(bad, y)
        assert line in str(error.value)
    for low in (torch.finfo(torch.float32).min, -1e9):
        trainer = Trainer(made(lambda low=low: Padded(low)), {}, 5, lr=0.1)  # type: ignore[misc]
        with pytest.raises(InputError, match="a sample's attention mask leaves a token no token to attend to"):
            trainer.step(x, y)  # where PyTorch attends to all, as all scores are the same
