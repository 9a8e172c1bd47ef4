"""What sparsity saves of a whole round: broadcast, training, messages, mean and test, by the kernels and by PyTorch.

    python benchmarks/whole_round.py [RECIPE ...] [--data FOLDER]
    python benchmarks/whole_round.py --clock [RECIPE ...]

The same run goes both ways in turns, a round each, in one process and on one thread (``local``); the least processor
time of three rounds counts, of steps too, as other processes may be at work. Two clients a round, of the recipes' ten,
and few test images where a dense round would take minutes. Every round is tested.

``--clock`` lets rounds of one process and of the engine that ``--engine auto`` chooses take turns, by the kernels, and
takes the least of five by the clock.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace

from fedsieve import local, rounds
from fedsieve.client import cost
from fedsieve.client.process import num_threads, usable_cores
from fedsieve.engine.round import Round
from fedsieve.engine.setup import open_run
from fedsieve.recipes import load_recipe
from fedsieve.runs.execution import Execution
from fedsieve.runs.provenance import cpu
from fedsieve.runs.run import open_ready

RESULTS = Path(__file__).parent / "results" / "whole_round.json"
ROUNDS, BY_CLOCK = 3, 5
CASES = {
    "flash.mnist": ("method.density=.05", "per_round=10", "method.c_d=2", "method.E_d=2"),
    "fedavg.mnist": ("per_round=10",),
    "zerofl.femnist": ("method.sparsity=.95", "per_round=10"),
    "flash.femnist": ("method.density=.05", "per_round=10", "method.c_d=2", "method.E_d=2"),
    "flash.gpt": ("method.density=.1", "per_round=10", "method.c_d=2", "method.E_d=2", "evaluate_every=1"),
    "zerofl.gpt": ("method.sparsity=.9", "per_round=10", "evaluate_every=1"),
    "pdst.cifar10_iid": ("method.density=.05", "per_round=2", "task.test_limit=500"),
    "zerofl.cifar10_iid": ("method.sparsity=.95", "per_round=2", "task.test_limit=500", "task.validation=0"),
}
"""Recipes, and what is changed in them: a short first stage of FLASH's, whose masks are as dense."""
CLOCKED = {"flash.mnist": ("method.density=.05",)} | {name: CASES[name] for name in ("flash.femnist", "zerofl.femnist")}
"""Recipes, and what is changed in them, whose rounds are timed by the clock: MNIST's as ``fedsieve run`` has it."""


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
    test_images: int = 0
    """How many, where a round is not tested on all."""

    @property
    def share(self) -> float:
        """What of a step's ratio a whole round keeps."""
        return self.dense / self.kernels / (self.dense_step / self.kernels_step)


@dataclass(frozen=True)
class ClockRow:
    """Seconds of a round by the clock: in one process, of one thread; and by the engine that auto chooses."""

    recipe: str
    clients: int
    engine: str
    cores: int
    one: float
    auto: float
    test: float
    """What of auto's round is its test, the row and all that follows the mean."""
    busy: float
    """The share of the cores' time that auto's processes computed."""


def measured(recipe: str, settings: tuple[str, ...], root: Path) -> Row:
    """Return what a round takes, either way."""
    run = replace(load_recipe(recipe, settings), evaluate_every=1)
    federation = open_run(run, root)
    cost.time = SimpleNamespace(perf_counter=time.process_time)  # a step's milliseconds are of the processor, too
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
    images = run.task.test_limit
    return Row(recipe, run.per_round, dense, dense_test, ours, our_test, dense_step, our_step, images)


def clocked(recipe: str, settings: tuple[str, ...], root: Path) -> ClockRow:
    """Return what a round takes by the clock."""
    run = replace(load_recipe(recipe, settings), evaluate_every=1)
    federation, engine, _, execution = open_ready(run, Execution(engine="auto", data=str(root)))
    assert engine
    one, several = rounds(federation, local()), rounds(federation, engine)
    cores, times = usable_cores(), list[tuple[float, float, float, float]]()
    while len(times) < BY_CLOCK:
        with num_threads(1):
            began = time.perf_counter()
            next(one)
        alone = time.perf_counter() - began
        began, computed = time.perf_counter(), processor_seconds()
        round_ = next(several)
        took, computed = time.perf_counter() - began, processor_seconds() - computed
        if round_.t > 1:
            times.append((alone, took, took - round_.seconds, computed / took / cores))
    several.close()
    one_core = min(alone for alone, *_ in times)
    return ClockRow(recipe, run.per_round, execution.engine, cores, one_core, *min(rest for _, *rest in times))


def processor_seconds() -> float:
    """Return the processor seconds of this process and its workers so far (Linux)."""
    pids = [os.getpid(), *(process.pid for process in multiprocessing.active_children())]
    fields = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in pids]
    return sum(int(field[11]) + int(field[12]) for field in fields) / os.sysconf("SC_CLK_TCK")


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
        "| a round of | clients | PyTorch, s (test) | kernels, s (test) | round | its training | a step | share kept |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        ours, theirs = row.kernels - row.kernels_test, row.dense - row.dense_test
        images = f", {row.test_images} test images" if row.test_images else ""
        lines.append(
            f"| `{row.recipe}`{images} | {row.clients} | {row.dense:.2f} ({row.dense_test:.2f}) | "
            f"{row.kernels:.2f} ({row.kernels_test:.2f}) | {row.dense / row.kernels:.1f}x | {theirs / ours:.1f}x | "
            f"{row.dense_step / row.kernels_step:.1f}x | {row.share:.0%} |"
        )
    return "\n".join(lines)


def clock_table() -> str:
    """Return the committed rows by the clock as a table."""
    rows = [ClockRow(**row) for row in json.loads(RESULTS.read_text())["clock"]]
    lines = [
        "| a round of | clients | one core, s | all cores, s (its test) | of one core's | engine | cores busy |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| `{row.recipe}` | {row.clients} | {row.one:.2f} | {row.auto:.2f} ({row.test:.2f}) | "
        f"{row.auto / row.one:.2f} | `{row.engine}` | {row.busy:.0%} of {row.cores} |"
        for row in rows
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*")
    parser.add_argument("--clock", action="store_true")
    parser.add_argument("--data", default=os.environ.get("FEDSIEVE_DATA", ""))
    arguments = parser.parse_args()
    kind, cases = ("clock", CLOCKED) if arguments.clock else ("rows", CASES)
    for recipe in arguments.recipes or cases:
        if arguments.clock:
            row = asdict(clocked(recipe, cases[recipe], Path(arguments.data)))
        else:
            with num_threads(1):
                row = asdict(measured(recipe, cases[recipe], Path(arguments.data)))
        results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"rows": [], "clock": []}
        by_recipe = {one["recipe"]: one for one in [*results.get(kind, []), row]}
        results |= {"cpu": cpu(), kind: [by_recipe[name] for name in cases if name in by_recipe]}
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    print(clock_table() if arguments.clock else table())


if __name__ == "__main__":
    main()
