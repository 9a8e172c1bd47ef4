"""Training by the kernels or by PyTorch: what only PyTorch can train, what is noted of it, and what is refused."""

import json
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedsieve import Task, local, pool, rounds
from fedsieve.client.cost import Cost
from fedsieve.client.training import params_of, train, train_on_mask
from fedsieve.engine.messages import Messages
from fedsieve.engine.setup import open_run
from fedsieve.kernels import library, loaded_isa, unavailable_reason
from fedsieve.kernels.dispatch import Kernels
from fedsieve.methods import NST, PDST, FedAvg, SparseFedPP
from fedsieve.report import report
from fedsieve.runs.execution import Execution
from fedsieve.runs.record import read_rows
from fedsieve.runs.recorder import record_run
from fedsieve.runs.sweep.grid import grid
from fedsieve.types import InputError, Tree
from kernel_training import SHAPE, both, device_of, fresh, mask_of
from oracles.lies import Reply, changed
from tiny import TinyNet, blobs, tiny_run

pytestmark = pytest.mark.skipif(bool(unavailable_reason()), reason=str(unavailable_reason()))


class Tied(TinyNet):
    def __init__(self) -> None:
        super().__init__()
        self.fc3 = nn.Linear(24, 3)
        self.fc3.weight = self.fc2.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv2(torch.relu(self.conv1(x)))).relu()
        hidden = self.fc1(x.flatten(1)).relu()
        logits: Tensor = self.fc2(hidden) + self.fc3(hidden)
        return logits


class Branching(TinyNet):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.sum() > 0 else -x)


class Still(TinyNet):
    def __init__(self) -> None:
        super().__init__()
        self.fc1.weight.requires_grad_(False)


class Doubled(TinyNet):
    def __init__(self) -> None:
        super().__init__()
        self.conv2.register_forward_hook(lambda module, args, output: 2 * output)


def doubled(layer: nn.Conv2d, x: Tensor) -> Tensor:
    return 2 * nn.Conv2d.forward(layer, x)


