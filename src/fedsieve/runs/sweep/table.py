"""The results of a sweep: one row a cell, over its seeds, beside what the papers print of the very same run.

Accuracies are those of the deployed models, in percent, and a spread is the standard deviation of the sample. Bytes are
those of training, a warm-up aside, and work is that of all rounds, both summed over the cell's finished runs; the
density is the mean of their last rounds'.
"""

from __future__ import annotations

import statistics
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from fedsieve.data.storage import write, write_json
from fedsieve.runs.comparison import Comparison, compare_published, settings_of
from fedsieve.runs.record import number, read_record
from fedsieve.runs.sweep.grid import Cell, Grid, recipe_label
from fedsieve.runs.units import format_ratio

MEASURES = ("recipe", "work", "density")
"""Columns of the table whose titles could be a setting's short name: its own column is titled by the whole one."""


@dataclass(frozen=True)
class CellResult:
    """A cell's results; None where nothing is known yet. ``seeds`` and ``rounds`` have an entry a seed."""

    cell: Cell
    seeds: tuple[float | None, ...]
    rounds: tuple[int, ...]
    mb_up: float | None
    """Of one client's upload in one round, in MB of 10^6 bytes."""
    factor: float | None
    """How many times less than dense federated averaging sends up."""
    work: float | None
    """The share of dense training's multiply-adds."""
    density: float | None
    papers: tuple[Comparison, ...] = ()
    """The published rows that the cell is, or else the nearest one, with what differs."""
    metric: str = "accuracy"
    """The task's first metric: accuracy, in percent, or another as it is."""

    @property
    def mean(self) -> float | None:
        """The metric's mean over the seeds that are there."""
        values = [value for value in self.seeds if value is not None]
        return statistics.fmean(values) if values else None

    @property
    def std(self) -> float | None:
        """The standard deviation of the sample, from two seeds on."""
        values = [value for value in self.seeds if value is not None]
        return statistics.stdev(values) if len(values) > 1 else None

    @property
    def whole(self) -> bool:
        """Whether every seed has run to its last round."""
        return all(t == self.cell.run.rounds for t in self.rounds)


def show_table(grid: Grid, folder: Path, *, save: bool = False, console: Console | None = None) -> None:
    """Print the table of a sweep, and ``save`` it in the directory too."""
    rows = cell_results(grid, folder)
    if save:
        write_json(folder / "results.json", {"cells": [as_json(row) for row in rows]})
        write(folder / "table.md", markdown(rows).encode())
    console = console or Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 1000)
    wide = _wide(rows)
    fits = console.measure(wide, options=console.options.update(width=10_000)).maximum <= console.width
    console.print(wide if fits else _narrow(rows))
    if note := _note(rows):
        console.print(note)
    console.print(f"{folder} holds the table (table.md, results.json) and the runs (fedsieve report {folder}/runs/*)")


def cell_results(grid: Grid, folder: Path) -> list[CellResult]:
    """Return the results of every cell, as far as its runs have got."""
    seeds = range(grid.seeds)
    return [_cell_result(cell, [cell.folder(seed, folder / "runs") for seed in seeds]) for cell in grid.cells]


def _cell_result(cell: Cell, folders: list[Path]) -> CellResult:
    runs = [read_record(folder) if (folder / "summary.json").exists() else None for folder in folders]
    whole = [run for run in runs if run and run.summary]
    rows = [row for run in whole for row in run.rows if row["round"] > 0]  # not a warm-up
    up, dense = (sum(number(row.get(name)) or 0.0 for row in rows) for name in ("bytes_up", "bytes_dense_up"))
    uploads = sum(len(row.get("clients") or ()) for row in rows)
    work, dense_work = (sum(run.final(f"multiply_adds{of}") or 0.0 for run in whole) for of in ("", "_dense"))
    densities = [value for run in whole if (value := run.final("density")) is not None]
    metric = next((next(iter(run.metrics)) for run in whole), "accuracy")
    values = [run.final(metric) if run else None for run in runs]
    scale = 100 if metric == "accuracy" else 1
    return CellResult(
        cell=cell,
        seeds=tuple(None if value is None else value * scale for value in values),
        rounds=tuple(int(run.rows[-1]["round"]) if run and run.summary else 0 for run in runs),
        mb_up=up / uploads / 1e6 if uploads else None,
        factor=dense / up if up else None,
        work=work / dense_work if dense_work else None,
        density=statistics.fmean(densities) if densities else None,
        papers=tuple(compare_published(settings_of(cell.run), runs)),
        metric=metric,
    )


def as_json(row: CellResult) -> dict[str, Any]:
    """Return a row as ``results.json`` holds it."""
    return {
        "recipe": row.cell.recipe,
        "settings": row.cell.settings,
        f"{row.metric}_mean": row.mean,
        f"{row.metric}_std": row.std,
        f"{row.metric}_seeds": list(row.seeds),
        "rounds": list(row.rounds),
        "rounds_planned": row.cell.run.rounds,
        "mb_up": row.mb_up,
        "times_less_than_dense": row.factor,
        "multiply_adds_share": row.work,
        "density": row.density,
        "paper": next((asdict(one.row) for one in row.papers if not one.differs), None),
        "difference": next((one.difference for one in row.papers), None),
        "papers": [_comparison_as_json(one) for one in row.papers],
    }


