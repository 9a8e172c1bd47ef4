"""What rounds take on a GPU, beside plain PyTorch: milliseconds a step and seconds a round, in one process, in turns.

Claim (H100): a step of ten clients, dense, in bf16, is at least twice as fast as ten of the best plain loop's; SWAT's
step takes at most 1.5 times dense's; a ZeroFL .95 cell (700 rounds) 150 s, a FLASH .05 cell (600) 120 s. ResNet-18,
batch 16, ten clients a round, CIFAR-10's shapes (noise, unless --data names a folder). Of a round all counts:
messages are encoded, decoded and checked, the mean taken. "Eager" is one client after another, an operation at a time.
n: rounds of all ways in turns until their time is up, medians, a first round left out; a step is the round's time by
its steps. The most important comes first; every line is printed, and written with --out, as soon as it is there.

    python benchmarks/gpu.py --minutes 3 --out gpu.jsonl
    python benchmarks/gpu.py --device cpu --small       (half a minute: the whole of it, on a tiny model)
    python benchmarks/gpu.py --table FILE               (lay a file's lines out)
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, TextIO

import gpu_peers
import gpu_steps
import topk
import torch
from gpu_steps import PRECISIONS, PlainLoop, Stepper, Work

from fedsieve import Data, Dataset, Run
from fedsieve.cli.bench.measurement import machine
from fedsieve.data import root_from
from fedsieve.engine import Engine, Federation, cohort, local, open_run
from fedsieve.engine.loop import rounds
from fedsieve.recipes import load_recipe

RESULTS = Path(__file__).parent / "results" / "gpu.jsonl"
METHODS = {
    "fedavg": (),
    "swat": ("method.sparsity=.95",),
    "zerofl": ("method.sparsity=.95",),
    "flash": ("method.density=.05", "method.c_d=1", "method.E_d=2"),
    "sparsefedpp": ("method.sparsity=.95",),
}
"""The recipes, and what is changed in them; FLASH's first stage, which is not measured, is short."""
TASKS = {"resnet18": "cifar10_iid", "digits_net": "digits"}
EVERY = (
    "lr=.01",
    "lr_end=.01",
    "epochs=1",
    "evaluate_every=1000000",
    "rounds=1000000",
    "task.validation=0",
    "batch=16",
)
CLIENTS = 5
"""How many times as many clients there are as train in a round."""
FEWEST = 3
"""Rounds that a median is of, at least."""


