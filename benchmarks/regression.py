"""Whether a tree is slower than an earlier commit: rounds of recipes, idle rounds, and the way to the first result.

Claim: against the commit before any task could be trained (``BASE``), recipes on digits and MNIST take at most 3 % more
a round, and so do idle clients and ``fedsieve run`` up to its first round's line (processor time: to its end). The
earlier commit is checked out into a temporary folder, and its kernels are compiled there.
A process of each tree runs the recipe, and they take turns, a round each. Both train on the same, so that a round is
compared with the same round of the other tree, just before or after it: the ratio is the median of those of processor
time, with its quartiles. Wall-clock is the median of the rounds that a busy machine left undisturbed
(``fedsieve.cli.bench``), a dash where there are none. Tests, warm-ups and the first round are set aside.
n: 2 pairs of processes, 16 rounds of digits each, 4 of MNIST (FLASH's warm-up cut to 2 clients and 2 epochs), 40 idle
ones, 9 first results.

    python benchmarks/regression.py            (against BASE: half an hour; MNIST needs FEDSIEVE_DATA)
    python benchmarks/regression.py COMMIT     (against another one; nothing is kept)
    python benchmarks/regression.py --table    (print the table of committed results)
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import fedsieve
from fedsieve.cli.bench.measurement import machine, steal_ticks, wait_seconds
from fedsieve.recipes import load_recipe

HERE = Path(__file__).parent
ROOT = HERE.parent
RESULTS = HERE / "results" / "regression.json"
BASE = "a6de323"
"""The commit before tasks other than classification by SGD."""
PAIRS, FIRSTS, LEAST = 2, 9, 3
"""Pairs of processes, first results of each tree, and undisturbed rounds that make a median."""
MNISTNET, DIGITSNET = "idle clients, MNISTNet", "idle clients, digits"
SHORT = ("method.c_d=2", "method.E_d=2")
DIGITS = ("fedavg", "topk", "zerofl", "swat", "nst", "flash")
MNIST = {"fedavg.mnist": (), "zerofl.mnist": (), "flash.mnist": SHORT}
PLAN: dict[str, tuple[int, tuple[str, ...]]] = {
    **{f"{method}.digits": (16, ()) for method in DIGITS},
    **{recipe: (4, settings) for recipe, settings in MNIST.items()},
    MNISTNET: (40, ()),
    DIGITSNET: (40, ()),
}
"""By recipe, the rounds that are timed, and what is changed in it."""
FIRST = "the first result"
WAITING = 0.02
"""The share of a round that its process may have waited for a core."""
SWITCHES = 50
"""How often the process of a first result may have lost its core to another."""


def serve(name: str) -> None:
    """Run a round of a recipe for every line of standard input, and print what it took."""
    count, settings = PLAN[name]
    if name in (MNISTNET, DIGITSNET):
        from round import Idle, idle

        task = fedsieve.Task("digits_net", "digits", 10)
        run = idle(10, 10**4) if name == MNISTNET else fedsieve.Run(Idle(), task, 10**4, 10, evaluate_every=10**6)
    else:
        run = load_recipe(name, [*settings, f"rounds={count + 2}", "evaluate_every=1000000"])
    stream = fedsieve.rounds(run, fedsieve.local(), data=os.environ.get("FEDSIEVE_DATA"))
    while next(stream).t < 1:
        pass
    for _ in sys.stdin:
        steal, waited, cpu, began = steal_ticks(), wait_seconds(), time.process_time(), time.perf_counter()
        next(stream)
        wall, cpu, waited = time.perf_counter() - began, time.process_time() - cpu, wait_seconds() - waited
        calm = waited < WAITING * wall and steal == steal_ticks()
        print(json.dumps({"from": fedsieve.__file__, "wall": wall, "cpu": cpu, "calm": calm}), flush=True)


def first_result(environment: dict[str, str]) -> dict[str, Any]:
    """Return what ``fedsieve run zerofl.digits`` took from the start of its process to its first round's line."""
    command = [sys.executable, "-m", "fedsieve", "run", "zerofl.digits", "-s", "rounds=1"]
    with tempfile.TemporaryDirectory() as folder:
        before, steal, began = resource.getrusage(resource.RUSAGE_CHILDREN), steal_ticks(), time.perf_counter()
        with subprocess.Popen(
            [*command, "--out", f"{folder}/run"], stdout=subprocess.PIPE, text=True, env=environment
        ) as process:
            assert process.stdout
            next(line for line in process.stdout if line.startswith("round 1/"))
            wall = time.perf_counter() - began
            process.communicate()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    switched = after.ru_nivcsw - before.ru_nivcsw
    return {"wall": wall, "cpu": cpu, "calm": steal == steal_ticks() and switched < SWITCHES}


