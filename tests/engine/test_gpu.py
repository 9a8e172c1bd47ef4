"""Cohorts on a GPU: clients that train at once by captured steps, beside one at a time and beside the CPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from cropped import BY_TURNS, MOMENTUM, SEVERAL, DropNet, cropped
from fedsieve import InputError, Run, local, open_run, rounds
from fedsieve.client.captured import CudaGraphs
from fedsieve.client.evaluation import EagerTest, Evaluation, accuracy
from fedsieve.client.process import exact
from fedsieve.client.training import params_of
from fedsieve.engine import cohort
from fedsieve.engine.cohorts import EagerSteps
from fedsieve.engine.rollback import Checkpoint
from fedsieve.methods import FedAvg
from fedsieve.types import SGD, AdamW, flatten
from methods_under_test import METHODS
from tasks import TASKS, task_run
from tiny import TinyNet, assert_same, blobs, tiny_run

pytestmark = pytest.mark.gpu


def on_gpu(one: Run, n: int = 0, precision: str = "fp32") -> list[Any]:
    return [*rounds(one, cohort(n, "cuda", precision=precision), device="cuda")]


@pytest.mark.parametrize("name", [*METHODS, *BY_TURNS])
def test_a_cohort_on_a_gpu_trains_what_a_cpu_trains(name: str) -> None:
    one = cropped((METHODS | BY_TURNS)[name], rounds=1, **MOMENTUM if name in SEVERAL else {})
    wanted, gpu = [*rounds(one, local(kernels="dense"))][-1], on_gpu(one)[-1]
    for key, value in wanted.state.params.items():
        torch.testing.assert_close(gpu.state.params[key], value, rtol=0, atol=1e-4)
    assert (gpu.bytes_down, gpu.steps) == (wanted.bytes_down, wanted.steps)
    assert gpu.multiply_adds_dense == wanted.multiply_adds_dense
    assert gpu.multiply_adds == pytest.approx(wanted.multiply_adds, rel=1e-3)


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("optimizer", [SGD(), AdamW(), torch.optim.RMSprop], ids=["sgd", "adamw", "rmsprop"])
def test_any_task_trains_on_a_gpu_as_on_a_cpu(name: str, optimizer: Any, recwarn: pytest.WarningsRecorder) -> None:
    """Captured, with clipping; an optimizer of one's own runs eagerly, and says so."""
    one = task_run(name, FedAvg(), rounds=2, optimizer=optimizer, lr=0.01, lr_end=0.005, clip_norm=1.0)
    wanted, gpu = [*rounds(one, local(kernels="dense"))][-1], on_gpu(one)[-1]
    for key, value in wanted.state.params.items():
        torch.testing.assert_close(gpu.state.params[key], value, rtol=0, atol=2e-4)
    for metric, number in wanted.scores.items():
        assert gpu.scores[metric] == pytest.approx(number, rel=1e-2)
    assert bool([w for w in recwarn if w.category is EagerSteps]) == (optimizer is torch.optim.RMSprop)


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
@pytest.mark.parametrize("name", [*SEVERAL, "sparsefedpp"])
def test_who_trains_beside_a_client_changes_no_bit(name: str, precision: str) -> None:
    """With chance in the model, too, which every worker draws for itself."""
    one = replace(cropped((METHODS | BY_TURNS)[name], rounds=3, **MOMENTUM), evaluate_every=3)
    one = replace(one, task=replace(one.task, model=DropNet))
    wanted = on_gpu(one, 1, precision)
    for n in (2, 3):
        for a, b in zip(on_gpu(one, n, precision), wanted, strict=True):
            assert_same(a, b)


def test_a_cohort_goes_on_from_a_checkpoint_bit_for_bit() -> None:
    one = cropped(METHODS["nst"], rounds=4)
    whole = on_gpu(one)
    before = whole[1]
    start = Checkpoint(before.t, flatten(before.state), before.memory)
    for a, b in zip(rounds(open_run(one), cohort(2, "cuda"), "cuda", start), whole[2:], strict=True):
        assert_same(a, b)


def test_a_captured_test_counts_what_an_eager_one_counts(recwarn: pytest.WarningsRecorder) -> None:
    """Of weights in turn in one memory; a whole and a last batch; examples on the GPU, and where they do not fit."""
    net, data = TinyNet().cuda(), blobs().test
    evaluation = Evaluation(net, data.to("cuda"), CudaGraphs(torch.device("cuda")), batch=50)
    on_host = Evaluation(net, data, CudaGraphs(torch.device("cuda")), batch=50)
    for seed in (1, 2, 1):
        torch.manual_seed(seed)
        other = TinyNet()
        with exact("cuda"):
            captured = evaluation.of(params_of(other))["accuracy"]
            assert captured == accuracy(net, data.to("cuda"), batch=50) == on_host.metrics()["accuracy"]
        assert abs(captured - accuracy(other, data)) < 2.5 / len(data)
    assert not [one for one in recwarn if one.category is EagerTest]


class LookingNet(TinyNet):
    """A model that asks for a number of the device in its forward."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1.0 + 0.0 * float(x.sum().isnan()))


def test_a_model_that_cannot_be_captured_trains_eagerly() -> None:
    one = cropped(METHODS["fedavg"], rounds=1)
    odd = replace(one, task=replace(one.task, model=LookingNet))
    with (
        pytest.warns(EagerSteps, match="cannot be captured: they run eagerly, and one client at a time"),
        pytest.warns(EagerTest, match="the model's test cannot be captured: it runs eagerly"),
    ):
        eager = on_gpu(odd)[-1]
    for key, value in on_gpu(one)[-1].state.params.items():
        torch.testing.assert_close(eager.state.params[key], value, rtol=0, atol=1e-5)


def test_saved_tensors_are_measured_there_too() -> None:
    federation = open_run(cropped(METHODS["swat"], rounds=1), measure=("masks",))
    *_, final = rounds(federation, cohort(2, "cuda"), "cuda")
    assert final.metrics["saved_bytes"] > 0


def test_more_clients_than_fit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (4 << 20, 128 << 20))
    with pytest.raises(InputError, match=r"3 clients at once do not fit on cuda: 1 do \(--engine cohort:1\)"):
        on_gpu(tiny_run(METHODS["fedavg"], rounds=1), 3)
