"""Finished runs whose models are used, and a folder with a file of the user's."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedsieve import local, open_run
from fedsieve.methods import ZeroFL
from fedsieve.recipes import load_recipe
from fedsieve.runs.recorder import record_run
from tiny import tiny_run

MINE = f"""
import sys; sys.path.append({str(Path(__file__).parents[1])!r})
from tiny import TinyNet, blobs, tiny_run
from dataclasses import replace
from fedsieve.methods import ZeroFL

def recipe():
    return tiny_run(ZeroFL(0.7, 0.1))

def other():
    run = recipe()
    return replace(run, task=replace(run.task, model=lambda: TinyNet()))
"""


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight rounds of ZeroFL on the digits, tested on 100 of them."""
    folder = tmp_path_factory.mktemp("runs") / "digits"
    easy = [
        "rounds=8",
        "evaluate_every=8",
        "per_round=3",
        "task.clients=6",
        "task.partition=iid",
        "task.test_limit=100",
    ]
    short = load_recipe("zerofl.digits", easy)
    list(record_run(folder, open_run(short), local(), "zerofl.digits"))
    return folder


@pytest.fixture(scope="session")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose network and data are the user's."""
    folder = tmp_path_factory.mktemp("runs") / "own"
    list(record_run(folder, open_run(tiny_run(ZeroFL(0.7, 0.1), rounds=2)), local(), "mine.py:recipe"))
    return folder


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder to work in, with the user's file in it."""
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    monkeypatch.delenv("FEDSIEVE_DATA", raising=False)
    yield tmp_path
    sys.modules.pop("mine", None)
