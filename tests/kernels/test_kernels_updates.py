"""Adam, Nesterov's momentum, clipping and corrections by the kernels: beside NumPy, and beside dense training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engines import pickled
from fedsieve import Device, InputError, Run, local, rounds
from fedsieve.client.training import Training, params_of, train_on_mask
from fedsieve.kernels import Trainer, unavailable_reason
from fedsieve.kernels.abi import AdamOp, address
from fedsieve.kernels.dispatch import Kernels
from fedsieve.kernels.program import Program
from fedsieve.methods import FLASH, NST, PDST, SCAFFOLD, FedAvg, FedDST, FedProx, SparseFedPP, Swat, ZeroFL
from fedsieve.sparse.layers import powerprop_, swat_
from fedsieve.types import Correction
from fedsieve.types.optimizers import SGD, AdamW
from kernel_training import assert_equal, both, device_of, fresh, mask_of
from tasks import task_run
from tiny import TinyNet, blobs, tiny_run

pytestmark = pytest.mark.skipif(bool(unavailable_reason()), reason=str(unavailable_reason()))


@pytest.mark.parametrize("power", [1.0, 1.25])
@pytest.mark.parametrize("m", [0, 1, 15, 16, 17, 33])
def test_adam_is_what_its_paper_says(m: int, power: float, native: None) -> None:
    """Loshchilov and Hutter 2019, Alg. 2, in float64, with the decay in the gradient and apart from it at once."""
    chance = np.random.default_rng(m)
    w64 = chance.normal(size=m)
    m64, v64 = np.zeros(m), np.zeros(m)
    w, value = torch.tensor(w64, dtype=torch.float32), torch.full((m,), torch.nan)
    w64 = w.double().numpy().copy()
    mean, square = torch.zeros(m), torch.zeros(m)
    lr, b1, b2, eps, inside, apart = 0.02, 0.9, 0.999, 1e-8, 0.125, 0.3
    for t in range(1, 6):
        grad = torch.tensor(chance.normal(size=m), dtype=torch.float32)
        op = AdamOp(address(w), address(mean), address(square), address(grad), m, 1 - b1, 1 - b2, eps, inside)
        op.keep, op.rate, op.root = 1 - lr * apart, lr / (1 - b1**t), (1 - b2**t) ** -0.5
        op.power, op.value = power, address(value)
        Program([op]).run()
        g = grad.double().numpy() * power * np.abs(w64) ** (power - 1) + inside * w64
        m64, v64 = b1 * m64 + (1 - b1) * g, b2 * v64 + (1 - b2) * g * g
        w64 = w64 - lr * apart * w64 - lr * (m64 / (1 - b1**t)) / (np.sqrt(v64 / (1 - b2**t)) + eps)
        for got, want in ((w, w64), (mean, m64), (square, v64), (value, np.sign(w64) * np.abs(w64) ** power)):
            np.testing.assert_allclose(got.numpy(), want, rtol=1e-5, atol=1e-6)


def shift_of(model: nn.Module) -> dict[str, Tensor]:
    """Return a vector that corrects some gradients."""
    chance = torch.Generator().manual_seed(8)
    names = {"conv1.weight", "conv2.weight", "fc1.weight", "fc1.bias", "bn.weight", "spare.weight"}
    named = [(name, w) for name, w in model.named_parameters() if name in names]
    return {name: 0.05 * torch.randn(w.shape, generator=chance) for name, w in named}


Settings = Callable[[nn.Module], dict[str, Any]]
EPS = 1e-4  # with 1e-8 Adam makes a whole step of a gradient of 1e-9, all of it rounding that differs between CPUs
RULES: dict[str, Settings] = {
    "adamw": lambda _: {"optimizer": AdamW(eps=EPS), "weight_decay": 0.3},
    "adamw, norms not decayed": lambda _: {
        "optimizer": AdamW(eps=EPS), "weight_decay": 3.0, "norm_weight_decay": False,
    },
    "adam": lambda _: {"optimizer": AdamW(0.8, 0.9, EPS, decoupled=False), "weight_decay": 0.3},
    "nesterov": lambda _: {"optimizer": SGD(nesterov=True), "momentum": 0.9, "weight_decay": 0.01},
    "clip": lambda _: {"clip_norm": 0.1, "momentum": 0.9},
    "a norm that is not reached": lambda _: {"clip_norm": 100.0, "momentum": 0.9},
    "adamw, clip": lambda _: {"optimizer": AdamW(eps=EPS), "clip_norm": 0.1, "weight_decay": 0.1},
    "proximal": lambda _: {"correction": Correction(mu=2.0), "momentum": 0.9},
    "shift": lambda model: {"correction": Correction(shift_of(model)), "momentum": 0.5},
    "all": lambda model: {
        "correction": Correction(shift_of(model), 1.0), "optimizer": AdamW(eps=EPS), "clip_norm": 0.2,
        "weight_decay": 0.2,
    },
}  # fmt: skip
LR = {True: 0.005, False: 0.02}


def settled(device: Device, model: nn.Module, rule: str) -> Device:
    settings = RULES[rule](model)
    return replace(device, lr=LR["adam" in rule or rule == "all"], **settings)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("layers", ["plain", "swat", "power", "cached", "unused"])
def test_a_training_is_the_same_by_both(layers: str, rule: str, one_thread: None) -> None:
    """Also of parameters that the model does not compute with, whose gradients are 0 before what is added to them."""
    models = []
    for model, device in both(layers):
        device = settled(device, model, rule)
        mask = mask_of(model, 0.5) if layers in ("plain", "unused") else {}
        for _ in range(2):  # the second on the same trainer, at rest again
            [*Training(device, mask)]
        models.append(model)
        assert bool(device.steps.__self__.sparse) == (len(models) == 2)  # type: ignore[union-attr]
    assert_equal(models)


@pytest.mark.parametrize("rule", RULES)
def test_a_mask_moves_under_an_optimizer(rule: str, one_thread: None) -> None:
    """What grows anew is at rest in both, where gradients off the mask count nowhere; and w_0 stays the start's."""
    models = []
    for model, device in both():
        device = settled(device, model, rule)
        masks = [mask_of(model, 0.5), mask_of(model, 0.9, seed=2)]
        masks.append({name: own & masks[1][name] for name, own in mask_of(model, 0.6, seed=3).items()})
        training = Training(device, masks[0])
        for step, _ in enumerate(training, start=1):
            if step in (2, 4):
                training.steps.write_()
                inner: Any = training.steps
                if isinstance(device.steps.__self__.sparse, type(None)):  # type: ignore[union-attr]
                    rest_(inner.steps, masks[step // 2 - 1])
                training.steps.put_(masks[step // 2])
        models.append(model)
        assert (model.get_parameter("fc1.weight") == 0)[~masks[2]["fc1.weight"]].all()
    assert_equal(models)


def rest_(steps: Any, mask: dict[str, Tensor]) -> None:
    """Set what PyTorch remembers off a mask to zero: what SGD gathered there, and what Adam left from earlier masks."""
    names = {id(p): name for name, p in steps.device.model.named_parameters()}
    for i, w in enumerate(steps.weights):
        own = mask.get(names[id(w)], torch.ones(()))
        if steps.velocity:
            steps.velocity[i].mul_(own)
        if steps.optimizer:
            for name in ("exp_avg", "exp_avg_sq"):
                steps.optimizer.state[w][name].mul_(own)


METHODS = {
    "flash": FLASH(density=0.3, c_d=2),
    "nst": NST(density=0.4),
    "pdst": PDST(density=0.3),
    "zerofl": ZeroFL(0.6),
    "swat": Swat(0.6),
    "feddst": FedDST(interval=1, end=1.0),
    "sparsefedpp": SparseFedPP(sparsity=0.5),
}


@pytest.mark.parametrize("method", METHODS)
def test_a_federation_ends_where_dense_training_ends(method: str, one_thread: None) -> None:
    """Every method that trains sparsely, with AdamW and clipping, on whatever masks it makes."""
    run_: Run = tiny_run(METHODS[method], rounds=2, lr=0.005, lr_end=0.005, optimizer=AdamW(), clip_norm=0.5)
    dense, sparse = ([*rounds(run_, local(kernels=kernels))] for kernels in ("dense", "sparse"))
    assert all([*round_.kernels] == ["sparse"] for round_ in sparse)
    close = [torch.isclose(sparse[-1].model[name], value, rtol=0, atol=1e-4) for name, value in dense[-1].model.items()]
    assert float(torch.cat([one.flatten() for one in close]).float().mean()) > 0.99  # a tie may fall another way
    assert sparse[-1].metrics["loss"] == pytest.approx(dense[-1].metrics["loss"], rel=1e-3)


@pytest.mark.parametrize("task", ["regression", "labels", "segmentation"])
@pytest.mark.parametrize("method", [PDST(0.3, policy="all"), ZeroFL(0.5, policy="all"), SparseFedPP(0.5, policy="all")])
def test_tasks_of_other_losses_end_alike(method: Any, task: str, one_thread: None) -> None:
    """By both, and to the bit by a worker that is sent everything."""
    run_ = task_run(task, method, rounds=2, optimizer=AdamW(), lr=0.02, lr_end=0.02, clip_norm=1.0)
    engines = local(kernels="dense"), local(kernels="sparse"), pickled("sparse")
    dense, sparse, there = ([*rounds(run_, engine)][-1] for engine in engines)
    assert [*sparse.kernels] == ["sparse"]
    for name, value in dense.model.items():
        torch.testing.assert_close(sparse.model[name], value, rtol=0, atol=1e-5)
        assert torch.equal(sparse.model[name], there.model[name])


@pytest.mark.parametrize("method", [FedProx(mu=2.0), SCAFFOLD()], ids=["fedprox", "scaffold"])
def test_methods_correct_gradients_alike(method: Any, one_thread: None) -> None:
    run_ = tiny_run(method, rounds=3, lr=0.02, lr_end=0.02)
    dense, sparse = ([*rounds(run_, local(kernels=kernels))][-1] for kernels in ("dense", "sparse"))
    assert [*sparse.kernels] == ["sparse"]
    for name, value in dense.model.items():
        torch.testing.assert_close(sparse.model[name], value, rtol=0, atol=1e-5)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("layers", ["plain", "swat", "power"])
def test_bits_do_not_depend_on_threads(layers: str, rule: str, native: None) -> None:
    """Also of vectors of which each thread has several parts of 4096."""
    ends = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        torch.manual_seed(3)
        model: nn.Module = TinyNet()
        model.fc1 = nn.Linear(72, 300)  # type: ignore[assignment]
        model.fc2 = nn.Linear(300, 3)  # type: ignore[assignment]
        if layers == "swat":
            swat_(model, {"conv2.weight": 0.3, "fc1.weight": 0.2}, 2)
        if layers == "power":
            powerprop_(model, ("conv2.weight", "fc1.weight"), 1.25, True)
        settings = {"momentum": 0.0, "weight_decay": 0.0} | RULES[rule](model)
        mask = mask_of(model, 0.9) if layers == "plain" else {}
        trainer = Trainer(model, mask, 33, lr=0.02, **settings)
        for n in (33, 17, 5):
            x, y = blobs().train.batch(torch.arange(n))
            trainer.step(x, y)  # type: ignore[arg-type]
        trainer.write_()
        ends.append(params_of(model))
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


@pytest.mark.parametrize("rule", RULES)
def test_low_memory_training_is_the_same(rule: str, native: None) -> None:
    ends = []
    for low_memory in (False, True):
        model = fresh()
        settings = {"momentum": 0.0, "weight_decay": 0.0} | RULES[rule](model)
        trainer = Trainer(model, mask_of(model, 0.5), 33, lr=0.02, low_memory=low_memory, **settings)
        for n in (33, 17):
            trainer.step(*blobs().train.batch(torch.arange(n)))  # type: ignore[arg-type]
        ends.append(trainer.weights.w.clone())
    assert torch.equal(*ends)


def test_what_an_optimizer_keeps_is_counted() -> None:
    memory = {}
    for name in ("clip", "adamw", "all"):
        model = fresh()
        trainer = Trainer(model, mask_of(model, 0.5), 16, lr=0.1, **({"weight_decay": 0.0} | RULES[name](model)))
        trainer.step(*blobs().train.batch(torch.arange(16)))  # type: ignore[arg-type]
        memory[name] = trainer.bytes
    each, sums = 4 * trainer.weights.w.numel(), 8 * len(trainer.lowered.updates.sums)
    assert memory["adamw"] - memory["clip"] == each - sums  # one moment more, and no sums of squares
    assert memory["all"] - memory["adamw"] == 2 * each + sums  # w_0, and a shift


def test_what_cannot_be_is_said_in_one_line() -> None:
    model = fresh("power")
    kernels = Kernels(model, "auto")
    device = replace(device_of(model), correction=Correction(shift_of(model)))
    assert not isinstance(kernels.take(device, {}), str) or "multiply" in str(kernels.take(device, {}))
    with torch.no_grad():
        model.get_parameter("fc1.weight")[0] = 0
    assert kernels.take(device, {}) == (
        "the method's correction brings weights back that are zero, of powerpropagation's layers"
    )
    other = replace(device_of(model), optimizer=torch.optim.RMSprop)
    assert kernels.take(other, {}) == "the kernels take steps of SGD, Adam and AdamW"
    with pytest.raises(InputError, match="--kernels sparse cannot be: the kernels take steps of SGD, Adam and AdamW"):
        next(rounds(tiny_run(PDST(), optimizer=torch.optim.RMSprop), local(kernels="sparse")))
    for task, line in (
        ("columns", "a tensor that is not made of the samples' tokens"),
        ("next token", "the model cannot be exported"),
    ):
        with pytest.raises(InputError, match=f"--kernels sparse cannot be: {line}"):
            next(rounds(task_run(task, FedAvg()), local(kernels="sparse")))
        (round_,) = rounds(task_run(task, FedAvg(), rounds=1), local())
        assert line in str(round_.dense_because)
    for wrong, line in (
        ({"optimizer": torch.optim.RMSprop}, "optimizer must be SGD or AdamW"),
        ({"clip_norm": -1.0}, "clip_norm must be a finite number of 0 or more, got -1.0"),
        (
            {"correction": Correction({"fc1.bias": torch.zeros(3)})},
            r"the shift of fc1.bias must be a float32 tensor \[24\]",
        ),
    ):
        with pytest.raises(InputError, match=line):
            step_of(Trainer(fresh(), {}, 4, lr=0.1, **wrong))  # type: ignore[arg-type]
    ready = Trainer(fresh(), {}, 4, lr=0.1, correction=Correction(mu=1.0))
    with pytest.raises(InputError, match="correction must have a shift, or mu, where the trainer was made with it"):
        ready.begin(0.1, 0.0, 0.0)


def step_of(trainer: Trainer) -> Tensor:
    return trainer.step(torch.zeros(4, 2, 6, 6), torch.zeros(4, dtype=torch.int64))


def test_a_gradient_that_is_no_number_is_not_hidden_by_clipping(native: None) -> None:
    trainer = Trainer(fresh(), {}, 4, lr=0.1, clip_norm=1.0, loss=lambda y, _: F.relu(y).sum() * torch.nan)
    step_of(trainer)
    assert trainer.weights.w.isnan().all()


def test_trainers_of_other_rules_are_others() -> None:
    """One after the other on the same model, and back: each training is at rest, with its own numbers."""
    models = []
    for model, device in both():
        for rule in ("adamw", "adam", "clip", "proximal", "shift", "adamw"):
            train_on_mask(settled(device, model, rule), mask_of(model, 0.5))
        models.append(model)
    assert_equal(models)
