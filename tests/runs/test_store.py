"""The run directory: complete, resumable after any crash, and never overwritten."""

import json
import multiprocessing
import os
import random
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from custom_methods import Odd
from fedsieve import InputError, local
from fedsieve.client.evaluation import accuracy
from fedsieve.engine.setup import open_run
from fedsieve.methods import DNR, FLASH, NST, PDST, FedAdam, FedAvg, HeteroFLASH, SparseFedPP, ZeroFL
from fedsieve.runs import recorder
from fedsieve.runs.execution import Execution
from fedsieve.runs.record import read_rows
from fedsieve.runs.recorder import record_run
from run_directories import RECIPE, go, same_run
from tiny import tiny_run

COLUMNS = ["round", "clients", "accuracy", "density", "bytes_up", "bytes_down", "bytes_dense_up", "bytes_dense_down"]
COLUMNS += ["seconds", "cpu_seconds", "refused", "multiply_adds", "multiply_adds_dense", "loss", "kernels"]
COLUMNS += ["csr_bytes_up", "dense_because", "steps", "ms_per_step", "density_of_policy", "density_of_all"]
SUMMARY = ["method", "dataset", "rounds", "accuracy", "density", "bytes_up", "bytes_down", "bytes_dense_up"]
SUMMARY += ["bytes_dense_down", "multiply_adds", "multiply_adds_dense", "seconds", "peak_memory_mb", "kernels", "steps"]
SUMMARY += [
    "csr_bytes_up",
    "ms_per_step",
    "dense_because",
    "density_of_policy",
    "density_of_all",
    "multiply_adds_not_counted",
]


def test_a_run_leaves_all_that_it_promises(tmp_path: Path) -> None:
    run = tiny_run(ZeroFL(0.7, 0.1), evaluate_every=3)
    assert go(tmp_path / "run", run) == [1, 2, 3, 4]
    rows = read_rows(tmp_path / "run")
    assert [row["round"] for row in rows] == [1, 2, 3, 4]
    assert [row["accuracy"] is None for row in rows] == [True, True, False, False]
    assert all(set(COLUMNS) <= row.keys() for row in rows)

    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert set(SUMMARY) <= summary.keys()
    assert (summary["method"], summary["dataset"], summary["rounds"]) == ("zerofl", "blobs", 4)
    assert summary["bytes_up"] == sum(row["bytes_up"] for row in rows)
    assert summary["csr_bytes_up"] == pytest.approx(summary["paper_bytes_up"], rel=0.2)
    assert summary["accuracy"] == rows[-1]["accuracy"]

    told = json.loads((tmp_path / "run/run.json").read_text())
    assert told["run"]["method"] | {"kind": "ZeroFL", "sparsity": 0.7, "r_mask": 0.1} == told["run"]["method"]
    assert told["run"]["task"]["model"] == "tiny:TinyNet"
    assert (told["class"], told["target_density"]) == ("fedsieve.methods.zerofl:ZeroFL", pytest.approx(0.3))
    assert {"version", "commit", "hardware", "engine", "device", "kernels", "recipe", "started"} <= told.keys()

    inputs = json.loads((tmp_path / "run/inputs.json").read_text())
    assert inputs == {"classes": ["a", "b", "c"], "shape": [2, 6, 6], "mean": [0.0], "std": [1.0]}
    held = json.loads((tmp_path / "run/partition.json").read_text())
    assert held["classes"] == ["a", "b", "c"]
    assert sum(map(sum, held["counts"])) == 240

    federation = open_run(run)
    model = federation.model()
    model.load_state_dict(load_file(tmp_path / "run/model.safetensors"))
    assert accuracy(model, federation.test()) == summary["accuracy"]
    assert len(list((tmp_path / "run/checkpoints").iterdir())) == 3


def test_a_warm_up_counts_as_bytes_and_as_no_upload_of_training(tmp_path: Path) -> None:
    """Nor does dense training, which has none, cost anything in its round."""
    assert go(tmp_path, tiny_run(FLASH(0.5, c_d=2, E_d=2), rounds=2)) == [0, 1, 2]
    first, *trained = read_rows(tmp_path)
    dense = [first[name] for name in ("bytes_dense_up", "bytes_dense_down", "multiply_adds_dense")]
    assert first["bytes_up"] > dense[0] == dense[1] == dense[2] == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["uploads"] == sum(len(row["clients"]) for row in trained) == 6
    assert summary["upload_bytes"] == sum(row["bytes_up"] for row in trained) / 6
    assert summary["csr_bytes_up"] == pytest.approx(sum(row["csr_bytes_up"] for row in trained) / 2)
    assert summary["csr_bytes_up"] > 2 * summary["paper_bytes_up"] > 20 * first["csr_bytes_up"] > 0
    assert summary["bytes_up"] == first["bytes_up"] + sum(row["bytes_up"] for row in trained)


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    [FedAdam(), Odd("remember"), SparseFedPP(0.8), DNR(), NST(), PDST(), FLASH(c_d=3), HeteroFLASH(c_d=2)],
    ids=["adam", "memory", "sparsefedpp", "dnr", "nst", "pdst", "flash", "hetero_flash"],
)
def test_stopping_and_resuming_changes_no_byte(tmp_path: Path, method: Any) -> None:
    run = tiny_run(method)
    go(tmp_path / "whole", run)
    assert go(tmp_path / "parts", run, until=1) == list(range(run.first, 2))
    assert json.loads((tmp_path / "parts/summary.json").read_text())["rounds"] == 1
    assert go(tmp_path / "parts", run, resume=True, until=3) == [2, 3]
    assert go(tmp_path / "parts", run, resume=True) == [4]
    assert go(tmp_path / "parts", run, resume=True) == []
    assert same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.slow
