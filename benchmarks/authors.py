"""Rows of the papers as their authors' code runs them: what the differences of docs/explanation/authors.md amount to.

Claim: on MNIST at density .05 (LDA 1.0, one seed, all 400 rounds) the softmax before the loss takes PDST below what is
printed, and all that the code does otherwise brings it above again, nearer than the paper's protocol does.

    fedsieve run ...                               as `fedsieve list papers` says, with all or some authors' settings
    python benchmarks/authors.py ROW RUN_DIR...    adds finished runs to results/authors.json; then python readme.py
"""

from __future__ import annotations

import sys
from pathlib import Path

from rows import read_rows, write_results

from fedsieve.recipes.papers import published
from fedsieve.runs.comparison import FREE, settings_of
from fedsieve.runs.record import flatten_settings, read_record

RESULTS = Path(__file__).parent / "results" / "authors.json"


def added(row: str, folder: Path) -> dict[str, object]:
    """Return a finished run of a row with what of its settings is not the row's."""
    record, (one,) = read_record(folder), [one for one in published() if one.name == row]
    own = {name: value for name, value in settings_of(one.run()).items() if name not in FREE}
    here = {name: value for name, value in flatten_settings(record.manifest["run"]).items() if name not in FREE}
    changes = {name: value for name, value in here.items() if own.get(name) != value}
    everything = {setting.split("=")[0] for setting in one.authors}
    if not record.whole or not changes or not changes.keys() <= everything:
        raise SystemExit(f"{folder} is no finished run of {row} that differs in the authors' settings alone")
    whole, seed = changes.keys() == everything, record.manifest["run"]["seed"]
    return {"row": row, "changes": changes, "all": whole, "seed": seed, "accuracy": record.summary["accuracy"]}


def table() -> str:
    """Return the committed runs as a Markdown table, each beneath the row that it is of."""
    rows = {row.name: row for row in published()}
    lines = ["| row | printed, % | run | accuracy, % (seed) |", "|---|---|---|---|"]
    for one in read_rows(RESULTS):
        row, what = rows[one["row"]], ", ".join(f"`{name}={value}`" for name, value in one["changes"].items())
        way = "as the authors' code" if one["all"] else f"{what} alone"
        number = f"{100 * one['accuracy']:.2f} ({one['seed']})"
        lines.append(
            f"| {row.name}: `{row.command.removeprefix('fedsieve run ')}` | {row.printed} | {way} | {number} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    name, *folders = sys.argv[1:]
    every = [*read_rows(RESULTS), *(added(name, Path(folder)) for folder in folders)]
    every.sort(key=lambda one: (int(one["row"].rpartition("/")[2]), not one["all"]))
    write_results(RESULTS, every)
