"""A table as plain data, which every form is written from: cells of lines, spans, a caption and notes.

A place that a cell above or to the left covers is None.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

LONGEST = 72
"""Letters of a text from outside that a table shows."""


@dataclass(frozen=True)
class CellLine:
    """A line of a cell: as a paper prints it (plain), ours, or a remark (soft); then marks, digits raised."""

    text: str
    role: Literal["plain", "ours", "soft"] = "plain"
    marks: tuple[str, ...] = ()


@dataclass(frozen=True)
class TableCell:
    """A cell, and how many rows and columns it covers."""

    lines: tuple[CellLine, ...] = ()
    rows: int = 1
    columns: int = 1


Places: TypeAlias = tuple[TableCell | None, ...]


@dataclass(frozen=True)
class TableGrid:
    """A table: rows of its head and body, of which the first ``stubs`` columns name the row."""

    caption: str
    head: tuple[Places, ...]
    body: tuple[Places, ...]
    stubs: int
    notes: tuple[str, ...] = ()


def text_cell(*texts: str) -> TableCell:
    """Return a cell of plain lines; without one it is empty."""
    return TableCell(tuple(map(CellLine, filter(None, texts))))


def shorten(text: str) -> str:
    """Return a text from outside as one printable line of bounded length."""
    line = "".join(letter if letter.isprintable() else " " for letter in text)
    return line if len(line) <= LONGEST else line[: LONGEST - 1] + "…"


def merge_stubs(rows: Sequence[tuple[str, ...]]) -> list[Places]:
    """Return the cells that name rows, one cell for neighbours that agree in it and in all to its left."""

    def place(i: int, j: int) -> TableCell | None:
        own = rows[i][: j + 1]
        if i and rows[i - 1][: j + 1] == own:
            return None
        end = next((k for k in range(i, len(rows)) if rows[k][: j + 1] != own), len(rows))
        return TableCell((CellLine(own[-1]),), rows=end - i)

    return [tuple(place(i, j) for j in range(len(row))) for i, row in enumerate(rows)]


def merge_titles(titles: Sequence[tuple[str, ...]]) -> tuple[Places, ...]:
    """Return the rows of a head, from the outer to the inner titles of every column; fewer titles span the rest."""
    levels = max(map(len, titles))

    def place(level: int, j: int) -> TableCell | None:
        own, inner = titles[j], level == len(titles[j]) - 1
        if level >= len(own) or (not inner and j and titles[j - 1][: level + 1] == own[: level + 1]):
            return None
        same = (k for k in range(j, len(titles)) if titles[k][: level + 1] != own[: level + 1])
        columns = 1 if inner else next(same, len(titles)) - j
        return TableCell((CellLine(own[level]),), rows=levels - level if inner else 1, columns=columns)

    return tuple(tuple(place(level, j) for j in range(len(titles))) for level in range(levels))
