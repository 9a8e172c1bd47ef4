"""A FEMNIST recipe over Flower and Ray: 100 clients, 10 rounds, and the memory of all processes after every round.

Claim: the run ends well on two cores, and after round 3 the memory of its processes together does not grow.
Memory is the proportional set size of the command and all that it started (SuperLink, the simulation, Ray, two
workers), each shared page counted once over all, taken when a round's row appears; n: 1 run.

    FEDSIEVE_DATA=... python benchmarks/scale.py [--json]
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from fedsieve.bench.clock import machine
from fedsieve.flower_app.superlink import script

SETTINGS = ["task.clients=100", "rounds=10", "per_round=10", "evaluate_every=5"]
RECIPE = "zerofl.femnist"


def femnist_over_ray() -> dict[str, Any]:
    """Run it; return what every round took and left in memory."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        settings = [part for setting in SETTINGS for part in ("-s", setting)]
        command = [script("fedsieve"), "run", RECIPE, *settings, "--engine", "flower:2", "--out", str(out)]
        began = time.monotonic()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        memory = list[float]()
        while process.poll() is None:
            done = len(_rows(out))
            if done > len(memory):
                memory.append(sum(map(_proportional_mb, [process.pid, *_descendants(process.pid)])))
            time.sleep(0.1)
        rows = _rows(out)
        return {
            "recipe": RECIPE,
            "settings": SETTINGS,
            "exit_code": process.returncode,
            "seconds": round(time.monotonic() - began, 1),
            "rounds": [
                {
                    "round": row["round"],
                    "seconds": round(row["seconds"], 2),
                    "bytes_up": row["bytes_up"],
                    "refused": len(row["refused"]),
                    "memory_mb": round(mb),
                }
                for row, mb in zip(rows, memory, strict=False)
            ],
        }


def _rows(out: Path) -> list[dict[str, Any]]:
    path = out / "rounds.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _descendants(pid: int) -> list[int]:
    parents = dict[int, int]()
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found, new = set[int](), {pid}
    while new:
        new = {child for child, parent in parents.items() if parent in new} - found
        found |= new
    return sorted(found)


def _proportional_mb(pid: int) -> float:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) * 1024 / 1e6


def main() -> None:
    """Print a line a round, or all of it as JSON."""
    told = {"machine": machine(), "femnist_over_ray": femnist_over_ray()}
    if "--json" in sys.argv:
        print(json.dumps(told, indent=1))
        return
    for row in told["femnist_over_ray"]["rounds"]:
        print(
            f"round {row['round']:2}: {row['seconds']:6.2f} s, {row['bytes_up'] / 1e6:6.2f} MB up, "
            f"{row['memory_mb']:5} MB in memory, {row['refused']} lost"
        )
    print(f"{told['femnist_over_ray']['seconds']} s in all, exit code {told['femnist_over_ray']['exit_code']}")


if __name__ == "__main__":
    main()