@dataclass
class Lines:
    """Lines of JSON, printed and written; parts of which one that fails leaves the others; and the end of the time."""

    out: TextIO | None
    end: float
    lines: list[dict[str, Any]] = field(default_factory=list)

    def add(self, what: str, **values: Any) -> None:
        """Print and write a line."""
        self.lines.append({"what": what, **values})
        text = json.dumps(self.lines[-1])
        print(text, flush=True)
        if self.out:
            self.out.write(text + "\n")
            self.out.flush()

    def part(self, what: str, measure: Callable[[], Mapping[str, Any] | None]) -> None:
        """Measure and add a line, unless the time is up; an error is a line, too."""
        if time.monotonic() > self.end:
            return self.add(what, skipped="no time was left")
        try:
            values = measure()
        except Exception as error:  # whatever a driver or a peer raises
            return self.add(what, error=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
        return None if values is None else self.add(what, **values)

    def left(self, share: float) -> float:
        """Return a share of the seconds that are left."""
        return max(0.0, self.end - time.monotonic()) * share


def dataset_of(work: Work) -> Dataset:
    """Return noise of the work's shapes, enough for ``CLIENTS`` times as many clients."""
    (x, y), n = replace(work, clients=work.clients * CLIENTS).data(), work.clients * CLIENTS * work.examples
    train = Data(x.flatten(0, 1), y.flatten(), (0.5,), (0.5,))
    return Dataset("noise", train, train.subset(torch.arange(min(n, 1000))), work.classes)


def federation_of(method: str, work: Work, data: Path | None) -> Federation:
    """Return a recipe's run on the work's shapes, or on the dataset under ``data``, opened."""
    run: Run = load_recipe(f"{method}.{TASKS[work.model]}", (*EVERY, *METHODS[method], f"per_round={work.clients}"))
    if data is None:
        task = replace(run.task, dataset=dataset_of(work), clients=work.clients * CLIENTS, partition="iid")
        run = replace(run, task=task)
    return open_run(run, data)


def engines(work: Work, precision: Any) -> dict[str, Engine]:
    """Return the ways in which a round's clients are trained: all at once in bf16 alone, eagerly in float32 alone."""
    dense, every = "auto" if precision == "fp32" else "dense", work.clients
    cohorts = {"best": 0, **({f"{every}": every} if precision == "bf16" else {}), "1": 1}
    ways = {f"cohort {name}": cohort(n, work.device, dense, precision) for name, n in cohorts.items()}
    return ways | ({"eager": local(work.device, "dense")} if precision == "fp32" else {})


def time_rounds(lines: Lines, work: Work, precision: str, data: Path | None, seconds: float) -> dict[str, Any]:
    """Add a line for each method and way, and the plain loop: rounds in turns, medians. Return the memory taken."""
    end = time.monotonic() + seconds
    with gpu_steps.products_in(precision, work):
        loop = PlainLoop(work, precision)
    with ExitStack() as stack:
        calls = dict[tuple[str, str], Callable[[], int]]()
        for method, way, engine in _pairs(work, precision):
            stream = rounds(federation_of(method, work, data), engine, work.device)
            stack.callback(stream.close)
            try:
                for _ in range(1 + (method == "flash")):  # after its first stage
                    next(stream)
            except Exception as error:  # what a driver or too little memory raises: the others go on
                lines.add("round", method=method, way=way, precision=precision, error=str(error)[:300])
                continue
            calls[method, way] = partial(_steps_of_round, stream)
        loop.round()
        calls["fedavg", "plain loop"] = lambda: loop.round() or work.clients * work.steps
        samples: dict[tuple[str, str], list[tuple[float, int]]] = {key: [] for key in calls}
        turns = 0
        while turns < 1 or time.monotonic() < (end if turns >= FEWEST else lines.end):
            for key, call in calls.items():
                work.wait()
                began = time.perf_counter()
                steps = call()
                work.wait()
                samples[key].append((time.perf_counter() - began, steps))
            if (turns := turns + 1) == FEWEST:
                add_rounds(lines, work, precision, samples)  # lest a kill leaves nothing
        if turns != FEWEST:
            add_rounds(lines, work, precision, samples)
    memory = {"memory_gb": torch.cuda.max_memory_reserved(work.device) / 1e9} if work.is_gpu else {}
    return {"precision": precision, "turns": turns, **memory}


def add_rounds(
    lines: Lines, work: Work, precision: str, samples: Mapping[tuple[str, str], list[tuple[float, int]]]
) -> None:
    """Add the medians of what is there, and the share of a large product's speed that dense training would need."""
    known = [line for line in lines.lines if line["what"] == "step" and line.get("precision") == precision]
    speed = known[-1].get("matmul_tflops") if known else None
    flops = work.flops() / work.batch * work.examples * work.clients
    for (method, way), own in samples.items():
        names = {"method": method, "way": way, "precision": precision}
        step, s_round = (median(part) for part in zip(*((1e3 * s / steps, s) for s, steps in own), strict=True))
        share = {"share": flops / s_round / 1e12 / speed} if speed else {}
        lines.add("round", **names, s_round=s_round, ms_step=step, n=len(own), **share)


def _pairs(work: Work, precision: str) -> Iterator[tuple[str, str, Engine]]:
    for way, engine in engines(work, precision).items():
        for method in METHODS:
            yield method, way, engine


def _steps_of_round(stream: Iterator[Any]) -> int:
    return max(1, next(stream).steps)


def time_steps(work: Work, precision: str, seconds: float) -> dict[str, Any]:
    """Return the milliseconds a step of one client: alone, on streams, grouped; eagerly and as a graph; and shares."""
    with gpu_steps.products_in(precision, work):
        calls = {"matmul": gpu_steps.matmul(work, precision), "eager": Stepper(work, precision).step}
        calls["graph"] = gpu_steps.captured(Stepper(work, precision).step, work)
        steps = [gpu_steps.captured(Stepper(work, precision).step, work) for _ in range(work.clients)]
        calls["streams"] = gpu_steps.on_streams(steps, work)
        calls["grouped"] = gpu_steps.captured(Stepper(work, precision, grouped=work.clients).step, work)
        times = gpu_steps.milliseconds(calls, work, seconds)
    flops = work.flops()
    speed = 2 * work.matmul**3 / times.pop("matmul") / 1e9
    each = times | {name: times[name] / work.clients for name in ("streams", "grouped")}
    shares = {f"share_{name}": flops / ms / 1e9 / speed for name, ms in each.items()}
    return {"clients": work.clients, "matmul_tflops": speed, "ms_step": each, **shares}


def time_selections(work: Work) -> dict[str, Any]:
    """Return the milliseconds of all exact cuts of a step of ResNet-18: weights and inputs of the inner layers."""
    effort = {"batch": work.batch, "repeats": 20} if work.is_gpu else {"batch": 1, "repeats": 1}
    return topk.measure(work.device, torch.bfloat16, **effort)


def measure(lines: Lines, work: Work, data: Path | None) -> None:
    """Add all lines, the most important first."""
    name = torch.cuda.get_device_name(work.device) if work.is_gpu else "cpu"
    lines.add("machine", machine=machine(), device=name, work={**vars(work)}, data=str(data or "noise"))
    if not work.is_gpu:
        torch.set_num_threads(1)
    for precision in PRECISIONS if work.is_gpu else PRECISIONS[:2]:
        own = partial(time_steps, work, precision, lines.left(0.05))
        lines.part("step", lambda own=own, precision=precision: {"precision": precision, **own()})
        free(work)
        if precision == PRECISIONS[0]:
            lines.part("selections", partial(time_selections, work))
        lines.part("rounds", partial(time_rounds, lines, work, precision, data, lines.left(0.35)))
        free(work)
    for peer, rounds_of in gpu_peers.PEERS.items():
        limit = min(lines.left(1), gpu_peers.LIMIT)
        own = partial(rounds_of, work, limit)
        lines.part("peer", lambda peer=peer, own=own: {"peer": peer, **own()})


def free(work: Work) -> None:
    """Give the device's memory back."""
    gc.collect()
    if work.is_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(work.device)


def table(lines: list[dict[str, Any]]) -> str:
    """Return the rounds of a file of lines as a table."""
    times = {(line["method"], line["way"], line["precision"]): line for line in lines if line["what"] == "round"}
    columns = ("method", "way", "precision", "s a round", "ms a step", "share of matmul's speed", "rounds")
    rows = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for (method, way, precision), line in times.items():
        if "error" in line:
            cells = [line["error"], "", "", ""]
        else:
            share = f"{line['share']:.1%}" if "share" in line else "-"
            cells = [f"{line['s_round']:.3f}", f"{line['ms_step']:.3f}", share, str(line["n"])]
        rows.append(f"| {' | '.join([method, way, precision, *cells])} |")
    return "\n".join(rows)


def committed() -> str:
    """Return what stands in the docs: the table of the committed lines, or that there are none."""
    if not RESULTS.exists():
        return "No GPU has measured this yet: `scripts/gpu` does."
    lines = read_lines(RESULTS)
    return f"{lines[0]['device']} ({lines[0]['machine']}):\n\n{table(lines)}"


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the whole lines of a file, of which the last may be cut."""
    texts = path.read_text().split("\n")[:-1]
    return [json.loads(text) for text in texts]


def main() -> None:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(description="Time rounds and steps on a GPU.")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="a tiny model, in half a minute")
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--data", help="folder of the datasets (default: noise)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where the lines are written, too")
    parser.add_argument("--table", type=Path, metavar="FILE", help="only lay out the lines of a file")
    options = parser.parse_args()
    if options.table:
        print(table(read_lines(options.table)))
        return
    work = replace(gpu_steps.SMALL if options.small else Work(), device=options.device)
    if work.is_gpu and not torch.cuda.is_available():
        sys.exit("gpu.py: PyTorch sees no GPU: use --device cpu --small")
    with ExitStack() as stack:
        out = stack.enter_context(options.out.open("w")) if options.out else None
        lines = Lines(out, time.monotonic() + 60 * options.minutes)
        measure(lines, work, root_from(options.data) if options.data else None)
    print(table(lines.lines))
    errors, skipped = (sum(what in line for line in lines.lines) for what in ("error", "skipped"))
    print(f"{len(lines.lines)} lines, {errors} of them errors, {skipped} left out")


if __name__ == "__main__":
    main()
