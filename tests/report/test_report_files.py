"""Files that the report cannot read, and places that it cannot write to: named, with the remedy."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from fedsieve.report import report
from fedsieve.types import InputError
from report_pages import write_run

FILES = [(f"{name}.json", f"{name}.json") for name in ("run", "summary", "partition")]
FILES += [("rounds.jsonl", "rounds.jsonl line 1")]


def broken(tmp_path: Path, name: str, text: str) -> Path:
    run = write_run(tmp_path / "run")
    (run / name).write_text(text)
    return run


@pytest.mark.parametrize(
    ("name", "text", "where"),
    [
        ("run.json", "{", "run.json"),
        ("run.json", "[]", "run.json"),
        ("summary.json", "", "summary.json"),
        ("rounds.jsonl", '{"round": 1}\nnot json\n{"round": 3}\n', "rounds.jsonl line 2"),
        ("partition.json", '{"classes": ["a"], "counts": [[1, 2]]}', "partition.json"),
        ("partition.json", '{"counts": [[1, 2]]}', "partition.json"),
        ("partition.json", '{"classes": ["a", "b"], "counts": [[1, 2], [1]]}', "partition.json"),
        ("partition.json", '{"classes": ["a"], "counts": [[-1]]}', "partition.json"),
        ("partition.json", '{"classes": ["a"], "counts": [[1e308], [1e308]]}', "partition.json"),
        ("partition.json", f'{{"classes": ["a"], "counts": [[1{"0" * 400}]]}}', "partition.json"),
        *((name, f'{{"a":{"[" * 60}{"]" * 60}}}\n', where) for name, where in FILES),
        *((name, f'{{"a":{"[" * 100_000}{"]" * 100_000}}}\n', where) for name, where in FILES),
        *((name, f'{{"a":1{"0" * 5000}}}\n', where) for name, where in FILES),
    ],
)
def test_a_broken_file_is_named_with_the_remedy(tmp_path: Path, name: str, text: str, where: str) -> None:
    run = broken(tmp_path, name, text)
    with pytest.raises(InputError, match=rf"{re.escape(str(run / where))}.*restore") as raised:
        report([run], tmp_path / "report.html")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "report.html").exists()


def test_what_is_not_a_run_directory_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    for folder in (tmp_path / "empty", tmp_path / "absent", tmp_path / "file"):
        with pytest.raises(InputError, match=rf"{folder} is not a run directory .*fedsieve run"):
            report([folder], tmp_path / "report.html")
    with pytest.raises(InputError, match="no run directory given"):
        report([], tmp_path / "report.html")


@pytest.mark.parametrize("name", ["run.json", "rounds.jsonl", "summary.json", "partition.json"])
def test_a_directory_in_a_files_place_is_named(tmp_path: Path, name: str) -> None:
    run = write_run(tmp_path / "run")
    (run / name).unlink()
    (run / name).mkdir()
    with pytest.raises(InputError, match=rf"{re.escape(str(run / name))} cannot be read \(Is a directory\)"):
        report([run], tmp_path / "report.html")
    (run / name).rmdir()
    os.mkfifo(run / name)  # which nobody ever writes to
    with pytest.raises(InputError, match=rf"{re.escape(str(run / name))} cannot be read \(Not a regular file\)"):
        report([run], tmp_path / "report.html")


def test_what_is_not_a_regular_file_is_not_written_over(tmp_path: Path) -> None:
    run, fifo, link = write_run(tmp_path / "run"), tmp_path / "fifo", tmp_path / "link"
    os.mkfifo(fifo)
    link.symlink_to("/dev/null")
    for out in (fifo, link, Path("/dev/null")):
        with pytest.raises(InputError, match=f"{out} is not a regular file"):
            report([run], out)
    assert fifo.is_fifo()
    assert link.is_symlink()


@pytest.mark.slow
def test_a_name_that_is_too_long_is_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    with pytest.raises(InputError, match="cannot be written"):
        report([run], tmp_path / ("r" * 256))
    report([run], tmp_path / ("r" * 255))
    assert (tmp_path / ("r" * 255)).exists()


def test_a_place_that_cannot_take_the_page_is_named(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    with pytest.raises(InputError, match=rf"{tmp_path} is a directory: name a file"):
        report([run], tmp_path)
    with pytest.raises(InputError, match=rf"{tmp_path / 'absent'} is not a folder: create it"):
        report([run], tmp_path / "absent" / "report.html")


@pytest.mark.slow
def test_a_page_that_cannot_be_finished_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, out = write_run(tmp_path / "run"), tmp_path / "report.html"
    out.write_text("old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(InputError, match=r"report.html cannot be written \(No space left on device\)"):
        report([run], out)
    assert out.read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "run"]
