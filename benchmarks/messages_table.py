"""The tables of docs/wire.md, from benchmarks/results/wire.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import rounding

RESULTS = Path(__file__).parent / "results" / "wire.json"


def table(which: str) -> str:
    """Return the rows, the comparison, the hardware they were measured on, or what fuzzing and rounding came to."""
    if which == "fuzz":
        return _fuzz(json.loads((RESULTS.parent / "fuzz.json").read_text())["slices"])
    if which == "rounding":
        return rounding.table()
    if not RESULTS.exists():
        return "not measured yet"
    told: dict[str, Any] = json.loads(RESULTS.read_text())
    if which == "hardware":
        return (
            f"{told['machine']}, " + ", ".join(f"{name} {v}" for name, v in told["versions"].items()) + "; one thread."
        )
    return _beside(told["beside"]) if which == "beside" else _rows(told["rows"])


def _fuzz(slices: list[dict[str, Any]]) -> str:
    lines = [
        "| back end | mutations | taken | refused | slowest | peak memory, x the model | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for back_end in ("pcodec", "zstd"):
        rows = [row for row in slices if row["back_end"] == back_end]
        taken, refused, seconds = (sum(row[name] for row in rows) for name in ("taken", "refused", "seconds"))
        slowest, memory = (max((row[name] for row in rows), default=0) for name in ("slowest_ms", "memory"))
        lines.append(
            f"| {back_end} | {taken + refused:,} | {taken:,} | {refused:,} | {slowest:.0f} ms | {memory:.2f} "
            f"| {seconds:.0f} |"
        )
    return "\n".join(lines)


def _rows(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| case | density | known | churn | values | bytes | bits a non-zero | of entropy | to CSR | to dense "
        "| MB/s | first MB/s | memory |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        churn = "" if r["churn"] is None else f"{100 * r['churn']:.1f} %"
        size = r["bytes"]
        lines.append(
            f"| {r['case']} | {r['density']:.4g} | {r['known']} | {churn} | {r['values']} | {size:,} | "
            f"{r['bits_per_nonzero']:.2f} | {size / r['entropy_bytes']:.3f} | {r['csr_bytes'] / size:.2f}x | "
            f"{r['dense_bytes'] / size:.1f}x | {r['encode_mb_s']:.0f}, {r['decode_mb_s']:.0f} | "
            f"{r['first_encode_mb_s']:.0f}, {r['first_decode_mb_s']:.0f} | "
            f"{r['encode_memory']:.2f}, {r['decode_memory']:.2f} |"
        )
    return "\n".join(lines)


def _beside(rows: list[dict[str, Any]]) -> str:
    lines = ["| | bytes | MB/s out | in | relative error | non-zeros that stay |", "|---|---|---|---|---|---|"]
    for r in rows:
        lost = [f"{r['error']:.2g}", f"{100 * r['kept']:.0f} %"] if "error" in r else ["0", "100 %"]
        cells = [r["codec"], f"{r['bytes']:,}", f"{r['encode_mb_s']:.0f}", f"{r['decode_mb_s']:.0f}", *lost]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
