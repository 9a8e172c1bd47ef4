"""Results of published rows made up for the tests of tables: of one seed, of several, of none, stale, of other data."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedsieve.engine.federation import described
from fedsieve.recipes.papers import Published
from fedsieve.recipes.papers.parts import PaperPart
from fedsieve.runs.comparison import compare_row
from fedsieve.runs.record import RunRecord
from fedsieve.runs.reproduction.results import RowResult


def record(row: Published, accuracy: float, seed: int = 0, about: Any = None, **summary: Any) -> RunRecord:
    """Return the kept result of a whole run of a row."""
    run = row.run()
    examples = {"name": "x", "version": row.says.version, "training": 0, "test": 0}
    for name, part in (("train", "training"), ("test", "test")):
        bounds = getattr(row.says, name)
        examples[part] = bounds[0] if bounds else 0
    own = json.loads(json.dumps(described(run))) | {"seed": seed}
    manifest = {"run": own, "dataset": examples, "recipe": row.recipe, "measure": []}
    manifest |= {"hardware": {"cpu": "CPU 1"}, "commit": "0123456789abcdef+"} | (about or {})
    end = {"round": run.rounds, row.reading.column: accuracy / 100}
    whole = {"rounds": run.rounds, "accuracy": accuracy / 100, **summary}
    return RunRecord(Path(f"{seed}.json"), manifest, [end], whole, [], None)


def result(row: Published, records: Sequence[RunRecord], stale: bool = False) -> RowResult:
    return RowResult(row, compare_row(row, records), tuple(records), stale)


def rows_of(part: PaperPart) -> list[Published]:
    return [row for row in part.runs if isinstance(row, Published)]


def every_kind(part: PaperPart, about: Any = None) -> list[RowResult]:
    """Return three seeds, one seed, none, one stale, one of fewer data, and rows that are not there."""
    rows = rows_of(part)
    few = {"dataset": {"version": "", "training": 300, "test": 10_000}}
    return [
        result(rows[0], [record(rows[0], value, s, about) for s, value in enumerate((98.0, 98.2, 98.4))]),
        result(rows[1], [record(rows[1], 98.5, about=about)]),
        result(rows[2], []),
        result(rows[3], [record(rows[3], 80.0, about=about)], stale=True),
        result(rows[4], [record(rows[4], 86.0, about=few | (about or {}))]),
    ]
