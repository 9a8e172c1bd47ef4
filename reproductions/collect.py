"""Gather finished runs of published rows, and set them beside the papers' numbers.

    python reproductions/collect.py RUN_DIR...    (take these runs into PAPER/results/)
    python reproductions/collect.py RUN_DIR=PATH.jsonl   (keep any other run as PATH.jsonl, below this folder)
    python benchmarks/readme.py                   (write the tables into the pages)

A run counts as a row of a paper's table if it is that row's recipe and settings, whatever its seed and how often it was
tested. Each result is a file of lines: the first says what ran where, each further one is a round.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from fedsieve.engine.federation import described
from fedsieve.recipes.papers import Published, published
from fedsieve.runs.record import read_rows
from fedsieve.runs.units import format_ratio

HERE = Path(__file__).parent
KEPT = ("round", "accuracy", "density", "loss", "bytes_up", "bytes_down", "bytes_dense_up", "bytes_dense_down")
MEASURED = ("mismatch", "accuracy_pruned", "saved_bytes", "saved_nonzero")


def take(folder: Path, out: Path | None = None) -> Path:
    """Copy what matters of a run directory into the results of its paper, or to ``out``, and return the file."""
    about = json.loads((folder / "run.json").read_text())
    row, run = row_of(about["run"]), about.pop("run")
    if row is None and out is None:
        sys.exit(f"{folder} is no row of a published table")
    known = {"row": row.name, "command": row.command} if row else {}
    if out is None and row:
        out = HERE / paper_of(row) / "results" / f"{row.name.replace('/', '-')}-seed{run['seed']}.jsonl"
    assert out is not None
    out.parent.mkdir(parents=True, exist_ok=True)
    rows = read_rows(folder)
    head = {**known, "seed": run["seed"], "rounds": run["rounds"], **about, "clients": len(rows[-1]["clients"])}
    lines = [head, *({n: r[n] for n in (*KEPT, *MEASURED) if n in r} for r in rows)]
    out.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return out


def row_of(run: dict[str, Any]) -> Published | None:
    """Return the published row that a run, as its run.json describes it, is."""
    plain = {**run, "seed": 0, "evaluate_every": 1}
    return next((row for row in published() if json.loads(json.dumps(described(row.run()))) == plain), None)


def paper_of(row: Published) -> str:
    """Return the folder of the paper that a row stands in."""
    return row.table.split("_")[0]


def table(paper: str) -> str:
    """Return all results of a paper beside its numbers."""
    found: dict[str, list[list[dict[str, Any]]]] = {}
    for path in sorted((HERE / paper / "results").glob("*.jsonl")):
        head, *rows = [json.loads(line) for line in path.read_text().splitlines()]
        found.setdefault(head["row"], []).append([head, *rows])
    lines = [
        "| row | run | rounds | paper, % | ours, % (seeds) | difference | density | upload, kB | than dense | down |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    known = {row.name: row for row in published()}
    order = {name: i for i, name in enumerate(known)}
    lines += [_line(known[name], found[name]) for name in sorted(found, key=order.__getitem__)]
    return "\n".join(lines)


def reached(path: str, t: int) -> str:
    """Return the accuracy in round ``t`` of the results in a file below this folder."""
    return f"{100 * _row(path, t)['accuracy']:.2f} %"


def mismatch(path: str, t: int) -> str:
    """Return the mask mismatch in round ``t`` of the results in a file below this folder."""
    return f"{_row(path, t)['mismatch']:.2g}"


def _row(path: str, t: int) -> dict[str, Any]:
    rows = [json.loads(line) for line in (HERE / path).read_text().splitlines()]
    return next(row for row in rows[1:] if row["round"] == t)


def _line(row: Published, runs: list[list[dict[str, Any]]]) -> str:
    ends = [100 * next(r["accuracy"] for r in reversed(rows) if r["accuracy"] is not None) for _, *rows in runs]
    head, *rows = runs[0]
    trained = [r for r in rows if r["round"] > 0]
    sums = {name: sum(r[name] for r in trained) for name in KEPT if name.startswith("bytes")}
    spread = f" ± {stdev(ends):.2f}" if len(ends) > 1 else ""
    paper = f"{row.accuracy:.2f}" + (f" ± {row.std:.2f}" if row.std is not None else "")
    tested = [r["round"] for r in trained if r["accuracy"] is not None]
    done = f"{tested[-1]} of {head['rounds']}"
    seeds = ", ".join(str(head["seed"]) for head, *_ in runs)
    cells = [
        row.name,
        f"`{row.recipe} {' '.join(row.settings)}`",
        done,
        paper + (" (a variant)" if row.variant else ""),
        f"{mean(ends):.2f}{spread} ({seeds})",
        f"{mean(ends) - row.accuracy:+.2f}" if tested[-1] == head["rounds"] else "-",
        f"{100 * trained[-1]['density']:.1f} %",
        f"{sums['bytes_up'] / len(trained) / head['clients'] / 1e3:.1f}",
        format_ratio(sums["bytes_dense_up"], sums["bytes_up"]),
        format_ratio(sums["bytes_dense_down"], sums["bytes_down"]),
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    for name in sys.argv[1:]:
        folder, _, path = name.rpartition("=") if name.endswith(".jsonl") else (name, "", "")
        print(take(Path(folder), HERE / path if path else None))
