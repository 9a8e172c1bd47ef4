"""What sparsity saves in time and memory: the tables of docs/benchmarks/performance.md.

Claim: the least ratios that stand in ``PLAN`` beside each row, on two cores, against the best of dense PyTorch in fp32
(both layouts; torch.compile changes nothing: `fedsieve bench step --compile`). n: medians of 7 undisturbed samples or
more, all variants in turns in one process, of three processes each variant's best (``fedsieve.cli.bench``). Hardware,
versions and samples stand in each row of benchmarks/results/performance.json. A row that is there for
this machine and these versions is not measured again, unless it rests on fewer samples.

    scripts/bench             (an hour on a quiet machine, and the runs of benchmarks/step.py: some hours)
    scripts/bench --again     (measure anew what is there)
    scripts/bench --more      (let three more processes measure what is there: each variant's best of all counts)
    scripts/bench --quick     (some minutes, few samples; nothing is kept, nothing is run)
    scripts/bench swat infer  (only these tables; runs are the table of benchmarks/step.py)
    scripts/bench --tokens    (transformers: benchmarks/tokens.py)
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import generation
import roof
import step as runs
import tokens
import torch

from fedsieve.cli.bench.inference import measure_inference
from fedsieve.cli.bench.measurement import WALL, Effort, fastest, machine, ratio
from fedsieve.cli.bench.step import dense_peak, measure_step, sparse_peak
from fedsieve.cli.bench.workload import Workload, instruction_set
from fedsieve.kernels import unavailable_reason

RESULTS = Path(__file__).parent / "results" / "performance.json"
FULL, QUICK = {"samples": 7, "seconds": 40.0, "processes": 3}, {"samples": 2, "seconds": 10.0}


@dataclass(frozen=True)
class Line:
    """A row of a table: what is measured, and the ratio to dense fp32 that is wanted at least, and aimed at."""

    case: Workload
    least: float | None = None
    aim: float | None = None

    def named(self) -> dict[str, Any]:
        """Return the case as results name it: none is of a trained model."""
        later = {"recipe": "", "unit": 1} | ({} if self.case.rule == "swat" else {"period": 1})
        return {name: value for name, value in asdict(self.case).items() if name not in later or value != later[name]}


PLAN: dict[str, list[Line]] = {
    "frozen": [
        Line(Workload(sparsity=0.90), 4.6, 5),
        Line(Workload(sparsity=0.95), 7.6, 8.3),
        Line(Workload(sparsity=0.98), 12, 13.5),
        Line(Workload(sparsity=0.99), 15, 17),
    ],
    "bf16": [
        Line(Workload(sparsity=0.90, batch=32, storage="bf16"), 6),
        Line(Workload(sparsity=0.95, batch=32, storage="bf16"), 10),
        Line(Workload(sparsity=0.98, batch=32, storage="bf16"), 16),
        Line(Workload(sparsity=0.99, batch=32, storage="bf16"), 20),
    ],
    "swat": [
        Line(Workload(sparsity=0.90, rule="swat"), 2.9, 3.3),
        Line(Workload(sparsity=0.95, rule="swat"), 4.2, 4.8),
        Line(Workload(sparsity=0.90, rule="swat", period=10)),
        Line(Workload(sparsity=0.95, rule="swat", period=10)),
    ],
    "units": [
        Line(Workload(sparsity=0.90, unit=8), 6, 6.5),
        Line(Workload(sparsity=0.95, unit=8), 9.5, 11),
        Line(Workload(sparsity=0.98, unit=8), 14, 17),
        Line(Workload(sparsity=0.99, unit=8), 17, 20),
    ],
    "small": [Line(Workload("leaf_cnn", sparsity=0.95), 5), Line(Workload("linear", sparsity=0.95), 12)],
    "infer": [Line(Workload(sparsity=0.95, batch=n), 6) for n in (1, 16, 32)],
    "memory": [
        Line(Workload(sparsity=0.95, batch=32), 3),
        Line(Workload(sparsity=0.95, batch=32, storage="bf16"), 6),
    ],
    "erk": [Line(Workload(sparsity=s, budget="erk")) for s in (0.90, 0.95, 0.98, 0.99)],
}
TITLES = {
    "frozen": "ResNet-18, a whole training step on a frozen mask, batch 16, fp32",
    "bf16": "ResNet-18, a whole training step on a frozen mask, batch 32, bf16 storage",
    "swat": "ResNet-18, a whole training step by SWAT (ZeroFL's local training), batch 16, fp32",
    "units": "ResNet-18 as in the first table, but on masks that units of 8 output channels share",
    "small": "LEAF CNN, all policy layers sparse, and its fc1 (3136 to 2048) alone: a training step, batch 16, fp32",
    "infer": "ResNet-18, inference, fp32",
    "memory": "ResNet-18, peak memory of a training step, batch 32",
    "erk": "ResNet-18 as in the first table, but the layers' densities by Erdos-Renyi-kernel",
}


TIMES = {
    "multiply-adds": "density_per_multiply_add",
    "sparse, ms": "ms_sparse",
    "dense fp32, ms": "ms_dense_fp32",
    "dense bf16, ms": "ms_dense_bf16",
    "to fp32": "ratio_fp32",
    "wanted": "least",
    "aim": "aim",
    "to bf16": "ratio_bf16",
    "of roof": "share_of_roof",
    "samples (dropped)": "samples",
}
COLUMNS: dict[str, dict[str, str]] = {
    "frozen": {"sparsity": "sparsity"} | TIMES,
    "swat": {"sparsity": "sparsity", "period": "period"} | TIMES,
    "small": {"network": "model", "sparsity": "sparsity"} | TIMES,
    "infer": {"batch": "batch", "sparsity": "sparsity"} | TIMES,
    "memory": {
        "storage": "storage",
        "sparsity": "sparsity",
        "sparse, MB": "peak_mb_sparse",
        "dense fp32, MB": "peak_mb_dense",
        "dense bf16, MB": "peak_mb_dense_bf16",
        "to fp32": "ratio_fp32",
        "wanted": "least",
        "to bf16": "ratio_bf16",
    },
}
"""A table's columns, and the fields that they show."""


