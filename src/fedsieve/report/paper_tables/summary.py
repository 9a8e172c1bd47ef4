"""How many of the papers' numbers our runs fill, agree with or miss; and the sentences that say why they miss."""

from __future__ import annotations

import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from fedsieve.data.storage import read_file
from fedsieve.recipes.papers import Published, published
from fedsieve.recipes.papers.parts import PAPERS, PaperPart, paper_parts
from fedsieve.report.paper_tables.grid import Places, TableGrid, merge_stubs, merge_titles, text_cell
from fedsieve.runs.record import RunRecord
from fedsieve.runs.reproduction.cells import PaperCell, cells_of
from fedsieve.runs.reproduction.results import RowResult, kept_seeds, result_of, row_results
from fedsieve.types import InputError

COUNTS = (
    *("printed", "filled", "in agreement", "above", "below", "not judged", "stale"),
    *("explained", "other data or protocol"),
)
"""What is counted of printed numbers. Filled: run with its data and protocol, which is the sum of the five after it;
explained: of those above or below."""
VERDICTS = {"within": "in agreement", "above": "above", "below": "below", "not judged": "not judged"}
CAUSES = "causes.toml"
WITH_MASKS = "zerofl-3"
"""The figure that shows masks, which run directories alone hold."""


def numbered_parts() -> list[PaperPart]:
    """Return the tables and figures that print numbers of whole runs."""
    return [part for part in paper_parts() if any(isinstance(row, Published) for row in part.runs)]


def all_results(out: Path) -> dict[PaperPart, list[RowResult]]:
    """Return what is kept in a directory of every printed number, of all seeds. Raises InputError."""
    seeds = kept_seeds(out)
    return {part: row_results(out, part, seeds) for part in numbered_parts()}


def figure_records(out: Path) -> dict[PaperPart, dict[PaperCell, list[RunRecord]]]:
    """Return what is kept in a directory of every figure of which anything is: by cell, the runs of all seeds.

    What needs the masks of run directories (Figure 3 of ZeroFL) is left out. Raises InputError.
    """
    seeds, figures = kept_seeds(out), dict[PaperPart, dict[PaperCell, list[RunRecord]]]()
    for part in paper_parts():
        if part.figure and part.figure != WITH_MASKS:
            cells = [cell.in_part(part) for cell in cells_of(part)]
            kept = {cell: [one for seed in seeds if (one := result_of(out, cell, seed))] for cell in cells}
            figures |= {part: kept} if any(kept.values()) else {}
    return figures


def read_causes(out: Path) -> dict[str, str]:
    """Return what ``causes.toml`` in a directory of results says of rows by their names; InputError if it is wrong."""
    path = out / CAUSES
    try:
        causes = tomllib.loads((read_file(path) or b"").decode())
    except ValueError as error:
        raise InputError(f"{path} is no TOML ({error}): correct it") from None
    known = {row.name for row in published()}
    for name, text in causes.items():
        if name not in known or not isinstance(text, str):
            raise InputError(f'{path}: {name} is no row of a paper with a sentence: write "flash_table2/3" = "..."')
    return causes


def count_results(results: Sequence[RowResult], causes: Mapping[str, str]) -> Counter[str]:
    """Return how many printed numbers are filled, and how they compare: the names of ``COUNTS``."""
    counts: Counter[str] = Counter(dict.fromkeys(COUNTS, 0))
    for one in results:
        verdict = VERDICTS.get(one.comparison.verdict)
        counts["printed"] += 1
        counts["filled"] += verdict is not None
        counts["other data or protocol"] += bool(one.records) and verdict is None
        if verdict is not None:
            counts["stale" if one.stale else verdict] += 1
            counts["explained"] += verdict in ("above", "below") and not one.stale and one.row.name in causes
    return counts


def summary_grid(results: Mapping[PaperPart, Sequence[RowResult]], causes: Mapping[str, str]) -> TableGrid:
    """Return the counts of each table, of each paper, and of all."""
    lines: dict[tuple[str, str], Counter[str]] = {}
    for paper, title in PAPERS.items():
        own = {part: count_results(rows, causes) for part, rows in results.items() if part.paper == paper}
        lines |= {(title, f"{part.name[:-1].capitalize()} {part.name[-1]}"): counts for part, counts in own.items()}
        lines |= {(title, "all"): _sum(list(own.values()))} if len(own) > 1 else {}
    lines["all", ""] = _sum([count_results(rows, causes) for rows in results.values()])
    numbers: list[Places] = [tuple(text_cell(str(counts[name])) for name in COUNTS) for counts in lines.values()]
    body = tuple((*names, *cells) for names, cells in zip(merge_stubs([*lines]), numbers, strict=True))
    notes = (
        "Filled: run with the row's data and protocol; in agreement: within two standard deviations, the paper's and "
        "ours combined; explained: above or below, with a sentence of cause beneath the table.",
    )
    return TableGrid(
        "Printed accuracies", merge_titles([("paper",), ("table",), *((n,) for n in COUNTS)]), body, 2, notes
    )


def counts_in_words(counts: Mapping[str, int]) -> str:
    """Return counts as a sentence; of what there is none, it says nothing."""
    text = f"{counts['filled']} of {counts['printed']} printed accuracies are filled by runs of their data and protocol"
    words = {"not judged": "without a known spread", "explained": "of the misses explained"}
    parts = [f"{counts[name]} {words.get(name, name)}" for name in COUNTS[2:-1] if counts[name]]
    other = counts["other data or protocol"]
    more = f"; {other} more {'was' if other == 1 else 'were'} run on other data or by another protocol" if other else ""
    return text + ": " * bool(parts) + ", ".join(parts) + more + "."


def _sum(every: Sequence[Counter[str]]) -> Counter[str]:
    return Counter({name: sum(counts[name] for counts in every) for name in COUNTS})
