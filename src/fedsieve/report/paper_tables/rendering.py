"""A table as Markdown, HTML or LaTeX. Whatever a cell says is text there: it opens no tag, column or command."""

from __future__ import annotations

import re
import textwrap
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import replace

from jinja2 import Environment, PackageLoader, StrictUndefined

from fedsieve.report.paper_tables.grid import CellLine, Places, TableCell, TableGrid

WIDTH = 26
"""Letters of a line of a LaTeX cell."""
PAGE = 60
"""Lines of a table on a page."""
LATEX = {
    **{letter: f"\\{letter}" for letter in "&%$#_{}"},
    **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "|": r"\textbar{}"},
    **{"<": r"\textless{}", ">": r"\textgreater{}", '"': "''", "[": "{[}", "*": "{*}", "`": r"\textasciigrave{}"},
    **{
        "±": r"$\pm$",
        "×": r"$\times$",
        "α": r"$\alpha$",
        "–": r"\textendash{}",
        "—": r"\textemdash{}",
        "…": r"\dots{}",
    },
    **{"↑": r"$\uparrow$", "↓": r"$\downarrow$", "†": r"$\dagger$"},
}


def grids_as_markdown(tables: Sequence[TableGrid]) -> str:
    """Return tables as Markdown: titles over several columns stand in each, a cell's lines are parted by ``<br>``."""
    return "\n".join(line for table in tables for line in _markdown(table))


def _markdown(table: TableGrid) -> Iterable[str]:
    yield from (f"**{_markdown_text(table.caption)}**", "")
    yield _markdown_row(", ".join(map(_markdown_text, titles)) for titles in _titles_by_column(table.head))
    yield _markdown_row(["---"] * len(table.head[0]))
    for row in table.body:
        yield _markdown_row("<br>".join(map(_markdown_line, cell.lines)) if cell else "" for cell in row)
    yield ""
    for note in table.notes:
        yield from (_markdown_text(note), "")


def _titles_by_column(head: Sequence[Places]) -> list[list[str]]:
    """Return the titles over every column, those of several columns in each."""
    titles: list[list[str]] = [[] for _ in head[0]]
    for level in head:
        for j, cell in enumerate(level):
            for own in titles[j : j + cell.columns] if cell else ():
                own += [line.text for line in cell.lines] if cell else []
    return titles


def _markdown_row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _markdown_line(line: CellLine) -> str:
    text = _markdown_text(line.text)
    text = {"plain": text, "ours": f"**{text}**", "soft": f"*{text}*"}[line.role] if text.strip() else text
    marks = "".join(f"<sup>{mark}</sup>" if mark.isdigit() else f" {mark}" for mark in line.marks)
    return text + marks


def _markdown_text(text: str) -> str:
    """Return a text with character references for what Markdown would read as more than a letter."""
    text = re.sub(r"[&<>|\\`*\[\]#~!]|(?<!\w)_|_(?!\w)|:(?=//)", lambda found: f"&#{ord(found[0])};", text)
    return re.sub(r"(?i)(?<=\bwww)\.", "&#46;", text)


def grids_as_html(tables: Sequence[TableGrid]) -> str:
    """Return tables as one element of a page with its own small style, which takes the page's colours."""
    loader = PackageLoader("fedsieve.report", "assets")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("table.html").render(tables=tables)


def grids_as_latex(tables: Sequence[TableGrid]) -> str:
    """Return tables as LaTeX floats, for the packages booktabs, multirow and adjustbox, as wide as the text at most."""
    head = "% needs \\usepackage{booktabs}, \\usepackage{multirow} and \\usepackage{adjustbox}"
    pages = (page for table in tables for page in _pages(table))
    return "\n".join([head, *(line for page in pages for line in _latex(page))]) + "\n"