@contextmanager
def checkout(commit: str) -> Iterator[Path]:
    """Check a commit out into a temporary folder, with its kernels compiled there; gone afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "-q", "--detach", str(tree), commit], check=True)
        try:
            subprocess.run([sys.executable, "-m", "fedsieve.kernels.build"], check=True, env=environment_of(tree))
            yield tree
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], check=True)


def environment_of(tree: Path) -> dict[str, str]:
    """Return the environment in which Python imports a tree's FedSieve."""
    return os.environ | {"PYTHONPATH": str(tree / "src"), "OMP_NUM_THREADS": "1"}


@contextmanager
def serving(name: str, tree: Path) -> Iterator[Callable[[], dict[str, Any]]]:
    """Start a process that runs a recipe in a tree, and yield what asks it for a round."""
    if name == FIRST:
        yield lambda: first_result(environment_of(tree))
        return
    command = [sys.executable, "-W", "ignore", __file__, "--serve", name]
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": environment_of(tree)}
    with subprocess.Popen(command, **pipes) as process:
        assert process.stdin
        assert process.stdout

        def ask() -> dict[str, Any]:
            print(file=process.stdin, flush=True)
            one: dict[str, Any] = json.loads(process.stdout.readline())  # type: ignore[union-attr]
            assert Path(one.pop("from")).is_relative_to(tree), "another FedSieve was imported"
            return one

        yield ask
        process.stdin.close()


def compared(name: str, trees: dict[str, Path]) -> dict[str, Any]:
    """Return how a recipe fares in two trees, ``before`` and ``now``: round by round, by turns."""
    samples: dict[str, list[dict[str, Any]]] = {"before": [], "now": []}
    count = FIRSTS if name == FIRST else PLAN[name][0]
    for _ in range(1 if name == FIRST else PAIRS):
        with ExitStack() as stack:
            asks = {which: stack.enter_context(serving(name, tree)) for which, tree in trees.items()}
            for turn in range(count):
                for which in sorted(asks, reverse=turn % 2 == 1):
                    samples[which].append(asks[which]())
    row: dict[str, Any] = {"name": name}
    for which, own in samples.items():
        calm = [one["wall"] for one in own if one["calm"]]
        wall = median(calm) if len(calm) >= LEAST else None
        row[which] = {"cpu": median(one["cpu"] for one in own), "wall": wall, "calm": len(calm)}
    ratios = [now["cpu"] / before["cpu"] for now, before in zip(samples["now"], samples["before"], strict=True)]
    low, middle, high = quantiles(ratios, n=4)
    return row | {"samples": len(ratios), "ratio": middle, "quartiles": [low, high]}


def table(results: dict[str, Any] | None = None) -> str:
    """Return the results, those that are committed by default, as a table in Markdown."""
    results = results or json.loads(RESULTS.read_text())
    lines = [
        "| | processor s before | now | wall s before | now | now / before (quartiles) | samples (calm before, now) |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in results["rows"]:
        before, now = row["before"], row["now"]
        name = row["name"] if row["name"].startswith(("idle", FIRST)) else f"`{row['name']}`"
        low, high = row["quartiles"]
        cells = (
            *(f"{one['cpu']:.3g}" for one in (before, now)),
            *("-" if one["wall"] is None else f"{one['wall']:.3g}" for one in (before, now)),
            f"{row['ratio']:.3f} ({low:.3f} to {high:.3f})",
            f"{row['samples']} ({before['calm']}, {now['calm']})",
        )
        lines.append(f"| {' | '.join((name, *cells))} |")
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    """Measure, print the table as it grows, and keep it if the commit is BASE."""
    if arguments[:1] == ["--serve"]:
        serve(arguments[1])
        return
    if arguments == ["--table"]:
        print(table())
        return
    commit = (arguments or [BASE])[0]
    git = ["git", "-C", str(ROOT), "rev-parse", "--short"]
    names = [subprocess.check_output([*git, one], text=True).strip() for one in (commit, "HEAD")]
    results: dict[str, Any] = {"machine": machine(), "before": names[0], "now": names[1], "rows": []}
    with checkout(commit) as tree:
        for name in (*PLAN, FIRST):
            results["rows"].append(compared(name, {"before": tree, "now": ROOT}))
            print(table({"rows": results["rows"][-1:]}).splitlines()[-1], flush=True)
    if commit == BASE:
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
