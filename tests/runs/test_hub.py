"""The folder for a hub: its card, and its loader in a process that cannot import FedSieve."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from deployed_models import command, make
from fedsieve import InputError
from fedsieve.runs.hub import LOADER, write_hub_folder
from fedsieve.runs.model import open_model

ASK = """
import sys
sys.modules["fedsieve"] = None
import numpy, torch
from load import load, normalize
numpy.save("y.npy", load(*map(eval, sys.argv[1:]))(normalize(torch.from_numpy(numpy.load("x.npy")))).detach().numpy())
"""


def answers(folder: Path, x: torch.Tensor, *words: str) -> torch.Tensor:
    """Return what load.py's model makes of ``x``."""
    np.save(folder / "x.npy", x.numpy())
    subprocess.run([sys.executable, "-c", ASK, *words], cwd=folder, env={"PYTHONPATH": ""}, check=True, timeout=120)
    return torch.from_numpy(np.load(folder / "y.npy"))


def test_the_loader_needs_no_fedsieve(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "hub"
    code, said, err = command(capsys, "export", run, "--to", "hub-folder", "-o", out)
    assert (code, err) == (0, "")
    assert said.startswith(f"wrote {out}: model.safetensors, config.json, README.md, load.py, network.py, ")
    assert len(LOADER.splitlines()) <= 20
    assert "fedsieve" not in LOADER
    model, x = open_model(run), torch.rand(5, 1, 8, 8)
    assert all(torch.equal(v, open_model(out).weights()[n]) for n, v in model.weights().items())
    assert torch.allclose(answers(out, x), model.network(model.normalize(x)), atol=1e-5)

    code, _, err = command(capsys, "export", run, "--to", "hub-folder", "-o", out)
    assert (code, "is there already" in err) == (2, True)
    code, _, err = command(capsys, "export", run, "--to", "hub", "-o", tmp_path / "other")
    assert (code, "--to must be file or hub-folder, got 'hub'" in err) == (2, True)

    yaml = pytest.importorskip("yaml")
    _, front, text = (out / "README.md").read_text().split("---\n", 2)
    about, summary = yaml.safe_load(front), json.loads((run / "summary.json").read_text())
    assert about["datasets"] == ["digits"]
    assert "zerofl" in about["tags"]
    for row in (
        f"| accuracy on the test set | {summary['accuracy']:.2%} |",
        f"| density of all weights | {model.density():.2%} |",
        f"| density of the policy's weights | {summary['density_of_policy']:.2%} |",
        f"| bytes sent up, all rounds | {summary['bytes_up']:,} |",
    ):
        assert row in text


def test_a_network_of_ones_own_is_an_argument(tmp_path: Path) -> None:
    model = make()
    own = model.metadata.run | {"task": {"model": "mine:Net", "dataset": "digits"}}
    model.metadata.run.clear()
    model.metadata.run.update(own)
    with torch.no_grad():
        write_hub_folder(model, tmp_path / "hub")
    assert not (tmp_path / "hub/network.py").exists()
    assert "load(YourNetwork())" in (tmp_path / "hub/README.md").read_text()
    with pytest.raises(InputError, match="nowhere is not a folder"):
        write_hub_folder(model, tmp_path / "nowhere/hub")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "shape"), [("resnet18", (3, 32, 32)), ("feddst_net", (3, 32, 32))])
def test_every_kind_of_network_comes_with_its_source(name: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    model = make(name, shape, mean=(0.1, 0.2, 0.3), std=(0.5, 1.0, 2.0))
    write_hub_folder(model, tmp_path / "hub")
    x = torch.rand(3, *shape)
    assert torch.allclose(answers(tmp_path / "hub", x), model.network(model.normalize(x)), atol=1e-5)
