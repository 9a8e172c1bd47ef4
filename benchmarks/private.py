"""What differential privacy costs on a frozen mask, and without one: FLASH and dense FedAvg, with and without noise.

Claim: with noise FLASH at density .1 reaches 75 % or more, in a tenth of dense FedAvg's bytes; dense FedAvg bears the
same noise better, although it falls on ten times the values. Accuracy is that of the deployed model after the last
round, on the whole test set. n: 3 seeds. A hundred clients cannot hide one: epsilon is large here, and is told for
larger populations too, from which as many are drawn each round; accuracy does not depend on how many the others are.
Hardware and versions stand in the results, benchmarks/results/private.json.

    python benchmarks/private.py          (5 minutes; stopped in the middle, it goes on where it was)
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from private_table import POPULATIONS, RESULTS, table

from fedsieve import Run, local, open_run
from fedsieve.cli.bench.measurement import machine
from fedsieve.methods import FLASH, FedAvg, Private
from fedsieve.methods.private import Release, epsilon
from fedsieve.recipes import load_recipe
from fedsieve.runs.execution import Execution
from fedsieve.runs.recorder import record_run


def runs() -> dict[str, Run]:
    """Return the recipe, and it without noise, and without sparsity."""
    recipe = load_recipe("private.digits")
    methods = {
        "private_flash": recipe.method,
        "private_fedavg": replace(recipe.method, inner=FedAvg()),
        "flash": FLASH(c_d=recipe.method.inner.c_d),
        "fedavg": FedAvg(),
    }
    return {name: replace(recipe, method=method, evaluate_every=recipe.rounds) for name, method in methods.items()}


def one(name: str, run: Run) -> dict[str, Any]:
    """Run it, or read what it left, and return its numbers."""
    out = Path("runs/private") / f"{name}-{run.seed}"
    for round in record_run(out, open_run(run), local(kernels="dense"), name, Execution(kernels="dense", resume=True)):
        print(f"{name} seed {run.seed} round {round.t}: {round.accuracy}", file=sys.stderr)
    summary = json.loads((out / "summary.json").read_text())
    return {"accuracy": summary["accuracy"], "upload_bytes": summary["upload_bytes"]}


def spent(method: Any, run: Run) -> dict[str, float]:
    """Return epsilon after the last round, by population."""
    if not isinstance(method, Private):
        return {}
    releases = *((k, 1) for k in method.warm_ups), (run.per_round, run.rounds)
    return {
        str(n): epsilon(tuple(Release(n, k, method.noise, t) for k, t in releases), method.delta) for n in POPULATIONS
    }


def main() -> None:
    """Measure, store and print."""
    results: dict[str, Any] = {"machine": machine(), "methods": {}}
    every = {(name, seed): one(name, replace(run, seed=seed)) for seed in range(3) for name, run in runs().items()}
    for name, run in runs().items():
        got = [every[name, seed] for seed in range(3)]
        results["methods"][name] = {key: [numbers[key] for numbers in got] for key in got[0]}
        results["methods"][name]["epsilon"] = spent(run.method, run)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    print(table())


if __name__ == "__main__":
    main()
