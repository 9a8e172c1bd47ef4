"""The results that are kept of a reproduced run: one file of kilobytes, from which tables, figures and pages are made.

    OUT/flash/results/flash_table2-14-seed0.json    ``run.json``, summary, and columns of the rounds
    OUT/runs/flash_table2-14-seed0/                 the run directory, with checkpoints and model: not for keeping

A column whose value never changes is written once. Numbers have six significant digits.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from fedsieve.data.storage import read_json, write
from fedsieve.recipes.papers import Published
from fedsieve.recipes.papers.arithmetic import arithmetic_version
from fedsieve.recipes.papers.parts import PaperPart
from fedsieve.runs.comparison import FREE, Comparison, compare_row, settings_of
from fedsieve.runs.record import RunRecord, flatten_settings, number, read_record
from fedsieve.runs.reproduction.cells import PaperCell, cells_of
from fedsieve.types import InputError

COLUMNS = (
    *("round", "accuracy", "accuracy_validation", "accuracy_pruned", "density", "loss", "bytes_up", "bytes_down"),
    *("bytes_dense_up", "bytes_dense_down", "csr_bytes_up", "steps"),
    *("kernels", "dense_because", "seconds", "cpu_seconds", "refused", "left_out", "mismatch", "layers"),
)
"""What is kept of a round."""
DIGITS = 6
MOVE = "move it away, or choose another --out"


@dataclass(frozen=True)
class RowResult:
    """A row of a table, with the runs of it that are there, by seed."""

    row: Published
    comparison: Comparison
    records: tuple[RunRecord, ...]
    stale: bool
    """Whether the arithmetic of the recipe has changed since one of the runs."""
    authors: tuple[RunRecord, ...] = ()
    """Runs of it as the authors' public code has it."""
    subset: tuple[RunRecord, ...] = ()
    """Runs of it on a part of its dataset."""


def result_path(out: Path, cell: PaperCell, seed: int) -> Path:
    """Return the file that a cell's result of one seed has in the directory ``out``."""
    return out / cell.name.split("_")[0] / "results" / f"{result_name(cell, seed)}.json"


def result_name(cell: PaperCell, seed: int) -> str:
    """Return what a cell's run of one seed is called: ``flash_table2-14-seed0``, ``flash_table2-14-authors-seed0``."""
    return "-".join(filter(None, [cell.name.replace("/", "-"), cell.variant, f"seed{seed}"]))


def kept_seeds(out: Path) -> list[int]:
    """Return the seeds that any result kept in ``out`` has."""
    names = (path.stem.rpartition("-seed")[2] for path in out.glob("*/results/*-seed*.json"))
    return sorted({int(name) for name in names if name.isdecimal()})


def keep_result(out: Path, cell: PaperCell, seed: int, folder: Path) -> Path:
    """Write what is kept of a finished run in ``folder``, and return the file. Raises InputError."""
    record = read_record(folder)
    path = result_path(out, cell, seed)
    _check_protocol(record, cell, seed, folder)
    if not record.whole:
        raise InputError(f"{folder} stands at round {record.last_round} of {cell.run.rounds}: let it go on first")
    manifest = {name: value for name, value in record.manifest.items() if name != "source"}
    head = {"row": cell.name, "seed": seed, "arithmetic": record.manifest.get("arithmetic", 1)}
    lines = [f'"{name}": {json.dumps(value)}' for name, value in head.items()]
    lines += [f'"{name}": {json.dumps(value)}' for name, value in (("run", manifest), ("summary", record.summary))]
    columns = _columns(record.rows)
    lines += ['"columns": {\n' + ",\n".join(f'"{n}": {json.dumps(v)}' for n, v in columns.items()) + "\n}"]
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, ("{\n" + ",\n".join(lines) + "\n}\n").encode())
    return path


