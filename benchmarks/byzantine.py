"""What clients that turn their updates round do to a run, and what a bound and robust means do about it.

Claim: with 1 and 3 of 10 clients that send their change turned round and ten times as long, a plain mean is lost;
median, trimmed mean and a bound on the norm lose at most 2 and 5 points of accuracy.
n: one seed of ``fedavg.digits`` on 10 equal clients that hold out a tenth, all in every round, 24 rounds, lr .3.

    python benchmarks/byzantine.py      writes results/byzantine.json; then python benchmarks/readme.py
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedsieve import InputError, Run, rounds
from fedsieve.cli.bench.measurement import machine
from fedsieve.recipes import apply_settings, load_recipe
from fedsieve.types import Tree

ROOT = Path(__file__).parent
sys.path.append(str(ROOT.parent / "tests"))
from oracles.lies import Act, Reply, changed, flipped  # noqa: E402

RESULTS = ROOT / "results" / "byzantine.json"
OPTIONS: dict[str, list[str]] = {
    "mean=plain": [],
    "mean=clipped mean.norm=2": ["mean=clipped", "mean.norm=2"],
    "mean=median": ["mean=median"],
    "mean=trimmed mean.share=0.3": ["mean=trimmed", "mean.share=0.3"],
    "bound=multiple": ["bound=multiple"],
}


def ten(options: list[str]) -> Run:
    """Return ten clients of the digits, all in every round."""
    base = load_recipe("fedavg.digits")
    shape = {
        "task": replace(base.task, clients=10, partition="iid", validation=0.1),
        "per_round": 10,
        "rounds": 24,
        "lr": 0.3,
    }
    return apply_settings(replace(base, **shape, evaluate_every=24), options)  # type: ignore[arg-type]


def byzantine(many: int) -> Act:
    """The first so many clients turn their changes round, ten times as long."""

    def act(t: int, client: int, down: Tree, reply: Reply) -> Iterable[tuple[int, Tree]]:
        yield client, flipped(10)(down, reply) if client < many else reply

    return act


def reached(options: list[str], many: int) -> float | None:
    """The accuracy at the end in percent; None where no update was finite any more."""
    try:
        *_, final = rounds(ten(options), changed(byzantine(many)))
    except InputError:
        return None
    assert final.accuracy is not None
    return round(100 * final.accuracy, 1)


def table() -> str:
    """Return the committed results as a table."""
    results = json.loads(RESULTS.read_text())
    lines = ["| setting | all honest | 1 of 10 | 3 of 10 |", "|---|---|---|---|"]
    for option, accuracies in results["accuracy"].items():
        lines.append(f"| `{option}` | {' | '.join('lost' if v is None else f'{v:.1f}' for v in accuracies)} |")
    return "\n".join(lines)


def main() -> None:
    accuracy = {option: [reached(settings, many) for many in (0, 1, 3)] for option, settings in OPTIONS.items()}
    results: dict[str, Any] = {"machine": machine(), "accuracy": accuracy}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    print(table())


if __name__ == "__main__":
    main()