class Patched(TinyNet):
    """A layer computes by a function that it was given, as some libraries do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv2.forward = partial(doubled, self.conv2)  # type: ignore[method-assign]


CANNOT = {
    Doubled: "conv2 has a hook",
    Patched: "conv2 has a forward of its own",
    Tied: "fc2.weight is used more than once",
    Branching: "the model cannot be traced",
    Still: "fc1.weight is not trained",
}


@pytest.mark.parametrize("net", CANNOT, ids=lambda net: net.__name__)
def test_what_the_kernels_cannot_train_is_dense_and_says_why(net: type[nn.Module]) -> None:
    run_ = replace(tiny_run(PDST(density=0.05), rounds=1), task=Task(net, blobs, 6))
    (round_,) = rounds(run_, local())
    assert round_.kernels == {"dense": 3}
    assert round_.dense_because
    assert CANNOT[net] in round_.dense_because
    for engine in (local(kernels="sparse"), pool(2, kernels="sparse")):
        with pytest.raises(InputError, match=f"--kernels sparse cannot be: .*{CANNOT[net]}.*; choose auto or dense"):
            next(rounds(run_, engine))


def test_a_mask_that_the_kernels_would_not_heed_is_dense() -> None:
    model = fresh("swat")
    kernels = Kernels(model, "auto")
    for name in ("fc1.weight", "conv1.bias", "bn.weight"):
        mask = {name: torch.zeros_like(model.get_parameter(name), dtype=torch.bool)}
        assert kernels.take(device_of(model), mask) == f"the mask of {name} is not one of a plain layer's weights"
    assert kernels.take(device_of(fresh()), {}) == "the method trains a model of its own"
    with pytest.raises(InputError, match="--kernels sparse cannot be: the method trains a model of its own"):
        Kernels(model, "sparse").take(device_of(fresh()), {})


def test_pruned_activations_at_a_power_of_one_are_not_for_the_kernels() -> None:
    (round_,) = rounds(tiny_run(SparseFedPP(sparsity=0.9, a=1.0), rounds=1), local())
    assert round_.dense_because == (
        "at a = 1 pruned weights come back, and conv1 would keep other activations at every step"
    )


def test_a_gpu_is_not_for_the_kernels() -> None:
    assert Kernels(fresh(), "auto", "cuda:0").graph(SHAPE) == "the kernels compute on CPUs, not on cuda:0"


def test_without_a_library_training_is_dense_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_find_library", lambda: "FEDSIEVE_ISA=none switches them off")
    (round_,) = rounds(tiny_run(PDST(density=0.05), rounds=1), local())
    assert round_.kernels == {"dense": 3}
    assert round_.dense_because == "there are no native kernels: FEDSIEVE_ISA=none switches them off"
    with pytest.raises(InputError, match="--kernels sparse cannot be: there are no native kernels: FEDSIEVE_ISA=none"):
        next(rounds(tiny_run(FedAvg(), rounds=1), local(kernels="sparse")))


def test_dense_is_what_it_was_without_kernels() -> None:
    """As asked for, no reason given; and to the bit what a device without kernels computes."""
    model, other = fresh(), fresh()
    mask = mask_of(model, 0.3)
    train_on_mask(device_of(model, Cost(model, Kernels(model, "dense")), momentum=0.9), mask)
    train_on_mask(device_of(other, momentum=0.9), mask)
    assert all(torch.equal(value, params_of(other)[name]) for name, value in params_of(model).items())
    (round_,) = rounds(tiny_run(PDST(density=0.05), rounds=1), local(kernels="dense"))
    assert (round_.kernels, round_.dense_because) == ({"dense": 3}, None)


# ---------------------------------------------------------------- what is noted of a run


def test_notes_are_no_part_of_an_upload() -> None:
    """Counted is what a message without them weighs, however a client trained."""
    for kernels in ("auto", "dense", "sparse"):
        sent: list[int] = []
        federation = open_run(tiny_run(FedAvg(), rounds=1))
        codec = Messages(federation)

        def weigh(t: int, client: int, down: Tree, reply: Reply) -> Iterable[tuple[int, Tree]]:
            bare = {name: part for name, part in reply.items() if name != "notes"}
            sent.append(len(codec.encode_reply(t, client, bare, codec.known(down))))  # noqa: B023
            yield client, reply

        (round_,) = rounds(federation, changed(weigh, local(kernels=kernels)))
        assert round_.bytes_up == sum(sent)


def test_work_counts_steps_seconds_and_multiply_adds_either_way() -> None:
    counted = []
    for _, device in both():
        cost: Cost = device.steps.__self__  # type: ignore[union-attr]
        train(device)
        assert cost.steps == len(cost.times) == 6
        assert 0 < sum(cost.times) <= cost.seconds
        counted.append((cost.products.real, cost.products.dense))
        cost.restart()
        assert (cost.steps, cost.seconds, cost.sparse) == (0, 0, None)
    assert counted[0] == counted[1]


@pytest.mark.slow
def test_a_run_tells_which_way_it_went(tmp_path: Path) -> None:
    out = tmp_path / "run"
    federation = open_run(tiny_run(PDST(density=0.1), rounds=2), measure=("masks", "kernels"))
    list(record_run(out, federation, local(kernels="sparse"), "x", Execution(kernels="sparse")))
    rows = read_rows(out)
    for row in rows:
        assert (row["kernels"], row["dense_because"], row["steps"]) == ({"sparse": 3}, None, 15)
        assert row["ms_per_step"] > 0
        assert row["saved_bytes"] > 0
        assert "saved_nonzero" not in row  # which the kernels do not tell
    about = json.loads((out / "run.json").read_text())
    assert (about["kernels"], about["hardware"]["isa"]) == ("sparse", loaded_isa())
    reply = json.loads((out / "summary.json").read_text())
    assert (reply["kernels"], reply["dense_because"], reply["steps"]) == ({"sparse": 6}, None, 30)
    assert reply["ms_per_step"] == pytest.approx(sum(row["ms_per_step"] for row in rows) / 2)
    ways = reply["kernels_measured"]
    assert ways["sparse"]["multiply_adds_per_step"] == pytest.approx(ways["dense"]["multiply_adds_per_step"])
    assert all(way["ms_per_step"] > 0 and way["peak_memory_mb"] > 50 for way in ways.values())
    report([out], tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "A step" in page
    assert f'<small>sparse <data value="{ways["sparse"]["ms_per_step"]!r}">' in page
    assert f'<small>dense <data value="{ways["dense"]["ms_per_step"]!r}">' in page


@pytest.mark.slow
def test_measuring_both_ways_changes_nothing_and_names_what_cannot_be(tmp_path: Path) -> None:
    run_ = replace(tiny_run(NST(density=0.2), rounds=2), task=Task(Tied, blobs, 6))
    for name, measure in (("a", ()), ("b", ("kernels",))):
        list(record_run(tmp_path / name, open_run(run_, measure=measure), local(), "x"))
    models = [(tmp_path / name / "model.safetensors").read_bytes() for name in "ab"]
    assert models[0] == models[1]
    ways = json.loads((tmp_path / "b/summary.json").read_text())["kernels_measured"]
    why = "--kernels sparse cannot be: fc2.weight is used more than once; choose auto or dense"
    assert ways["sparse"] == {"because": why}
    assert ways["dense"]["ms_per_step"] > 0


# ---------------------------------------------------------------- how a run is begun


def test_a_run_goes_on_as_it_was_begun(tmp_path: Path) -> None:
    federation = open_run(tiny_run(PDST(density=0.1)))
    list(record_run(tmp_path, federation, local(kernels="sparse"), "x", Execution(kernels="sparse", until=1)))
    for other in ("auto", "dense"):
        with pytest.raises(InputError, match=f"was begun with --kernels sparse, not {other}: go on so, or choose"):
            record_run(tmp_path, federation, local(kernels=other), "x", Execution(kernels=other, resume=True))
    list(record_run(tmp_path, federation, local(kernels="sparse"), "x", Execution(kernels="sparse", resume=True)))
    assert [row["kernels"] for row in read_rows(tmp_path)] == [{"sparse": 3}] * 4


@pytest.mark.parametrize("make", [local, lambda kernels: pool(2, kernels=kernels), lambda kernels: sweep(kernels)])
def test_unknown_kernels_are_refused(make: Any) -> None:
    with pytest.raises(InputError, match="unknown kernels 'fast'; they are auto, sparse, dense"):
        make(kernels="fast")


def sweep(kernels: str) -> Any:
    return grid(["pdst.digits"], [], 1, Execution(kernels=kernels))


def test_a_sweep_tells_no_time() -> None:
    with pytest.raises(InputError, match="--measure kernels is for fedsieve run"):
        grid(["pdst.digits"], [], 1, Execution(measure="kernels"))
