"""What it costs in accuracy to multiply in bfloat16, as on a GPU by ``--precision bf16``, weights and sums in float32.

Claim: no run ends more than a point below the same run in float32. n: three seeds of the digits' recipes, and of MNIST
in 20 rounds, in which the learning rate falls to its end: the accuracy of the deployed model on the whole test set,
after the last round, and as a mean of the last ten. On a CPU, where PyTorch rounds the same factors of the same
products.

    python benchmarks/precision.py digits          (10 minutes)
    python benchmarks/precision.py mnist           (half an hour; needs FEDSIEVE_DATA)
    python benchmarks/precision.py --table

Stopped in the middle, it goes on where it was.
"""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import mean, stdev

from rounding import accuracies, write_rows
from rows import markdown, read_results

from fedsieve.engine.cohorts import in_process
from fedsieve.recipes import load_recipe
from fedsieve.runs.execution import Execution
from fedsieve.runs.recorder import record_run

RESULTS = Path(__file__).parent / "results" / "precision.json"
CASES: dict[str, tuple[str, ...]] = {"digits": (), "mnist": ("rounds=20",)}
"""Datasets, and settings of their runs."""
RECIPES = ("fedavg", "zerofl", "flash", "sparsefedpp")
SEEDS = (0, 1, 2)


def one(recipe: str, precision: str, seed: int, settings: tuple[str, ...]) -> dict[str, float]:
    """Run a recipe, or read what it left, and return its numbers."""
    out = Path("runs/precision") / f"{recipe}-{precision}-{seed}"
    run = load_recipe(recipe, [*settings, f"seed={seed}"])
    if not (out / "summary.json").exists():
        engine = in_process("cpu", "dense", precision)
        execution = Execution(kernels="dense", precision=precision, resume=True)
        for round in record_run(out, execution.open(run), engine, recipe, execution):
            print(f"{out.name} round {round.t}: {round.accuracy}", file=sys.stderr)
    return accuracies(out)


def measure(task: str) -> None:
    """Run everything of a task that is not there yet, and write it down."""
    rows = []
    for name in RECIPES:
        recipe = f"{name}.{task}"
        for precision in ("fp32", "bf16"):
            runs = [one(recipe, precision, seed, CASES[task]) for seed in SEEDS]
            numbers = {key: [run[key] for run in runs] for key in runs[0]}
            rows.append({"task": task, "recipe": recipe, "precision": precision, **numbers})
    write_rows(RESULTS, task, rows)


def table() -> str:
    """Return the committed results as a table, differences to float32 seed by seed."""
    rows = read_results(RESULTS)["rows"]
    exact = {row["recipe"]: row for row in rows if row["precision"] == "fp32"}
    header = "| run | float32, % (each seed) | bfloat16, % (each seed) | difference | of the last ten rounds |"
    lines = []
    for row in rows:
        if row["precision"] == "fp32":
            continue
        before, cells = exact[row["recipe"]], [row["recipe"]]
        for values in (before["accuracy"], row["accuracy"]):
            cells.append(f"{100 * mean(values):.2f} ({', '.join(f'{100 * v:.1f}' for v in values)})")
        for key in ("accuracy", "late"):
            differences = [100 * (a - b) for a, b in zip(row[key], before[key], strict=True)]
            cells.append(f"{mean(differences):+.2f} ± {stdev(differences) / len(differences) ** 0.5:.2f}")
        lines.append(cells)
    return markdown(header, lines)


if __name__ == "__main__":
    if sys.argv[-1] in CASES:
        measure(sys.argv[-1])
    elif "--table" not in sys.argv:
        sys.exit(f"usage: python benchmarks/precision.py {'|'.join(CASES)}|--table")
    print(table())
