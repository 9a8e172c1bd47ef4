"""Tables of comma-separated values: numbers, categories, classes and owners by the names of columns."""

from __future__ import annotations

import csv
import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedsieve.data.constructors.rows import Rows, with_owner
from fedsieve.types import InputError

Table = dict[str, list[str]]
"""Texts by column."""


def rows_of_tables(
    paths: Sequence[str | Path],
    x: Sequence[str] | None,
    y: str | Sequence[str],
    categorical: Collection[str] = (),
    client: str | None = None,
    delimiter: str = ",",
) -> list[Rows]:
    """Return the examples of each file: ``x`` are the inputs' columns, of None all but ``y`` and ``client``.

    An input is a number, or one of the values of a ``categorical`` column, as so many zeros and a one. A target is a
    number, or the name of a class; several targets are numbers. What is no numeric input stays a column, to partition
    by. Raises InputError.
    """
    tables = [_read(Path(path).expanduser(), delimiter) for path in paths]
    targets = [y] if isinstance(y, str) else [*y]
    owner = [] if client is None else [client]
    inputs = [name for name in tables[0] if name not in (*targets, *owner)] if x is None else [*x]
    for path, table in zip(paths, tables, strict=True):
        for name in (*inputs, *targets, *owner, *categorical):
            if name not in table:
                raise InputError(f"{path} has no column {name!r}: it has {', '.join(table)}")
    if odd := [name for name in categorical if name not in inputs]:
        raise InputError(f"column {odd[0]!r} is categorical, but no input: leave it out of categorical")
    if not inputs:
        raise InputError(f"{paths[0]} has no column left for the inputs: name them by x")
    values = {name: sorted({text for table in tables for text in table[name]}) for name in categorical}
    several = []
    for path, table in zip(paths, tables, strict=True):
        for name in (*targets, *owner, *categorical):
            if "" in table[name]:
                where = f"{path}: column {name!r}, row {table[name].index('') + 1}"
                raise InputError(f"{where}: a value is missing: fill it, or take the row out")
        blocks = [_block(f"{path}: column {name!r}", table[name], values.get(name)) for name in inputs]
        columns = {name: _values(texts) for name, texts in table.items() if name in categorical or name not in inputs}
        rows = Rows(torch.from_numpy(np.concatenate(blocks, 1)), _targets(str(path), table, targets), columns=columns)
        several.append(rows if client is None else with_owner(rows, client, _values(table[client])))
    return several


def _block(what: str, texts: list[str], values: list[str] | None) -> NDArray[np.float32]:
    """Return a column as inputs, float32 [n, 1], or of a category [n, its values]."""
    if values is None:
        return _numbers(what, texts)[:, None]
    return np.array([[text == value for value in values] for text in texts], np.float32)


def _numbers(what: str, texts: list[str]) -> NDArray[np.float32]:
    numbers = np.empty(len(texts), np.float32)
    for i, text in enumerate(texts):
        try:
            numbers[i] = float(text)
        except ValueError:
            remedy = "fill it" if not text else "declare the column categorical, or leave it out of x"
            raise InputError(f"{what}, row {i + 1}: {text!r} is no number: {remedy}") from None
        if not np.isfinite(numbers[i]):
            raise InputError(f"{what}, row {i + 1}: {text!r} is not finite: fill it, or take the row out")
    return numbers


def _targets(path: str, table: Table, names: list[str]) -> Any:
    """Return targets: of one column classes where it holds whole numbers or texts, else float32; several as float32."""
    if len(names) == 1:
        values = _values(table[names[0]])
        return values if values.dtype.kind == "U" else torch.from_numpy(values)
    return torch.from_numpy(np.stack([_numbers(f"{path}: column {n!r}", table[n]) for n in names], 1))


def _values(texts: list[str]) -> NDArray[Any]:
    """Return a column as int64 where all are whole numbers, else as float32 where all are numbers, else as texts."""
    if all(re.fullmatch(r"[+-]?[0-9]{1,18}", text) for text in texts):
        return np.array([int(text) for text in texts], np.int64)
    try:
        numbers = np.array([float(text) for text in texts], np.float32)
    except ValueError:
        return np.array(texts, str)
    return numbers if np.isfinite(numbers).all() else np.array(texts, str)


def _read(path: Path, delimiter: str) -> Table:
    """Return a file's columns by the names in its first line. Raises InputError."""
    with _one_line(path), path.open(newline="", encoding="utf-8-sig") as file:
        lines = csv.reader(file, delimiter=delimiter, strict=True)
        header = [name.strip() for name in next(lines, [])]
        if len({*header}) < len(header) or not all(header):
            raise ValueError("its first line must name every column, each by another name")
        table: Table = {name: [] for name in header}
        columns = [*table.values()]
        for row in lines:
            if row and len(row) != len(header):
                raise ValueError(f"line {lines.line_num} has {len(row)} columns, the first {len(header)}")
            for column, text in zip(columns, row, strict=False):
                column.append(text.strip())
    if not table or not columns[0]:
        raise InputError(f"{path} holds no row: the first line names the columns, each other is an example")
    return table


@contextmanager
def _one_line(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{path} cannot be read ({error.strerror or error}): name a file of comma-separated values"
        ) from None
    except (ValueError, TypeError, csv.Error) as error:
        raise InputError(f"{path} is no table of comma-separated values ({error}): correct it") from None
