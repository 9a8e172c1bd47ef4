"""Clients trained by the kernels: what a loop sees and does, the trainer that stays, threads, and the end."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engines import pickled
from fedsieve import Task, local, rounds
from fedsieve.client.training import Training, params_of, sgd
from fedsieve.engine import Round
from fedsieve.kernels import dispatch, unavailable_reason
from fedsieve.kernels.dispatch import Kernels
from fedsieve.kernels.graph import Graph
from fedsieve.kernels.trainer import Trainer
from fedsieve.methods import FLASH, NST, PDST, FedAvg, SparseFedPP, Swat, ZeroFL
from fedsieve.recipes import load_recipe
from fedsieve.sparse.effective import reset_thresholds_
from fedsieve.types import flatten
from kernel_training import SHAPE, assert_equal, both, device_of, fresh, mask_of
from tiny import TinyNet, blobs, tiny_run

pytestmark = pytest.mark.skipif(bool(unavailable_reason()), reason=str(unavailable_reason()))


def test_what_a_loops_body_does_to_the_weights_is_done() -> None:
    models = []
    for model, device in both(momentum=0.9):
        mask = mask_of(model, 0.5)
        for _ in sgd(device):
            with torch.no_grad():
                for name, own in mask.items():
                    model.get_parameter(name).mul_(own)
        models.append(model)
    assert_equal(models)
    assert all((model.get_parameter(name) == 0)[~own].all() for name, own in mask.items())


@pytest.mark.parametrize("rule", ["plain", "swat", "power"])
def test_what_a_loops_body_sees_is_what_it_would_see(rule: str) -> None:
    seen = []
    for model, device in both(rule, momentum=0.9, lr=0.02):
        seen.append([params_of(model) for _ in sgd(device)])
    for dense, sparse in zip(*seen, strict=True):
        for name, value in dense.items():
            torch.testing.assert_close(sparse[name], value, rtol=0, atol=1e-5)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_threshold_serves_for_a_whole_training_and_no_longer(threads: int) -> None:
    """Two trainings on one trainer, of weights with zeros; without the cache the weights are others."""
    trained: dict[str, list[nn.Module]] = {"cached": [], "power": []}
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for rule, models in trained.items():
            for model, device in both(rule, lr=0.05, batch=10):
                with torch.no_grad():
                    for name in ("conv2.weight", "fc1.weight"):
                        model.get_parameter(name)[:, ::2] = 0
                for _ in range(2):
                    reset_thresholds_(model)
                    [*Training(device)]
                models.append(model)
    finally:
        torch.set_num_threads(before)
    assert_equal(trained["cached"])
    cached, plain = (params_of(models[0]) for models in trained.values())
    assert float((cached["conv2.weight"] - plain["conv2.weight"]).abs().max()) > 1e-4


def test_trainers_that_decay_norms_and_those_that_do_not_are_two() -> None:
    """On the same model, one after the other, and back."""
    models = []
    for model, device in both(weight_decay=0.3, momentum=0.9, lr=0.02):
        for norms in (True, False, True):
            [*Training(replace(device, norm_weight_decay=norms))]
        models.append(model)
    assert_equal(models)


def test_a_loop_that_is_left_leaves_the_weights_of_its_last_step() -> None:
    models = []
    for model, device in both():
        for step, _ in enumerate(sgd(device), start=1):
            if step == 3:
                break
        models.append(model)
    assert_equal(models)


def test_momentum_follows_a_mask_that_moves_and_what_grows_anew_starts_at_rest() -> None:
    models = []
    for model, device in both(momentum=0.9, lr=0.02):
        first, second = mask_of(model, 0.4), mask_of(model, 0.6, seed=2)
        training = Training(device, first)
        for step, _ in enumerate(training, start=1):
            if step == 3:
                training.steps.write_()
                inner: Any = training.steps
                if isinstance(device.steps.__self__.sparse, type(None)):  # type: ignore[union-attr]
                    for w, v in zip(inner.steps.weights, inner.steps.velocity, strict=True):
                        name = next(n for n, p in model.named_parameters() if p is w)
                        v.mul_(first.get(name, torch.ones(())))  # what PyTorch gathered off the mask
                training.steps.put_(second)
        models.append(model)
        assert (model.get_parameter("fc1.weight") == 0)[~second["fc1.weight"]].all()
    assert_equal(models)


class Chancy(TinyNet):
    """Layers that the kernels leave to PyTorch, one of them with chance of its own, one with weights."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.dropout = nn.InstanceNorm2d(4, affine=True), nn.Dropout(0.3)
        self.dilated = nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=2)
        self.depthwise = nn.Conv2d(4, 4, 3, padding=1, groups=4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.depthwise(self.dilated(self.norm(self.conv1(self.dropout(x))))))
        x = self.bn(self.conv2(x)).relu()
        logits: Tensor = self.fc2(self.fc1(x.flatten(1)).relu())
        return logits


