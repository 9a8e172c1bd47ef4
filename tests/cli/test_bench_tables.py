"""The pages' tables and pictures of measurements: what they show, and which rows are measured again."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fedsieve.cli.bench.measurement import Effort
from fedsieve.cli.bench.roof import Roof
from fedsieve.cli.bench.workload import Workload
from fedsieve.types import InputError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def performance(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import performance

    monkeypatch.setattr(performance, "RESULTS", tmp_path / "performance.json")
    monkeypatch.setattr(performance.runs, "RESULTS", tmp_path / "kernels.json")
    monkeypatch.setattr(performance.roof, "RESULTS", tmp_path / "roof.json")
    monkeypatch.setattr(
        performance.roof, "measure_roof", lambda threads: Roof(threads, 100.0, 4.0, 3.0, 2.0, 1.0, "a CPU")
    )
    return performance


def fabricated(name: str, case: Workload, effort: Effort) -> dict[str, Any]:
    times = {"ms_sparse": 41.0, "ms_dense_fp32": 287.0, "ms_dense_bf16": 164.0, "ratio_fp32": 7.0, "ratio_bf16": 4.0}
    return {"density_per_multiply_add": 0.0525, **times, "samples_kept": effort.samples, "samples_dropped": 2}


def test_the_picture_shows_the_numbers(performance: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import picture
    from picture import whole_round

    rows = [
        whole_round.Row("flash.mnist", 10, 6.0, 2.0, 1.5, 0.5, 18.0, 3.0),
        whole_round.Row("fedavg.mnist", 10, 6.0, 2.0, 3.0, 0.5, 18.0, 12.0),
        whole_round.Row("zerofl.femnist", 10, 9.0, 2.0, 3.0, 0.5, 18.0, 6.0),
    ]
    assert picture.ratios(rows) == [
        ("flash.mnist, 95 % zeros", 4.0, 6.0),
        ("fedavg.mnist, dense", 2.0, 1.5),
        ("zerofl.femnist, 95 % zeros", 3.0, 3.0),
    ]
    monkeypatch.setattr(whole_round, "RESULTS", tmp_path / "whole_round.json")
    clock = [whole_round.ClockRow("flash.mnist", 10, "pool:2", 2, 2.0, 1.04, 0.3, 0.97)]
    results = {"cpu": "a CPU", "rows": [vars(row) for row in rows], "clock": [vars(row) for row in clock]}
    whole_round.RESULTS.write_text(json.dumps(results))
    assert whole_round.table().splitlines()[3].endswith("| 2.0x | 1.6x | 1.5x | 133% |")
    last = "| `flash.mnist` | 10 | 2.00 | 1.04 (0.30) | 0.52 | `pool:2` | 97% of 2 |"
    assert whole_round.clock_table().splitlines()[-1] == last
    monkeypatch.setattr(picture, "PICTURE", tmp_path / "rounds.png")
    picture.main()
    assert (tmp_path / "rounds.png").read_bytes()[:4] == b"\x89PNG"


def test_a_table_shows_what_was_measured_and_wanted(performance: Any) -> None:
    wanted, effort = performance.PLAN["frozen"][1], Effort(2)
    numbers = fabricated("frozen", wanted.case, effort)
    told = {"table": "frozen", "case": wanted.named(), **performance.circumstances(effort), **numbers}
    lines = performance.table("frozen", [told]).splitlines()
    assert lines[2] == "| 90 % | - | - | - | - | - | 4.6x | 5x | - | - | - |"
    assert lines[3] == "| 95 % | 5.25 % | 41.0 | 287 | 164 | 7.0x | 7.6x | 8.3x | 4.0x | - | 7 (2) |"
    assert "2 threads, kernels for" in performance.hardware([told])


def test_every_row_is_measured_once_and_a_poor_one_again(
    performance: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []

    def measured(name: str, case: Workload, effort: Effort) -> dict[str, Any]:
        asked.append(name)
        poor = {"samples_kept": 1} if name == "swat" and len(asked) < 40 else {}
        return fabricated(name, case, effort) | poor

    monkeypatch.setattr(performance, "measured", measured)
    monkeypatch.setattr(performance.runs, "main", lambda: asked.append("runs"))
    monkeypatch.setattr(sys, "argv", ["performance.py"])
    planned = [name for name, lines in performance.PLAN.items() for _ in lines]
    performance.main()
    assert asked == [*planned, "runs"]
    assert len(performance.committed()) == len(planned)
    asked.clear()
    performance.main()
    assert asked == ["swat"] * len(performance.PLAN["swat"]) + ["runs"]
    asked.clear()
    monkeypatch.setattr(sys, "argv", ["performance.py", "--quick"])
    before = performance.RESULTS.read_bytes()
    performance.main()
    assert asked == planned
    assert performance.RESULTS.read_bytes() == before
    assert "wanted" in capsys.readouterr().out


def test_the_table_of_runs(performance: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    runs, ran = performance.runs, []

    def one(recipe: str, kernels: str, seed: int) -> list[dict[str, Any]]:
        ran.append((kernels, seed))
        slow = 6.0 if kernels == "dense" else 2.0
        rows = [{"round": t, "seconds": slow + t, "accuracy": 0.5 + t / 10 + seed / 100} for t in range(3)]
        rows = [row | {"cpu_seconds": 0.99 * row["seconds"]} for row in [*rows, {"round": 3, "seconds": 0.0}]]
        return [*rows, {"round": 4, "seconds": 99.0, "cpu_seconds": 90.0}]  # disturbed

    def tested(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{"accuracy": None} | row for row in rows]

    monkeypatch.setattr(runs, "one", lambda *run: tested(one(*run)))
    found = {"flash.mnist": runs.measure("flash.mnist")}
    assert ran == [(kernels, seed) for seed in (0, 1, 2) for kernels in ("dense", "sparse")]
    seeds = "71.0 (70.0, 71.0, 72.0)"
    line = f"| `flash.mnist` | 30 | 7.00 | 3.00 | 2.3x faster | 18 (6) | {seeds} | {seeds} |"
    assert runs.table(found).splitlines()[3] == line


def test_a_median_of_rounds_needs_three_undisturbed_ones(performance: Any) -> None:
    rows = [{"seconds": s, "cpu_seconds": c} for s, c in ((1.0, 1.0), (2.0, 1.97), (3.0, 2.9), (4.0, 4.0))]
    timed = performance.runs.timed
    assert timed(rows) == {"seconds": 2.0, "rounds_kept": 3, "rounds_dropped": 1}
    assert timed(rows[:3]) == {"seconds": None, "rounds_kept": 2, "rounds_dropped": 1}


def test_messages_are_weighed_as_the_table_says(monkeypatch: pytest.MonkeyPatch) -> None:
    from fedsieve.cli.bench.wire import Message, keep_largest, measure_message, tensor_entropy
    from fedsieve.sparse.csr import csr_bytes
    from fedsieve.wire import Known, Manifest

    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.delitem(sys.modules, "wire", raising=False)
    from wire import compare_codecs

    generator = torch.Generator().manual_seed(0)
    params = {"w": torch.randn(300, 400, generator=generator), "v": torch.randn(90, 90, generator=generator)}
    base = {n: v * (1 + 0.01 * torch.randn(v.shape, generator=generator)) for n, v in params.items()}
    tree = keep_largest(params, 0.1)
    row = measure_message(Message("drawn", tree, "manifest", Known(Manifest.of(params))), repeats=1)
    known = measure_message(Message("drawn", tree, "base", Known(Manifest.of(params), base)), repeats=1)
    nnz = round(0.1 * 128_100)
    assert row.density == pytest.approx(0.1, abs=1e-4)
    assert (row.csr_bytes, row.dense_bytes) == (8 * nnz + 260, 4 * 128_100)
    assert csr_bytes(tree) == row.csr_bytes
    assert 0.9 < row.bytes / row.entropy_bytes < 1.03
    assert 0.9 < known.bytes / known.entropy_bytes < 1.06
    assert known.bytes < 0.8 * row.bytes
    assert row.churn is None
    assert known.churn is not None
    assert 0 < known.churn < 0.05
    peers = {told["codec"]: told["bytes"] for told in compare_codecs(tree, repeats=1)}
    assert len(peers) == 4
    assert min(peers, key=lambda name: peers[name]) == "FedSieve"
    assert sum(tensor_entropy("w", torch.ones(64, 64), Known(), "f32")) == 64 * 64 * 23  # one sign, one exponent


def test_bench_wire_prints_the_rows_as_json(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedsieve.cli.bench import wire
    from fedsieve.cli.bench.commands import wire_command

    small = {"w": torch.randn(40, 50, generator=torch.Generator().manual_seed(0))}
    monkeypatch.setattr(wire, "random_messages", lambda densities: wire.messages_of("small", small, small, densities))
    wire_command("0.05,0.2", True)
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    wanted = ["case", "density", "known", "values", "bytes", "entropy_bytes", "csr_bytes", "dense_bytes"]
    assert list(rows[0])[:10] == [*wanted, "encode_mb_s", "decode_mb_s"]
    assert [row["values"] for row in rows] == [
        "f32",
        "f32",
        *(v for v in ("bf16", "int8", "int4") for _ in range(2)),
        "f32",
        "f32",
    ]
    with pytest.raises(InputError, match="between 0 and 1"):
        wire_command("2", True)
