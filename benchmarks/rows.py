"""Results in JSON files, rows of measurements among them, and tables of them in Markdown."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fedsieve.data.storage import write

Row = dict[str, Any]
"""One measurement, with the machine that it was made on."""


def read_results(path: Path) -> dict[str, Any]:
    """Return the results in a file; none where there is no file yet."""
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return results


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a file; none where there is no file yet."""
    rows: list[Row] = json.loads(path.read_text()) if path.exists() else []
    return rows


def write_results(path: Path, results: dict[str, Any] | list[Row]) -> None:
    """Write results or rows so that a stop leaves the old file or the new one."""
    write(path, (json.dumps(results, indent=1) + "\n").encode())


def without(rows: list[Row], identity: Row) -> list[Row]:
    """Return the rows that differ from ``identity`` in one of its fields."""
    return [row for row in rows if not identity.items() <= row.items()]


def hardware(rows: Iterable[Row]) -> str:
    """Return the hardware, the versions and the clock of rows, in one line."""
    return "; ".join(dict.fromkeys(f"{row['machine']} ({row['clock']})" for row in rows))


def markdown(header: str, rows: Iterable[Iterable[object]]) -> str:
    """Return a table in Markdown: its header, a line ``| a | b |``, and the cells of each row."""
    lines = (f"| {' | '.join(map(str, cells))} |" for cells in rows)
    return "\n".join([header, "|---" * (header.count("|") - 1) + "|", *lines])