def _comparison_as_json(one: Comparison) -> dict[str, Any]:
    return {"row": one.row.name, "differs": one.differs, "difference": one.difference}


def columns(rows: list[CellResult]) -> dict[str, list[str]]:
    """Return the table's columns, by their titles; those that say nothing of any row are left out."""
    table = {"recipe": [recipe_label(row.cell.recipe) for row in rows]}
    cells = {name: row.cell for row in reversed(rows) for name in reversed(row.cell.swept)}
    for name in reversed(cells):
        whole = next((n for n in cells[name].settings if n.split(".")[-1] == name), name)
        table[whole if name in MEASURES else name] = [row.cell.swept.get(name, "-") for row in rows]
    for metric in dict.fromkeys(row.metric for row in rows):
        title, form = ("accuracy, %", ".2f") if metric == "accuracy" else (metric, ".4g")
        table[title] = [_mean(row.mean, row.std, form) if row.metric == metric else "-" for row in rows]
    forms = [".1f" if row.metric == "accuracy" else ".4g" for row in rows]
    seeds = [[_number(value, form) for value in row.seeds] for row, form in zip(rows, forms, strict=True)]
    table["each seed"] = [", ".join(each) for each in seeds]
    if not all(row.whole for row in rows):
        table["rounds run"] = [_rounds(row) for row in rows]
    table["MB up"] = [_number(row.mb_up, ".3g") for row in rows]
    table["than dense"] = [format_ratio(row.factor or 0, 1) or "-" for row in rows]
    table["work"] = [_number(row.work, ".1%") for row in rows]
    table["density"] = [_number(row.density, ".1%") for row in rows]
    if any(row.papers for row in rows):
        table["paper, %"] = ["; ".join(one.text for one in row.papers) or "-" for row in rows]
        table["difference"] = ["; ".join(_number(one.difference, "+.2f") for one in row.papers) or "-" for row in rows]
    return table


def markdown(rows: list[CellResult]) -> str:
    """Return the table as Markdown."""
    table = columns(rows)
    lines = [list(table), ["---"] * len(table), *zip(*table.values(), strict=True)]
    text = "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)
    return text + (f"\n{note}\n" if (note := _note(rows)) else "")


def _mean(mean: float | None, std: float | None, form: str = ".2f") -> str:
    """Return a mean and its standard deviation, or - for what is not known."""
    return "-" if mean is None else f"{mean:{form}} ± {_number(std, form)}"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


def _rounds(row: CellResult) -> str:
    few, many = min(row.rounds), max(row.rounds)
    return f"{few if few == many else f'{few}-{many}'}/{row.cell.run.rounds}"


def _note(rows: list[CellResult]) -> str:
    """Return what the table's words mean, where that is not plain."""
    fixed = (_fixed("All", rows, everywhere=True), _fixed("Methods that have it", rows, everywhere=False))
    lines = [line for line in fixed if line]
    if any(one.differs for row in rows for one in row.papers):
        lines.append("Where data or protocol are not a paper's, its column says what differs.")
    return " ".join(lines)


def _fixed(who: str, rows: list[CellResult], *, everywhere: bool) -> str:
    """Return the settings that are the same in all rows, or in those rows alone that have them."""
    every = [row.cell.settings for row in rows]
    names = dict.fromkeys(name for settings in every for name in settings)
    one = {n: {s[n] for s in every if n in s} for n in names if all(n in s for s in every) == everywhere}
    same = [f"{name}={value}" for name, (value, *more) in one.items() if not more]
    return f"{who} with {', '.join(same)}." if same else ""


def _wide(rows: list[CellResult]) -> Table:
    cells = columns(rows)
    table = Table(*(Column(title, no_wrap=True) for title in cells), box=None, pad_edge=False, header_style="bold")
    for line in zip(*cells.values(), strict=True):
        table.add_row(*line)
    return table


def _narrow(rows: list[CellResult]) -> Text:
    """Return the table for a narrow terminal: a paragraph a cell, whose first line names it."""
    text, table_columns = Text(), columns(rows)
    for i, row in enumerate(rows):
        values = {title.removesuffix(", %"): cells[i] for title, cells in table_columns.items()}
        text.append(f"{row.cell.label}\n", style="bold")
        text.append(f"  {row.metric} {values[row.metric]}{' %' * (row.metric == 'accuracy')} ({values['each seed']})")
        if "paper" in values:
            text.append(f", paper {values['paper']}, difference {values['difference']}")
        text.append("\n  ")
        if "rounds run" in values:
            text.append(f"{values['rounds run']} rounds, ")
        text.append(f"{values['MB up']} MB up, {values['than dense']} than dense, ")
        text.append(f"work {values['work']}, density {values['density']}\n")
    text.right_crop(1)
    return text