def _pages(table: TableGrid) -> Iterable[TableGrid]:
    """Yield a table in parts of a page each, if its rows are independent: those of several stubs belong together."""
    parts: list[list[Places]] = [[]]
    heights = [max(len(_latex_parts(cell)) for cell in row) for row in table.body]
    room = PAGE
    for row, height in zip(table.body, heights, strict=True):
        if table.stubs == 1 and height > room:
            parts, room = [*parts, []], PAGE
        parts[-1].append(row)
        room -= height
    for i, rows in enumerate(parts):
        notes = table.notes if i == len(parts) - 1 else ()
        caption = table.caption + ", continued" * (i > 0)
        yield replace(table, caption=caption, body=tuple(rows), notes=notes)


def _latex(table: TableGrid) -> Iterable[str]:
    columns = len(table.head[0])
    yield from (r"\begin{table*}", r"\centering", r"\scriptsize", r"\setlength{\tabcolsep}{3pt}")
    yield from (rf"\caption{{{_latex_text(table.caption)}}}", r"\begin{adjustbox}{max width=\textwidth}")
    yield from (rf"\begin{{tabular}}{{{'l' * columns}}}", r"\toprule")
    for level, places in enumerate(table.head):
        yield _latex_row(_latex_head(table.head, level))
        yield from (
            rf"\cmidrule(lr){{{j}-{j + cell.columns - 1}}}"
            for j, cell in enumerate(places, 1)
            if cell and cell.columns > 1
        )
    for i, row in enumerate(table.body):
        if not i or (table.stubs > 1 and row[0]):
            yield r"\midrule"
        yield _latex_row(_latex_cell(cell) for cell in row)
    yield from (r"\bottomrule", r"\end{tabular}", r"\end{adjustbox}", "")
    yield from (rf"\par\smallskip\parbox{{\linewidth}}{{{_latex_text(note)}}}" for note in table.notes)
    yield r"\end{table*}"


def _latex_head(head: Sequence[Places], level: int) -> Iterable[str]:
    """Yield the cells of a row of the head; a title of several rows stands in the lowest."""
    for j, cell in enumerate(head[level]):
        above = next((c for up in range(level) if (c := head[up][j]) and c.rows == level - up + 1), None)
        own = cell if cell and cell.rows == 1 else above
        if own and own.columns > 1:
            yield rf"\multicolumn{{{own.columns}}}{{c}}{{{_latex_text(own.lines[0].text)}}}"
        elif own:
            yield _latex_text(own.lines[0].text)
        elif not _covered_from_left(head[level], j):
            yield ""


def _covered_from_left(places: Places, j: int) -> bool:
    return any(cell and i + cell.columns > j for i, cell in enumerate(places[:j]))


def _latex_row(cells: Iterable[str]) -> str:
    return f"{' & '.join(cells)} \\\\"


def _latex_cell(cell: TableCell | None) -> str:
    lines = _latex_parts(cell)
    text = r"\\ ".join(lines)
    text = rf"\shortstack[l]{{{text}}}" if len(lines) > 1 else text
    return rf"\multirow[t]{{{cell.rows}}}{{*}}{{{text}}}" if cell and cell.rows > 1 else text


def _latex_parts(cell: TableCell | None) -> list[str]:
    return [text for line in cell.lines for text in _latex_lines(line)] if cell else []


def _latex_lines(line: CellLine) -> list[str]:
    """Return a line of a cell as lines that are narrow enough, the marks after the last."""
    style = {"plain": "{}", "ours": r"\textbf{{{}}}", "soft": r"\textit{{{}}}"}[line.role]
    lines = [style.format(_latex_text(text)) for text in textwrap.wrap(line.text, WIDTH) or [""]]
    marks = "".join(f"$^{{{mark}}}$" if mark.isdigit() else f" {_latex_text(mark)}" for mark in line.marks)
    return [*lines[:-1], lines[-1] + marks]


def _latex_text(text: str) -> str:
    """Return a text with its special letters as commands; what LaTeX has no letter for becomes a question mark."""
    return "".join(map(_latex_letter, text)).replace("--", "-{}-")


def _latex_letter(letter: str) -> str:
    if letter in LATEX:
        return LATEX[letter]
    if letter.isspace():
        return " "
    plain = unicodedata.normalize("NFKD", letter)[0]
    plain = plain if plain.isascii() and plain.isprintable() else "?"
    return LATEX.get(plain, plain)
