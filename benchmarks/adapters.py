"""What fine-tuning gains on a frozen sparse base: LoRA adapters of a small GPT, on what Shakespeare's roles say.

Half of the roles train the base, 100 rounds, dense or by FLASH at density .1; the other half trains adapters of all its
linear layers, rank 8, for 50 (the recipe lora.gpt). Claim: adapters bring the sparse base nearer to the adapted dense
one, and their rounds, whose products read a tenth of the weights, take less time. Perplexity is on the test characters
of the second half. n: one base of each, 3 seeds of adapters. Seconds are processor time of one thread, of all that a
round does, its test included.

    python benchmarks/adapters.py            (half an hour on one core; needs FEDSIEVE_DATA with Shakespeare)
    python benchmarks/adapters.py --table    (print the table of committed results)

Stopped in the middle, it goes on where it was.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from perplexity import recorded
from rows import markdown, read_results, write_results

from fedsieve import Run
from fedsieve.cli.bench.measurement import machine
from fedsieve.recipes import load_recipe

RESULTS = Path(__file__).parent / "results" / "adapters.json"
RUNS = Path("runs/adapters")
SEEDS = (0, 1, 2)
HALF = ("task.part=1/2", "task.clients=114", "evaluate_every=100")
BASES = {
    "dense": ("fedavg.gpt", ("lr=0.0015", "lr_end=0.00015", *HALF)),
    "FLASH, density .1": ("flash.gpt", ("method.density=0.1", "lr=0.003", "lr_end=0.0003", *HALF)),
}
"""By its label, the recipe that trains a base, and what is changed in it; rates are benchmarks/perplexity.py's."""


def main() -> None:
    """Run what is not there yet: the bases, then each seed of both."""
    results = read_results(RESULTS)
    for label, (recipe, settings) in BASES.items():
        if label not in results:
            results[label] = numbers(recipe, load_recipe(recipe, settings), RUNS / recipe) | {"seeds": {}}
            write_results(RESULTS, {"machine": machine()} | results)
    for seed in SEEDS:
        for label, (recipe, _) in BASES.items():
            if str(seed) not in results[label]["seeds"]:
                run = replace(load_recipe("lora.gpt", [f"task.init={RUNS / recipe}"]), seed=seed)
                results[label]["seeds"][str(seed)] = numbers("lora.gpt", run, RUNS / f"lora-{recipe}-{seed}")
                write_results(RESULTS, {"machine": machine()} | results)
    print(table())


def numbers(recipe: str, run: Run, out: Path) -> dict[str, Any]:
    """Run, or what is left of it, and return what the table shows of it."""
    summary, rows, _ = recorded(recipe, run, out)
    return {
        "density": summary["density"],
        "upload_bytes": summary["upload_bytes"],
        "seconds": mean(row["cpu_seconds"] for row in rows if row["round"]),
        "curve": {str(row["round"]): row["perplexity"] for row in rows if row.get("perplexity")},
    }


def table() -> str:
    """Return the results as a table."""
    header = (
        "| base | its perplexity, of its half | of the other: adapters after 10 rounds | after 50 (each seed) "
        "| upload, kB a round (the base's) | seconds a round (the base's) |"
    )
    results, rows = read_results(RESULTS), []
    for label in (label for label in BASES if results.get(label, {}).get("seeds")):
        own = results[label]
        runs = [*own["seeds"].values()]
        early, last = (mean(run["curve"][t] for run in runs) for t in ("10", "50"))
        each = ", ".join(f"{run['curve']['50']:.2f}" for run in runs)
        cells = [
            label,
            f"{own['curve']['100']:.2f}",
            f"{early:.2f}",
            f"{last:.2f} ({each})",
            f"{mean(run['upload_bytes'] for run in runs) / 1e3:.0f} ({own['upload_bytes'] / 1e3:.0f})",
            f"{mean(run['seconds'] for run in runs):.2f} ({own['seconds']:.2f})",
        ]
        rows.append(cells)
    return markdown(header, rows)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(table()) if "--table" in sys.argv else main()
