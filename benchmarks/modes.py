"""How much a sparse step's time differs from process to process, and what asking for lines in advance does to that.

Claim: where the kernels ask for lines of the maps before they need them, a step takes less. How far processes lie apart
is where their memory lies in the caches that they share. n: PROCESSES processes each way, in turns, each the fastest
of SAMPLES steps (ResNet-18, 95 % sparse, batch 16, one thread, processor time); the other way is a library compiled
without ``__builtin_prefetch``. Hardware and times stand in benchmarks/results/modes.json.

    python benchmarks/modes.py            (five minutes on a quiet machine, and a compiler)
    python benchmarks/modes.py --table    (print the table of committed results)
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch

from fedsieve.cli.bench.workload import Workload, sparse_step, sparse_trainer
from fedsieve.kernels.build import build
from fedsieve.runs.provenance import cpu_model

RESULTS = Path(__file__).parent / "results" / "modes.json"
PROCESSES, SAMPLES, UNITS = 6, 9, (1, 8)
WAYS = {"asked for before": (), "when needed": ("-D__builtin_prefetch(...)=(void)0", "-w")}


def steps() -> list[float]:
    """Return the milliseconds of a step on an unstructured mask and on one of units, in this process."""
    torch.set_num_threads(1)
    return [fastest(Workload(sparsity=0.95, unit=unit)) for unit in UNITS]


def fastest(workload: Workload) -> float:
    """Return the milliseconds of the fastest step."""
    step, best = sparse_step(sparse_trainer(workload), workload), float("inf")
    for _ in range(SAMPLES):
        began = time.thread_time()
        step()
        best = min(best, time.thread_time() - began)
    return 1e3 * best


def measured() -> dict[str, Any]:
    """Return the times of all processes, each way."""
    results: dict[str, Any] = {"cpu": cpu_model(), "ms": {way: [] for way in WAYS}}
    with TemporaryDirectory() as folder:
        for way, flags in WAYS.items():
            print(build(Path(folder) / way, flags=flags, force=True), file=sys.stderr)
        for _ in range(PROCESSES):
            for way in WAYS:
                own = os.environ | {"FEDSIEVE_KERNELS_DIR": str(Path(folder) / way)}
                run = subprocess.run(
                    [sys.executable, __file__, "--one"], env=own, capture_output=True, text=True, check=True
                )
                results["ms"][way].append(json.loads(run.stdout))
    return results


def table(results: dict[str, Any]) -> str:
    """Return the spread of the processes as the page shows it."""
    lines = ["| lines of the maps are | unstructured: least, median, most, ms | units of 8 |", "|---|---|---|"]
    for way, processes in results["ms"].items():
        spreads = [(min(own), median(own), max(own)) for own in zip(*processes, strict=True)]
        lines.append(f"| {way} | {' | '.join(', '.join(f'{ms:.1f}' for ms in spread) for spread in spreads)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, and print the table."""
    if "--one" in sys.argv:
        print(json.dumps(steps()))
        return
    if "--table" not in sys.argv:
        RESULTS.write_text(json.dumps(measured(), indent=1) + "\n")
    print(table(json.loads(RESULTS.read_text())))


if __name__ == "__main__":
    main()
