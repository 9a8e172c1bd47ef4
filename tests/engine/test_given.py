"""Models, datasets and partitions that are given as objects are as good as functions that make them."""

import copy
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from fedsieve import Dataset, Task, local, open_run, pool
from fedsieve.cli import app
from fedsieve.flower.app.project import AppConfig, write_app
from fedsieve.methods import PDST, FedAvg, SparseFedPP, TopK, ZeroFL
from fedsieve.runs.execution import Execution
from fedsieve.runs.provenance import sources
from fedsieve.runs.recorder import record_run
from fedsieve.types import InputError
from tiny import TinyNet, alike, blobs, last, tiny_run

README = Path(__file__).parents[2] / "README.md"


def halves(dataset: Dataset, clients: int, seed: int) -> list[Tensor]:
    """Every client has some of all examples: others may have them too."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randperm(len(dataset.train), generator=generator)[:40] for _ in range(clients)]


@pytest.mark.slow
def test_the_readmes_python_runs_as_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
    y = torch.arange(4000) % 10
    torch.manual_seed(0)
    x = torch.randn(10, 64)[y] + 0.5 * torch.randn(4000, 64)
    network = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    exec(block, {"x": x, "y": y, "x_test": x, "y_test": y, "my_network": network})
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [int(line[0]) for line in lines] == [*range(1, 51)]
    assert float(lines[-1][1]) > 0.8


@pytest.mark.parametrize("method", [FedAvg(), ZeroFL(0.7), SparseFedPP(0.6), PDST(0.5)], ids=lambda m: m.name)
def test_objects_are_as_good_as_functions_and_are_left_alone(method: Any) -> None:
    base = tiny_run(method, rounds=2)
    model, dataset = open_run(base).model(), blobs()
    model.eval()
    before = copy.deepcopy(model.state_dict())
    task = Task(model, dataset, 6, halves(dataset, 6, base.seed))
    final = last(replace(base, task=task))
    assert all(torch.equal(v, model.state_dict()[name]) for name, v in before.items())
    assert [type(m) for m in model.modules()] == [type(m) for m in TinyNet().modules()]
    assert not model.training
    given = Task(lambda: model, lambda: dataset, 6, halves)  # a function may give the same object every time
    assert alike(final, last(replace(base, task=given)))
    assert not alike(final, last(replace(base, task=replace(task, model=TinyNet), seed=1)))


def test_weights_that_a_model_comes_with_are_where_a_run_starts() -> None:
    for method in (FedAvg(), TopK(0.0), SparseFedPP(0.0)):
        model = TinyNet()
        base = tiny_run(method, rounds=1, lr=1e-6, lr_end=1e-6)
        final = last(replace(base, task=replace(base.task, model=model)))
        for name, w in model.named_parameters():
            assert torch.allclose(final.model[name], w, atol=1e-4), (method, name)


@pytest.mark.system
def test_objects_reach_other_processes() -> None:
    base = tiny_run(PDST(0.5), rounds=1)
    there = replace(base, task=Task(TinyNet(), blobs(), 6, halves(blobs(), 6, 0)))
    assert alike(last(there), last(there, pool(2)))


def test_a_run_directory_knows_the_objects_of_its_run(tmp_path: Path) -> None:
    base, model, dataset = tiny_run(FedAvg(), rounds=2), TinyNet(), blobs()
    mine, before = replace(base, task=Task(model, dataset, 6, halves(dataset, 6, 0))), copy.deepcopy(model.state_dict())
    recipe = "mine"
    [*record_run(tmp_path, open_run(mine), local(), recipe, Execution(until=1))]
    with torch.no_grad():
        model.fc2.bias[0] += 1
    with pytest.raises(InputError, match=r"tiny:TinyNet \w{8} there, .* draws task.model by chance"):
        [*record_run(tmp_path, open_run(mine), local(), recipe, Execution(resume=True))]
    model.load_state_dict(before)
    other = replace(dataset, test=dataset.test.subset(torch.arange(7)))
    for wrong in (replace(mine.task, dataset=other), replace(mine.task, partition=halves(dataset, 6, 1))):
        with pytest.raises(
            InputError, match=r"holds another run \(task\.(dataset blobs|partition indices) \w{8} there"
        ):
            [*record_run(tmp_path, open_run(replace(mine, task=wrong)), local(), recipe, Execution(resume=True))]
    same = replace(mine, task=replace(mine.task, model=copy.deepcopy(model), dataset=blobs()))
    assert [r.t for r in record_run(tmp_path, open_run(same), local(), recipe, Execution(resume=True))] == [2]
    assert {"tiny.py"} <= sources(mine).keys()


RECIPE = """
import torch
from torch import nn
from fedsieve import Data, Dataset, Run, Task
from fedsieve.methods import PDST

def recipe():
    x = torch.randn(120, 8, generator=torch.Generator().manual_seed(0))
    data = Data(x, (x[:, 0] > 0).long())
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
    task = Task(model, Dataset("mine", data, data, 2, version="v0.01"), 4, tiers=[1.0])
    return Run(PDST(0.5), task, rounds=3, per_round=2)
"""


def test_the_command_line_takes_a_recipe_of_objects(tmp_path: Path) -> None:
    (tmp_path / "objects_recipe.py").write_text(RECIPE)
    recipe, out = f"{tmp_path}/objects_recipe.py:recipe", str(tmp_path / "out")
    ran = CliRunner().invoke(app, ["run", recipe, "--out", out, "-s", "task.partition=lda:1.0"])
    assert "pdst on mine (v0.01): 3 rounds" in ran.output, ran.output
    assert "(lda:1.0), 120 training examples" in ran.output
    known = json.loads((tmp_path / "out/run.json").read_text())["dataset"]
    assert known == {"name": "mine", "version": "v0.01", "training": 120, "test": 120, "owners": 0}
    with pytest.raises(InputError, match=r"gives another model at every call.* give task.model as a function, or seed"):
        write_app(tmp_path / "app", AppConfig(recipe=recipe))
    # the network's first weights, which the recipe draws at every call, are of no consequence
    told = CliRunner().invoke(app, ["predict", out, "test:0-9", "--recipe", recipe])
    assert "accuracy" in told.output, told.output
