"""A run that goes on: with more rounds, with another version, and after somebody has edited its files."""

import errno
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from command_line import CommandLine
from fedsieve import InputError, local
from fedsieve.engine.prolong import uses_rounds
from fedsieve.engine.setup import open_run
from fedsieve.methods import DNR, FLASH, NST, PDST, FedAvg
from fedsieve.recipes import load_recipe, recipes
from fedsieve.runs import resume
from fedsieve.runs.execution import Execution
from fedsieve.runs.record import read_rows
from fedsieve.runs.recorder import check_directory, record_run
from run_directories import RECIPE, about, flat, go, same_run
from tiny import tiny_run


@pytest.mark.parametrize("schedule", [{"lr_rounds": 10}, {"lr_milestones": (1, 2)}])
def test_a_decay_over_rounds_of_its_own_does_not_hinder_prolonging(tmp_path: Path, schedule: dict[str, Any]) -> None:
    run = tiny_run(FedAvg(), rounds=3, **schedule)
    go(tmp_path / "whole", run)
    go(tmp_path / "out", replace(run, rounds=2))
    assert go(tmp_path / "out", run, resume=True) == [3]
    assert same_run(tmp_path / "whole", tmp_path / "out")


@pytest.mark.parametrize("method", [FedAvg(), NST(), FLASH(c_d=3)], ids=["fedavg", "memory", "warm-up"])
@pytest.mark.slow
def test_a_prolonged_run_equals_one_that_was_never_stopped(tmp_path: Path, method: Any) -> None:
    go(tmp_path / "whole", flat(method, 6))
    out = tmp_path / "out"
    go(out, flat(method, 2))
    with pytest.raises(InputError, match=r"\(rounds 2 there, 4 here\): add --resume to prolong it"):
        go(out, flat(method, 4))
    assert go(out, flat(method, 4), resume=True, until=3) == [3]
    assert go(out, flat(method, 6), resume=True) == [4, 5, 6]
    assert go(out, flat(method, 6), resume=True) == []
    assert same_run(tmp_path / "whole", out)
    assert about(out)["run"] == about(tmp_path / "whole")["run"]
    assert about(out)["changes"] == [{"round": 3, "rounds": [2, 4]}, {"round": 4, "rounds": [4, 6]}]
    assert json.loads((out / "summary.json").read_text())["rounds"] == 6


def test_a_crash_before_the_first_new_round_changes_nothing(tmp_path: Path) -> None:
    go(tmp_path / "whole", flat(FedAvg(), 4))
    out = tmp_path / "out"
    go(out, flat(FedAvg(), 2))
    edit("run.json", lambda c: c["run"].update(rounds=8) or c.update(changes=[{"round": 3, "rounds": [2, 8]}]))(out)
    assert go(out, flat(FedAvg(), 4), resume=True) == [3, 4]
    assert same_run(tmp_path / "whole", out)
    assert [change["rounds"] for change in about(out)["changes"]] == [[2, 8], [8, 4]]


@dataclass(frozen=True)
class Slowing(FedAvg):
    """Reads the number of rounds, and does not say so."""

    def client(self, down: Any, device: Any) -> Any:
        return super().client(down, replace(device, lr=device.lr / device.rounds))


class Said(Slowing):
    uses_rounds = False


@pytest.mark.slow
def test_what_is_stretched_over_the_rounds_is_not_prolonged(tmp_path: Path) -> None:
    refusals = {
        "lr": (tiny_run(FedAvg(), rounds=2), "its learning rate falls to lr_end=0.05 over all rounds"),
        "dnr": (flat(DNR(), 2), r"dnr itself goes by the number of rounds \(device.rounds\)"),
        "own": (flat(Slowing(), 2), "fedavg itself goes by the number of rounds"),
    }
    for name, (run, why) in refusals.items():
        go(tmp_path / name, run)
        before = {p: p.read_bytes() for p in (tmp_path / name).rglob("*") if p.is_file()}
        more = replace(run, rounds=3)
        with pytest.raises(InputError, match=f"was planned for 2 rounds, and rounds=3 would be another run: {why}"):
            go(tmp_path / name, more, resume=True)
        assert {p: p.read_bytes() for p in (tmp_path / name).rglob("*") if p.is_file()} == before
    assert [name for name in recipes() if uses_rounds(load_recipe(name).method)] == [
        n for n in recipes() if n.startswith(("dnr.", "feddst."))
    ]
    assert uses_rounds(replace(load_recipe("private.digits").method, inner=DNR()))
    assert not uses_rounds(Said())


