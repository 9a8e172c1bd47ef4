"""``fedsieve list``: what there is to run, and where it was found."""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from fedsieve.cli.run import ENGINES
from fedsieve.data import NAMES, dataset_status
from fedsieve.methods import METHODS
from fedsieve.recipes import recipes
from fedsieve.recipes.papers import authors_by_method, published, rows_by_protocol
from fedsieve.types import InputError

PARTS = ("methods", "recipes", "datasets", "engines")


def show_catalogue(what: str, data: Path | None, console: Console | None = None) -> None:
    """Print one part of the catalogue, or all of it. Raises InputError for a part that there is not."""
    console = console or Console(highlight=False)
    if what == "published":
        return _show_published(console)
    if what == "papers":
        return _show_papers(console)
    if what != "all" and what not in PARTS:
        raise InputError(f"there is no list of {what!r}: choose {', '.join(PARTS)}, published, papers or all")
    for part in PARTS if what == "all" else (what,):
        table = Table(
            "",
            Column("", overflow="fold"),
            title=part,
            title_justify="left",
            title_style="bold",
            box=None,
            show_header=False,
            pad_edge=False,
        )
        for name, text in catalogue_entries(part, data).items():
            table.add_row(f"[cyan]{name}[/]", text)
        console.print(table)
        if what == "all":
            console.print()


def catalogue_entries(part: str, data: Path | None) -> dict[str, str]:
    """Return one part of the catalogue: names and a line about each."""
    if part == "methods":
        return {name: f"{_first(make)} [dim]{_paper(name, make)}[/]" for name, make in METHODS.items()}
    if part == "recipes":
        return {name: recipe.about for name, recipe in recipes().items()}
    if part == "datasets":
        return {name: escape(dataset_status(name, data)) for name in NAMES}
    return {name: kind.about for name, kind in ENGINES.items()}


def _show_published(console: Console) -> None:
    """Print every published row with the command that runs it, each a line that a terminal breaks but copies whole."""
    width = max(len(row.name) for row in published())
    for row in published():
        accuracy = f"{row.accuracy:5.2f}" + ("       " if row.std is None else f" ± {row.std:4.2f}")
        line = f"{row.name:{width}}  {accuracy}  {'variant' if row.variant else '':7}  {row.command}"
        console.print(line, soft_wrap=True, markup=False)


def _show_papers(console: Console) -> None:
    """Print the tables of the papers: the protocol of each on each dataset, term by term, and its rows."""
    for title, (protocol, rows) in rows_by_protocol().items():
        console.print(f"[bold]{title}[/]")
        terms = Table("", Column("", overflow="fold"), box=None, show_header=False, padding=(0, 2, 0, 0))
        for term, text in protocol.items():
            terms.add_row(term.replace("_", " "), escape(text))
        console.print(terms)
        for row in rows:
            console.print(f"{row.name}  {row.printed}  {row.command}", soft_wrap=True, markup=False)
        for methods, settings in authors_by_method(rows).items():
            console.print(f"{methods} as the authors' code: ... {settings}", soft_wrap=True, markup=False)
        console.print()


def _first(thing: object) -> str:
    return (inspect.getdoc(thing) or "").split("\n")[0]


def _paper(name: str, make: object) -> str:
    """Return the paper that the docstring of the method's module cites, if any: authors, year, quoted title."""
    text = " ".join((sys.modules[make.__module__].__doc__ or "").split())
    cited = re.findall(r'(?:[A-Z]\S+ & )?[A-Z]\w+ (?:et al\. )?\d{4}, ".+?"', text)
    paper = str(cited[-1 if name in ("fedadam", "dnr") else 0]) if cited else ""
    return paper.rstrip(',"') + '"' * bool(paper)
