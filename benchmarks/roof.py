"""What machines can do at most: the table of roofs in docs/benchmarks/performance.md, by ``fedsieve bench roof``.

Claim: none; a step's share of the roof rests on these numbers. n: the fastest of 25 samples, of each number, with one
thread and with as many as there are cores. A machine's rows replace those that it had before.

    python benchmarks/roof.py            (ten seconds, on a quiet machine)
    python benchmarks/roof.py --table    (print the table of committed results)
"""

from __future__ import annotations

import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rows import markdown, read_rows, write_results

from fedsieve.cli.bench.roof import measure_roof

RESULTS = Path(__file__).parent / "results" / "roof.json"
RATES = ("gflops", "l1_gb_s", "l2_gb_s", "l3_gb_s", "memory_gb_s")


def committed() -> list[dict[str, Any]]:
    """Return the rows that are there."""
    return read_rows(RESULTS)


def measured(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows with this machine's, measured anew."""
    new = [asdict(measure_roof(threads)) for threads in sorted({1, os.cpu_count() or 1})]
    return [row for row in rows if row["cpu"] != new[0]["cpu"]] + new


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as the page shows them."""
    header = "| CPU | threads | multiply-adds, Gflop/s | L1, GB/s | L2, GB/s | L3, GB/s | memory, GB/s |"
    return markdown(header, ((row["cpu"], row["threads"], *(f"{row[name]:.0f}" for name in RATES)) for row in rows))


def main() -> None:
    """Measure this machine, and print the table."""
    if "--table" not in sys.argv:
        write_results(RESULTS, measured(committed()))
    print(table(committed()))


if __name__ == "__main__":
    main()
