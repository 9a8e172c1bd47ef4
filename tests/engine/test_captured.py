"""Captured steps train what Python trains; a recorder stands in for CUDA's graphs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from cropped import BY_TURNS, MOMENTUM, SEVERAL, cropped
from fedsieve import Federation, local, open_run, rounds
from fedsieve.client.captured import Capture
from fedsieve.engine.engines import Engine
from fedsieve.engine.rollback import Memory
from fedsieve.engine.worker import Worker, run_client
from fedsieve.sparse import layers, periodic, selection
from fedsieve.types import Device
from methods_under_test import METHODS
from recorded import Graphs
from tiny import TinyNet


def replayed(graphs: Graphs, patch: pytest.MonkeyPatch) -> Engine:
    """Return an engine of one worker whose layers leave their numbers on the device, and whose steps are replayed."""

    @contextmanager
    def engine(federation: Federation, memory: Memory) -> Iterator[Any]:
        worker = Worker(federation, kernels="dense")
        worker.capture = Capture(worker.model, worker.cost.products, "fp32", graphs)  # type: ignore[arg-type]
        worker.cost.dense_steps = worker.capture.begin

        def exchange(t: int, messages: Mapping[int, bytes]) -> Iterator[tuple[int, bytes]]:
            for client, message in messages.items():
                with patch.context() as inner:
                    for module in (layers, periodic):
                        inner.setattr(module, "on_device", lambda x: True)
                    inner.setattr(selection, "_select", selection.sort_select)
                    reply, remembered = run_client(worker, t, client, message, memory.get(client, b""))
                if remembered:
                    memory[client] = remembered
                yield client, reply

        yield exchange

    return engine


@pytest.mark.parametrize("name", [*METHODS, *BY_TURNS])
def test_replayed_steps_train_what_python_trains(name: str, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    """Several clients and rounds, each step captured once; while it is, nothing looks at a number."""
    momentum = MOMENTUM if name in SEVERAL else {}
    one, graphs = cropped((METHODS | BY_TURNS)[name], rounds=3, **momentum), Graphs()
    for a, b in zip(
        rounds(open_run(one), replayed(graphs, monkeypatch)), rounds(one, local(kernels="dense")), strict=True
    ):
        for key, value in b.state.params.items():
            torch.testing.assert_close(a.state.params[key], value, rtol=0, atol=2e-5)
        assert (a.steps, a.multiply_adds_dense) == (b.steps, b.multiply_adds_dense)
        assert a.multiply_adds == pytest.approx(b.multiply_adds, rel=2e-3)
        assert a.metrics == pytest.approx(b.metrics, rel=1e-4)
    assert 2 <= graphs.captures <= 8  # a whole and a last batch, exact or not, and of two stages


class CoinNet(TinyNet):
    """Chance on the CPU, which a graph would not repeat."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if torch.rand(()) < 0.5 else -x)


def test_a_model_that_draws_on_the_host_is_not_captured(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    one = cropped(METHODS["fedavg"], rounds=1)
    one = replace(one, task=replace(one.task, model=CoinNet))
    with pytest.raises(RuntimeError, match="draws by chance on the CPU in its forward"):
        [*rounds(open_run(one), replayed(Graphs(), monkeypatch))]


def test_a_capture_without_memory_left_is_renewed(one_thread: None) -> None:
    """A longer training needs more room, and its graphs other memory; weights elsewhere are captured anew."""
    federation = open_run(cropped(METHODS["fedavg"]))
    worker, graphs = Worker(federation, kernels="dense"), Graphs()
    renewals = list[int]()
    graphs.renew = lambda: renewals.append(graphs.captures)  # type: ignore[method-assign]
    worker.capture = Capture(worker.model, worker.cost.products, "fp32", graphs)  # type: ignore[arg-type]
    device = federation.device(1, 0, worker.model, "cpu", {})

    def train(device: Device) -> int:
        assert worker.capture
        assert device.augment
        steps, n = worker.capture.begin(device, {}), len(device.data)
        for _ in range(device.epochs):
            [*steps.epoch(torch.arange(n), device.augment.draw(n, device.rng))]
        steps.write_()
        return graphs.captures

    assert [train(device), train(device)] == [2, 2]
    assert train(replace(device, epochs=4)) == 4
    worker.model.get_parameter("fc2.weight").data = worker.model.get_parameter("fc2.weight").detach().clone()
    assert train(device) == 6
    assert renewals == [0, 2]


def test_python_takes_the_first_step_where_saved_tensors_are_measured(one_thread: None) -> None:
    federation = open_run(cropped(METHODS["fedavg"]), measure=("masks",))
    worker, graphs = Worker(federation, kernels="dense"), Graphs()
    worker.capture = Capture(worker.model, worker.cost.products, "fp32", graphs)  # type: ignore[arg-type]
    worker.capture.watches = True
    worker.cost.dense_steps = worker.capture.begin
    device = federation.device(1, 0, worker.model, "cpu", {})
    device.steps = worker.cost.begin
    assert worker.saved
    assert device.augment
    worker.saved.restart()
    n = len(device.data)
    steps = worker.cost.begin(device, {})
    losses = [*steps.epoch(torch.arange(n), device.augment.draw(n, device.rng))]
    steps.write_()
    assert (len(losses), graphs.captures) == (5, 2)
    assert worker.saved.bytes > 0
