"""What rounding the values that clients send costs in accuracy, with error feedback.

Claim: with bf16, int8 and int4 a run ends within .3 points of the same run with float32. n: three seeds, the accuracy
of the deployed model on the whole test set, after the last round, and as a mean of the last ten rounds, which moves
less. The digits' runs are the recipes'; MNIST's have 20 rounds, in which the learning rate falls to its end.

    python benchmarks/rounding.py digits          (10 minutes)
    python benchmarks/rounding.py mnist           (two hours; needs FEDSIEVE_DATA)
    python benchmarks/rounding.py --table

Stopped in the middle, it goes on where it was.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import mean
from typing import Any

from fedsieve import local, open_run
from fedsieve.bench.clock import machine
from fedsieve.data import root_from
from fedsieve.recipes import made
from fedsieve.settings import changed
from fedsieve.store import Origin, keep, read_rows

RESULTS = Path(__file__).parent / "results" / "rounding.json"
CASES = {
    "ZeroFL 95 %, r_mask 0": ("zerofl", ["method.sparsity=0.95", "method.r_mask=0"]),
    "FLASH d .05": ("flash", ["method.density=0.05"]),
}
TASKS: dict[str, list[str]] = {"digits": [], "mnist": ["rounds=20"]}
VALUES = ("f32", "bf16", "int8", "int4")
SEEDS = (0, 1, 2)
LAST = 10
"""So many rounds' accuracies are averaged."""


def one(task: str, name: str, values: str, seed: int) -> dict[str, float]:
    """Run a case, or read what it left, and return its numbers."""
    method, settings = CASES[name]
    recipe, out = f"{method}.{task}", Path("runs/rounding") / f"{method}.{task}-{values}-{seed}"
    run = changed(made(recipe), [*settings, *TASKS[task], f"values={values}", f"seed={seed}"])
    if not (out / "summary.json").exists():
        for round in keep(out, open_run(run, root_from(None)), local(), Origin(recipe), resume=True):
            print(f"{out.name} round {round.t}: {round.accuracy}", file=sys.stderr)
    told = [row["accuracy"] for row in read_rows(out) if row["accuracy"] is not None]
    return {"accuracy": told[-1], "late": mean(told[-LAST:])}


def measure(task: str) -> None:
    """Run everything of a task that is not there yet, and write down what there is after every case."""
    for name in CASES:
        rows = {values: [one(task, name, values, seed) for seed in SEEDS] for values in VALUES}
        told: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"rows": []}
        told["machine"] = machine()
        told["rows"] = [row for row in told["rows"] if (row["task"], row["case"]) != (task, name)]
        for values, runs in rows.items():
            numbers = {key: [run[key] for run in runs] for key in runs[0]}
            told["rows"].append({"task": task, "case": name, "values": values, **numbers})
        RESULTS.write_text(json.dumps(told, indent=1) + "\n")


def table() -> str:
    """Return the committed results as a table."""
    rows: list[dict[str, Any]] = json.loads(RESULTS.read_text())["rows"]
    plain = {(row["task"], row["case"]): row for row in rows if row["values"] == "f32"}
    lines = [
        "| run | values | accuracy, % (each seed) | to float32 | last ten rounds, % | to float32 |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        base = plain[row["task"], row["case"]]
        cells = [f"{row['case']}, {row['task']}", row["values"]]
        for key in ("accuracy", "late"):
            seeds = f" ({', '.join(f'{100 * v:.1f}' for v in row[key])})" if key == "accuracy" else ""
            cells += [f"{100 * mean(row[key]):.2f}{seeds}", f"{100 * (mean(row[key]) - mean(base[key])):+.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    if sys.argv[-1] in TASKS:
        measure(sys.argv[-1])
    elif "--table" not in sys.argv:
        sys.exit(f"usage: python benchmarks/rounding.py {'|'.join(TASKS)}|--table")
    print(table())
