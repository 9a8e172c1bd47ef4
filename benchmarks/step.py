"""What the kernels save in whole runs: the time of a round with ``--kernels sparse`` and ``dense``, and the accuracy.

Claim: a round takes less, and the accuracy after the same rounds is the same within the noise of three seeds. n: 3
seeds a recipe; the time is the median of the undisturbed rounds of all seeds, clients computing with one thread each,
tests and FLASH's first stage set aside. A round counts as undisturbed if its one process computed for 98 % of it; where
fewer than three are, the table has no time. Dense and sparse runs alternate, so that a busy hour does not fall on one
of them alone.
FLASH on CIFAR-10 is cut to 3 rounds of 4 clients, and its first stage to 2 clients and 2 epochs, for time's sake.
Hardware and versions stand in the results, benchmarks/results/kernels.json. Stopped in the middle, it goes on.

    python benchmarks/step.py            (hours; MNIST and CIFAR-10 need FEDSIEVE_DATA)
    python benchmarks/step.py RECIPE     (only this one)
    python benchmarks/step.py --table    (print the table of committed results)
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rows import markdown, read_results, write_results

from fedsieve.cli.bench.measurement import machine
from fedsieve.runs.record import read_rows
from fedsieve.runs.units import format_ratio

RESULTS = Path(__file__).parent / "results" / "kernels.json"
RUNS = Path("runs/kernels")
SEEDS = (0, 1, 2)
KERNELS = ("dense", "sparse")
BUSY, LEAST = 0.98, 3
"""The share of a round that its process must have computed, and the rounds that make a median."""


@dataclass(frozen=True)
class Plan:
    """How far a recipe is run, and what is changed in it."""

    rounds: int
    settings: tuple[str, ...] = ()
    needs_data: bool = True


PLAN = {
    "zerofl.digits": Plan(80, needs_data=False),
    "flash.mnist": Plan(30),
    "flash.cifar10_niid": Plan(3, ("method.c_d=2", "method.E_d=2", "per_round=4")),
}


def measure(recipe: str) -> dict[str, Any]:
    """Run a recipe with both kernels and every seed, if that is not done; return what it took and reached."""
    rows_of = {(kernels, seed): one(recipe, kernels, seed) for seed in SEEDS for kernels in KERNELS}
    results: dict[str, Any] = {"machine": machine(), "rounds": PLAN[recipe].rounds, "settings": PLAN[recipe].settings}
    for kernels in KERNELS:
        rows = [[row for row in rows_of[kernels, seed] if row["round"]] for seed in SEEDS]
        results[kernels] = timed([row for own in rows for row in own]) | {
            "accuracy": [[row["accuracy"] for row in own if row["accuracy"] is not None][-1] for own in rows],
        }
    return results


def timed(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the median of the undisturbed rounds, None of too few, and how many were kept and dropped."""
    samples = [row["seconds"] for row in rows if row["cpu_seconds"] >= BUSY * row["seconds"]]
    seconds = median(samples) if len(samples) >= LEAST else None
    return {"seconds": seconds, "rounds_kept": len(samples), "rounds_dropped": len(rows) - len(samples)}


def one(recipe: str, kernels: str, seed: int) -> list[dict[str, Any]]:
    """Run a recipe with a seed, or go on with it, and return its rows."""
    plan, out = PLAN[recipe], RUNS / f"{recipe}-{kernels}-{seed}"
    rows = read_rows(out)
    if not rows or rows[-1]["round"] < plan.rounds:
        command = [str(Path(sys.executable).with_name("fedsieve")), "run", recipe, "--kernels", kernels]
        command += ["--until", str(plan.rounds), "--out", str(out), "--resume"]
        for setting in (f"seed={seed}", *plan.settings):
            command += ["-s", setting]
        subprocess.run(command, check=True)
    return read_rows(out)


def committed() -> dict[str, Any]:
    """Return the results that are there, by recipe."""
    return read_results(RESULTS)


def table(results: dict[str, Any]) -> str:
    """Return the results as a table; dashes where a recipe has not been run, or no time could be had."""
    header = (
        "| recipe | rounds | dense, s a round | sparse, s a round | than dense | rounds timed (dropped) "
        "| accuracy dense, % (seeds) | sparse, % |"
    )
    rows = []
    for recipe, plan in PLAN.items():
        cells = [f"`{' '.join([recipe, *plan.settings])}`", str(plan.rounds)]
        if got := results.get(recipe):
            cells += [*times(got), accuracies(got["dense"]), accuracies(got["sparse"])]
        rows.append(cells + ["-"] * (8 - len(cells)))
    return markdown(header, rows)


def times(got: dict[str, Any]) -> list[str]:
    """Return the cells of a round's time: dense, sparse, their ratio, and the rounds that they rest on."""
    dense, sparse = (got[kernels]["seconds"] for kernels in KERNELS)
    cells = ["-" if seconds is None else f"{seconds:.2f}" for seconds in (dense, sparse)]
    timed_rounds, dropped = (sum(got[kernels][f"rounds_{what}"] for kernels in KERNELS) for what in ("kept", "dropped"))
    return [*cells, format_ratio(dense or 0, sparse or 0, ("faster", "slower")) or "-", f"{timed_rounds} ({dropped})"]


def accuracies(got: dict[str, Any]) -> str:
    """Return the mean accuracy of the seeds, and each."""
    seeds = [100 * value for value in got["accuracy"]]
    return f"{sum(seeds) / len(seeds):.1f} ({', '.join(f'{value:.1f}' for value in seeds)})"


def main() -> None:
    """Run what is not there yet, and print the table."""
    if "--table" not in sys.argv:
        for recipe in [name for name in PLAN if name in sys.argv] or PLAN:
            if PLAN[recipe].needs_data and not os.environ.get("FEDSIEVE_DATA"):
                print(f"{recipe} is left out: FEDSIEVE_DATA is not set", file=sys.stderr)
                continue
            write_results(RESULTS, committed() | {recipe: measure(recipe)})
    print(table(committed()))


if __name__ == "__main__":
    main()
