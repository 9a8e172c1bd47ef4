"""Rows of measurements in a JSON file, each with the machine that it was measured on."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a file; none where there is no file yet."""
    rows: list[Row] = json.loads(path.read_text()) if path.exists() else []
    return rows


def without(rows: list[Row], identity: Row) -> list[Row]:
    """Return the rows that differ from ``identity`` in one of its fields."""
    return [row for row in rows if not identity.items() <= row.items()]


def hardware(rows: Iterable[Row]) -> str:
    """Return the hardware, the versions and the clock of rows, in one line."""
    return "; ".join(dict.fromkeys(f"{row['machine']} ({row['clock']})" for row in rows))