def memories(case: Workload, effort: Effort) -> dict[str, Any]:
    """Return the peaks of training steps in MB: dense in fp32 and by autocast, and the case's."""
    sparse = sparse_peak(case, effort.threads)
    dense, bf16 = (dense_peak(case.model, case.batch, effort.threads, kind) for kind in ("fp32", "bf16"))
    peaks = {"peak_mb_sparse": sparse, "peak_mb_dense": dense, "peak_mb_dense_bf16": bf16}
    return peaks | {"ratio_fp32": ratio(dense, sparse), "ratio_bf16": ratio(bf16, sparse)}


def measured(name: str, case: Workload, effort: Effort) -> dict[str, Any]:
    """Return the numbers of a row."""
    if name == "memory":
        return memories(case, effort)
    row = asdict((measure_inference if name == "infer" else measure_step)(case, effort))
    if row.pop("clock") != WALL:  # the tables are of undisturbed machines alone
        row |= dict.fromkeys((key for key in row if key.startswith(("ms_", "ratio_"))), None) | {"samples_kept": 0}
    return row


def circumstances(effort: Effort) -> dict[str, Any]:
    """Return what a row's numbers belong to."""
    return {"machine": machine(), "threads": effort.threads, "isa": instruction_set(), "fedsieve": version("fedsieve")}


def committed() -> list[dict[str, Any]]:
    """Return the rows that are there."""
    rows: list[dict[str, Any]] = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    return rows


def same(row: dict[str, Any], identity: dict[str, Any]) -> bool:
    """Return whether a row is of this table and case, on this machine and with these versions."""
    return all(row[key] == value for key, value in identity.items())


