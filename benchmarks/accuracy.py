"""What sparsity costs in accuracy and saves in bytes: the methods side by side, three seeds each.

Claim: on the digits ZeroFL at 90 % sparsity with r_mask .1 reaches 95 % or more and dense FedAvg 97 % or more; at
density .05 FLASH reaches at least what PDST and NST do. On MNIST, 30 of the papers' 400 rounds (100 clients, 10 a
round, LDA 1.0), SWAT and ZeroFL at 90 % reach 97 % or more with every seed, dense FedAvg with one seed of three.
Accuracy is that of the deployed model after the last round, on the whole test set. n: 3 seeds. Hardware and versions
stand in the results, benchmarks/results/TASK.json. digits_units and mnist_units set masks in units of eight output
channels beside masks of single weights, at densities .1 and .05, MNIST in 80 of 400 rounds.
vit: ViT-tiny on CIFAR-10, from scratch, 50 rounds of 5 of 50 clients, one seed: dense, FLASH and ZeroFL.

    python benchmarks/accuracy.py digits          (8 minutes)
    python benchmarks/accuracy.py digits05        (5 minutes: density .05)
    python benchmarks/accuracy.py mnist           (half an hour; needs FEDSIEVE_DATA)
    python benchmarks/accuracy.py digits_units    (10 minutes)
    python benchmarks/accuracy.py mnist_units     (half an hour; needs FEDSIEVE_DATA)
    python benchmarks/accuracy.py vit             (two hours and a half on one core; needs FEDSIEVE_DATA)
    python benchmarks/accuracy.py --table TASK    (print the table of committed results)

Stopped in the middle, it goes on where it was.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from matplotlib.figure import Figure

from fedsieve import local
from fedsieve.cli.bench.measurement import machine
from fedsieve.recipes import load_recipe
from fedsieve.runs.execution import Execution
from fedsieve.runs.record import read_rows
from fedsieve.runs.recorder import record_run
from fedsieve.runs.units import format_ratio

HERE = Path(__file__).parent
ROUNDS = {"digits": 0, "digits05": 0, "mnist": 30, "digits_units": 0, "mnist_units": 80, "vit": 50}
RECIPES = {
    "fedavg": "FedAvg, dense",
    "fedadam": "FedAdam, dense",
    "swat": "SWAT 90 %",
    "zerofl": "ZeroFL 90 %, r_mask .1",
    "topk": "Top-k 90 %",
}
CORRECTED = {"fedprox": "FedProx, mu .01, dense", "scaffold": "SCAFFOLD, dense"}
SPARSE = {
    "sparsefedpp": "SparseFedPP {s} %",
    "nst": "NST {s} %",
    "pdst": "PDST {s} %",
    "flash": "FLASH {s} %",
    "hetero_flash": "hetero-FLASH 80, 85, 90 %",
    "dnr": "DNR {s} %, in one place",
}
UNITS = {"digits_units": ("flash", "nst", "pdst"), "mnist_units": ("flash", "pdst")}
"""The methods whose masks are also in units of output channels."""
CASES = {
    task: {f"{name} {d} {unit}": (name, d, unit) for name in names for d in (".1", ".05") for unit in (1, 8)}
    for task, names in UNITS.items()
}
"""By what results call them: a method, its density, and the channels that share a pattern."""
LABELS = {
    **{task: dict.fromkeys(cases, "") for task, cases in CASES.items()},
    "mnist": RECIPES,
    "vit": {"flash": "FLASH 90 %", "zerofl": RECIPES["zerofl"], "fedavg": RECIPES["fedavg"]},
    "digits": RECIPES
    | {name: label.format(s=90) for name, label in SPARSE.items()}
    | CORRECTED
    | {"feddst": "FedDST 80 %"},
    "digits05": {name: SPARSE[name].format(s=95) for name in ("sparsefedpp", "nst", "pdst", "flash")},
}
SETTINGS = {
    "digits": {"sparsefedpp": ["method.sparsity=0.9"]},
    "digits05": {name: ["method.density=0.05"] for name in ("nst", "pdst", "flash")},
    **{
        task: {case: [f"method.density={d}", f"method.unit={unit}"] for case, (_, d, unit) in cases.items()}
        for task, cases in CASES.items()
    },
}
SETTINGS["mnist_units"] = {case: [*own, "evaluate_every=10"] for case, own in SETTINGS["mnist_units"].items()}
SETTINGS["vit"] = {name: ["per_round=5", "evaluate_every=10"] for name in LABELS["vit"]}
SEEDS = (0, 1, 2)
ONE_SEED = ("vit",)


def measure(task: str, path: Path) -> dict[str, Any]:
    """Run everything that is not there yet, and write and return the results: after each method where runs are long."""
    results: dict[str, Any] = {"machine": machine(), "task": task, "recipes": {}}
    for name in LABELS[task]:
        runs = [one(task, name, seed) for seed in (SEEDS[:1] if task in ONE_SEED else SEEDS)]
        results["recipes"][name] = {key: [run[key] for run in runs] for key in runs[0]}
        if task in ONE_SEED or name == [*LABELS[task]][-1]:
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(results, indent=1) + "\n")
    return results


def one(task: str, name: str, seed: int) -> dict[str, Any]:
    """Run a method with a seed, or read what it left, and return its numbers."""
    data = task.removesuffix("05").removesuffix("_units")
    recipe = f"{name.split()[0]}.{'central_' * (name == 'dnr')}{data}"
    settings = SETTINGS.get(task, {}).get(name, [])
    run, out = (
        replace(load_recipe(recipe, settings), seed=seed),
        Path("runs/accuracy") / f"{name.replace(' ', '_')}.{task}-{seed}",
    )
    execution = Execution(resume=True, until=ROUNDS[task])
    engine = local(kernels="dense" if task == "digits_units" else "auto")
    for round in record_run(out, execution.open(run), engine, recipe, execution):
        print(f"{recipe} seed {seed} round {round.t}: {round.accuracy}", file=sys.stderr)
    summary = json.loads((out / "summary.json").read_text())
    rows = read_rows(out)
    if task in CASES:
        rows = [row for row in rows if row["round"] <= (ROUNDS[task] or run.rounds) and row["accuracy"] is not None]
        return {"accuracy": rows[-1]["accuracy"], "curve": [row["accuracy"] for row in rows if row["round"]]}
    return {
        "accuracy": summary["accuracy"],
        "density": summary["density"],
        "upload_bytes": summary["upload_bytes"],
        "dense_bytes": sum(row["bytes_dense_up"] for row in rows if row["round"]) / summary["uploads"],
        "paper_bytes": summary["paper_bytes_up"],
        "work": summary["multiply_adds"] / summary["multiply_adds_dense"],
        "curve": [row["accuracy"] for row in rows if row["round"] and row["accuracy"] is not None],
    }


def table(results: dict[str, Any]) -> str:
    """Return the results as the table that the README shows."""
    if results["task"] in CASES:
        return unit_table(results)
    labels = LABELS[results["task"]]
    lines = [
        "| method | accuracy, % (each seed) | first at 90 % | one upload, kB | than dense | paper's formula | work |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, label in labels.items():
        if not (got := results["recipes"].get(name)):
            continue
        accuracy = f"{100 * mean(got['accuracy']):.1f}"
        if len(got["accuracy"]) > 1:
            seeds = ", ".join(f"{100 * v:.1f}" for v in got["accuracy"])
            accuracy += f" ± {100 * stdev(got['accuracy']):.1f} ({seeds})"
        size, paper = mean(got["upload_bytes"]), got["paper_bytes"][0]
        factor = format_ratio(mean(got["dense_bytes"]), size)
        by_formula = f"{paper / 1e3:.0f} kB" if paper else "-"
        reached = ", ".join(first_at(curve, 0.9) for curve in got["curve"])
        cells = [label, accuracy, reached, f"{size / 1e3:.0f}", factor, by_formula, f"{100 * mean(got['work']):.0f} %"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def unit_table(results: dict[str, Any]) -> str:
    """Return masks of single weights and in units of eight channels side by side."""
    lines = [
        "| method | density | single weights, % right (each seed) | units of 8 | units lose, points (each seed) |",
        "|---|---|---|---|---|",
    ]
    for name, d, unit in CASES[results["task"]].values():
        if unit > 1:
            continue
        both = [results["recipes"][f"{name} {d} {u}"]["accuracy"] for u in (1, 8)]
        cells = [f"{100 * mean(own):.1f} ({', '.join(f'{100 * v:.1f}' for v in own)})" for own in both]
        lost = [100 * (a - b) for a, b in zip(*both, strict=True)]
        cells.append(f"{mean(lost):z.1f} ({', '.join(f'{v:z.1f}' for v in lost)})")
        lines.append(f"| {SPARSE[name].partition(' ')[0]} | {d} | {' | '.join(cells)} |")
    return "\n".join(lines)


def card_line(results: dict[str, Any], name: str) -> str:
    """Return a method's results as a line of its card."""
    got, label = results["recipes"][name], LABELS[results["task"]][name]
    accuracy = f"{100 * mean(got['accuracy']):.1f} ± {100 * stdev(got['accuracy']):.1f} %"
    size, work = mean(got["upload_bytes"]), 100 * mean(got["work"])
    upload = f"one upload {size / 1e3:.0f} kB ({format_ratio(mean(got['dense_bytes']), size, than='dense')})"
    dense = f"multiply-adds {work:.0f} % of dense, density as shipped {100 * mean(got['density']):.1f} %"
    return f"{label}, handwritten digits, LDA 1.0, {len(SEEDS)} seeds: accuracy {accuracy}, {upload}, {dense}."