def test_what_a_crash_leaves_is_mended(tmp_path: Path) -> None:
    """Every state that a crash can leave between two writes."""
    run = tiny_run(ZeroFL(0.7, 0.1))
    go(tmp_path / "whole", run)
    out = tmp_path / "out"
    go(out, run, until=2)
    with (out / "rounds.jsonl").open("a") as file:  # a row whose checkpoint was never written, and half of another
        file.write(json.dumps({"round": 3, "seconds": 1}) + '\n{"round": 4, "cli')
    (out / "checkpoints/000003.safetensors.tmp").write_bytes(b"half")
    assert go(out, run, resume=True) == [3, 4]
    assert same_run(tmp_path / "whole", out)

    for lost in ("summary.json", "model.safetensors"):  # after the last checkpoint, before the end
        (out / lost).unlink()
    assert go(out, run, resume=True) == []
    assert same_run(tmp_path / "whole", out)

    early = tmp_path / "early"  # before run.json, and before the first checkpoint
    early.mkdir()
    (early / "run.json.tmp").write_text("{")
    assert go(early, run, resume=True) == [1, 2, 3, 4]
    assert same_run(tmp_path / "whole", early)


def test_resuming_where_nothing_is_yet_starts_from_the_beginning(tmp_path: Path) -> None:
    assert go(tmp_path / "new", tiny_run(FedAvg()), resume=True) == [1, 2, 3, 4]


