"""``scripts/gpu``, tried without a GPU: its parts, and all of it in small."""

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "scripts" / "gpu"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    loader = SourceFileLoader("gpu_script", str(SCRIPT))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setitem(sys.modules, loader.name, module)
    loader.exec_module(module)
    return module


@pytest.fixture
def session(script: ModuleType, tmp_path: Path) -> Any:
    (tmp_path / "work").mkdir()
    options = argparse.Namespace(minutes=1.0, device="cpu", small=True, data="", precision="bf16")
    return script.Session(options, tmp_path, time.monotonic() + 60)


# The script's parts


def test_a_part_that_fails_is_told_by_its_last_line(script: ModuleType, session: Any) -> None:
    log = session.out / "log"
    how = script.follow(session, [sys.executable, "-c", "print('first'); raise SystemExit('why')"], log, 30)
    assert how.startswith("failed after ")
    assert how.endswith("(exit code 1): why")
    assert script.follow(session, [sys.executable, "-c", "print('all')"], log, 30).endswith(": all")


def test_a_part_whose_time_is_up_is_ended_with_all_that_it_started(
    script: ModuleType, session: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "GRACE", 0.5)
    pid = session.out / "pid"
    code = (
        "import signal, subprocess, sys, time; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"open({str(pid)!r}, 'w').write(str(child.pid)); time.sleep(60)"
    )
    assert script.follow(session, [sys.executable, "-c", code], session.out / "log", 3).startswith("ended after its ")
    state = Path(f"/proc/{pid.read_text()}/stat")
    until = time.monotonic() + 10  # it has been told to end, and a busy machine takes its time
    while state.exists() and state.read_text().rpartition(") ")[2][0] != "Z" and time.monotonic() < until:
        time.sleep(0.05)
    assert not state.exists() or state.read_text().rpartition(") ")[2][0] == "Z"


def test_small_files_of_runs_are_kept_and_large_ones_are_not(script: ModuleType, session: Any) -> None:
    run = session.out / "work/reproductions/runs/one"
    run.mkdir(parents=True)
    (run / "rounds.jsonl").write_text("1\n")
    (run / "checkpoint.safetensors").write_bytes(b"0" * 100)
    (run / "large.json").write_bytes(b"0" * (script.SMALL_FILE + 1))
    script.keep(session)
    (run / "rounds.jsonl").write_text("1\n2\n")
    script.keep(session)
    copies = session.out / "cells/runs/one"
    assert {path.name for path in copies.iterdir()} == {"rounds.jsonl"}
    assert (copies / "rounds.jsonl").read_text() == "1\n2\n"


def test_what_is_missing_is_a_line(
    script: ModuleType, session: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(script, "NEEDED", ("torch", "a_package_of_nobody"))
    assert not script.check(session)
    assert f"check: a_package_of_nobody is missing: install it for {sys.executable}" in capsys.readouterr().out
    assert json.loads((session.out / "summary.json").read_text())["checks"].startswith("a_package_of_nobody is missing")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_a_line(script: ModuleType, session: Any) -> None:
    session.options.device = "cuda"
    assert not script.check(session)
    assert "PyTorch sees no GPU: check nvidia-smi" in session.parts["checks"]


def test_the_cells_are_rows_of_the_papers(script: ModuleType) -> None:
    from fedsieve.recipes.papers.parts import find_part
    from fedsieve.runs.reproduction.cells import cells_of

    seen = set[tuple[str, int]]()
    for paper, part, rows in (*script.CELLS, *script.SMALL_CELLS):
        numbers = [int(number) for number in rows.split(",")]
        cells = cells_of(find_part(paper, part), numbers)
        assert len(cells) == len(numbers)
        dataset = {cell.run.task.dataset for cell in cells}
        assert dataset == ({"mnist"} if (paper, part, rows) in script.SMALL_CELLS else {"cifar10"})
        assert not {(f"{paper} {part}", number) for number in numbers} & seen
        seen |= {(f"{paper} {part}", number) for number in numbers}


@pytest.mark.parametrize("words", [["--minutes", "0"], ["--data", "nowhere"], ["--out", str(SCRIPT)]])
def test_bad_options_are_a_line(words: list[str]) -> None:
    done = subprocess.run([sys.executable, SCRIPT, *words], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("gpu: error: ")


# All of it, in small


@pytest.mark.system
@pytest.mark.parametrize("ended_by", [None, signal.SIGTERM, signal.SIGKILL])
def test_the_script_in_small(tmp_path: Path, ended_by: signal.Signals | None) -> None:
    command = [sys.executable, SCRIPT, "--device", "cpu", "--small", "--minutes", "1.2", "--out", tmp_path / "out"]
    environment = {name: value for name, value in os.environ.items() if name != "FEDSIEVE_DATA"}
    lines = list[str]()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, process_group=0) as process:
        assert process.stdout
        for line in process.stdout:
            lines.append(line)
            if ended_by and line.startswith("tests: "):
                time.sleep(5)
                process.send_signal(ended_by)
    out = tmp_path / "out"
    parts = json.loads((out / "summary.json").read_text())
    assert parts["checks"].startswith("no GPU, PyTorch ")
    assert parts["tests"].startswith("ran for ")
    if ended_by == signal.SIGKILL:
        assert parts.keys() == {"checks", "tests"}
        return
    if ended_by:
        assert parts.keys() == {"checks", "tests", "end"}
        assert lines[-1] == "  end: asked for before the time was up\n"
        return
    assert process.returncode == 0, lines
    assert parts["cells"] == "left out: no data folder is named (--data, FEDSIEVE_DATA)"
    assert lines[-1] == f"  cells: {parts['cells']}\n"
    check_benchmarks([json.loads(line) for line in (out / "benchmarks.jsonl").read_text().splitlines()])
    assert ", 0 of them errors, " in parts["benchmarks"]


def check_benchmarks(lines: list[dict[str, Any]]) -> None:
    """Check that the benchmarks have measured what they are to, in bf16 at least."""
    rounds = {(line["method"], line["way"], line["precision"]) for line in lines if line["what"] == "round"}
    methods = {"fedavg", "swat", "zerofl", "flash", "sparsefedpp"}
    ways = {(method, way, "bf16") for method in methods for way in ("cohort best", "cohort 10", "cohort 1")}
    assert rounds >= ways | {("fedavg", "plain loop", "bf16")}
    steps = next(line for line in lines if line["what"] == "step")
    assert steps["ms_step"].keys() == {"eager", "graph", "streams", "grouped"}
    assert {"machine", "selections", "peer"} <= {line["what"] for line in lines}
