"""What FedSieve's messages save in a Flower app: bytes and accuracy of examples/flower_quickstart, several ways.

Claim: exact messages end with the plain app's model, to the bit, in fewer bytes; a tenth of the update in bf16 takes
less than a tenth of the bytes up. n: ten nodes, the app's ten rounds, all nodes in each, one run a row. Bytes are
those of whole messages, records and metadata, as Flower serializes them, evaluation's among them; accuracy is that of
the final model on the nodes' held-out examples. The grid is an in-process one (tests/flower_grid.py).

    python benchmarks/flower_bytes.py          (a minute)
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

import torch
from flower_table import BYTES, bytes_table

HERE = Path(__file__).parent
QUICKSTART = HERE.parent / "examples/flower_quickstart"
NODES = 10
WAYS = {
    "plain Flower": ("", ""),
    "`SparseMod()`": ("SparseMod()", ""),
    "`SparseMod(values='bf16')`": ("SparseMod(values='bf16')", ""),
    "`SparseMod(values='bf16')`, `SparseGrid(grid, values='bf16')`": ("SparseMod(values='bf16')", ", values='bf16'"),
    "`SparseMod(top=0.1)`": ("SparseMod(top=0.1)", ""),
    "`SparseMod(top=0.1, feedback=True)`": ("SparseMod(top=0.1, feedback=True)", ""),
    "`SparseMod(top=0.1, values='bf16')`": ("SparseMod(top=0.1, values='bf16')", ""),
}


def written(folder: Path, mod: str, grid: str) -> None:
    """Write the quickstart into a folder, with the mod and the grid's arguments; without a mod as it is."""
    shutil.copytree(QUICKSTART / "quickstart", folder / "quickstart")
    client, server = (folder / "quickstart" / f"{part}_app.py" for part in ("client", "server"))
    if mod:
        text = client.read_text().replace("app = ClientApp()", f"app = ClientApp(mods=[{mod}])")
        client.write_text(text.replace("import torch", "import torch\nfrom fedsieve.flower import SparseMod", 1))
        text = server.read_text().replace("grid=grid", f"grid=SparseGrid(grid{grid})")
        server.write_text(text.replace("import torch", "import torch\nfrom fedsieve.flower import SparseGrid", 1))


def one(mod: str, grid: str) -> dict[str, Any]:
    """Run the app one way, and return its numbers."""
    from flower_grid import InProcessGrid, served

    config = tomllib.loads((QUICKSTART / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        written(folder, mod, grid)
        for module in [module for module in sys.modules if module.startswith("quickstart")]:
            del sys.modules[module]
        sys.path.insert(0, name)
        os.chdir(folder)
        client, server, task = (
            importlib.import_module(f"quickstart.{m}") for m in ("client_app", "server_app", "task")
        )
        inside = InProcessGrid(client.app, NODES, config)
        served(server.app, inside, config)
        model = task.Net()
        model.load_state_dict(torch.load("final_model.pt", weights_only=True))
        right = [task.test(model, task.load_data(node, NODES, 100)[1])[1] for node in range(NODES)]
        os.chdir(HERE)
        sys.path.remove(name)
    assert not any(reply.has_error() for reply in inside.replies.values())
    rounds = config["num-server-rounds"] * NODES
    return {"up": inside.bytes_up / rounds, "down": inside.bytes_down / rounds, "accuracy": sum(right) / NODES}


def main() -> None:
    """Measure, store and print."""
    from fedsieve.cli.bench.measurement import machine

    sys.path.insert(0, str(HERE.parent / "tests"))
    results = {"machine": machine(), "ways": {name: one(*way) for name, way in WAYS.items()}}
    BYTES.write_text(json.dumps(results, indent=1) + "\n")
    print(bytes_table())


if __name__ == "__main__":
    main()