def damaged(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "a pipe":
        path.unlink()
        os.mkfifo(path)
        return
    if how == "cut":
        del content[len(content) // 2 :]
    elif how == "flipped":
        content[-5] ^= 1
    elif how == "header":
        content[3] ^= 0xFF
    else:
        content.clear()
    path.write_bytes(content)


@pytest.mark.parametrize("how", ["cut", "flipped", "header", "emptied", "a pipe"])
@pytest.mark.slow
def test_a_damaged_checkpoint_is_one_line_and_the_one_before_it_serves(tmp_path: Path, how: str) -> None:
    run = tiny_run(FedAvg())
    go(tmp_path / "whole", run)
    go(tmp_path / "out", run, until=3)
    newest = tmp_path / "out/checkpoints/000003.safetensors"
    damaged(newest, how)
    rows = (tmp_path / "out/rounds.jsonl").read_bytes()
    with pytest.raises(InputError, match=r"000003.safetensors is damaged: remove it to go on from round 2"):
        go(tmp_path / "out", run, resume=True)
    assert (tmp_path / "out/rounds.jsonl").read_bytes() == rows
    newest.unlink()
    assert go(tmp_path / "out", run, resume=True) == [3, 4]
    assert same_run(tmp_path / "whole", tmp_path / "out")


def test_a_directory_with_a_run_is_not_overwritten(tmp_path: Path) -> None:
    run = tiny_run(FedAvg())
    go(tmp_path, run)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(InputError, match="already holds this run: add --resume"):
        go(tmp_path, run)
    with pytest.raises(InputError, match=r"holds another run \(lr 0.1 there, 0.2 here\): choose another --out$"):
        go(tmp_path, replace(run, lr=0.2), resume=True)
    with pytest.raises(InputError, match="holds another run"):
        go(tmp_path, replace(run, method=ZeroFL()))
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_a_directory_with_other_files_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(InputError, match="is not empty and holds no run"):
        go(tmp_path, tiny_run(FedAvg()))
    with pytest.raises(InputError, match="is a file, which holds no run"):
        go(tmp_path / "thesis.tex", tiny_run(FedAvg()))
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_two_processes_cannot_work_in_one_directory(tmp_path: Path) -> None:
    run = tiny_run(FedAvg())
    first = record_run(tmp_path, open_run(run), local(), RECIPE)
    with pytest.raises(InputError, match="another process is at work"):
        go(tmp_path, replace(run, seed=1))
    next(first)
    with (tmp_path / "rounds.jsonl").open("a") as file:  # the first is between a row and its checkpoint
        file.write('{"round": 2}\n')
    before = (tmp_path / "rounds.jsonl").read_bytes()
    with pytest.raises(InputError, match="another process is at work"):
        go(tmp_path, run, resume=True)
    assert (tmp_path / "rounds.jsonl").read_bytes() == before


def drop_row(out: Path) -> None:
    lines = (out / "rounds.jsonl").read_text().splitlines(keepends=True)
    (out / "rounds.jsonl").write_text("".join(lines[:1] + lines[2:]))


INCONSISTENT: dict[str, Callable[[Path], object]] = {
    "no rows": lambda out: (out / "rounds.jsonl").unlink(),
    "a row missing": drop_row,
    "a row that is none": lambda out: (out / "rounds.jsonl").write_text("null\n{}\n3\n"),
    "no checkpoints": lambda out: shutil.rmtree(out / "checkpoints"),
}


@pytest.mark.parametrize("how", INCONSISTENT)
def test_a_directory_that_contradicts_itself_is_not_gone_on_with(tmp_path: Path, how: str) -> None:
    run = tiny_run(FedAvg(), rounds=6)
    go(tmp_path, run, until=5)
    INCONSISTENT[how](tmp_path)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*.jsonl")}
    with pytest.raises(InputError, match=r"rounds\.jsonl (is not as it was|has 5 rows)"):
        go(tmp_path, run, resume=True)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*.jsonl")} == before


def test_other_files_among_the_checkpoints_are_left_alone(tmp_path: Path) -> None:
    run = tiny_run(FedAvg())
    go(tmp_path / "whole", run)
    go(tmp_path / "out", run, until=2)
    for name in ("best", "0000.copy"):
        shutil.copy(tmp_path / "out/checkpoints/000001.safetensors", tmp_path / f"out/checkpoints/{name}.safetensors")
    shutil.copy(tmp_path / "out/checkpoints/000001.safetensors", tmp_path / "out/checkpoints/000009.safetensors")
    with pytest.raises(InputError, match=r"000009\.safetensors is damaged"):
        go(tmp_path / "out", run, resume=True)
    (tmp_path / "out/checkpoints/000009.safetensors").unlink()
    assert go(tmp_path / "out", run, resume=True) == [3, 4]
    assert same_run(tmp_path / "whole", tmp_path / "out")
    assert (tmp_path / "out/checkpoints/best.safetensors").exists()


def test_a_summary_is_never_of_another_round(tmp_path: Path) -> None:
    run = tiny_run(FedAvg(), evaluate_every=4, rounds=8)
    go(tmp_path, run, until=3)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["rounds"], summary["accuracy"]) == (3, read_rows(tmp_path)[-1]["accuracy"])
    assert summary["accuracy"] is not None
    going = record_run(tmp_path, open_run(run), local(), RECIPE, Execution(resume=True))
    next(going)
    assert not (tmp_path / "summary.json").exists()
    assert not (tmp_path / "model.safetensors").exists()


def test_a_checkpoint_of_other_data_is_refused(tmp_path: Path) -> None:
    run = tiny_run(FedAvg())
    go(tmp_path, run, until=2)
    federation = open_run(run)
    other = replace(federation, shards=(*federation.shards[1:], federation.shards[0]))
    with pytest.raises(InputError, match="holds a run on other data"):
        list(record_run(tmp_path, other, local(), RECIPE, Execution(resume=True)))


def victim(out: Path, device: str) -> None:
    torch.set_num_threads(1)
    saver = recorder._saver
    recorder._saver = lambda _: saver(device)
    go(out, tiny_run(ZeroFL(0.7, 0.1), rounds=60), resume=True)


@pytest.mark.system
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_kill_9_at_any_instant_changes_no_byte(tmp_path: Path, device: str) -> None:
    """Also where checkpoints are written while the next round trains, as on a GPU."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_store"])
    chance, killed, done = random.Random(0), 0, 0
    for name, patience in (("whole", 60.0), *[("out", 0.0)] * 60, ("out", 60.0)):
        process = context.Process(target=victim, args=(tmp_path / name, device))
        process.start()
        process.join(patience or chance.uniform(0.1, 0.5))
        process.kill()
        process.join()
        killed += process.exitcode == -signal.SIGKILL
        checkpoints = sorted((tmp_path / "out/checkpoints").glob("*.safetensors"))
        rows = read_rows(tmp_path / "out")
        assert not checkpoints or int(checkpoints[-1].stem) >= max(done, len(rows) - 1), "more than a round was lost"
        done = int(checkpoints[-1].stem) if checkpoints else 0
        if done == 60 and (tmp_path / "out/summary.json").exists():
            break
    assert killed >= 5
    assert same_run(tmp_path / "whole", tmp_path / "out")


def test_writes_survive_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tiny_run(FedAvg())
    go(tmp_path / "whole", run)
    real, calls = os.fsync, [0]

    def full(fd: int) -> None:
        calls[0] += 1
        if calls[0] == 12:
            raise OSError(28, "No space left on device")
        real(fd)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        go(tmp_path / "out", run)
    assert go(tmp_path / "out", run, resume=True)
    assert same_run(tmp_path / "whole", tmp_path / "out")
