"""Checkpoints that are written while the next round trains, as on a GPU: a crash loses no more than elsewhere."""

import threading
from pathlib import Path
from typing import Any

import pytest

from fedsieve import Run, local, rounds
from fedsieve.engine.round import Round
from fedsieve.engine.setup import open_run
from fedsieve.methods import FedAvg
from fedsieve.runs import recorder, resume
from fedsieve.runs.execution import Execution
from fedsieve.runs.record import read_rows
from fedsieve.runs.recorder import record_run
from run_directories import RECIPE, go, same_run
from tiny import tiny_run


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Write checkpoints while the next round trains, as on a GPU."""
    saver = recorder._saver
    monkeypatch.setattr(recorder, "_saver", lambda _: saver("cuda"))


def test_a_checkpoint_is_written_while_the_next_round_trains(
    tmp_path: Path, later: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is on disk before that round's row is: where it cannot be, the run ends, and goes on from the one before."""
    run = tiny_run(FedAvg())
    go(tmp_path / "whole", run)
    real, threads = resume.save_checkpoint, list[threading.Thread]()
    trained = threading.Event()

    def save(out: Path, round: Round, about: Any) -> None:
        threads.append(threading.current_thread())
        assert round.t == 3 or trained.wait(20)
        trained.clear()
        if round.t == 3:
            raise OSError(28, "No space left on device")
        real(out, round, about)

    monkeypatch.setattr(resume, "save_checkpoint", save)
    sample = Run.sample
    monkeypatch.setattr(Run, "sample", lambda self, t: (t > 1 and trained.set(), sample(self, t))[1])
    with pytest.raises(OSError, match="No space left"):
        go(tmp_path / "out", run)
    assert len({*threads, threading.main_thread()}) == 2
    assert [row["round"] for row in read_rows(tmp_path / "out")] == [1, 2, 3]
    assert sorted(path.stem for path in (tmp_path / "out/checkpoints").iterdir()) == ["000001", "000002"]
    monkeypatch.undo()
    assert go(tmp_path / "out", run, resume=True) == [3, 4]
    assert same_run(tmp_path / "whole", tmp_path / "out")


@pytest.mark.usefixtures("later")
def test_whoever_stops_a_run_waits_for_its_checkpoint(tmp_path: Path) -> None:
    run = tiny_run(FedAvg())
    going = record_run(tmp_path, open_run(run), local(), RECIPE)
    next(going)
    next(going)
    going.close()
    assert sorted(path.stem for path in (tmp_path / "checkpoints").iterdir()) == ["000001", "000002"]
    assert go(tmp_path, run, resume=True) == [3, 4]


def test_callbacks_are_called_after_the_checkpoint_is_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also on a GPU."""
    devices, saver = list[str](), recorder._saver
    monkeypatch.setattr(recorder, "_saver", lambda device: (devices.append(device), saver(device))[1])
    monkeypatch.setattr(
        recorder, "rounds", lambda one, engine, _, *rest, **how: rounds(one, engine, "cpu", *rest, **how)
    )
    newest = list[bool]()

    def look(round: Round) -> None:
        newest.append((tmp_path / f"one/checkpoints/{round.t:06d}.safetensors").exists())

    federation, gpu = open_run(tiny_run(FedAvg())), Execution(device="cuda")
    assert len([*record_run(tmp_path / "one", federation, local(), RECIPE, gpu, [look])]) == 4
    assert len([*record_run(tmp_path / "two", federation, local(), RECIPE, gpu)]) == 4
    assert (newest, devices) == ([True] * 4, ["cpu", "cuda"])
    assert same_run(tmp_path / "one", tmp_path / "two")
