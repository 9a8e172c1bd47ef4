"""The roof: what is read from where, a step's least seconds against arithmetic by hand, and the command."""

import json
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from fedsieve.cli.bench import roof
from fedsieve.cli.bench.roof import Roof, cache_sizes, measure_roof, roof_seconds
from fedsieve.kernels import Trainer

pytestmark = pytest.mark.usefixtures("native")
SLOW_READS = Roof(1, 1e9, 4.0, 2.0, 1.0, 0.5)
"""Multiply-adds cost nothing; a GB takes 1/4 s from the first cache, 2 s from memory."""
SLOW_SUMS = Roof(1, 8.0, 1e9, 1e9, 1e9, 1e9)


def trainer_of(unit: int, storage: str = "fp32") -> tuple[Trainer, int]:
    """Return a trainer of a convolution whose input needs no gradient, BatchNorm, ReLU and a layer; and its entries."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(64, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 3),
    )
    mask = (torch.rand(16 // unit, 64, 3, 3) < 0.25).repeat_interleave(unit, 0)
    trainer = Trainer(model, {"0.weight": mask}, 16, lr=0.1, momentum=0.9, storage=storage)  # type: ignore[arg-type]
    trainer.step(torch.randn(16, 64, 8, 8), torch.randint(3, (16,)))
    return trainer, int(mask.sum())


@pytest.mark.parametrize("unit", [1, 8])
def test_a_step_that_reads(unit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roof, "cache_sizes", lambda: {1: 10_000, 2: 200_000, 3: 300_000})
    trainer, entries = trainer_of(unit)
    vector, positions = 16 * 4, 8 * 8
    # the convolution: forward and the weights' gradient. A tile is 2 lines of 8: it looks at 4 by 10 positions of 64
    # channels, 163,840 bytes, in the second cache. The arena does not fit the third: maps are in memory.
    conv = 2 * max(entries * positions * vector / unit / 2e9, (64 + 16) * positions * vector / 0.5e9)
    norm = (2 + 3) * 16 * positions * vector / 0.5e9
    pool = 2 * (16 * positions + 16) * vector / 0.5e9
    # the linear layer has 3 rows: no unit. Its 16 inputs and 3 outputs lie in the first cache, 48 products
    linear = 3 * max(48 * vector / 4e9, (16 + 3) * vector / 0.5e9)
    optimizer = 5 * 4 * (entries + 48) / 0.5e9
    assert trainer.lowered.arena.memory.numel() * 4 > 300_000
    assert roof_seconds(trainer, SLOW_READS) == pytest.approx(conv + norm + pool + linear + optimizer)


@pytest.mark.parametrize("storage", ["fp32", "bf16"])
def test_a_step_that_computes(storage: str) -> None:
    trainer, entries = trainer_of(1, storage)
    samples = 16 if storage == "fp32" else 32  # a block is filled up
    flops = 2 * samples * (2 * entries * 64 + 3 * 48)
    assert roof_seconds(trainer, SLOW_SUMS) == pytest.approx(flops / 8e9, rel=1e-3)


def test_the_smallest_cache_that_holds_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roof, "cache_sizes", lambda: {1: 10, 2: 100, 3: 1000})
    both = Roof(2, 1.0, 4.0, 3.0, 2.0, 1.0)
    assert [both.bandwidth(size) for size in (10, 11, 100, 101, 500, 501)] == [4e9, 3e9, 3e9, 2e9, 2e9, 1e9]


def test_caches_are_what_the_system_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(roof, "CACHES", tmp_path)
    assert cache_sizes() == roof.TYPICAL
    for i, (level, kind, size) in enumerate([(1, "Data", 48), (1, "Instruction", 64), (2, "Unified", 2048)]):
        (tmp_path / f"index{i}").mkdir()
        for name, text in (("level", f"{level}"), ("type", kind), ("size", f"{size}K")):
            (tmp_path / f"index{i}" / name).write_text(text + "\n")
    assert cache_sizes() == {1: 48 << 10, 2: 2048 << 10, 3: roof.TYPICAL[3]}


def test_this_machine_has_a_roof(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roof, "cache_sizes", lambda: {1: 32 << 10, 2: 256 << 10, 3: 1 << 20})
    monkeypatch.setattr(roof, "SAMPLES", 3)
    began = time.perf_counter()
    machine = measure_roof(1, time.thread_time)
    assert time.perf_counter() - began < 5
    assert 1 < machine.gflops < 2000
    assert machine.l1_gb_s > 0.8 * machine.memory_gb_s > 0.1
    assert machine.l1_gb_s < 4 * machine.gflops  # four bytes are read for a multiply-add, of two operations


def test_the_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from fedsieve.cli.bench.commands import roof_command

    monkeypatch.setattr(roof, "measure_roof", lambda threads: Roof(threads, 100.0, 4.0, 3.0, 2.0, 1.0, "a CPU"))
    roof_command(3, True)
    one, all_ = map(json.loads, capsys.readouterr().out.splitlines())
    assert (one["threads"], all_["threads"], one["gflops"], one["cpu"]) == (1, 3, 100.0, "a CPU")
    roof_command(1, False)
    assert "multiply-adds, Gflop/s" in capsys.readouterr().out
