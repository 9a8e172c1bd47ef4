"""The benchmarks of a GPU, without one: plain PyTorch that rounds are measured beside, and a step's computed cost."""

import json
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")


# Plain PyTorch, beside which rounds are measured


@pytest.mark.slow
def test_grouped_clients_train_as_each_alone() -> None:
    from gpu_steps import SMALL, Stepper

    together = Stepper(SMALL, "fp32", grouped=3)
    for _ in range(2):
        together.step()
    for client in range(3):
        model = SMALL.network().train()
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        x, y = (part[client, : SMALL.batch] for part in SMALL.data())
        for _ in range(2):
            optimizer.zero_grad()
            F.cross_entropy(model((x / 255 - 0.5) / 0.5), y).backward()
            optimizer.step()
        for name, weight in model.named_parameters():
            of_all = together.model.get_parameter(name)
            own = of_all.view(3, *weight.shape)[client]
            torch.testing.assert_close(own, weight, rtol=1e-4, atol=1e-6)


def test_norms_of_grouped_clients_are_their_own() -> None:
    from gpu_steps import group

    plain = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4))
    grouped, x = group(plain, 2), torch.randn(5, 4, 6, 6)
    outputs = grouped(x)
    for client in range(2):
        assert torch.allclose(
            outputs[:, 4 * client : 4 * client + 4], plain(x[:, 2 * client : 2 * client + 2]), atol=1e-6
        )