def test_fewer_rounds_than_were_run_are_refused(tmp_path: Path) -> None:
    go(tmp_path, flat(FedAvg(), 4), until=3)
    with pytest.raises(InputError, match=r"has run 3 rounds, more than rounds=2: give 3 or more, or choose another"):
        go(tmp_path, flat(FedAvg(), 2), resume=True)
    with pytest.raises(InputError, match="has run 3 rounds"):
        check_directory(tmp_path, open_run(flat(FedAvg(), 2)), RECIPE, Execution(resume=True))
    assert go(tmp_path, flat(FedAvg(), 3), resume=True) == []


def edit(name: str, change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def edited(out: Path) -> None:
        content = json.loads((out / name).read_text())
        change(content)
        (out / name).write_text(json.dumps(content))

    return edited


def row(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def edited(out: Path) -> None:
        rows = read_rows(out)
        change(rows[0])
        (out / "rounds.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in rows))

    return edited


def raw(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda out: (out / name).write_bytes(content) and None


def folder(name: str) -> Callable[[Path], None]:
    def instead(out: Path) -> None:
        (out / name).unlink()
        (out / name).mkdir()

    return instead


EDITS: dict[str, Callable[[Path], None]] = {
    "a better accuracy": row(lambda one: one.update(accuracy=0.99)),
    "an accuracy NaN": row(lambda one: one.update(accuracy=float("nan"))),
    "no accuracy": row(lambda one: one.pop("accuracy")),
    "a string for a number": row(lambda one: one.update(bytes_up="many")),
    "a huge number": row(lambda one: one.update(bytes_up=10**400)),
    "a blank more": lambda out: (out / "rounds.jsonl").write_bytes(b" " + (out / "rounds.jsonl").read_bytes()),
    "deep rows": raw("rounds.jsonl", b"[" * 200_000 + b"\n" + b"]" * 10 + b"\n"),
    "a separator": raw("rounds.jsonl", '{"round": 1, "x": "\u2028"}\n{"round": 2}\n'.encode()),
    "rows not UTF-8": raw("rounds.jsonl", b"\xff\xfe\n\xff\n"),
    "rows gone": lambda out: (out / "rounds.jsonl").unlink(),
    "a folder for the rows": folder("rounds.jsonl"),
    "rounds in run.json": edit("run.json", lambda c: c["run"].update(rounds=3)),
    "a text for rounds": edit("run.json", lambda c: c["run"].update(rounds="4")),
    "no run": edit("run.json", lambda c: c.pop("run")),
    "a run of another shape": edit("run.json", lambda c: c.update(run=[1])),
    "changes of another shape": edit("run.json", lambda c: c.update(changes=[{"round": 1, "rounds": [1]}])),
    "a deep run.json": raw("run.json", b'{"run":' * 200_000),
    "run.json not UTF-8": raw("run.json", b"\xff\xfe"),
    "an empty run.json": raw("run.json", b""),
    "a folder for run.json": folder("run.json"),
    "a folder for inputs.json": folder("inputs.json"),
    "no folder for the checkpoints": lambda out: shutil.rmtree(out / "checkpoints") or (out / "checkpoints").touch(),
    "a folder for a checkpoint": folder("checkpoints/000002.safetensors"),
}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("stopped") / "out"
    go(out, flat(PDST(), 4), until=2)
    return out


@pytest.mark.parametrize("name", EDITS)
def test_what_was_edited_is_one_line_before_any_training(stopped: Path, tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    shutil.copytree(stopped, out)
    EDITS[name](out)
    kept = {p.name for p in out.iterdir()}
    with pytest.raises((InputError, OSError)) as error:
        next(record_run(out, open_run(flat(PDST(), 4)), local(), RECIPE, Execution(resume=True)))
    said = str(error.value)
    assert "\n" not in said
    assert any(f"{out}/{part}" in said for part in ("rounds.jsonl", "run.json", "inputs.json", "checkpoints"))
    assert {p.name for p in out.iterdir()} == kept


def test_edited_rounds_are_noticed_whatever_is_asked_for(stopped: Path, tmp_path: Path) -> None:
    for rounds in (4, 6):
        out = tmp_path / str(rounds)
        shutil.copytree(stopped, out)
        edit("run.json", lambda c: c["run"].update(rounds=6))(out)
        with pytest.raises(InputError, match=r"run\.json has been changed since the last checkpoint: put it back"):
            go(out, flat(PDST(), rounds), resume=True)
    out = tmp_path / "lr"
    shutil.copytree(stopped, out)
    edit("run.json", lambda c: c["run"].update(momentum=0.5))(out)
    with pytest.raises(InputError, match=r"run\.json has been changed since the last checkpoint: put it back"):
        go(out, replace(flat(PDST(), 4), momentum=0.5), resume=True)


def test_links_in_a_run_directory_are_replaced(stopped: Path, tmp_path: Path) -> None:
    out, mine = tmp_path / "out", tmp_path / "mine"
    shutil.copytree(stopped, out)
    mine.write_text("mine")
    for name in ("summary.json", "summary.json.tmp", "model.safetensors", "model.safetensors.tmp", "inputs.json"):
        (out / name).unlink(missing_ok=True)
        (out / name).symlink_to(mine)
    (out / "checkpoints/000003.safetensors.tmp").symlink_to(mine)
    assert go(out, flat(PDST(), 4), resume=True) == [3, 4]
    assert mine.read_text() == "mine"
    assert not (out / "summary.json").is_symlink()
    rows = (out / "rounds.jsonl").rename(tmp_path / "rows")
    before = rows.read_bytes()
    (out / "rounds.jsonl").symlink_to(rows)
    going = record_run(out, open_run(flat(PDST(), 6)), local(), RECIPE, Execution(resume=True))
    assert not (out / "rounds.jsonl").is_symlink()
    next(going)
    (out / "rounds.jsonl").unlink()
    (out / "rounds.jsonl").symlink_to(rows)
    with pytest.raises(OSError, match="symbolic"):
        next(going)
    assert rows.read_bytes() == before


def test_another_version_goes_on_and_is_recorded(tmp_path: Path) -> None:
    go(tmp_path, tiny_run(FedAvg()), until=2)
    now = about(tmp_path)
    edit("run.json", lambda c: c.update(version="0.0.1", commit="abc"))(tmp_path)
    assert go(tmp_path, tiny_run(FedAvg()), resume=True) == [3, 4]
    change = {"round": 3, "version": ["0.0.1", now["version"]], "commit": ["abc", now["commit"]]}
    assert about(tmp_path) == now | {"changes": [change]}
    edit("run.json", lambda c: c.update(version="0.0.1"))(tmp_path)
    assert go(tmp_path, tiny_run(FedAvg()), resume=True) == []
    assert about(tmp_path)["changes"] == [change]  # no round was run by it


FAILURES = {
    "memory": (MemoryError(), "not enough memory"),
    "PyTorch's": (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "not enough memory"),
    "a full disk": (OSError(errno.ENOSPC, "No space left on device", "here"), "No space left on device: here"),
    "deep": (RecursionError("maximum recursion depth exceeded"), "nested too deeply"),
    "gpu": (torch.AcceleratorError("CUDA error: unknown error\nmore"), "the GPU failed: CUDA error: unknown error"),
}


@pytest.mark.parametrize("name", FAILURES)
@pytest.mark.slow
def test_what_the_machine_cannot_do_is_one_line_that_says_how_to_go_on(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fedsieve: CommandLine
) -> None:
    error, line = FAILURES[name]

    def failing(out: Path, round: Any, about: Any) -> None:
        if round.t == 2:
            raise error
        save(out, round, about)

    run = ("run", "fedavg.digits", "-s", "rounds=2", "--out", str(tmp_path / "out"))
    save = resume.save_checkpoint
    with monkeypatch.context() as patch:
        patch.setattr(resume, "save_checkpoint", failing)
        said = fedsieve(*run, code=2).stderr
    assert said.count("\n") == 1
    assert line in said
    assert said.endswith("; every finished round is on disk: --resume goes on\n")
    assert fedsieve(*run, "--resume").stderr == ""
    assert [row["round"] for row in read_rows(tmp_path / "out")] == [1, 2]
