"""Runs as pandas frames."""

import json
from pathlib import Path

import pytest

import fedsieve
from fabricated import fabricate
from fedsieve import InputError
from fedsieve.methods import FedAvg
from figure_runs import change_rows, flash, rows_of, zerofl
from tiny import tiny_run

pandas = pytest.importorskip("pandas")


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    fabricate(tmp_path / "a", flash(0.1), rounds=3, seed=4)
    fabricate(tmp_path / "b", zerofl(0.9), rounds=3, done=2)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes.txt").touch()
    return tmp_path


def test_rows_have_what_was_measured_and_the_settings(runs: Path) -> None:
    change_rows(runs / "a", lambda row: row | {"kernels": {"sparse": 2, "dense": 3}, "lr": 7})
    rows, summaries = fedsieve.load_runs(f"{runs}/*")
    assert [*rows["run"]] == [str(runs / "a")] * 3 + [str(runs / "b")] * 2
    assert [*rows["round"]] == [1, 2, 3, 1, 2]
    assert [*rows["accuracy"]] == [row["accuracy"] for name in "ab" for row in rows_of(runs / name)]
    assert [*rows["kernels.dense"][:3]] == [3] * 3
    assert [*rows["clients"][:1]] == [[0, 1, 2, 3, 4]]
    first = rows.iloc[0]
    assert (first["method.kind"], first["method.density"], first["seed"], first["rounds"]) == ("FLASH", 0.1, 4, 3)
    assert (first["lr"], first["setting.lr"]) == (7, 0.1)  # a metric has the name of a setting
    assert rows.groupby("method.kind")["accuracy"].max().shape == (2,)
    assert summaries.shape[0] == 2


def test_summaries_are_a_row_a_run(runs: Path) -> None:
    frame = fedsieve.load_runs([runs / "a", runs / "b"]).summaries.set_index("run")
    assert [*frame["finished"]] == [True, False]
    assert [*frame["round"]] == [3, 2]
    assert [*frame["rounds"]] == [3, 3]  # the setting
    assert frame["accuracy"][str(runs / "a")] == json.loads((runs / "a/summary.json").read_text())["accuracy"]
    assert pandas.isna(frame["accuracy"][str(runs / "b")])
    assert [*frame["method.sparsity"].dropna()] == [0.9]


def test_lists_among_settings_are_texts_to_group_by(tmp_path: Path) -> None:
    fedsieve.run(tiny_run(FedAvg(), rounds=1), tmp_path / "run")
    rows = fedsieve.load_runs(tmp_path / "run").rows
    assert rows["task.tiers"][0] == "[1.0]"
    assert rows["engine"][0] == "local"
    assert len(rows.groupby(["task.tiers", "lr"])) == 1


def test_mistakes_are_one_line(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"no run directory is .*/none\*: name some, such as runs/\*"):
        fedsieve.load_runs(f"{runs}/none*")
    with pytest.raises(InputError, match="notes is not a run directory"):
        fedsieve.load_runs(runs / "notes")
    monkeypatch.setitem(__import__("sys").modules, "pandas", None)
    with pytest.raises(InputError, match=r"^load_runs needs a package: pip install pandas$"):
        fedsieve.load_runs(f"{runs}/*")