def first_at(curve: list[float], accuracy: float) -> str:
    """Return the first round that reached an accuracy, or a dash."""
    return next((str(t) for t, value in enumerate(curve, start=1) if value >= accuracy), "-")


def picture(results: dict[str, Any], path: Path) -> None:
    """Draw accuracy over the kilobytes that a client has sent, a line for each of the first methods."""
    figure = Figure(figsize=(7.2, 3.4), layout="constrained")
    axes = figure.add_subplot()
    colours = (
        "#4d4d4d",
        "#e69f00",
        "#009e73",
        "#0072b2",
        "#cc79a7",
        "#56b4e9",
        "#d55e00",
        "#999999",
        "#000000",
        "#882255",
        "#117733",
    )
    styles = ("-", ":", "-.", "-", "--", "-", "--", "-.", "-", ":", "--")
    for (name, label), colour, style in zip(LABELS[results["task"]].items(), colours, styles, strict=False):
        got = results["recipes"][name]
        curves = [mean(values) for values in zip(*got["curve"], strict=True)]
        megabytes = [(t + 1) * mean(got["upload_bytes"]) / 1e6 for t in range(len(curves))]
        axes.plot(megabytes, [100 * v for v in curves], style, color=colour, label=label, linewidth=1.8)
    axes.set(xscale="log", xlabel="MB sent by a client that takes part in every round", ylabel="test accuracy, %")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.grid(axis="y", color="#d9dde1", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize="small", loc="upper left")
    figure.savefig(path, dpi=160)


def main() -> None:
    """Measure a task, or print the table of the committed results."""
    task = sys.argv[-1]
    if task not in ROUNDS:
        sys.exit(f"usage: python benchmarks/accuracy.py [--table] {'|'.join(ROUNDS)}")
    results = HERE / "results" / f"{task}.json"
    if "--table" not in sys.argv:
        measurements = measure(task, results)
        if task in ("digits", "mnist"):
            picture(measurements, HERE.parent / "docs/images" / f"{task}.png")
    print(table(json.loads(results.read_text())))


if __name__ == "__main__":
    main()
