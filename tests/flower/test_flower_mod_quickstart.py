"""The documented diff, applied to the quickstart: the same model to the bit, in fewer bytes."""

import importlib
import re
import shutil
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

from fedsieve.flower.app.superlink import superlink
from flower_grid import InProcessGrid, served

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "examples/flower_quickstart"


def diff() -> dict[str, list[list[str]]]:
    """The hunks of the page's diff, by file."""
    (text,) = re.findall(r"```diff\n(.*?)```", (ROOT / "docs/how-to/flower.md").read_text(), re.S)
    files = re.findall(r"^--- (\S+)\n(.*?)(?=^--- |\Z)", text, re.S | re.M)
    return {name: [hunk.splitlines() for hunk in hunks.split("@@\n") if hunk] for name, hunks in files}


def patched(folder: Path) -> Path:
    shutil.copytree(QUICKSTART, folder)
    for name, hunks in diff().items():
        text = (folder / name).read_text()
        for lines in hunks:
            before = "".join(f"{line[1:]}\n" for line in lines if line[0] in " -")
            assert text.count(before) == 1, before
            text = text.replace(before, "".join(f"{line[1:]}\n" for line in lines if line[0] in " +"))
        (folder / name).write_text(text)
    return folder


def run(folder: Path, monkeypatch: pytest.MonkeyPatch, where: Path) -> tuple[dict[str, Any], InProcessGrid]:
    """Run an app of that folder, and return the model that it saved, and the grid."""
    config = tomllib.loads((folder / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    config |= {"num-server-rounds": 2, "local-epochs": 1}
    for name in [name for name in sys.modules if name.split(".")[0] == "quickstart"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.chdir(where)
    client, server = (importlib.import_module(f"quickstart.{part}_app") for part in ("client", "server"))
    assert Path(str(server.__file__)).is_relative_to(folder)
    grid = InProcessGrid(client.app, 5, config)
    served(server.app, grid, config)
    return torch.load(where / "final_model.pt", weights_only=True), grid


def test_four_lines_change() -> None:
    lines = [line for hunks in diff().values() for lines in hunks for line in lines]
    assert sum(line.startswith("+") for line in lines) == 4
    assert sum(line.startswith("-") for line in lines) == 2


@pytest.mark.slow
def test_the_model_is_the_same_to_the_bit_in_fewer_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, before = run(QUICKSTART, monkeypatch, tmp_path)
    same, after = run(patched(tmp_path / "app"), monkeypatch, tmp_path)
    assert [*plain] == [*same]
    assert all(torch.equal(plain[name], same[name]) for name in plain)
    assert not [reply for reply in (*before.replies.values(), *after.replies.values()) if reply.has_error()]
    assert after.bytes_up < 0.8 * before.bytes_up
    assert after.bytes_down < 0.95 * before.bytes_down


@pytest.mark.system
@pytest.mark.timeout(300)
def test_flwr_run_takes_the_changed_app_to_its_end(tmp_path: Path) -> None:
    app, settings = patched(tmp_path / "app"), "num-supernodes=4 client-resources-num-cpus=1 init-args-num-cpus=2"
    with superlink(tmp_path, {"RAY_ADDRESS": "local"}) as link:
        options = ["--federation-config", settings, "-c", "num-server-rounds=1 local-epochs=1"]
        number = str(link.flwr("run", str(app), *options)["run-id"])
        status = ""
        while not status.startswith("finished"):
            time.sleep(1)
            status = link.flwr("list", "--run-id", number)["runs"][0]["status"]
        said = link.log.read_text()
    assert status == "finished:completed", said[-3000:]
