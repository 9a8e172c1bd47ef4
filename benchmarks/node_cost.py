"""What a message costs a SuperNode: rounds of a deployment on loopback, less what the clients trained.

Claim: some seconds, most of them for a new process that imports PyTorch and reads its data. One SuperLink and two
SuperNodes, each a process, on one machine; the answer of a round's last client counts. The first round, in which the
SuperNodes say who they are, does not. n: 1 run of 10 rounds. Hardware and versions stand in the results.

    python benchmarks/node_cost.py      (2 minutes)
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from fedsieve.cli.bench.measurement import machine
from fedsieve.flower.app.superlink import script

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "node_cost.json"
RECIPE, NODES, ROUNDS = "fedavg.digits", 2, 11


def rounds_of_supernodes() -> list[dict[str, Any]]:
    """Run a deployment; return the rows of its rounds."""
    sys.path.append(str(HERE.parent / "tests"))
    from supernodes import deployment, rows

    with tempfile.TemporaryDirectory() as name:
        folder, out = Path(name), Path(name) / "run"
        settings = [f"task.clients={NODES}", f"per_round={NODES}", f"rounds={ROUNDS}", f"evaluate_every={ROUNDS}"]
        options = [part for setting in settings for part in ("-s", setting)]
        app = [script("fedsieve"), "flower", "app", RECIPE, str(folder / "app"), "--out", str(out), *options]
        subprocess.run(app, check=True)
        with deployment(folder / "flower") as it:
            for client in range(NODES):
                it.supernode(f"node {client}", f"partition-id={client}")
            it.finished(it.run(folder / "app"), out, 600)
        return rows(out)


def told(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the seconds that rounds took beyond training."""
    beyond = [row["seconds"] - row["steps"] / NODES * row["ms_per_step"] / 1000 for row in rows[1:]]
    return {
        "recipe": RECIPE,
        "nodes": NODES,
        "rounds": len(beyond),
        "seconds": median(beyond),
        "fastest": min(beyond),
        "slowest": max(beyond),
        "machine": machine(),
    }


def sentence() -> str:
    """Return the results in words."""
    got = json.loads(RESULTS.read_text())
    spread = f"{got['fastest']:.1f} to {got['slowest']:.1f} in {got['rounds']} rounds of `{got['recipe']}`"
    return f"{got['seconds']:.1f} s ({spread}, {got['nodes']} SuperNodes on one machine of two cores)"


if __name__ == "__main__":
    RESULTS.write_text(json.dumps(told(rounds_of_supernodes()), indent=1) + "\n")
    print(sentence())
