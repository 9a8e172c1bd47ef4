"""The tables of docs/wire.md, from benchmarks/results/wire.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "wire.json"


def table(which: str) -> str:
    """Return the rows, the comparison, or the hardware they were measured on."""
    if not RESULTS.exists():
        return "not measured yet"
    told: dict[str, Any] = json.loads(RESULTS.read_text())
    if which == "hardware":
        return (
            f"{told['machine']}, " + ", ".join(f"{name} {v}" for name, v in told["versions"].items()) + "; one thread."
        )
    return _beside(told["beside"]) if which == "beside" else _rows(told["rows"])


def _rows(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| case | density | known | churn | values | bytes | bits a non-zero | of entropy | to CSR | to dense | MB/s |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        churn = "" if r["churn"] is None else f"{100 * r['churn']:.1f} %"
        size = r["bytes"]
        lines.append(
            f"| {r['case']} | {r['density']:.4g} | {r['known']} | {churn} | {r['values']} | {size:,} | "
            f"{r['bits_per_nonzero']:.2f} | {size / r['entropy_bytes']:.3f} | {r['csr_bytes'] / size:.2f}x | "
            f"{r['dense_bytes'] / size:.1f}x | {r['encode_mb_s']:.0f}, {r['decode_mb_s']:.0f} |"
        )
    return "\n".join(lines)


def _beside(rows: list[dict[str, Any]]) -> str:
    lines = ["| | bytes | MB/s out | in |", "|---|---|---|---|"]
    lines += [f"| {r['codec']} | {r['bytes']:,} | {r['encode_mb_s']:.0f} | {r['decode_mb_s']:.0f} |" for r in rows]
    return "\n".join(lines)
