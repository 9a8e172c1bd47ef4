"""What sparsity costs a language model: FLASH, Top-k and ZeroFL beside dense FedAvg, on what Shakespeare's roles say.

Claims to be tested: a small GPT, 100 rounds (227 roles, 10 a round), reaches within 3 % of dense's perplexity at a
fifth and at a tenth of its weights; LEAF's LSTM, 30 rounds, at a fifth. Perplexity is the deployed model's after the
last round, on all test characters (the last fifth of what each role says). n: 3 seeds. Learning rates are chosen on
validation (``choose``: a tenth of every role's training windows, seed 10, 30 rounds), by each method for itself, at the
lower sparsity; the dense GPT's is the choice of settings.py. Seconds are processor time of one thread, of all that a
round does.

    python benchmarks/perplexity.py choose     (an hour on one core; needs FEDSIEVE_DATA with Shakespeare)
    python benchmarks/perplexity.py measure    (four hours on one core)
    python benchmarks/perplexity.py --table    (print the table of committed results)
    python benchmarks/perplexity.py --picture  (draw docs/images/shakespeare.png of them: the GPT)

Stopped in the middle, each goes on where it was; two of a stage, such as ``measure shakespeare`` and ``measure
gpt``, may run beside each other.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from matplotlib.figure import Figure
from rows import markdown, read_results, write_results

from fedsieve import Run, local
from fedsieve.cli.bench.measurement import machine
from fedsieve.recipes import load_recipe
from fedsieve.runs.execution import Execution
from fedsieve.runs.record import read_rows, read_summary
from fedsieve.runs.recorder import record_run

RESULTS = Path(__file__).parent / "results" / "perplexity.json"
PICTURE = Path(__file__).parent.parent / "docs/images/shakespeare.png"
COLOURS = {"fedavg": "#000000", "flash": "#0072b2", "topk": "#d55e00", "zerofl": "#009e73"}
SEEDS, HELD_OUT, CHOOSING_SEED, CHOOSING_ROUNDS = (0, 1, 2), 0.1, 10, 30


@dataclass(frozen=True)
class Method:
    """A row of the table: a recipe's method with settings, and the learning rates that are tried (others' too)."""

    method: str
    label: str
    settings: tuple[str, ...] = ()
    rates: tuple[float, ...] = ()

    @property
    def sparser(self) -> bool:
        """Whether it is the sparser of a recipe's two."""
        return self.settings[:1] in (("method.density=0.1",), ("method.sparsity=0.9",))

    @property
    def name(self) -> str:
        """Its name in the results."""
        return "-".join((self.method, *(each.split("=")[1] for each in self.settings)))


@dataclass(frozen=True)
class Experiment:
    """A model, the rounds that it is trained, the earlier rounds that the table has, and the methods."""

    label: str
    rounds: int
    earlier: tuple[int, int]
    methods: tuple[Method, ...]


EXPERIMENTS = {
    "shakespeare": Experiment(
        "LSTM",
        30,
        (10, 20),
        (
            Method("fedavg", "FedAvg, dense", (), (0.8, 1.6)),
            Method("flash", "FLASH, density .2", ("method.density=0.2",), (0.8, 1.6)),
        ),
    ),
    "gpt": Experiment(
        "GPT",
        100,
        (30, 60),
        (
            Method("fedavg", "FedAvg, dense", (), (0.0015,)),
            Method("flash", "FLASH, density .2", ("method.density=0.2",), (0.0015, 0.003)),
            Method("flash", "FLASH, density .1", ("method.density=0.1",)),
            Method("topk", "Top-k, 80 %", ("method.sparsity=0.8",), (0.0015, 0.003)),
            Method("topk", "Top-k, 90 %", ("method.sparsity=0.9",)),
            Method("zerofl", "ZeroFL, 80 %", ("method.sparsity=0.8",), (0.0015, 0.003)),
            Method("zerofl", "ZeroFL, 90 %", ("method.sparsity=0.9",)),
        ),
    ),
}


def one(data: str, method: Method, rounds: int, lr: float, seed: int, validation: float = 0.0) -> dict[str, Any]:
    """Run a recipe, or what is left of it, in a directory of its own, and return its numbers."""
    recipe = f"{method.method}.{data}"
    own = load_recipe(recipe)
    settings = [
        f"rounds={rounds}",
        f"lr={lr:g}",
        f"lr_end={lr * own.lr_end / own.lr:g}",
        f"task.validation={validation}",
    ]
    run = replace(load_recipe(recipe, [*settings, *method.settings]), seed=seed)
    out = Path("runs/perplexity") / f"{data}-{method.name}-{rounds}-{lr:g}-{seed}"
    summary, rows, seconds = recorded(recipe, run, out)
    last = rows[-1]
    return {
        "lr": lr,
        "perplexity": last["perplexity"],
        "validation": last.get("perplexity_validation"),
        "density": summary["density"],
        "upload_bytes": summary["upload_bytes"],
        "seconds": seconds,
        "curve": {str(row["round"]): row["perplexity"] for row in rows if row.get("perplexity") and row["round"] > 0},
    }


