"""What rounding the values that clients send costs in accuracy, with error feedback.

Claim: with bf16, int8 and int4 a run ends within .3 points of the same run with float32. n: five seeds of the
digits' recipe, three of MNIST in 20 rounds, in which the learning rate falls to its end: the accuracy of the deployed
model on the whole test set, after the last round, and as a mean of the last ten, which moves less.

    python benchmarks/rounding.py digits          (10 minutes)
    python benchmarks/rounding.py mnist           (half an hour; needs FEDSIEVE_DATA)
    python benchmarks/rounding.py --table

Stopped in the middle, it goes on where it was.
"""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from rows import markdown, read_results, without, write_results

from fedsieve import local
from fedsieve.cli.bench.measurement import machine
from fedsieve.recipes import load_recipe
from fedsieve.runs.execution import Execution
from fedsieve.runs.record import read_rows
from fedsieve.runs.recorder import record_run

RESULTS = Path(__file__).parent / "results" / "rounding.json"
CASES = {
    "digits": ("ZeroFL 90 %, r_mask .1", [], (0, 1, 2, 3, 4)),
    "mnist": ("ZeroFL 95 %, r_mask 0", ["method.sparsity=0.95", "method.r_mask=0", "rounds=20"], (0, 1, 2)),
}
VALUES = ("f32", "bf16", "int8", "int4")
LAST = 10
"""So many rounds' accuracies are averaged."""


def one(task: str, values: str, seed: int) -> dict[str, float]:
    """Run a case, or read what it left, and return its numbers."""
    _, settings, _ = CASES[task]
    recipe, out = f"zerofl.{task}", Path("runs/rounding") / f"zerofl.{task}-{values}-{seed}"
    run = load_recipe(recipe, [*settings, f"values={values}", f"seed={seed}"])
    if not (out / "summary.json").exists():
        for round in record_run(out, Execution().open(run), local(), recipe, Execution(resume=True)):
            print(f"{out.name} round {round.t}: {round.accuracy}", file=sys.stderr)
    return accuracies(out)


def accuracies(out: Path) -> dict[str, float]:
    """Return the accuracy after a run's last round, and the mean of the last rounds'."""
    every = [row["accuracy"] for row in read_rows(out) if row["accuracy"] is not None]
    return {"accuracy": every[-1], "late": mean(every[-LAST:])}


def measure(task: str) -> None:
    """Run everything of a task that is not there yet, and write it down."""
    name, _, seeds = CASES[task]
    rows = []
    for values in VALUES:
        runs = [one(task, values, seed) for seed in seeds]
        numbers = {key: [run[key] for run in runs] for key in runs[0]}
        rows.append({"task": task, "case": name, "values": values, **numbers})
    write_rows(RESULTS, task, rows)


def write_rows(path: Path, task: str, rows: list[dict[str, Any]]) -> None:
    """Put a task's rows in the place of its old ones in a file of results, with the machine."""
    results = {"rows": []} | read_results(path) | {"machine": machine()}
    results["rows"] = without(results["rows"], {"task": task}) + rows
    write_results(path, results)


def table() -> str:
    """Return the committed results as a table, differences to float32 seed by seed."""
    rows = read_results(RESULTS)["rows"]
    plain = {row["task"]: row for row in rows if row["values"] == "f32"}
    header = "| run | values | accuracy, % (each seed) | to float32 | last ten rounds, % | to float32 |"
    lines = []
    for row in rows:
        cells = [f"{row['case']}, {row['task']}", row["values"]]
        for key in ("accuracy", "late"):
            seeds = f" ({', '.join(f'{100 * v:.1f}' for v in row[key])})" if key == "accuracy" else ""
            differences = [100 * (a - b) for a, b in zip(row[key], plain[row["task"]][key], strict=True)]
            error = stdev(differences) / len(differences) ** 0.5
            cells += [f"{100 * mean(row[key]):.2f}{seeds}", f"{mean(differences):+.2f} ± {error:.2f}" if error else ""]
        lines.append(cells)
    return markdown(header, lines)


if __name__ == "__main__":
    if sys.argv[-1] in CASES:
        measure(sys.argv[-1])
    elif "--table" not in sys.argv:
        sys.exit(f"usage: python benchmarks/rounding.py {'|'.join(CASES)}|--table")
    print(table())