def read_result(path: Path) -> RunRecord | None:
    """Return a kept result as a run, None where there is no file. Raises InputError."""
    remedy = "restore it, or remove it to run the cell again"
    content = read_json(path, remedy)
    if content is None:
        return None
    parts: list[Any] = [content.get(name) for name in ("run", "summary", "columns")]
    if not all(isinstance(part, dict) for part in parts):
        raise InputError(f"{path} is no result of a run: {remedy}")
    manifest, summary, columns = parts
    measure, rounds = manifest.get("measure"), columns.get("round")
    if not isinstance(measure, list) or not all(isinstance(name, str) for name in measure):
        raise InputError(f"{path} does not say what was measured: {remedy}")
    if not isinstance(rounds, list) or not rounds or not all(type(t) is int and 0 <= t < 10**9 for t in rounds):
        raise InputError(f"{path} names no rounds: {remedy}")
    if any(later <= t for t, later in pairwise(rounds)):
        raise InputError(f"{path} has its rounds out of order: {remedy}")
    varying = {name: values for name, values in columns.items() if isinstance(values, list)}
    if any(len(values) != len(rounds) for values in varying.values()):
        raise InputError(f"{path} has columns of several lengths: {remedy}")
    constant = {
        name: value["always"] for name, value in columns.items() if isinstance(value, dict) and "always" in value
    }
    rows = [constant | {name: values[i] for name, values in varying.items()} for i in range(len(rounds))]
    for row in rows:
        for name in ("accuracy", "accuracy_validation"):
            share = row.get(name)
            if share is not None and not 0 <= (value if (value := number(share)) is not None else -1) <= 1:
                raise InputError(f"{path} has an {name} of {share!r} in round {row['round']}: {remedy}")
    record = RunRecord(path, manifest | {"arithmetic": content.get("arithmetic")}, rows, summary, [], None)
    last = record.whole and record.final("rounds") == record.last_round
    if not last or record.final("accuracy") is None or rows[-1].get("accuracy") is None:
        raise InputError(f"{path} is no finished run that was tested at its end: {remedy}")
    return record


def result_of(out: Path, cell: PaperCell, seed: int) -> RunRecord | None:
    """Return the result of a cell that is kept in ``out``; None where there is none, or it was tested too seldom.

    Raises InputError for a file that is damaged, or the result of another protocol.
    """
    path = result_path(out, cell, seed)
    record = read_result(path)
    if record is None:
        return None
    _check_protocol(record, cell, seed, path)
    every = record.settings.get("evaluate_every", "1")
    often = every.isdecimal() and int(every) > 0 and cell.run.evaluate_every % int(every) == 0
    return record if often and {*cell.measure} <= {*record.manifest.get("measure", ())} else None


def is_stale(record: RunRecord) -> bool:
    """Tell whether the arithmetic of a run's recipe has changed since it ran."""
    return record.manifest.get("arithmetic") != arithmetic_version(record.recipe)


def row_results(out: Path, part: PaperPart, seeds: Sequence[int]) -> list[RowResult]:
    """Return the results of every published row of a table, as far as they are kept in ``out``. Raises InputError."""
    results: dict[str, RowResult] = {}
    for cell in cells_of(part):
        own, twin, fewer = cell.in_part(part), cell.as_authors(), cell.as_variant("subset", ())
        records = _results(out, own, seeds)
        authors = _results(out, twin.in_part(part), seeds) if twin else ()
        subset = _results(out, fewer.in_part(part), seeds)
        for row in own.rows:
            if isinstance(row, Published):
                stale = any(map(is_stale, records))
                results[row.name] = RowResult(row, compare_row(row, records), records, stale, authors, subset)
    return [results[row.name] for row in part.runs if row.name in results]


def _results(out: Path, cell: PaperCell, seeds: Sequence[int]) -> tuple[RunRecord, ...]:
    return tuple(record for seed in seeds if (record := result_of(out, cell, seed)))


def _check_protocol(record: RunRecord, cell: PaperCell, seed: int, where: Path) -> None:
    """Raise InputError, naming the first difference, unless a run was the cell's; a subset may have fewer clients."""
    if record.settings.get("seed") != str(seed):
        raise InputError(f"{where} is of seed {record.settings.get('seed')}, not {seed}: {MOVE}")
    free = {*FREE, "task.clients"} if cell.variant == "subset" else {*FREE}
    there = {name: value for name, value in flatten_settings(record.manifest.get("run")).items() if name not in free}
    here = {name: value for name, value in settings_of(cell.run).items() if name not in free}
    for name in dict.fromkeys((*here, *there)):
        if there.get(name) != here.get(name):
            difference = f"{name} {there.get(name)}, not {here.get(name)}"
            raise InputError(f"{where} is of another protocol than {cell.name} ({difference}): {MOVE}")


def _columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    columns: dict[str, Any] = {}
    for name in COLUMNS:
        values = [_short(row.get(name)) for row in rows]
        if any(value not in (None, []) for value in values):
            same = name != "round" and all(value == values[0] for value in values)
            columns[name] = {"always": values[0]} if same else values
    return columns


def _short(value: Any) -> Any:
    """Return a value with its floats to six significant digits."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {name: _short(part) for name, part in value.items()}
    return [_short(part) for part in value] if isinstance(value, list) else value