def recorded(recipe: str, run: Run, out: Path) -> tuple[dict[str, Any], list[dict[str, Any]], float | None]:
    """Run, or what is left of it, in a directory; return its summary, its rows, and the processor seconds of a round.

    None where most rounds were there.
    """
    execution, seconds, start = Execution(resume=True), list[float](), time.process_time()
    for round in record_run(out, execution.open(run), local(), recipe, execution):
        seconds.append(-(start - (start := time.process_time())))
        print(f"{out.name} round {round.t}", file=sys.stderr, flush=True)
    summary = read_summary(out)
    assert summary
    return summary, read_rows(out), mean(seconds[1:]) if len(seconds) > run.rounds // 2 else None


def choose(names: list[str]) -> None:
    """Try what is not tried yet of the learning rates, by the perplexity of held-out windows."""
    for data in names:
        for method in EXPERIMENTS[data].methods:
            for lr in method.rates if len(method.rates) > 1 else ():
                if f"{lr:g}" not in tried(data, method):
                    score = one(data, method, CHOOSING_ROUNDS, lr, CHOOSING_SEED, HELD_OUT)["validation"]
                    keep(data, method.method, "tried", {f"{lr:g}": round(score, 3)})


def measure(names: list[str]) -> None:
    """Run what is not there yet, each method at the learning rate that validation chose for it."""
    for data in names:
        experiment = EXPERIMENTS[data]
        for seed in SEEDS:
            for method in experiment.methods:
                if str(seed) not in seeds(data, method):
                    rates = tried(data, method)
                    lr = float(min(rates, key=rates.__getitem__)) if rates else method.rates[0]
                    keep(data, method.name, "seeds", {str(seed): one(data, method, experiment.rounds, lr, seed)})


def tried(data: str, method: Method) -> dict[str, float]:
    """Return each learning rate that was tried, with its perplexity on held-out windows."""
    rates: dict[str, float] = read_results(RESULTS).get(data, {}).get(method.method, {}).get("tried", {})
    return rates


def seeds(data: str, method: Method) -> dict[str, dict[str, Any]]:
    """Return the numbers of each run."""
    runs: dict[str, dict[str, Any]] = read_results(RESULTS).get(data, {}).get(method.name, {}).get("seeds", {})
    return runs


def keep(data: str, name: str, part: str, more: dict[str, Any]) -> None:
    """Add to the results of a method."""
    results = {"machine": machine()} | read_results(RESULTS)
    results.setdefault(data, {}).setdefault(name, {}).setdefault(part, {}).update(more)
    write_results(RESULTS, results)


def table() -> str:
    """Return the results as a table."""
    header = (
        "| model | method | learning rate (others) | after rounds | perplexity (each seed) | to dense | upload, kB "
        "| seconds a round |"
    )
    rows = []
    for data, experiment in EXPERIMENTS.items():
        dense = seeds(data, experiment.methods[0])
        for method in experiment.methods:
            runs, rates = seeds(data, method), tried(data, method)
            if not runs:
                continue
            lr = f"{next(iter(runs.values()))['lr']:g}"
            others = ", ".join(f"{name}: {v:.2f}" for name, v in rates.items() if name != lr)
            values = [run["perplexity"] for run in runs.values()]
            before = "; ".join(
                f"{t}: {mean(run['curve'][str(t)] for run in runs.values()):.2f}" for t in experiment.earlier
            )
            ratio = mean(values) / mean(dense[seed]["perplexity"] for seed in runs) if {*runs} <= {*dense} else None
            seconds = [run["seconds"] for run in runs.values() if run.get("seconds")]
            cells = [
                experiment.label,
                method.label,
                f"{lr}: {rates[lr]:.2f} ({others})" if rates else lr,
                f"{before}; {experiment.rounds}",
                f"{mean(values):.2f} ({', '.join(f'{v:.2f}' for v in values)})",
                f"{100 * (ratio - 1):+.1f} %" if ratio and ratio != 1 else "",
                f"{mean(run['upload_bytes'] for run in runs.values()) / 1e3:.0f}",
                f"{mean(seconds):.2f}" if seconds else "",
            ]
            rows.append(cells)
    return markdown(header, rows)


def draw() -> None:
    """Draw the GPT's perplexity over the bytes that a client has sent: the mean of the seeds, and each thinly."""
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    axes, experiment = figure.add_subplot(), EXPERIMENTS["gpt"]
    for method in experiment.methods:
        runs = [*seeds("gpt", method).values()]
        curves = [[(int(t), value) for t, value in run["curve"].items()] for run in runs]
        mega = mean(run["upload_bytes"] for run in runs) / 1e6
        style: dict[str, Any] = {"color": COLOURS[method.method], "linestyle": "--" if method.sparser else "-"}
        for curve in curves if len(curves) > 1 else ():
            axes.plot([t * mega for t, _ in curve], [value for _, value in curve], linewidth=0.6, alpha=0.5, **style)
        middle = [(t, mean(dict(curve)[t] for curve in curves)) for t, _ in curves[0]]
        axes.plot([t * mega for t, _ in middle], [value for _, value in middle], label=method.label, **style)
    axes.set(xscale="log", xlabel="MB that a client has sent if it took part in every round", ylabel="perplexity")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize="small")
    figure.savefig(PICTURE, dpi=160)


if __name__ == "__main__":
    torch.set_num_threads(1)
    stage, *chosen = sys.argv[1:]
    if stage == "--table":
        print(table())
    elif stage == "--picture":
        draw()
    else:
        {"choose": choose, "measure": measure}[stage](chosen or [*EXPERIMENTS])