@pytest.mark.parametrize("method", [FedAvg(), NST(density=0.4)], ids=["fedavg", "nst"])
def test_layers_that_the_kernels_do_not_know_are_trained_and_counted_alike(method: Any) -> None:
    run_ = replace(tiny_run(method, rounds=2, momentum=0.0), task=Task(Chancy, blobs, 6))
    engines = local(kernels="dense"), local(kernels="sparse"), pickled("sparse")
    dense, sparse, there = ([*rounds(run_, engine)][-1] for engine in engines)
    for name, value in sparse.state.params.items():
        torch.testing.assert_close(value, dense.state.params[name], rtol=0, atol=1e-5)
        assert torch.equal(value, there.state.params[name])
    assert sparse.multiply_adds == there.multiply_adds == pytest.approx(dense.multiply_adds)
    assert sparse.multiply_adds_dense == dense.multiply_adds_dense


def test_threads_change_no_bit() -> None:
    finals = []
    before = torch.get_num_threads()
    for n in (1, 2):
        torch.set_num_threads(n)
        try:
            finals.append([*rounds(tiny_run(ZeroFL(0.9), rounds=2), local(kernels="sparse"))][-1])
        finally:
            torch.set_num_threads(before)
    one, two = (flatten(final.state) for final in finals)
    assert all(torch.equal(value, two[name]) for name, value in one.items())


@pytest.mark.slow
def test_a_trainer_is_made_once_and_serves_every_client(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    class Counting(Trainer):
        def __init__(self, *args: Any, **options: Any):
            made.append(1)
            super().__init__(*args, **options)

    monkeypatch.setattr(dispatch, "Trainer", Counting)
    for method, wanted in ((PDST(density=0.3), 1), (Swat(0.7), 1), (FedAvg(), 1), (FLASH(0.3, c_d=3, E_d=2), 7)):
        made.clear()
        list(rounds(tiny_run(method), local(kernels="sparse")))  # FLASH: two masks a client, and the last
        assert len(made) == wanted, method
    made.clear()
    list(rounds(tiny_run(SparseFedPP(0.6)), local(kernels="sparse")))
    assert len(made) == 4  # a union of cuts a round


def test_clients_of_other_sizes_share_a_trainer_up_to_sixteen_samples() -> None:
    model = fresh()
    kernels = Kernels(model, "sparse")
    trainers = [kernels.trainer(graph_of_(kernels), device_of(model, examples=n), {})[0] for n in (9, 16, 3, 40)]
    assert len({id(trainer) for trainer in trainers}) == 1
    assert kernels.trainer(graph_of_(kernels), device_of(model, examples=40, batch=17), {})[1]


def graph_of_(kernels: Kernels) -> Graph:
    graph = kernels.graph(SHAPE)
    assert isinstance(graph, Graph)
    return graph


@pytest.mark.slow
@pytest.mark.parametrize("method", ["pdst", "flash", "hetero_flash", "nst"])
def test_the_digits_end_where_dense_training_ends(method: str) -> None:
    short = replace(load_recipe(f"{method}.digits"), rounds=6, evaluate_every=3)
    ends: list[Round] = [[*rounds(short, local(kernels=kernels))][-1] for kernels in ("dense", "sparse")]
    assert ends[0].accuracy == pytest.approx(ends[1].accuracy, abs=0.05)
    assert ends[0].metrics["loss"] == pytest.approx(ends[1].metrics["loss"], rel=0.02)
    assert ends[0].multiply_adds == pytest.approx(ends[1].multiply_adds, rel=0.02)
