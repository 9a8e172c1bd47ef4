"""What sparsity costs a language model: FLASH at density .2 beside dense FedAvg, on what Shakespeare's roles say.

Claim to be tested: LEAF's LSTM and a small GPT, 30 rounds (227 roles, 10 a round), reach within 3 % of dense's
perplexity with a fifth of the weights that the policy names. Perplexity is the deployed model's after the last round,
on all test characters (the last fifth of what each role says). n: 3 seeds. Learning rates are chosen on validation
(``choose``: a tenth of every role's training windows, seed 10, all 30 rounds), by each method for itself.

    python benchmarks/perplexity.py choose     (40 minutes on one core; needs FEDSIEVE_DATA with Shakespeare)
    python benchmarks/perplexity.py measure    (an hour on one core)
    python benchmarks/perplexity.py --table    (print the table of committed results)

Stopped in the middle, each goes on where it was; two of a stage, such as ``measure shakespeare`` and ``measure
shakespeare_gpt``, may run beside each other.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
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
MODELS = {"shakespeare": "LSTM", "shakespeare_gpt": "GPT"}
RATES = {
    "shakespeare": {"fedavg": (0.8, 1.6), "flash": (0.8, 1.6)},
    "shakespeare_gpt": {"fedavg": (0.0015,), "flash": (0.0015, 0.003)},
}
"""The learning rates that are tried; they fall as the recipe's do. The dense GPT's is settings.py's choice."""
TOLERANCE = 1.03


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
    summary, last = read_summary(out), read_rows(out)[-1]
    assert summary
    return {
        "perplexity": last["perplexity"],
        "validation": last.get("perplexity_validation"),
        "density": summary["density"],
        "upload_bytes": summary["upload_bytes"],
        "work": summary["multiply_adds"] / summary["multiply_adds_dense"],
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
                if str(seed) not in read().get(data, {}).get(method, {}).get("seeds", {}):
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


def ratios(data: str) -> list[float]:
    """Return FLASH's perplexity over dense's, of each seed."""
    of = read()[data]
    return [of["flash"]["seeds"][str(s)]["perplexity"] / of["fedavg"]["seeds"][str(s)]["perplexity"] for s in SEEDS]


def table() -> str:
    """Return the results as a table."""
    lines = [
        "| model | method | learning rate (others tried) | perplexity (each seed) | than dense | upload, kB | work |",
        "|---|---|---|---|---|---|---|",
    ]
    for data, model in MODELS.items():
        for method, label in LABELS.items():
            got = read()[data][method]
            runs = [got["seeds"][str(seed)] for seed in SEEDS]
            lr, values = f"{runs[0]['lr']:g}", [run["perplexity"] for run in runs]
            tried = got.get("tried", {})
            others = ", ".join(f"{name}: {v:.2f}" for name, v in tried.items() if name != lr)
            rates = f"{lr}: {tried[lr]:.2f} ({others})" if tried else lr
            seeds = ", ".join(f"{v:.2f}" for v in values)
            than = f"{100 * (mean(ratios(data)) - 1):+.1f} %" if method == "flash" else ""
            size, work = mean(run["upload_bytes"] for run in runs), mean(run["work"] for run in runs)
            shown = f"{mean(values):.2f} ± {stdev(values):.2f} ({seeds})"
            lines.append(f"| {model} | {label} | {rates} | {shown} | {than} | {size / 1e3:.0f} | {100 * work:.0f} % |")
    return "\n".join(lines)


if __name__ == "__main__":
    torch.set_num_threads(1)
    stage, *chosen = sys.argv[1:]
    if stage == "--table":
        print(table())
    else:
        {"choose": choose, "measure": measure}[stage](chosen or [*MODELS])
