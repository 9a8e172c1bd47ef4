"""Which runs are one configuration, which of several alike counts, and what tells configurations apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedsieve.report.configurations import group_configurations
from fedsieve.runs.record import RunRecord
from report_pages import change, page_of, write_run


@pytest.mark.slow
def test_of_runs_with_the_same_settings_one_counts(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / place, commit=place) for place in ("old", "new", "going")]
    for day, run in enumerate(runs[:2], 1):
        change(run / "run.json", started=f"2026-02-{day:02d}T09:30:00+00:00")
    (runs[2] / "summary.json").unlink()
    with pytest.warns(UserWarning, match=r"one counts .*: .*/new, not .*/old, .*/going$"):
        page = page_of(tmp_path, *runs)
    assert page.result("ZeroFL")
    assert "new" in page.texts
    assert not {"old", "going"} & set(page.texts)


def test_runs_that_say_nothing_of_their_settings_are_called_by_their_folders(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / place) for place in ("here/a", "here/b", "there/b")]
    for run in runs:
        (run / "run.json").write_text("{}")
    page = page_of(tmp_path, *runs)
    for label in ("a", "b (2)", "b (3)"):
        assert page.result(label)


def run_of(method: str = "ZeroFL", seed: int = 0, about: dict[str, Any] | None = None, **fields: Any) -> RunRecord:
    """Return a run of nothing but settings, their names written with two underscores for a dot."""
    run: dict[str, Any] = {"method": {"kind": method}, "seed": seed}
    for name, value in fields.items():
        *path, last = name.split("__")
        node = run
        for part in path:
            node = node.setdefault(part, {})
        node[last] = value
    return RunRecord(Path("x"), {"run": run} | (about or {}), [], None, [], None)


@pytest.mark.parametrize(
    ("runs", "labels"),
    [
        ([run_of()], ["ZeroFL"]),
        ([run_of("FLASH"), run_of("NST", lr=0.2)], ["FLASH", "NST"]),
        ([run_of(lr=0.1), run_of(lr=0.2), run_of(lr=0.2, seed=1)], ["lr 0.1", "lr 0.2"]),
        (
            [run_of(method__sparsity=s, task__partition=p, lr=s) for s in (0.9, 0.95) for p in ("iid", "lda:1.0")],
            [f"sparsity {s}, partition {p}" for s in (0.9, 0.95) for p in ("iid", "lda:1.0")],
        ),
        (
            [
                run_of(kind, about={"target_density": d}, **{f"method__{name}": of(d)})
                for kind, name, of in (("ZeroFL", "sparsity", lambda d: 1 - d), ("FLASH", "density", float))
                for d in (0.1, 0.25)
            ],
            [f"{kind}, density {d}" for kind in ("ZeroFL", "FLASH") for d in (0.1, 0.25)],
        ),
        ([run_of(), run_of(bound__kind="Running")], ["default", "bound Running"]),
        ([run_of(about={"kernels": k}) for k in ("sparse", "dense")], ["kernels sparse", "kernels dense"]),
        ([run_of(about={"engine": e}) for e in ("local", "pool:2")], ["engine local", "engine pool:2"]),
        ([run_of(about={"engine": e}, seed=i) for i, e in enumerate(("local", "pool:2"))], ["ZeroFL"]),
        ([run_of(about={"class": c}) for c in ("a:ZeroFL", "b:ZeroFL")], ["class a:ZeroFL", "class b:ZeroFL"]),
        ([run_of(x="a" * 40 + c) for c in "bc"], [f"x {'a' * 27}… ({i})" for i in (1, 2)]),
    ],
)
def test_labels_are_the_fewest_settings_that_tell_configurations_apart(
    runs: list[RunRecord], labels: list[str]
) -> None:
    assert [one.label for one in group_configurations(runs)] == labels
