"""A paper's number stands beside a run only where data and protocol are its row's; else a phrase says what differs."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedsieve.data import SOURCES
from fedsieve.engine import Run
from fedsieve.recipes import load_recipe
from fedsieve.recipes.papers import published
from fedsieve.runs.comparison import Comparison, compare_published, settings_of
from fedsieve.runs.record import RunRecord, read_record

FLASH = ("flash.mnist", "method.density=0.05")
SPEECH = ("zerofl.speech_iid", "method.sparsity=0.9", "method.r_mask=0.2", "rounds=300", "evaluate_every=1")
FEMNIST = ("zerofl.femnist", "method.sparsity=0.95", "method.r_mask=0.2", "task.clients=3597")
MNIST = {"training": 60_000, "test": 10_000}
CLIPS = {"version": "v0.01", "training": 56_196, "test": 6_835}


def run_of(recipe: str, *settings: str) -> Run:
    return load_recipe(recipe, settings)


def record(folder: Path, run: Run, last: int | None = None, examples: Any = None) -> RunRecord:
    """Return a run of so many rounds whose accuracy rises by 1/1000 a round to its half, and then falls by as much."""
    last, folder = last or run.rounds, folder / f"{run.seed}"
    folder.mkdir()
    tested = [t % run.evaluate_every == 0 or t == last for t in range(1, last + 1)]
    rows = [
        {"round": t, "accuracy": min(t, run.rounds - t) / 1000 if tested[t - 1] else None} for t in range(1, last + 1)
    ]
    (folder / "run.json").write_text(json.dumps({"run": settings_tree(run), "dataset": examples}))
    (folder / "rounds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "summary.json").write_text(json.dumps({"rounds": last, "accuracy": rows[-1]["accuracy"]}))
    return read_record(folder)


def settings_tree(run: Run) -> Any:
    from fedsieve.engine.federation import described

    return described(run)


def compared(run: Run, *records: RunRecord | None) -> list[tuple[str, str]]:
    return [(one.row.table, one.text) for one in compare_published(settings_of(run), records)]


def test_a_number_stands_beside_its_run_with_the_seeds_that_are_missing(tmp_path: Path) -> None:
    run = run_of(*FLASH)
    records = [record(tmp_path, replace(run, seed=seed), examples=MNIST) for seed in range(3)]
    assert compared(run, *records) == [("flash_table2", "97.30 ± 0.26")]
    assert compared(run, records[0]) == [("flash_table2", "97.30 ± 0.26 (1 of 3 seeds)")]
    (one,) = compare_published(settings_of(run), records)
    assert one.difference == pytest.approx(0 - 97.3)


def test_neither_seed_nor_how_often_it_was_tested_makes_it_another_run(tmp_path: Path) -> None:
    run = replace(run_of(*FLASH), seed=7, evaluate_every=400)
    assert compared(run, record(tmp_path, run, examples=MNIST)) == [("flash_table2", "97.30 ± 0.26 (1 of 3 seeds)")]


@pytest.mark.parametrize(
    ("settings", "phrase"),
    {
        ("task.clients=300", "batch=8"): "300 of 3,597 writers, batch 8, not 16",
        ("task.clients=300",): "300 of 3,597 writers",
        ("task.clients=3600",): "3600 writers, not 3,597",
        ("rounds=100",): "100 of 1000 rounds",
        ("lr=.1",): "lr 0.1, not 0.004",
        ("values=bf16",): "values bf16, not default",
    }.items(),
)
def test_a_setting_that_differs_is_named(settings: tuple[str, ...], phrase: str) -> None:
    assert compared(run_of(*FEMNIST, *settings)) == [("zerofl_table1", phrase)]


@pytest.mark.parametrize(
    ("last", "summary", "phrase"),
    [
        (100, {"examples": MNIST}, "round 100 of 400"),
        (None, {"examples": {"training": 5_000, "test": 10_000}}, "5,000 of 60,000 training examples"),
        (None, {"examples": {"training": 60_000, "test": 10_001}}, "10,001 test examples, not 10,000"),
        (None, {}, "training examples not counted, test examples not counted"),
    ],
)
def test_data_and_rounds_that_are_missing_are_named(
    tmp_path: Path, last: int | None, summary: dict[str, Any], phrase: str
) -> None:
    run = run_of(*FLASH)
    assert compared(run, record(tmp_path, run, last, **summary)) == [("flash_table2", phrase)]


def test_counts_that_a_paper_rounds_are_met_by_all_that_round_to_them(tmp_path: Path) -> None:
    run = replace(run_of(*FEMNIST), evaluate_every=1000)
    whole = record(tmp_path, run, examples={"training": 652_999, "test": 165_001})
    assert compared(run, whole) == [("zerofl_table1", "83.78 ± 0.19 (1 of 3 seeds)")]
    (tmp_path / "more").mkdir()
    more = record(tmp_path / "more", run, examples={"training": 653_000, "test": 165_001})
    assert compared(run, more) == [("zerofl_table1", "653,000 training examples, not 652,000")]


def test_another_version_of_the_data_is_named(tmp_path: Path) -> None:
    run = run_of(*SPEECH)
    other = record(tmp_path, run, examples={**CLIPS, "version": "v0.02"})
    assert compared(run, other) == [("zerofl_table1", "v0.02, not v0.01")]
    assert {row.says.version for row in published()} == {"", "v0.01", "3,597 writers", "3,400 writers"}
    names = {version.name for source in SOURCES.values() for version in source.versions}
    assert {row.says.version for row in published()} <= {"", *names}


def test_a_run_without_some_updates_is_not_the_papers(tmp_path: Path) -> None:
    run = run_of(*FLASH)
    done = record(tmp_path, run, examples=MNIST)
    done.rows[3]["refused"] = [{"client": 3, "reason": "not finite"}]
    assert compared(run, done) == [("flash_table2", "1 update refused or left out")]


def test_best_is_compared_with_best_and_a_round_with_that_round(tmp_path: Path) -> None:
    run = run_of(*SPEECH)
    at, best = compare_published(settings_of(run), [record(tmp_path, run, examples=CLIPS)])
    assert (at.row.table, at.values) == ("zerofl_table1", (pytest.approx(10.0),))
    assert (best.row.table, best.values) == ("zerofl_table3", (pytest.approx(15.0),))
    assert (at.text, best.text) == ("86.11 ± 1.11 at round 200 (1 of 3 seeds)", "87.52 ± 0.44 best (1 of 3 seeds)")


def test_what_a_run_cannot_be_read_for_does_not_stand(tmp_path: Path) -> None:
    run = replace(run_of(*SPEECH), evaluate_every=10)
    seldom = record(tmp_path, run, examples=CLIPS)
    assert compared(run, seldom) == [("zerofl_table1", "86.11 ± 1.11 at round 200 (1 of 3 seeds)")]
    assert compared(replace(run, rounds=200)) == [("zerofl_table1", "200 of 300 rounds")]
    (tmp_path / "part").mkdir()
    assert compared(run, record(tmp_path / "part", run, 250, examples=CLIPS))[0][0] == "zerofl_table1"
    (tmp_path / "short").mkdir()
    short = record(tmp_path / "short", run, 100, examples=CLIPS)
    assert compared(run, short) == [("zerofl_table1", "round 100 of 300")]
    assert compared(run, None) == [("zerofl_table1", "not yet 200 rounds")]
    (tmp_path / "odd").mkdir()
    odd = replace(run, evaluate_every=7)
    assert compared(odd, record(tmp_path / "odd", odd, examples=CLIPS)) == [("zerofl_table1", "no test in round 200")]


def test_another_implementation_or_experiment_is_no_row(tmp_path: Path) -> None:
    variant = next(row for row in published() if row.variant)
    assert compared(variant.run()) == [("sparsefedpp_fig1", "another implementation than the paper's")]
    for other in ("zerofl.digits", "fedavg.cifar10_iid"):
        assert compared(run_of(other)) == []
    assert compared(run_of(FLASH[0], "method.density=0.07")) == []
    assert compared(run_of(FLASH[0], "task.partition=lda:0.5")) == []


@pytest.mark.slow
def test_all_rows_are_their_own_runs() -> None:
    for row in published():
        tables = [table for table, _ in compared(row.run())]
        assert tables[0] in (row.table, row.quoted, "flash_table2", "zerofl_table1")


def test_a_comparison_says_what_differs_before_any_number() -> None:
    row = published()[0]
    assert Comparison(row, "lr .2, not .1").text == "lr .2, not .1"
    assert Comparison(row, "lr .2, not .1").difference is None
