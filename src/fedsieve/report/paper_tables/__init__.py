"""The papers' tables laid out as printed, with the results of our runs in them: as Markdown, HTML or LaTeX."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Literal

from fedsieve.recipes.papers.parts import PaperPart
from fedsieve.report.paper_tables.contents import paper_grids
from fedsieve.report.paper_tables.rendering import grids_as_html, grids_as_latex, grids_as_markdown
from fedsieve.report.paper_tables.summary import (
    all_results,
    count_results,
    counts_in_words,
    figure_records,
    numbered_parts,
    read_causes,
    summary_grid,
)
from fedsieve.runs.reproduction.results import RowResult

__all__ = [
    "FORMS",
    "all_results",
    "count_results",
    "counts_in_words",
    "figure_records",
    "numbered_parts",
    "paper_table",
    "read_causes",
    "results_summary",
]

FORMS = {"md": grids_as_markdown, "html": grids_as_html, "tex": grids_as_latex}


def paper_table(
    part: PaperPart,
    results: Sequence[RowResult],
    form: Literal["md", "html", "tex"],
    causes: Mapping[str, str] = MappingProxyType({}),
) -> str:
    """Return a table as its paper prints it, with ours beneath each number, and below it what the runs took.

    ``causes`` gives a sentence for rows that differ, by their names. HTML is a fragment with a style of its own; LaTeX
    needs the packages booktabs and multirow. Raises InputError for a figure without printed numbers.
    """
    return FORMS[form](paper_grids(part, results, causes))


def results_summary(
    results: Mapping[PaperPart, Sequence[RowResult]], form: Literal["md", "html", "tex"], causes: Mapping[str, str]
) -> str:
    """Return how many of the papers' numbers are filled, in agreement, above and below, per paper and table."""
    return FORMS[form]([summary_grid(results, causes)])
