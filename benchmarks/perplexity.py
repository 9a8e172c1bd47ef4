"""What sparsity costs a language model: FLASH at density .2 beside dense FedAvg, on what Shakespeare's roles say.

Claim to be tested: LEAF's LSTM and a small GPT, 30 rounds (227 roles, 10 a round), reach within 3 % of dense's
perplexity with a fifth of the weights that the policy names. Perplexity is the deployed model's after the last round,
on all test characters (the last fifth of what each role says). n: 3 seeds. Learning rates are chosen on validation
(``choose``: a tenth of every role's training windows, seed 10, all 30 rounds), by each method for itself; the dense
GPT's is the choice of settings.py.

    python benchmarks/perplexity.py choose     (40 minutes on one core; needs FEDSIEVE_DATA with Shakespeare)
    python benchmarks/perplexity.py measure    (an hour on one core)
    python benchmarks/perplexity.py --table    (print the table of committed results)

Stopped in the middle, each goes on where it was; two of a stage, such as ``measure shakespeare`` and ``measure
gpt``, may run beside each other.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from fedsieve import local
from fedsieve.cli.bench.measurement import machine
from fedsieve.recipes import load_recipe
from fedsieve.runs.execution import Execution
from fedsieve.runs.record import read_rows, read_summary
from fedsieve.runs.recorder import record_run

RESULTS = Path(__file__).parent / "results" / "perplexity.json"
ROUNDS, SEEDS, HELD_OUT, CHOOSING_SEED = 30, (0, 1, 2), 0.1, 10
LABELS = {"fedavg": "FedAvg, dense", "flash": "FLASH, density .2"}
MODELS = {"shakespeare": "LSTM", "gpt": "GPT"}
RATES = {
    "shakespeare": {"fedavg": (0.8, 1.6), "flash": (0.8, 1.6)},
    "gpt": {"fedavg": (0.0015,), "flash": (0.0015, 0.003)},
}
"""The learning rates that are tried; they fall as the recipe's do. The dense GPT's is settings.py's choice."""


def one(data: str, method: str, lr: float, seed: int, validation: float = 0.0) -> dict[str, Any]:
    """Run a recipe, or what is left of it, in a directory of its own, and return its numbers."""
    own = load_recipe(f"{method}.{data}")
    lr_end = lr * own.lr_end / own.lr
    settings = [f"rounds={ROUNDS}", f"lr={lr:g}", f"lr_end={lr_end:g}", f"task.validation={validation}"]
    recipe, run = f"{method}.{data}", replace(load_recipe(f"{method}.{data}", settings), seed=seed)
    out = Path("runs/perplexity") / f"{method}.{data}-{lr:g}-{seed}"
    execution = Execution(resume=True)
    for round in record_run(out, execution.open(run), local(), recipe, execution):
        print(f"{out.name} round {round.t}", file=sys.stderr, flush=True)
    summary, rows = read_summary(out), read_rows(out)
    last = rows[-1]
    assert summary
    return {
        "perplexity": last["perplexity"],
        "validation": last.get("perplexity_validation"),
        "density": summary["density"],
        "upload_bytes": summary["upload_bytes"],
        "curve": {str(row["round"]): row["perplexity"] for row in rows if row.get("perplexity") and row["round"] > 0},
    }


def choose(names: list[str]) -> None:
    """Try what is not tried yet of the learning rates, by the perplexity of held-out windows."""
    for data in names:
        for method in reversed(LABELS):
            for lr in RATES[data][method] if len(RATES[data][method]) > 1 else ():
                if f"{lr:g}" not in read().get(data, {}).get(method, {}).get("tried", {}):
                    score = one(data, method, lr, CHOOSING_SEED, HELD_OUT)["validation"]
                    keep(data, method, "tried", {f"{lr:g}": round(score, 3)})


def measure(names: list[str]) -> None:
    """Run what is not there yet, each method at the learning rate that validation chose for it."""
    for data in names:
        for seed in SEEDS:
            for method in LABELS:
                tried = read().get(data, {}).get(method, {}).get("tried", {})
                lr = min(tried, key=tried.__getitem__) if tried else RATES[data][method][0]
                there = read().get(data, {}).get(method, {}).get("seeds", {})
                if "curve" not in there.get(str(seed), {}):
                    keep(data, method, "seeds", {str(seed): one(data, method, float(lr), seed) | {"lr": float(lr)}})


def read() -> dict[str, Any]:
    """Return the results so far."""
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    return results


def keep(data: str, method: str, part: str, more: dict[str, Any]) -> None:
    """Add to the results of a recipe."""
    results = {"machine": machine()} | read()
    results.setdefault(data, {}).setdefault(method, {}).setdefault(part, {}).update(more)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


def seeds_of(data: str) -> list[str]:
    """Return the seeds that both methods have run with."""
    of = read()[data]
    return [str(seed) for seed in SEEDS if all(str(seed) in of[method].get("seeds", {}) for method in LABELS)]


def table() -> str:
    """Return the results as a table, of the seeds that both methods have run with."""
    lines = [
        "| model | method | learning rate (others) | after 10, 20 rounds | 30 (each seed) | to dense | upload, kB |",
        "|---|---|---|---|---|---|---|",
    ]
    for data, model in MODELS.items():
        dense = mean(read()[data]["fedavg"]["seeds"][seed]["perplexity"] for seed in seeds_of(data))
        for method, label in LABELS.items():
            got = read()[data][method]
            runs = [got["seeds"][seed] for seed in seeds_of(data)]
            lr, tried = f"{runs[0]['lr']:g}", got.get("tried", {})
            others = ", ".join(f"{name}: {v:.2f}" for name, v in tried.items() if name != lr)
            rates = f"{lr}: {tried[lr]:.2f} ({others})" if tried else lr
            before = ", ".join(f"{mean(run['curve'][t] for run in runs):.2f}" for t in ("10", "20"))
            values = [run["perplexity"] for run in runs]
            after = f"{mean(values):.2f} ({', '.join(f'{v:.2f}' for v in values)})"
            than = f"{100 * (mean(values) / dense - 1):+.1f} %" if method == "flash" else ""
            size = mean(run["upload_bytes"] for run in runs)
            lines.append(f"| {' | '.join([model, label, rates, before, after, than, f'{size / 1e3:.0f}'])} |")
    return "\n".join(lines)


if __name__ == "__main__":
    torch.set_num_threads(1)
    stage, *chosen = sys.argv[1:]
    if stage == "--table":
        print(table())
    else:
        {"choose": choose, "measure": measure}[stage](chosen or [*MODELS])
