"""Which engine ``auto`` stands for: a pool where a run lasts, on the cores that PyTorch may use."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fedsieve import Run, Task
from fedsieve.engine import Federation
from fedsieve.engine.setup import open_run
from fedsieve.methods import FedAvg
from fedsieve.runs import engines
from fedsieve.runs.engines import choose_engine, dense_multiply_adds, find_engine
from fedsieve.runs.execution import Execution, execution_options
from fedsieve.runs.record import read_manifest
from fedsieve.runs.run import run
from tiny import TinyNet, blobs, tiny_run

SAMPLE = 36 * 4 * 2 * 9 + 9 * 8 * 4 * 9 + 72 * 24 + 24 * 3
"""The multiply-adds of TinyNet's forward pass of one sample."""
ROUND = 3 * SAMPLE * 3 * 36
"""Those of a round of three clients with 36 examples: forward, and twice backward."""


@pytest.fixture(autouse=True)
def cores(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two of them."""
    monkeypatch.setattr(engines, "usable_cores", lambda: 2)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def federation() -> Federation:
    return open_run(tiny_run(FedAvg(), rounds=10))


def chosen(federation: Federation, run_: Run, **changes: Any) -> str:
    return choose_engine(Execution(**{"engine": "auto", **changes}), replace(federation, run=run_)).engine


def test_the_work_of_a_run_is_that_of_its_examples(federation: Federation) -> None:
    longer = replace(federation, run=replace(federation.run, epochs=2))
    assert dense_multiply_adds(longer, 5) == pytest.approx(ROUND * 2 * 5, rel=1e-6)


def test_a_run_that_lasts_has_a_process_for_each_core(federation: Federation, monkeypatch: pytest.MonkeyPatch) -> None:
    """For each client of the largest round, if they are fewer; another engine that is named stays."""
    long = federation.run
    assert chosen(federation, long) == "local"
    monkeypatch.setattr(engines, "LASTING", 10 * ROUND * 0.99)
    assert chosen(federation, long) == "pool:2"
    assert chosen(federation, long, until="9") == chosen(federation, replace(long, rounds=9)) == "local"
    monkeypatch.setattr(engines, "LASTING", 0)
    assert chosen(federation, replace(long, per_round=1)) == "local"
    assert chosen(federation, long, engine="local") == "local"
    assert chosen(federation, long, precision="bf16", kernels="dense") == "local"
    torch.set_num_threads(1)
    assert chosen(federation, long) == "local"


def test_what_no_process_can_be_sent_stays_in_this_one(federation: Federation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "LASTING", 0)
    assert chosen(federation, replace(federation.run, task=Task(lambda: TinyNet(), blobs, 6))) == "local"


def test_a_small_shared_memory_keeps_a_run_in_this_process(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As containers have: the pool's processes share the training examples there."""
    monkeypatch.setattr(engines, "LASTING", 0)
    needed = 2 * federation.dataset.train.nbytes
    for free, engine in ((needed, "local"), (needed + 1, "pool:2")):
        monkeypatch.setattr(engines.shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        assert chosen(federation, federation.run) == engine


def test_a_system_without_such_a_folder_has_room(federation: Federation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "LASTING", 0)
    monkeypatch.setattr(engines, "SHARED_MEMORY", Path("/there/is/none"))
    assert chosen(federation, federation.run) == "pool:2"


def test_a_run_notes_the_engine_that_was_chosen(tmp_path: Path) -> None:
    run(tiny_run(FedAvg(), rounds=1), tmp_path / "run", engine="auto")
    manifest = read_manifest(tmp_path / "run")
    assert manifest
    assert manifest["engine"] == "local"


def test_the_command_has_auto_and_python_local() -> None:
    kind, number = find_engine(Execution(engine="auto"))
    assert (kind.make, number) == (None, 0)
    option = next(one for one in execution_options("run") if one.name == "engine")
    assert (option.default, option.metadata["default"]) == ("local", "auto")
