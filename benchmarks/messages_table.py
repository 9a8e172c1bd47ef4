"""The tables of docs/benchmarks/messages.md, from benchmarks/results/wire.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import rounding

RESULTS = Path(__file__).parent / "results" / "wire.json"


def table(which: str) -> str:
    """Return the rows, the comparison, the hardware they were measured on, or what fuzzing and rounding came to."""
    if which == "asked":
        return _asked(json.loads(RESULTS.read_text())["rows"])
    if which == "fuzz":
        return _fuzz(json.loads((RESULTS.parent / "fuzz.json").read_text())["slices"])
    if which == "units":
        return _units(json.loads((RESULTS.parent / "wire_units.json").read_text())["rows"])
    if which == "rounding":
        return rounding.table()
    if not RESULTS.exists():
        return "not measured yet"
    results: dict[str, Any] = json.loads(RESULTS.read_text())
    if which == "hardware":
        versions = ", ".join(f"{name} {v}" for name, v in results["versions"].items())
        return f"{results['machine']}, {versions}; one thread."
    return _beside(results["beside"]) if which == "beside" else _rows(results["rows"])


def _units(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| model | density | unit | message, kB | positions, kB | bits each | than dense | out, in, looking, ms |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        size, positions = row["bytes"], row["positions"]
        cells = [row["model"], row["density"], row["unit"], f"{size / 1e3:.1f}", f"{positions / 1e3:.1f}"]
        cells += [f"{8 * positions / row['nonzeros']:.2f}", f"{row['dense_bytes'] / size:.1f}x less"]
        cells.append(", ".join(f"{row[f'{what}_ms']:.2g}" for what in ("encode", "decode", "look")))
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def _asked(rows: list[dict[str, Any]]) -> str:
    def row_of(case: str, known: str, values: str = "f32", density: float = 0) -> dict[str, Any]:
        same = (r for r in rows if (r["case"], r["known"], r["values"]) == (case, known, values))
        return next(r for r in same if not density or abs(r["density"] - density) < 1e-4)

    def ratio(row: dict[str, Any]) -> str:
        return f"{row['dense_bytes'] / row['bytes']:.1f}x"

    def floor(row: dict[str, Any]) -> str:
        return f"{row['dense_bytes'] / (3 * 8 * row['bytes'] / row['bits_per_nonzero'] + row['position_bytes']):.1f}x"

    plain, base, top = "manifest", "manifest, base", "trained, top weights"
    zerofl, flash, powered = (next(r["case"] for r in rows if r["case"].startswith(n)) for n in ("Zero", "FLA", "Spa"))
    sparse = [r for r in rows if r["case"] == top and r["values"] == "f32" and r["density"] < 0.11]
    lines = ["| asked | found | sign, mantissa and positions alone |", "|---|---|---|"]
    for name, case, known, aim in (
        (zerofl, zerofl, plain, "17x"),
        (f"{zerofl}, base known", zerofl, base, "23x"),
        (flash, flash, plain, "24x"),
        (powered, powered, plain, "440x"),
    ):
        row = row_of(case, known)
        lines.append(f"| {name}: {aim} | {ratio(row)} | {floor(row) if known == plain else ''} |")
    bf16 = [ratio(row_of(top, known, "bf16", 0.05)) for known in (plain, base)]
    lines.append(f"| bf16 at density .05: 60x | {bf16[0]}; base known, {bf16[1]} | |")
    worst = [max(r["bytes"] / r["entropy_bytes"] for r in rows if r["case"] == top and r["known"] == known and
                 r["values"] == "f32") for known in (plain, base)]  # fmt: skip
    lines.append(
        f"| whole message at most 1.02 of its entropy, .3 to .001 | {worst[0]:.3f}; base known, {worst[1]:.3f} | |"
    )
    for what, aim in (("encode", 500), ("decode", 2000)):
        keys = ((plain, f"{what}_mb_s"), (base, f"{what}_mb_s"), (base, f"first_{what}_mb_s"))
        slow = [min(r[key] for r in sparse if r["known"] == known) for known, key in keys]
        speeds = f"{slow[0]:.0f}; base known, {slow[1]:.0f}, the first message {slow[2]:.0f}"
        lines.append(f"| {what} {aim} MB/s at densities .1 and below | {speeds} | |")
    memory = max(max(r["encode_memory"], r["decode_memory"]) for r in rows)
    lines.append(f"| memory at most 1.5 dense models | {memory:.2f} | |")
    return "\n".join(lines)


def _fuzz(slices: list[dict[str, Any]]) -> str:
    lines = [
        "| model, elements | back end | mutations | taken | refused | peak memory, x the model | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for model, back_end in dict.fromkeys((row["model"], row["back_end"]) for row in slices):
        rows = [row for row in slices if (row["model"], row["back_end"]) == (model, back_end)]
        accepted, refused, seconds = (sum(row[name] for row in rows) for name in ("taken", "refused", "seconds"))
        numbers = f"{accepted + refused:,} | {accepted:,} | {refused:,} | {max(row['memory'] for row in rows):.2f}"
        lines.append(f"| {model} | {back_end} | {numbers} | {seconds:.0f} |")
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
