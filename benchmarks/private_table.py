"""The table of benchmarks/private.py, from its results."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean, stdev

RESULTS = Path(__file__).parent / "results" / "private.json"
POPULATIONS = (100, 10_000, 1_000_000)
LABELS = {
    "private_flash": "FLASH 90 %, private",
    "private_fedavg": "FedAvg, dense, private",
    "flash": "FLASH 90 %",
    "fedavg": "FedAvg, dense",
}


def table() -> str:
    """Return the results as the table that the card shows."""
    results = json.loads(RESULTS.read_text())
    columns = ", ".join(f"{n:,}" for n in POPULATIONS)
    lines = [f"| | accuracy, % (each seed) | one upload, kB | epsilon of {columns} clients |", "|---|---|---|---|"]
    for name, got in results["methods"].items():
        seeds = ", ".join(f"{100 * v:.1f}" for v in got["accuracy"])
        spread = f"{100 * mean(got['accuracy']):.1f} ± {100 * stdev(got['accuracy']):.1f} ({seeds})"
        epsilons = ", ".join(f"{value:.3g}" for value in got["epsilon"].values()) or "-"
        lines.append(f"| {LABELS[name]} | {spread} | {mean(got['upload_bytes']) / 1e3:.0f} | {epsilons} |")
    return "\n".join(lines)
