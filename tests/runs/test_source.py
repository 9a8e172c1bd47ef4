"""The user's own code as a part of a run: it is kept, and its changes are noticed, refused or recorded."""

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from command_line import CommandLine
from fedsieve import InputError, local
from fedsieve.engine.setup import open_run
from fedsieve.methods import FedAvg
from fedsieve.recipes import load_recipe
from fedsieve.runs.execution import Execution
from fedsieve.runs.provenance import sources
from fedsieve.runs.record import read_rows
from fedsieve.runs.recorder import check_directory, record_run
from fedsieve.runs.resume import code_folder
from run_directories import about, flat
from tiny import TinyNet

RECIPE = """
from tiny import blobs
from fedsieve import Run, Task
from fedsieve.methods import FedAvg
from {nets} import Net

SPEED = {speed}

class Mine(FedAvg):
    def client(self, down, device):
        return super().client(down, device)

def recipe() -> Run:
    return Run(Mine(), Task(Net, blobs, 6), 4, 3, batch=8)
"""
NETS = """
from tiny import TinyNet

class Net(TinyNet):
    {body}
"""


class Files:
    """A recipe and the module that it imports, which can change between two runs as they would between processes."""

    def __init__(self, folder: Path, name: str):
        self.folder, self.name, self.nets = folder, name, f"{name}_nets"
        self.write()

    def write(self, speed: int = 1, body: str = "pass") -> None:
        (self.folder / f"{self.name}.py").write_text(RECIPE.format(nets=self.nets, speed=speed))
        (self.folder / f"{self.nets}.py").write_text(NETS.format(body=body))
        for name in (self.name, self.nets):
            sys.modules.pop(name, None)

    @property
    def recipe(self) -> str:
        return f"{self.folder / self.name}.py:recipe"

    def go(self, out: Path, **options: Any) -> list[int]:
        run = load_recipe(self.recipe)
        return [r.t for r in record_run(out, open_run(run), local(), self.recipe, Execution(**options))]


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Files:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    return Files(tmp_path, f"own_{abs(hash(request.node.name))}")


