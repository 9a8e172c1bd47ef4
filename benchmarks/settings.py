"""What validation chooses of the settings that are this project's own: recipes on digits and diabetes, and the GPT.

Every setting is trained on eight tenths (the GPT: nine) of every client's training examples, with seeds that no
published number has, and judged by the deployed model on the held-out rest; no test example is used. Learning rates are
multiples of the recipe's, ``lr_end`` with them. The GPT on Shakespeare is cut to 8 of its 100 rounds. Another
setting than the recipe's is better beyond noise where it is so with every seed, and in the mean by more than the seeds
of either are apart.

    python benchmarks/settings.py digits          (20 minutes on one core)
    python benchmarks/settings.py others          (20 minutes; needs FEDSIEVE_DATA with Shakespeare)
    python benchmarks/settings.py --table         (print the table of committed results)

Stopped in the middle, it goes on where it was.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from rows import markdown, read_results, write_results

import fedsieve
from fedsieve.engine.rollback import DivergenceError
from fedsieve.recipes import load_recipe

HERE = Path(__file__).parent
RESULTS = HERE / "results"
SEEDS = (10, 11)
DENSE, SPARSE = ("fedavg", "fedadam", "fedprox", "scaffold"), ("swat", "zerofl", "topk", "sparsefedpp")
MASKED = ("nst", "pdst", "flash", "hetero_flash", "feddst")
RECIPES = {
    "digits": [f"{method}.digits" for method in (*DENSE, *SPARSE, *MASKED)],
    "others": [
        *(f"{method}.{data}" for data in ("diabetes", "gpt") for method in ("fedavg", "topk")),
        *("private.digits", "dnr.central_digits", "swat.central_digits"),
    ],
}
HELD_OUT = {"gpt": 0.1}
ROUNDS = {"gpt": 8}
FACTORS = {"digits": (0.25, 0.5, 1.0, 2.0), "others": (0.5, 1.0, 2.0)}
OF_METHODS: dict[str, list[str]] = {
    "fedadam.digits": ["method.server.eta=0.003", "method.server.eta=0.03"],
    "fedprox.digits": ["method.mu=0.001", "method.mu=0.1"],
    "feddst.digits": ["method.alpha=0.25"],
}
"""What else is this project's own."""
LOWER = ("mse", "perplexity")
"""The metrics that are better where they are lower."""


def settings_of(recipe: str, group: str) -> Iterator[tuple[str, list[str]]]:
    """Yield the settings that a recipe is tried with, each after what the table calls it."""
    own = load_recipe(recipe)
    for factor in FACTORS[group]:
        lr = f"lr={factor * own.lr:g}"
        yield lr, [lr, f"lr_end={factor * own.lr_end:g}"]
    for setting in OF_METHODS.get(recipe, []):
        yield setting.removeprefix("method."), [setting]


def measure(group: str) -> None:
    """Train what is not there yet of a group, and write each result when it comes."""
    path = RESULTS / f"settings_{group}.json"
    results = read_results(path)
    for recipe in RECIPES[group]:
        entry = results.setdefault(recipe, {"own": f"lr={load_recipe(recipe).lr:g}", "metric": "", "tried": {}})
        for label, settings in settings_of(recipe, group):
            if label not in entry["tried"]:
                entry["tried"][label] = [score(recipe, settings, seed, entry) for seed in SEEDS]
                print(recipe, label, entry["tried"][label], file=sys.stderr, flush=True)
                write_results(path, results)


def score(recipe: str, settings: list[str], seed: int, entry: dict[str, Any]) -> float | None:
    """Return the task's first metric of the held-out examples after the last round; None if training diverges."""
    data = recipe.partition(".")[2]
    rounds = ROUNDS.get(data, load_recipe(recipe).rounds)
    held_out = f"task.validation={HELD_OUT.get(data, 0.2)}"
    how = [f"seed={seed}", held_out, "task.test_limit=10", f"evaluate_every={rounds}"]
    try:
        row = fedsieve.run(load_recipe(recipe, [*settings, *how]), until=rounds).rows[-1]
    except DivergenceError:
        return None
    entry["metric"] = next(name for name in (*LOWER, "accuracy") if row.get(f"{name}_validation") is not None)
    value: float = row[f"{entry['metric']}_validation"]
    return round(value, 4)


def choice(entry: dict[str, Any]) -> tuple[str, bool]:
    """Return what validation chooses of a recipe's settings, and whether it is better than the recipe beyond noise."""
    sign = -1 if entry["metric"] in LOWER else 1
    tried = {label: [sign * v for v in values] for label, values in entry["tried"].items() if None not in values}
    best = max(tried, key=lambda label: mean(tried[label]))
    a, b = tried[best], tried[entry["own"]]
    spread = max(max(a) - min(a), max(b) - min(b))
    return best, min(x - y for x, y in zip(a, b, strict=True)) > 0 and mean(a) - mean(b) > spread


def table() -> str:
    """Return what validation chooses beside what the recipes have."""
    header = "| recipe | of held-out examples | the recipe's setting | validation's choice | by that | beyond noise |"
    rows = []
    for group in RECIPES:
        for recipe, entry in read_results(RESULTS / f"settings_{group}.json").items():
            best, beyond = choice(entry)
            own, other = (_shown(entry["tried"][label], entry["metric"]) for label in (entry["own"], best))
            cells = (f"`{recipe}`", entry["metric"], f"{entry['own']}: {own}", best, other, "yes" if beyond else "no")
            rows.append(cells)
    return markdown(header, rows)


def _shown(values: list[float], metric: str) -> str:
    return ", ".join(f"{100 * v:.1f} %" if metric == "accuracy" else f"{v:.3g}" for v in values)


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "--table":
        print(table())
    else:
        measure(sys.argv[1])
