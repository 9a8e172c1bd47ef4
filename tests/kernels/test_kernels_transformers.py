"""Transformers by the kernels: that they train, and compute, as by PyTorch."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from engines import pickled
from fedsieve import InputError, LoRA, Run, Task, local, rounds
from fedsieve.client.losses import NextToken
from fedsieve.client.training import params_of
from fedsieve.client.vector_models import CharGPT
from fedsieve.kernels import Predictor, Trainer, unavailable_reason
from fedsieve.kernels.abi import GatherOp
from fedsieve.kernels.checks import Unsupported
from fedsieve.kernels.dispatch import Inference, close
from fedsieve.kernels.trace import read_graph
from fedsieve.methods import FLASH, NST, PDST, FedAvg, SparseFedPP, ZeroFL
from fedsieve.sparse.layers import powerprop_, swat_
from fedsieve.types import logits_of
from fedsieve.types.optimizers import SGD, AdamW
from outside_models import texts
from token_models import (
    CASES,
    LENGTH,
    VOCABULARY,
    Llama,
    Series,
    dense_steps,
    examples,
    gpt,
    made,
    masks_of,
    vit,
)

pytestmark = pytest.mark.skipif(bool(unavailable_reason()), reason=str(unavailable_reason()))
EPS = 1e-4
"""Of AdamW, where two ways to sum are compared: with 1e-8 it makes whole steps of what is only rounding."""


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


@pytest.mark.parametrize("storage", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "case", ["gpt", "llama", "gpt2", "vit", "encoder, norms first", "dropout in attention", "rotary"]
)
def test_low_memory_training_is_the_same_in_less(case: str, storage: Any, native: None) -> None:
    make, kind, loss = CASES[case]
    x, y = examples(kind)
    results = []
    for low_memory in (False, True):
        model = made(make)
        how: dict[str, Any] = {"storage": storage, "optimizer": AdamW(eps=EPS), "loss": loss, "low_memory": low_memory}
        trainer = Trainer(model, masks_of(model, 0.4), 5, lr=0.02, **how)
        torch.manual_seed(7)
        losses = [float(trainer.step(*batch)) for batch in ((x, y), (x[1:4], y[1:4]), (x, y))]
        trainer.write_()
        results.append((losses, params_of(model), trainer.lowered.arena.memory.numel()))
    (losses, full, words), (again, low, fewer) = results
    assert losses == again
    assert all(torch.equal(x, low[name]) for name, x in full.items())
    assert fewer < words


def test_rounds_are_tested_without_reading_the_model_again(monkeypatch: pytest.MonkeyPatch, native: None) -> None:
    """By passes of the resident model, with the weights as they then are: an export takes longer than a test."""
    read: list[Any] = []

    def counted(*args: Any, **how: Any) -> Any:
        read.append(args)
        return read_graph(*args, **how)

    monkeypatch.setattr("fedsieve.kernels.dispatch.read_graph", counted)
    monkeypatch.setattr("fedsieve.kernels.inference.read_graph", None)
    model, (x, _) = made(gpt).eval(), examples("text", 9)
    inference = Inference(model, "auto")
    for d in (0.4, 0.2):
        with torch.no_grad():
            for name, mask in masks_of(model, d).items():
                model.get_parameter(name).mul_(mask)
            predict = inference.of(x, 10**9, 8)
            assert predict is not None
            assert close(predict(x), model(x))
    assert len(read) == 1


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
        want = logits_of(model(x))
    for n in (9, 1, 0):
        torch.testing.assert_close(predictor(x[:n]), want[:n], rtol=1e-5, atol=2e-6)
    assert predictor.reason is None
    if kind == "text":
        with pytest.raises(InputError, match="must be of 0 to 12, got 13"):
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