def test_a_run_keeps_the_users_own_code_and_notices_when_it_changes(own: Files, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert own.go(out, until=1) == [1]
    names = {f"{own.name}.py", f"{own.nets}.py", "tiny.py"}
    assert about(out)["source"].keys() == names
    assert {p.name for p in (out / "source/000001").iterdir()} == names
    first = (out / f"source/000001/{own.name}.py").read_bytes()
    assert first == (tmp_path / f"{own.name}.py").read_bytes()
    assert own.go(out, resume=True, until=2) == [2]
    before = about(out)

    own.write(speed=2, body="x = 1")
    line = f"{tmp_path / own.name}.py, {tmp_path / own.nets}.py changed since .*source/000001.*--accept-changes"
    with pytest.raises(InputError, match=line):
        own.go(out, resume=True)
    with pytest.raises(InputError, match="changed since"):
        check_directory(out, open_run(load_recipe(own.recipe)), own.recipe, Execution(resume=True))
    assert about(out) == before
    assert own.go(out, resume=True, until=3, accept_changes=True) == [3]
    assert (out / f"source/000001/{own.name}.py").read_bytes() == first
    assert (out / f"source/000003/{own.name}.py").read_bytes() == (tmp_path / f"{own.name}.py").read_bytes()
    (change,) = about(out)["changes"]
    assert (change["round"], change["source"]) == (3, [before["source"], about(out)["source"]])
    assert own.go(out, resume=True) == [4]

    own.write(speed=2)  # back at the first state of one file: still another than the last
    with pytest.raises(InputError, match=rf"/{own.nets}\.py changed since .*source/000003"):
        own.go(out, resume=True)


def test_the_code_that_a_run_goes_on_with_is_that_of_its_last_change() -> None:
    changes = [{"round": 2, "source": []}, {"round": 4, "source": []}, {"round": 6, "rounds": [4, 8]}]
    for count, since in ((0, 1), (1, 2), (2, 4), (3, 4)):
        assert code_folder(Path("out"), {"changes": changes[:count]}, 1) == Path(f"out/source/{since:06d}")


def test_imports_of_numbers_alone_and_of_functions_are_own_code(own: Files, tmp_path: Path) -> None:
    kinds = {"number": "from {} import RATE", "later": "def f():\n    from {} import g", "all": "from {} import *"}
    for kind, line in kinds.items():
        name = f"{own.name}_{kind}"
        (tmp_path / f"{name}.py").write_text("RATE = 1\n")
        with (tmp_path / f"{own.nets}.py").open("a") as file:
            file.write(f"\n{line.format(name)}\n")
    (tmp_path / f"{own.name}_later.py").write_text("from . import nothing\ndef g(): ...\n")
    out = tmp_path / "out"
    own.go(out, until=1)
    assert {f"{own.name}_{kind}.py" for kind in kinds} <= about(out)["source"].keys()
    for kind in kinds:
        path = tmp_path / f"{own.name}_{kind}.py"
        before = path.read_text()
        path.write_text("RATE = 2\n")
        with pytest.raises(InputError, match=f"^{path} changed since"):
            own.go(out, resume=True)
        path.write_text(before)
    assert own.go(out, resume=True, until=2) == [2]


def test_the_layers_of_a_model_that_is_given_as_it_is_are_the_users_own_code() -> None:
    run = flat(FedAvg(), 4)
    assert sources(run).keys() == {"tiny.py"}
    model = nn.Sequential(nn.Flatten(), TinyNet())
    run = replace(run, task=replace(run.task, model=model, dataset="digits"))
    assert sources(run) == {"tiny.py": Path(__file__).parents[1] / "tiny.py"}
    assert not sources(replace(run, task=replace(run.task, model=nn.Linear(2, 2))))


def test_a_run_of_fedsieves_own_code_keeps_none_of_it(tmp_path: Path) -> None:
    run = replace(load_recipe("fedavg.digits"), rounds=1)
    assert [r.t for r in record_run(tmp_path, open_run(run), local(), "fedavg.digits")] == [1]
    assert about(tmp_path)["source"] == {}
    assert not (tmp_path / "source").exists()


@pytest.mark.slow
def test_the_command_line_goes_on_with_changes_that_are_accepted(
    own: Files, tmp_path: Path, fedsieve: CommandLine
) -> None:
    run = ("run", own.recipe, "--out", str(tmp_path / "out"), "-s", "lr_end=.1")
    assert fedsieve(*run, "--until", "1").stderr == ""
    own.write(speed=2)
    said = fedsieve(*run, "--resume", code=2).stderr
    assert said.count("\n") == 1
    assert f"{own.name}.py changed since" in said
    assert fedsieve(*run, "--resume", "--accept-changes").stderr == ""
    assert fedsieve(*run, "--resume", "-s", "rounds=5").stderr == ""
    assert [row["round"] for row in read_rows(tmp_path / "out")] == [1, 2, 3, 4, 5]
    said = fedsieve(*run, "--resume", "-s", "rounds=6", "-s", "lr_end=.05", code=2).stderr
    assert said.count("\n") == 1


@pytest.mark.system
def test_a_sweep_goes_on_with_changes_that_are_accepted(
    own: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fedsieve: CommandLine
) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{os.environ.get('PYTHONPATH', '')}:{Path(__file__).parents[1]}")
    sweep = ("sweep", own.recipe, "--out", str(tmp_path / "out"), "--seeds", "1", "-s", "lr=.1,.2")
    assert fedsieve(*sweep, "--until", "1").stderr == ""
    own.write(speed=2)
    said = fedsieve(*sweep, code=2).stderr
    assert said.count("\n") == 1
    assert f"{own.name}.py changed since" in said
    assert fedsieve(*sweep, "--accept-changes").stderr == ""
    changes = [about(run)["changes"] for run in sorted((tmp_path / "out/runs").iterdir())]
    assert [[change["round"] for change in one] for one in changes] == [[2], [2]]