def table(name: str, rows: Iterable[dict[str, Any]]) -> str:
    """Return a table as the page shows it; dashes where a row has not been measured."""
    if name in ("runs", "roof"):
        return runs.table(runs.committed()) if name == "runs" else roof.table(roof.committed())
    by_case = {json.dumps(row["case"]): row for row in rows if row["table"] == name}  # the last one counts
    columns = COLUMNS.get(name, COLUMNS["frozen"])
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for line in PLAN[name]:
        row = by_case.get(json.dumps(line.named()), {}) | {"least": line.least, "aim": line.aim}
        cells = [shown(row | line.named(), key) for key in columns.values()]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def shown(row: dict[str, Any], key: str) -> str:
    """Return a field of a row as its cell."""
    if key == "samples":
        return f"{row['samples_kept']} ({row['samples_dropped']})" if "samples_kept" in row else "-"
    value = row.get(key)
    if value is None:
        return "-"
    if key in ("sparsity", "density_per_multiply_add", "share_of_roof"):
        return f"{100 * value:.3g} %"
    if key.startswith("ratio"):
        return f"{value:.1f}x"
    if key in ("least", "aim"):
        return f"{value:g}x"
    if isinstance(value, float):
        return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"
    return str(value)


def hardware(rows: Iterable[dict[str, Any]]) -> str:
    """Return the hardware and the versions of the rows, in one line."""
    lines = {f"{row['machine']}, {row['threads']} threads, kernels for {row['isa']}": None for row in rows}
    return "; ".join(lines) or "not measured yet"


def whole(row: dict[str, Any], effort: Effort) -> bool:
    """Return whether a row rests on as many samples as were wanted."""
    return int(row.get("samples_kept", effort.samples)) >= effort.samples


def joined(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Return one row of two: each variant's best process of both."""
    return new | fastest([new, old]) | {"processes": old["processes"] + new["processes"]}


def updated(rows: list[dict[str, Any]], identity: dict[str, Any], effort: Effort, more: bool) -> list[dict[str, Any]]:
    """Return the rows with one measured anew; or with ``more``, or where samples are wanting, measured again."""
    new = identity | measured(identity["table"], Workload(**identity["case"]), effort) | {"processes": effort.processes}
    for row in rows:
        if same(row, identity) and "ms_sparse" in row and (more or not whole(row, effort)):
            new = joined(row, new)
    return [row for row in rows if not same(row, identity)] + [new]


def main() -> None:
    """Measure what is not there yet, row by row, and print the tables."""
    if "--tokens" in sys.argv:
        sys.argv.remove("--tokens")
        tokens.main()
        generation.main()
        return
    quick, again, more = (f"--{word}" in sys.argv for word in ("quick", "again", "more"))
    tables = [word for word in sys.argv[1:] if not word.startswith("-")] or ["roof", *PLAN, "runs"]
    if unknown := set(tables) - {"roof", *PLAN, "runs"}:
        sys.exit(f"no table {', '.join(sorted(unknown))}; the tables are roof, {', '.join(PLAN)} and runs")
    effort = Effort(torch.get_num_threads(), **(QUICK if quick else FULL))  # type: ignore[arg-type]
    if why := unavailable_reason():
        print(f"no sparse kernels here, so only dense PyTorch is measured: {why}", file=sys.stderr)
    if not quick and "roof" in tables:
        roof.main()
    rows = [] if quick else committed()
    for name, lines in PLAN.items():
        if name not in tables:
            continue
        for line in lines:
            identity = {"table": name, "case": line.named()} | circumstances(effort)
            if again or more or not any(same(row, identity) and whole(row, effort) for row in rows):
                print(f"{name}: {line.case}", file=sys.stderr)
                rows = updated(rows, identity, effort, more)
                if not quick:
                    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
        print(
            f"\n{TITLES[name]} ({hardware(r for r in rows if r['table'] == name)})\n\n{table(name, rows)}", flush=True
        )
    if not quick and "runs" in tables:
        runs.main()


if __name__ == "__main__":
    main()
