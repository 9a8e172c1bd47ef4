"""What sparsity saves of a whole round: broadcast, training, messages, mean and test, by the kernels and by PyTorch.

    python benchmarks/whole_round.py [--data FOLDER] [--json FILE]

The same run goes both ways in turns, a round each, in one process and on one thread (``local``); the least processor
time of three rounds counts, as other processes may be at work. Two clients a round, of the recipes' ten, where a dense
round would take minutes. A round is tested on all test images.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from fedsieve import local, rounds
from fedsieve.client.process import num_threads
from fedsieve.engine.round import Round
from fedsieve.engine.setup import open_run
from fedsieve.recipes import load_recipe
from fedsieve.runs.provenance import cpu

RESULTS = Path(__file__).parent / "results" / "whole_round.json"
ROUNDS = 3
CASES = {
    "flash.mnist": ("method.density=.05", "per_round=10", "method.c_d=2", "method.E_d=2"),
    "fedavg.mnist": ("per_round=10",),
    "zerofl.femnist": ("method.sparsity=.95", "per_round=10"),
    "flash.femnist": ("method.density=.05", "per_round=10", "method.c_d=2", "method.E_d=2"),
    "pdst.cifar10_iid": ("method.density=.05", "per_round=2"),
    "zerofl.cifar10_iid": ("method.sparsity=.95", "per_round=2"),
}
"""Recipes, and what is changed in them: a short first stage of FLASH's, whose masks are as dense."""


@dataclass(frozen=True)
class Row:
    """Processor seconds of a round, and of these the test; milliseconds of a step, with what a client's steps need."""

    recipe: str
    clients: int
    dense: float
    dense_test: float
    kernels: float
    kernels_test: float
    dense_step: float
    kernels_step: float


def measured(recipe: str, settings: tuple[str, ...], root: Path) -> Row:
    """Return what a round takes, either way."""
    run = replace(load_recipe(recipe, settings), evaluate_every=1)
    federation = open_run(run, root)
    streams = {way: timed(rounds(federation, local(kernels=way), kernels=way)) for way in ("dense", "auto")}
    best: dict[str, tuple[float, float, float]] = {}
    timed_rounds = 0
    while timed_rounds < ROUNDS:
        pairs = {way: next(stream) for way, stream in streams.items()}
        if pairs["auto"][1].t < 1:
            continue
        timed_rounds += 1
        for way, (seconds, round_) in pairs.items():
            now = seconds, seconds - round_.cpu_seconds, round_.ms_per_step or 0.0
            best[way] = tuple(map(min, now, best.get(way, now)))  # type: ignore[assignment]
    (dense, dense_test, dense_step), (ours, our_test, our_step) = best["dense"], best["auto"]
    return Row(recipe, run.per_round, dense, dense_test, ours, our_test, dense_step, our_step)


def timed(stream: Iterator[Round]) -> Iterator[tuple[float, Round]]:
    """Yield every round with the processor seconds that it took."""
    while True:
        began = time.process_time()
        round_ = next(stream)
        yield time.process_time() - began, round_


def table() -> str:
    """Return the committed rows as a table."""
    rows = [Row(**row) for row in json.loads(RESULTS.read_text())["rows"]]
    lines = [
        "| a round of | clients | PyTorch, s (the test) | kernels, s (the test) | round | training alone |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        ours, theirs = row.kernels - row.kernels_test, row.dense - row.dense_test
        lines.append(
            f"| `{row.recipe}` | {row.clients} | {row.dense:.2f} ({row.dense_test:.2f}) | "
            f"{row.kernels:.2f} ({row.kernels_test:.2f}) | {row.dense / row.kernels:.1f}x | {theirs / ours:.1f}x |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", default=[*CASES])
    parser.add_argument("--data", default=os.environ.get("FEDSIEVE_DATA", ""))
    arguments = parser.parse_args()
    there = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []
    by_recipe = {row["recipe"]: row for row in there}
    with num_threads(1):
        for recipe in arguments.recipes:
            by_recipe[recipe] = asdict(measured(recipe, CASES[recipe], Path(arguments.data)))
            rows = [by_recipe[name] for name in CASES if name in by_recipe]
            RESULTS.write_text(json.dumps({"cpu": cpu(), "rows": rows}, indent=1) + "\n")
    print(table())


if __name__ == "__main__":
    main()
