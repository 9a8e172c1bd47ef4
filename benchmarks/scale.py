"""A FEMNIST recipe over Flower and Ray: 100 clients, 10 rounds, and the memory of all processes after every round.

Claim: the run ends well on two cores; from round 3 to 10 the memory of all processes together grows by less than 3 %.
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

from fedsieve.cli.bench.measurement import machine
from fedsieve.flower.app.guard import descendants
from fedsieve.flower.app.superlink import script

SETTINGS = ["task.clients=100", "rounds=10", "per_round=10", "evaluate_every=5"]
RECIPE = "zerofl.femnist"
PARTS = ("the server", "the workers", "the rest", "all processes")
"""The process with the server's loop; those that train; the command line, SuperLink and Ray."""


def femnist_over_ray() -> dict[str, Any]:
    """Run it; return what every round sent and left in memory."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        settings = [part for setting in SETTINGS for part in ("-s", setting)]
        command = [script("fedsieve"), "run", RECIPE, *settings, "--engine", "flower:2", "--out", str(out)]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        memory = list[dict[str, int]]()
        while process.poll() is None:
            rounds = len(_rows(out))
            if rounds > len(memory):
                memory.append(_memory([process.pid, *descendants(process.pid)]))
            time.sleep(0.1)
        rows = _rows(out)
        return {
            "recipe": RECIPE,
            "settings": SETTINGS,
            "exit_code": process.returncode,
            "rounds": [
                {
                    "round": row["round"],
                    "bytes_up": row["bytes_up"],
                    "refused": len(row["refused"]),
                    "memory_mb": mb,
                }
                for row, mb in zip(rows, memory, strict=False)
            ],
        }


def _rows(out: Path) -> list[dict[str, Any]]:
    path = out / "rounds.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _memory(pids: list[int]) -> dict[str, int]:
    """Return the MB of each part, and of all together."""
    megabytes = dict.fromkeys(PARTS, 0.0)
    for pid in pids:
        size, command = _proportional_mb(pid), _command(pid)
        part = "the workers" if "ClientAppActor" in command else "the server" if "simulation" in command else "the rest"
        megabytes[part] += size
        megabytes["all processes"] += size
    return {part: round(size) for part, size in megabytes.items()}


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def _proportional_mb(pid: int) -> float:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) * 1024 / 1e6


ARITHMETIC = ((10_000, 100), (10_000, 1_000), (1_000_000, 1_000))
EXAMPLES = 200
"""A client's; a server that splits the data itself keeps the place of each, 8 bytes."""


def table(results: dict[str, Any]) -> str:
    """Return memory and bytes by round, then what larger federations would send and hold, as Markdown."""
    run = results["femnist_over_ray"]
    rounds = run["rounds"]
    upload = rounds[-1]["bytes_up"] / 10
    lines = [
        f"`{run['recipe']}` with {', '.join(f'`{one}`' for one in run['settings'])}, two workers on two cores:",
        "",
        "| after round | " + " | ".join(str(row["round"]) for row in rounds) + " |",
        "|---|" + "---|" * len(rounds),
        *(
            f"| memory of {part}, MB | " + " | ".join(str(row["memory_mb"][part]) for row in rounds) + " |"
            for part in PARTS
        ),
        "| sent up in the round, MB | " + " | ".join(f"{row['bytes_up'] / 1e6:.1f}" for row in rounds) + " |",
        "",
        "| clients | a round | sent up a round, at that upload | kept by a server that splits the data |",
        "|---|---|---|---|",
    ]
    for clients, sampled in ARITHMETIC:
        upload_mb, data_mb = sampled * upload / 1e6, clients * EXAMPLES * 8 / 1e6
        lines.append(f"| {clients:,} | {sampled:,} | {upload_mb:.0f} MB | {data_mb:,.0f} MB ({EXAMPLES} a client) |")
    return "\n".join(lines)


def main() -> None:
    """Print the tables, or all of it as JSON."""
    results = {"machine": machine(), "femnist_over_ray": femnist_over_ray()}
    print(json.dumps(results, indent=1) if "--json" in sys.argv else table(results))


if __name__ == "__main__":
    main()
