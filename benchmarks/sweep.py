"""How long one sweep of all methods on the handwritten digits takes, and whether FLASH is ahead of its baselines.

Aim: ten methods, three seeds each, 95 % sparse where they are sparse, two runs at once: under two minutes on two cores
(missed: to encode and check every message takes a third of it). Claim: FLASH's mean accuracy is at least NST's and
PDST's. The time is the wall-clock of the command, start and table included, on a machine with nothing else to do
(``load`` says how busy it was before). n: 1.
Hardware and versions stand in the results, benchmarks/results/sweep.json.

    python benchmarks/sweep.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from fedsieve.cli.bench.measurement import machine

METHODS = ("fedavg", "fedadam", "swat", "zerofl", "topk", "sparsefedpp", "nst", "pdst", "flash", "hetero_flash")
SETTINGS = ("method.density=.05", "method.sparsity=.95", "evaluate_every=10")


def main() -> None:
    """Run the sweep in a folder of its own, and keep what it took and found."""
    command = [str(Path(sys.executable).parent / "fedsieve"), "sweep", *(f"{name}.digits" for name in METHODS)]
    command += [word for setting in SETTINGS for word in ("-s", setting)]
    with tempfile.TemporaryDirectory() as folder:
        out, load, began = Path(folder) / "sweep", os.getloadavg()[0], time.perf_counter()
        subprocess.run([*command, "--seeds", "3", "--jobs", "2", "--out", str(out)], check=True)
        seconds = time.perf_counter() - began
        cells = json.loads((out / "results.json").read_text())["cells"]
    reached = {cell["recipe"].split(".")[0]: round(cell["accuracy_mean"], 2) for cell in cells}
    line = " ".join(["fedsieve sweep", *command[2:], "--seeds 3 --jobs 2"])
    numbers = {"machine": machine(), "command": line, "seconds": round(seconds, 1), "load": round(load, 2)}
    results = Path(__file__).parent / "results" / "sweep.json"
    results.write_text(json.dumps(numbers | {"accuracy_percent": reached}, indent=1) + "\n")
    print(json.dumps(numbers | {"accuracy_percent": reached}))


if __name__ == "__main__":
    main()
