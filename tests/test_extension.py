"""CONTRIBUTING says which files to touch: a copy of the sources gets one more of each thing, in those files alone."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from extension import ROOT, Extension

PACKAGE = "src/fedsieve"


OPTION = Extension(
    {},
    {
        f"{PACKAGE}/runs/execution.py": [
            (
                "    resume: bool",
                '    remark: str = _option("", "A word to keep.", "run", "sweep", "flower")\n    resume: bool',
            )
        ],
        f"{PACKAGE}/runs/recorder.py": [
            ('start = {"recipe": recipe,', 'start = {"remark": execution.remark, "recipe": recipe,')
        ],
    },
)

METHOD = Extension(
    {
        f"{PACKAGE}/methods/halved.py": '''"""Federated averaging of steps half as long."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from fedsieve.client.training import load_, params_of, train
from fedsieve.server.aggregate import mean, tensors
from fedsieve.types import Device, Method, RoundContext, ServerState, Tree, Update


@dataclass(frozen=True)
class Halved(Method[ServerState]):
    """Go half of the way to the mean."""

    def init(self, model: nn.Module, rng: torch.Generator) -> ServerState:
        return ServerState(params_of(model))

    def broadcast(self, state: ServerState, context: RoundContext) -> Tree:
        return state.params

    def client(self, down: Tree, device: Device) -> Update:
        load_(device.model, tensors(down))
        metrics = train(device)
        return Update(params_of(device.model), len(device.data), metrics)

    def aggregate(self, state: ServerState, updates: Iterable[Update], context: RoundContext) -> ServerState:
        average = mean(updates)
        return ServerState({name: (value + average[name]) / 2 for name, value in state.params.items()})
'''
    },
    {
        f"{PACKAGE}/methods/__init__.py": [
            ("\n\n__all__", "\nfrom fedsieve.methods.halved import Halved\n\n__all__"),
            ('    "fedavg": FedAvg,\n', '    "fedavg": FedAvg,\n    "halved": Halved,\n'),
        ]
    },
)

ENGINE = Extension(
    {
        f"{PACKAGE}/engine/backwards.py": '''"""Train the clients of a round in one process, the last one first."""

from contextlib import contextmanager

from fedsieve.engine.worker import Worker, run_client


def backwards(execution):
    @contextmanager
    def engine(federation, memory):
        worker = Worker(federation, "cpu", execution.kernels)

        def exchange(t, messages):
            answers = {}
            for client in reversed([*messages]):
                answers[client], kept = run_client(worker, t, client, messages[client], memory.get(client, b""))
                if kept:
                    memory[client] = kept
            return [(client, answers[client]) for client in messages]

        yield exchange

    return engine
'''
    },
    {
        f"{PACKAGE}/runs/engines.py": [
            ("\n\n\nclass", "\nfrom fedsieve.engine.backwards import backwards\n\n\nclass"),
            (
                "OWN_ENGINES = {\n",
                'OWN_ENGINES = {\n    "backwards": EngineKind("last client first", lambda how, _: backwards(how)),\n',
            ),
        ]
    },
)

SCRIPT = """
from pathlib import Path
from typer.testing import CliRunner
from fedsieve.cli import app

def fedsieve(*words):
    done = CliRunner().invoke(app, words, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output

SHORT = ("-s", "rounds=1", "--kernels", "dense")
fedsieve("run", "fedavg.digits", *SHORT, "--out", "plain", "--remark", "mine")
fedsieve("sweep", "fedavg.digits", *SHORT, "--seeds", "1", "--out", "sweep", "--remark", "mine")
fedsieve("flower", "app", "fedavg.digits", "app", "--remark", "mine")
fedsieve("run", "fedavg.digits", *SHORT, "--out", "backwards", "--engine", "backwards")
fedsieve("run", "mine.py:halved", *SHORT, "--out", "halved")
Path("list").write_text(fedsieve("list"))
"""

MINE = """
from dataclasses import replace
from fedsieve.methods import METHODS
from fedsieve.recipes import load_recipe

def halved():
    return replace(load_recipe("fedavg.digits"), method=METHODS["halved"]())
"""


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with what an extended copy of the sources has written when it was used."""
    folder = tmp_path_factory.mktemp("extended")
    shutil.copytree(ROOT / "src", folder / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for extension in (OPTION, METHOD, ENGINE):
        extension.apply(folder)
    (folder / "mine.py").write_text(MINE)
    environment = {**os.environ, "PYTHONPATH": str(folder / "src")}
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def about(run: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((run / "run.json").read_text())
    return manifest


@pytest.mark.slow
def test_an_option_of_a_run_reaches_command_line_sweep_and_flower(extended: Path) -> None:
    (swept,) = (extended / "sweep/runs").iterdir()
    assert [about(run)["remark"] for run in (extended / "plain", swept)] == ["mine", "mine"]
    project = tomllib.loads((extended / "app/pyproject.toml").read_text())
    assert project["tool"]["flwr"]["app"]["config"]["remark"] == "mine"


@pytest.mark.slow
def test_a_method_is_one_file_and_one_line(extended: Path) -> None:
    assert about(extended / "halved")["method"] == "halved"
    assert re.search(r"^halved +Go half of the way to the mean\.", (extended / "list").read_text(), re.M)
    assert (extended / "halved/model.safetensors").read_bytes() != (extended / "plain/model.safetensors").read_bytes()


@pytest.mark.slow
def test_an_engine_is_one_exchange_and_one_line(extended: Path) -> None:
    assert about(extended / "backwards")["engine"] == "backwards"
    assert re.search(r"^backwards +last client first", (extended / "list").read_text(), re.M)
    models = [(extended / name / "model.safetensors").read_bytes() for name in ("plain", "backwards")]
    assert models[0] == models[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("row", "extension"), [("an option of a run", OPTION), ("a method", METHOD), ("an engine", ENGINE)]
)
def test_contributing_names_the_files(row: str, extension: Extension) -> None:
    assert len({*extension.new, *extension.changed}) == 2
    extension.assert_named(row)
