"""The table of results: the numbers of the runs, and a dash where nothing plausible was measured."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fabricated import fabricate
from fedsieve.engine.federation import described
from fedsieve.recipes import load_recipe
from fedsieve.report.results import all_finished, progress_text
from fedsieve.runs.progress import summary_table
from fedsieve.runs.record import read_record
from fedsieve.runs.units import format_ratio
from report_pages import cells_of, change, page_of, row_of, rows_in, write_run


def test_what_was_not_counted_stands_beside_the_multiply_adds(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    for names, said in (["aten::<b>", "aten::fft"], True), ([], False), (5, False):
        change(run / "summary.json", multiply_adds_not_counted=names)
        assert ("not counted: aten::<b>, aten::fft" in cells_of(run)[6][0]) == said


def test_the_way_of_training_is_counted_over_all_seeds(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"{seed}", seed=seed, rounds=3) for seed in (0, 1)]
    for kernels, run in zip(({"sparse": 3, "dense": 2}, {"sparse": 5}), runs, strict=True):
        rows = [row | {"kernels": kernels, "ms_per_step": 2.0, "steps": 7} for row in rows_in(run)]
        (run / "rounds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    steps = [row[7][0] for row in page_of(tmp_path, *runs).rows if len(row) == 10]
    assert steps == ["A step", "2.00 mssparse 24, dense 6", "A step", "2.00 mssparse 9, dense 6", "2.00 mssparse"]


def test_seeds_are_one_row_of_means_with_their_spread(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"z{seed}", seed=seed) for seed in (2, 0, 1)]
    runs.append(write_run(tmp_path / "going", seed=3, done=7))
    runs.append(write_run(tmp_path / "alone", method={"kind": "FedAvg"}))
    for i, run in enumerate(runs[:3]):
        change(run / "summary.json", accuracy=0.9 + i / 50, accuracy_validation=0.8, bytes_up=1e6 + 2e5 * i)
        change(run / "summary.json", density_of_all=0.5 + i / 10, density_of_policy=0.1)
    page = page_of(tmp_path, *runs)
    (row,) = (row for row in page.rows if len(row) == 10 and row[0][0].strip().startswith("ZeroFL4 seeds"))
    assert "3 of 4 finished, 7 to 12 of 12 rounds" in row[0][0]
    assert row[1] == ("92.0 ± 2.0 %validation 80.0 %", [pytest.approx(0.92), pytest.approx(0.8)])
    assert "of the policy 10.0 %of all 60.0 ± 10.0 %" in row[2][0]
    assert row[3][0].startswith("1.20 ± 0.20 MBdense 31.2 MB26.0x less")
    assert page.result("FedAvg, seed 0alone")[1][0].count("±") == 0
    for seed in range(4):
        assert page.result(f"ZeroFL, seed {seed}")
    bands = (tmp_path / "report.html").read_text().count('id="accuracy-FillBetween')
    assert bands == 1


def test_an_upload_stands_beside_the_papers_formula_and_csr(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    change(run / "summary.json", csr_bytes_up=187_200.0)
    upload = page_of(tmp_path, run).result("ZeroFL")[5]
    assert upload[1][1:] == [93_600.0, 187_200.0]
    assert "paper 93.6 kB" in upload[0]
    assert "CSR 187 kB" in upload[0]


def test_a_run_that_is_not_the_papers_says_what_differs(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    change(run / "run.json", run=described(load_recipe("flash.mnist", ["method.density=0.05", "rounds=12"])))
    accuracy = page_of(tmp_path, run).result("FLASH")[1][0]
    assert accuracy.endswith("%paper 12 of 400 rounds")


@pytest.mark.parametrize("done", [12, 7])
def test_the_table_holds_the_numbers_of_the_run(tmp_path: Path, done: int) -> None:
    run = write_run(tmp_path / "run", done=done)
    rows = rows_in(run)
    total = {name: sum(row[name] for row in rows) for name, value in rows[0].items() if isinstance(value, int | float)}
    label, accuracy, density, up, down, upload, work, time, memory = page_of(tmp_path, run).result("ZeroFL")
    assert ("7 of 12 rounds" in label[0]) == (done == 7)
    assert accuracy == (f"{100 * rows[-1]['accuracy']:.1f} %", [rows[-1]["accuracy"]])
    assert density == (f"{100 * rows[-1]['density']:.1f} %", [rows[-1]["density"]])
    for cell, name in ((up, "up"), (down, "down")):
        assert cell[1] == [total[f"bytes_{name}"], total[f"bytes_dense_{name}"]]
        assert f"{total[f'bytes_dense_{name}'] / total[f'bytes_{name}']:.1f}x less" in cell[0]
    assert upload[1] == [total["bytes_up"] / (5 * done), *[93_600.0] * (done == 12)]
    assert work[1] == [total["multiply_adds"], total["multiply_adds_dense"]]
    assert time == (f"{total['seconds']:.1f} s", [total["seconds"]])
    assert memory == (("412 MB", [412.0]) if done == 12 else ("–", []))


@pytest.mark.parametrize(
    ("size", "dense", "said"),
    [
        (999, 999, "999 Bdense 999 Bthe same"),
        (1_000, 12_345, "1.00 kBdense 12.3 kB12.3x less"),
        (999_999, 500_000, "1.00 MBdense 500 kB2.0x more"),
        (2.5e9, 2.5e12, "2.50 GBdense 2.50 TB1,000x less"),
        (0, 10, "0 Bdense 10 B"),
    ],
)
def test_bytes_read_well(tmp_path: Path, size: float, dense: float, said: str) -> None:
    run = write_run(tmp_path / "run")
    change(run / "summary.json", bytes_up=size, bytes_dense_up=dense)
    assert cells_of(run)[3][0] == said


def test_factors_say_less_or_more_never_a_fraction_of_fewer(tmp_path: Path) -> None:
    for reference, measured, cell, sentence in (
        (9.64, 1, "9.6x less", "9.6 times less than dense"),
        (0.34, 1, "2.9x more", "2.9 times more than dense"),
        (1.04, 1, "1.04x less", "1.04 times less than dense"),
        (1, 1.004, "the same", "the same as dense"),
        (2e5, 1, "200,000x less", "200,000 times less than dense"),
        (0, 1, "", ""),
        (1, 0, "", ""),
        (math.inf, 1, "", ""),
        (math.nan, 1, "", ""),
    ):
        assert (format_ratio(reference, measured), format_ratio(reference, measured, than="dense")) == (cell, sentence)
    assert format_ratio(1, 3, ("fewer", "more"), "dense") == "3.0 times more than dense"
    run = write_run(tmp_path / "run")
    change(
        run / "summary.json",
        multiply_adds=1.2e11,
        multiply_adds_dense=4.1e10,
        upload_bytes=1e3,
        accuracy_validation=None,
        density_of_all=0.1,
        multiply_adds_not_counted=[],
        kernels={"sparse": 3},
        ms_per_step=1.5,
        bytes_up=2000,
        bytes_dense_up=1000,
    )
    console = Console(record=True, width=120, file=io.StringIO())
    console.print(summary_table(run))
    said = console.export_text()
    assert "2.9 times more than dense" in said
    assert "2.0 times more than dense" in said
    assert "fewer" not in said
    assert "before the first round" not in said
    first, rest = (run / "rounds.jsonl").read_text().split("\n", 1)
    (run / "rounds.jsonl").write_text(json.dumps(json.loads(first) | {"round": 0, "multiply_adds": 9e10}) + "\n" + rest)
    console.print(summary_table(run))
    assert "75% of it before the first round, where dense has none" in console.export_text()


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.81, "0.8 s"), (59.4, "59.4 s"), (61, "1 min 1 s"), (7384, "2 h 3 min")]
)
def test_durations_read_well(tmp_path: Path, seconds: float, said: str) -> None:
    run = write_run(tmp_path / "run")
    change(run / "summary.json", seconds=seconds)
    assert cells_of(run)[7][0] == said


def test_a_row_that_a_crash_tore_off_is_left_out(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", done=5)
    torn = json.dumps(row_of(6, 12) | {"refused": [{"client": 0, "reason": "é"}]}, ensure_ascii=False).encode()
    with (run / "rounds.jsonl").open("ab") as file:
        file.write(torn[: torn.index("é".encode()) + 1])
    page = page_of(tmp_path, run)
    assert "5 of 12 rounds" in page.text
    assert page.result("ZeroFL")[3][1][0] == sum(row_of(t, 12)["bytes_up"] for t in range(1, 6))


def test_a_run_stopped_early_is_not_called_finished(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    assert (run / "summary.json").exists()
    about = json.loads((run / "run.json").read_text())
    about["run"]["rounds"] = 400
    (run / "run.json").write_text(json.dumps(about))
    page = page_of(tmp_path, run)
    assert "12 of 400 rounds" in page.text
    assert "finished" not in page.text


def test_a_round_run_again_counts_once_as_last_written(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", done=3)
    with (run / "rounds.jsonl").open("a") as file:
        file.write(json.dumps(row_of(3, 12) | {"accuracy": 0.625}) + "\n")
    page = page_of(tmp_path, run)
    assert "3 of 12 rounds" in page.text
    assert page.result("ZeroFL")[1][1] == [0.625]


def test_a_run_without_a_round_says_so(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", done=0)
    page = page_of(tmp_path, run)
    assert "0 of 12 rounds" in page.text
    assert page.text.count("Nothing measured yet.") == 5
    (run / "rounds.jsonl").unlink()
    (run / "partition.json").unlink()
    assert "Who holds what" not in page_of(tmp_path, run).text


@pytest.mark.parametrize("lost", [None, "", "nan", float("nan"), True])
def test_values_that_are_not_numbers_are_left_out(tmp_path: Path, lost: Any) -> None:
    run = write_run(tmp_path / "run", done=1)
    names = [name for name, value in row_of(1, 12).items() if isinstance(value, int | float) and name != "round"]
    (run / "rounds.jsonl").write_text(json.dumps(row_of(1, 12) | dict.fromkeys(names, lost)) + "\n")
    page = page_of(tmp_path, run)
    assert page.text.count("Nothing measured yet.") == 5
    assert [text for text, _ in page.result("ZeroFL")[1:]] == ["–"] * 8


def test_numbers_that_nothing_measures_are_left_out(tmp_path: Path) -> None:
    for i, lost in enumerate((1e308, -1e308, 10**400, 1e-320, 5)):
        run = write_run(tmp_path / f"{i}", done=3)
        fields = ["clients", "refused"] + ["bytes_up", "bytes_dense_up", "seconds", "multiply_adds"] * (lost != 5)
        rows = [row | dict.fromkeys(fields, lost) for row in rows_in(run)]
        (run / "rounds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        cells = cells_of(run)
        assert cells[5][0] == "–"
        assert (cells[3][0] == cells[6][0] == cells[7][0] == "–") == (lost != 5)
        assert cells[1][1] == [rows[-1]["accuracy"]]


def test_an_upload_is_not_guessed_where_a_round_does_not_say_who_answered(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", done=3)
    rows = rows_in(run)
    rows[1]["clients"] = 5
    (run / "rounds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert cells_of(run)[5] == ("–", [])


@pytest.mark.parametrize("rounds", [10, 13, None, "12", [12]])
def test_a_summary_of_other_rounds_is_passed_over(tmp_path: Path, rounds: Any) -> None:
    run = write_run(tmp_path / "run")
    change(run / "summary.json", rounds=rounds, accuracy=0.125, bytes_up=1)
    cells = cells_of(run)
    rows = rows_in(run)
    assert cells[1][1] == [rows[-1]["accuracy"]]
    assert cells[3][1][0] == sum(row["bytes_up"] for row in rows)
    assert cells[8] == ("–", [])


def test_one_round_and_missing_fields_still_make_a_page(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", done=1)
    bare = write_run(tmp_path / "bare", done=0)
    (bare / "rounds.jsonl").write_text('{"round": 1, "accuracy": 0.5}\n{"round": 2}\n')
    (bare / "run.json").write_text("{}")
    page = page_of(tmp_path, run, bare)
    assert "1 of 12 rounds" in page.text
    assert "2 of ? rounds" in page.text
    assert page.result("bare")[1] == ("50.0 %", [0.5])


def test_rounds_without_a_test_are_passed_over(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", done=5, every=2)
    page = page_of(tmp_path, run)
    assert page.result("ZeroFL")[1][1] == [rows_in(run)[3]["accuracy"]]


def test_a_run_that_a_condition_has_ended_is_finished(tmp_path: Path) -> None:
    folder = fabricate(tmp_path / "run", {"kind": "FLASH", "density": 0.1}, rounds=8, done=6)
    assert progress_text([read_record(folder)]) == "6 of 8 rounds"
    summary = {"rounds": 6, "accuracy": 0.5, "stopped_at": 6, "stopped_because": "accuracy>=.5"}
    (folder / "summary.json").write_text(json.dumps(summary))
    run = read_record(folder)
    assert (run.ended, run.whole) == (True, False)
    assert all_finished([run])
    assert progress_text([run]) == "stopped at accuracy>=.5, 6 rounds"
    (folder / "summary.json").write_text(json.dumps(summary | {"rounds": 5}))  # it went on
    assert not read_record(folder).ended