def test_the_plain_loop_is_federated_averaging() -> None:
    from gpu_steps import SMALL, PlainLoop

    work = replace(SMALL, clients=2, examples=12, batch=16)  # a step of all examples: their order does not matter
    loop = PlainLoop(work, "fp32")
    for _ in range(2):
        loop.round()
    mean = {name: value.clone() for name, value in work.network().state_dict().items()}
    for _ in range(2):
        reached = []
        for client in range(2):
            model = work.network().train()
            model.load_state_dict(mean)
            x, y = (part[client] for part in work.data())
            gradients = torch.autograd.grad(F.cross_entropy(model((x / 255 - 0.5) / 0.5), y), [*model.parameters()])
            reached.append([w.detach() - 0.01 * g for w, g in zip(model.parameters(), gradients, strict=True)])
        mean = {name: (a + b) / 2 for name, a, b in zip(mean, *reached, strict=True)}
    for own, expected in zip(loop.mean, mean.values(), strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.gpu
def test_a_captured_step_is_the_step() -> None:
    from gpu_steps import SMALL, WARM, Stepper, captured, products_in

    work, steps = replace(SMALL, device="cuda"), 3
    with products_in("fp32", work):
        replay = captured(Stepper(work, "fp32").step, work)
        _others = [torch.full((n,), torch.nan, device="cuda") for n in range(1, 5000)]  # in what memory is free
        captured_one, eager = Stepper(work, "fp32"), Stepper(work, "fp32")
        again = captured(captured_one.step, work)
        for _ in range(steps):
            replay()
            again()
        for _ in range(WARM + steps):
            eager.step()
    for name, weight in eager.model.named_parameters():
        torch.testing.assert_close(captured_one.model.get_parameter(name), weight, rtol=1e-3, atol=1e-5)


# What a step takes of a GPU


@pytest.mark.slow
def test_the_counts_of_a_step_are_resnet_18s() -> None:
    import gpu_cost

    widths = {64: (32, 3), 128: (16, 64), 256: (8, 128), 512: (4, 256)}  # the side of the maps, the channels before
    products = 0
    for width, (side, before) in widths.items():
        first, inner = (1, 4) if width == 64 else (1, 3)
        products += side**2 * width * 9 * (first * before + inner * width)
        products += 0 if width == 64 else side**2 * width * before  # the shortcut
    forward = 2 * 16 * products
    step = gpu_cost.dense_step()
    assert step["convolutions, forward"].flops == forward
    first = 2 * 16 * 32**2 * 64 * 9 * 3
    assert step["convolutions, backward"].flops == 2 * forward - first  # nothing asks for the images' gradient
    assert (step["convolutions, forward"].launches, step["convolutions, backward"].launches) == (20, 39)
    assert (step["update"].launches, step["update"].bytes) == (1, 3 * 4 * 11_173_962)
    assert step["norms"].launches == 40
    cuts = gpu_cost.selections()
    inputs = 4 * 64 * 32**2 + 64 * 32**2 + 3 * 128 * 16**2 + 128 * 16**2 + 3 * 256 * 8**2 + 256 * 8**2 + 3 * 512 * 4**2
    assert cuts.launches == 6 + 16 * 5 + 16 * (2 * 2 + 3)  # and counts of non-zeros, each to a share, and three sums
    assert cuts.bytes == (4 * 4 + 2 + 2) * 10_985_472 + (4 + 1) * 2 * 16 * inputs  # weights are written in bf16
    assert gpu_cost.masks().bytes == (4 + 4 + 4) * (1_728 + 10_985_472 + 172_032)
    results = json.loads(gpu_cost.RESULTS.read_text())
    for label in ("convolutions, forward", "convolutions, backward", "update"):
        assert results["kernels"][label] == asdict(step[label])
    assert results["extras"] == {"ZeroFL .95": asdict(cuts), "FLASH .05": asdict(gpu_cost.masks())}
    assert {name: cell["steps"] for name, cell in results["cells"].items()} == {
        "ZeroFL .95": 700 * 10 * 29,  # 450 examples: 28 batches of 16 and one of 2
        "FLASH .05": 600 * 10 * 32 + 10 * 10 * 32,
    }


def test_a_round_on_the_host_is_what_cannot_be_hidden() -> None:
    """Tensors beside one another, the largest a half of all; top weights by the GPU."""
    from gpu_cost import round_on_host

    host = {"broadcast": 8.0, "open": 1.0, "choose": 5.0, "choose_support": 4.0, "mean": 6.0, "deploy": 3.0}
    host |= {"deploy_support": 2.0, "bound": 1.0, "checkpoint": 7.0, "largest": 0.5, "selected": 4e9}
    moved = 1.0  # five bytes an element at 20e9 a second
    alone = 4 + 1 + 5 + 6 + 3 + 1 + 7
    assert round_on_host(host, 10.0) == (alone, 4 + 1 + (0.5 + moved))
    assert round_on_host(host, 5.0)[1] == round_on_host(host, 10.0)[1] + 2
    dense = host | {"choose_support": 0.0, "deploy_support": 0.0}
    assert round_on_host(dense, 10.0) == (alone, 4 + 1 + 1.5)


def test_clients_that_end_at_once_wait_for_one_another() -> None:
    """Two train in four seconds whether at once or one after another; then each is encoded in three, by one thread."""
    from gpu_schedule import Stage, seconds_of

    def full(n: int) -> float:
        return 1.0

    stages = [Stage("train", 2.0, full), Stage("choose", 1.0, float), Stage("encode", 3.0, full, 1)]
    assert seconds_of(stages, 2, 2, ("train",)) == 4 + 1 + 3 + 3
    assert seconds_of(stages, 2, 1, ("train",)) == 2 + 1 + 3 + 3
    assert (
        seconds_of(stages, 2, 1, ("train", "choose")) == 2 + 1 + 3 + 3
    )  # the second trains while the first is encoded
    assert seconds_of(stages, 3, 1, ("train", "choose")) == 2 + 1 + 3 * 3
    assert seconds_of(stages[:2], 2, 1, ("train", "choose")) == 2 * (2 + 1)
    twice = [stages[0], Stage("encode", 3.0, float, 2)]
    assert seconds_of(twice, 2, 2, ("train",)) == 4 + 3


def test_an_operation_takes_the_longest_of_its_times() -> None:
    from gpu_cost import Gpu, Kernels

    gpu = Gpu(flops=100, share=0.5, bandwidth=10, bandwidth_share=0.5, launch=1, processors=4, overlap=0.25)
    small, moved, full, few = Kernels(), Kernels(), Kernels(), Kernels()
    small.add(3, 5, 50, gpu=gpu)
    assert (small.alone, small.together) == (3, 1)
    moved.add(1, 50, 50, gpu=gpu)
    assert (moved.alone, moved.together) == (10, 10)
    full.add(1, 5, 500, tiles=4, gpu=gpu)
    assert (full.alone, full.together) == (10, 10)
    few.add(1, 5, 500, tiles=1, gpu=gpu)
    assert (few.alone, few.together) == (40, 10)


# Lines


def test_lines_go_on_after_an_error_and_stop_with_the_time(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from gpu import Lines, read_lines

    def fails() -> None:
        raise RuntimeError("CUDA error:\n out of memory")

    with (tmp_path / "lines").open("w") as out:
        lines = Lines(out, time.monotonic() + 60)
        lines.part("a", fails)
        lines.part("b", lambda: {"ms": 1.5})
        lines.end = 0
        lines.part("c", fails)
        out.write('{"what": "cut')
    assert read_lines(tmp_path / "lines") == [
        {"what": "a", "error": "RuntimeError: CUDA error: out of memory"},
        {"what": "b", "ms": 1.5},
        {"what": "c", "skipped": "no time was left"},
    ]
    assert capsys.readouterr().out.count("\n") == 3


def test_the_table_has_the_last_line_of_each_way() -> None:
    from gpu import table

    line = {
        "what": "round",
        "method": "fedavg",
        "way": "cohort 1",
        "precision": "bf16",
        "s_round": 1.0,
        "ms_step": 3.0,
        "n": 3,
    }
    other = line | {"s_round": 2.0, "ms_step": 6.0, "n": 9, "share": 0.125}
    failed = {"what": "round", "method": "swat", "way": "cohort 1", "precision": "bf16", "error": "no memory"}
    rows = table([{"what": "machine"}, line, failed, {"what": "rounds", "turns": 9}, other]).splitlines()
    assert rows[2:] == [
        "| fedavg | cohort 1 | bf16 | 2.000 | 6.000 | 12.5% | 9 |",
        "| swat | cohort 1 | bf16 | no memory |  |  |  |",
    ]
