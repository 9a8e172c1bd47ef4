"""What stands in a paper's table: the printed numbers with ours beneath them, and below, a line a row that was run."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

from fedsieve.recipes.papers import Published
from fedsieve.recipes.papers.parts import PAPERS, PaperPart
from fedsieve.report.paper_tables.grid import (
    CellLine,
    TableCell,
    TableGrid,
    merge_stubs,
    merge_titles,
    shorten,
    text_cell,
)
from fedsieve.report.paper_tables.layout import DASH, DATASETS, layout_of
from fedsieve.runs.comparison import data_differences, read_accuracy
from fedsieve.runs.record import RunRecord
from fedsieve.runs.reproduction.results import RowResult
from fedsieve.runs.units import format_bytes, format_duration, format_percent

MARKS = {"above": "↑", "below": "↓"}
STALE = "†"
PAPER_MB = 1_024_000
"""Bytes of a megabyte in ZeroFL's tables."""
LEGEND = (
    "Each number is the paper's; beneath it ours: mean ± standard deviation over n seeds, or what differs in data or "
    f"protocol. {MARKS['above']} and {MARKS['below']}: above or below the paper by more than two standard "
    "deviations, the paper's and ours combined (the root of the sum of their squares; ours left out with one seed; "
    f"not judged where neither is known). {STALE}: stale, the arithmetic of the recipe has changed since the run."
)
BELOW = (
    "One upload: by the paper's formula, as CSR, and as really sent, in bytes and how many times less than dense. Less "
    "than dense: as really sent, over all rounds. "
    "Time: of one run, all rounds with their tests; the mean over the seeds."
)

Numbers = Callable[[RunRecord], float | None]


def printed_table(part: PaperPart, results: Sequence[RowResult], causes: Mapping[str, str]) -> TableGrid:
    """Return a table as its paper prints it, with ours in its cells; ``causes``: a sentence for rows by their names."""
    layout, rows = layout_of(part), printed_rows(part)
    by_name = {one.row.name: one for one in results if one.records or one.authors or one.subset}
    reasons = [cause for cause in dict.fromkeys(causes.get(row.name) for row in rows if row.name in by_name) if cause]
    lines: dict[tuple[str, ...], dict[str, Published]] = {}
    for row in rows:
        lines.setdefault(tuple(text(row) for text in layout.stubs.values()), {})[layout.column(row)] = row
    names = merge_stubs([*lines])
    body = []
    for name, own in zip(names, lines.values(), strict=True):
        first = next(iter(own.values()))
        cells = [
            _cell(here, by_name.get(here.name), _footnote(causes.get(here.name), reasons))
            if (here := own.get(column))
            else text_cell(DASH)
            for column in layout.columns
        ]
        body.append((*name, *cells, *(text_cell(text(first)) for text in layout.beside.values())))
    titles = [*((title,) for title in layout.stubs), *layout.columns.values(), *((title,) for title in layout.beside)]
    notes = (f"Accuracy in percent: {_readings(rows)}.", LEGEND, *(f"{i} {text}" for i, text in enumerate(reasons, 1)))
    return TableGrid(part_caption(part), merge_titles(titles), tuple(body), len(layout.stubs), notes)


def runs_table(part: PaperPart, results: Sequence[RowResult]) -> TableGrid | None:
    """Return what the runs of a table took and sent, one line a row that was run; None where none was."""
    body = tuple(tuple(cell(one) for cell in RUN_COLUMNS.values()) for one in results if one.records)
    caption = f"{part_caption(part, 'the runs')}"
    return TableGrid(caption, merge_titles([*RUN_COLUMNS]), body, 1, (BELOW,)) if body else None


def printed_rows(part: PaperPart) -> list[Published]:
    """Return the rows of a part that the paper prints a number of."""
    return [row for row in part.runs if isinstance(row, Published)]


def part_caption(part: PaperPart, title: str = "") -> str:
    """Return what a part is called: ``FLASH, Table 2: ...``."""
    kind, number = part.name[:-1].capitalize(), part.name[-1]
    return f"{PAPERS[part.paper]}, {kind} {number}: {title or part.title}"


def _readings(rows: Sequence[Published]) -> str:
    """Return which accuracy the numbers are, with the datasets where they are several."""
    readings: dict[str, list[str]] = {}
    for row in rows:
        readings.setdefault(str(row.reading), []).append(DATASETS[row.keys["dataset"]])
    if len(readings) == 1:
        return next(iter(readings))
    return "; ".join(f"{reading} ({', '.join(dict.fromkeys(of))})" for reading, of in readings.items())


def _footnote(cause: str | None, reasons: Sequence[str]) -> tuple[str, ...]:
    return (str(reasons.index(cause) + 1),) if cause in reasons and cause else ()


def _cell(row: Published, result: RowResult | None, footnote: tuple[str, ...]) -> TableCell:
    """Return a printed number, and beneath it what its runs reached, or what differs, with its marks."""
    spread = "" if row.std is None else f" ± {row.std:.2f}"
    lines = [CellLine(f"{row.accuracy:.2f}{spread}")]
    if result:
        one, stale = result.comparison, (STALE,) if result.stale else ()
        marks = (*filter(None, [MARKS.get(one.verdict)]), *stale, *footnote)
        text = _mean(one.values) + f" (n = {len(one.values)})" if one.values else shorten(one.differs)
        if one.values or result.records:
            lines.append(CellLine(text, "ours" if one.values else "soft", marks))
        for records, what in ((result.authors, "as the authors' code"), (result.subset, _part_of(row, result.subset))):
            values = [100 * value for run in records if (value := read_accuracy(row, run)) is not None]
            if values:
                lines.append(CellLine(f"{_mean(values)} (n = {len(values)}) {what}", "soft"))
    return TableCell(tuple(lines))


def _part_of(row: Published, records: Sequence[RunRecord]) -> str:
    """Return on what part of its dataset a row was run."""
    datasets = [dataset for run in records if isinstance(dataset := run.manifest.get("dataset"), dict)]
    return "on " + ", ".join(data_differences(row, datasets[0])) if datasets else ""


def _mean(values: Sequence[float]) -> str:
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.2f}{spread}"


def _known(result: RowResult, get: Numbers) -> list[float]:
    return [value for run in result.records if (value := get(run)) is not None]


def _over_seeds(result: RowResult, get: Numbers, form: Callable[[float], str]) -> str:
    """Return the mean of a measure over the runs that have it, or a dash."""
    known = _known(result, get)
    return form(statistics.fmean(known)) if known else DASH


def _command(result: RowResult) -> TableCell:
    settings = [text for text in result.row.settings if not text.startswith("evaluate_every=")]
    return text_cell(result.row.recipe, *(text.removeprefix("method.") for text in settings))


def _reached(result: RowResult) -> TableCell:
    """Return what the runs reach, read as the row was, and how far that is from it; or what differs."""
    known = [100 * value for value in _known(result, partial(read_accuracy, result.row))]
    one = result.comparison
    about = shorten(one.differs) if one.difference is None else f"{one.difference:+.2f}, {one.verdict}"
    marks = (STALE,) if result.stale else ()
    return TableCell((CellLine(_mean(known) if known else DASH, "ours", marks), CellLine(about, "soft")))


def _counted(name: str, result: RowResult) -> TableCell:
    """Return the bytes of one upload as a formula counts them, and how many times less than dense that is."""
    text = _over_seeds(result, lambda run: run.final(name), format_bytes)
    ratio = _over_seeds(result, lambda run: _ratio(_dense_upload(run), run.final(name)), _as_times)
    return TableCell((CellLine(text), *([CellLine(ratio, "soft")] if text != DASH else [])))


def _formula(result: RowResult) -> TableCell:
    """Return the bytes of one upload by the paper's formula, for ZeroFL in its own megabytes too."""
    cell = _counted("paper_bytes_up", result)
    if result.row.upload_mb is None or not _known(result, lambda run: run.final("paper_bytes_up")):
        return cell
    own = _over_seeds(result, lambda run: run.final("paper_bytes_up"), lambda size: f"{size / PAPER_MB:.1f}")
    return TableCell((*cell.lines, CellLine(f"{own} MB of {PAPER_MB:,} B", "soft")))


def _dense_upload(run: RunRecord) -> float | None:
    return _ratio(run.total("bytes_dense_up"), run.final("uploads"))


def _ratio(whole: float | None, part: float | None) -> float | None:
    return whole / part if whole and part else None


def _as_times(ratio: float) -> str:
    return f"{ratio:,.1f}×"


def _less(way: str, result: RowResult) -> TableCell:
    """Return how many times less than dense was sent one way over the whole run."""
    get = lambda run: _ratio(run.total(f"bytes_dense_{way}"), run.total(f"bytes_{way}"))  # noqa: E731
    return text_cell(_over_seeds(result, get, _as_times))


def _paper_prints(result: RowResult) -> TableCell:
    row = result.row
    ways = {"up": row.savings_up, "down": row.savings_down}
    size = [] if row.upload_mb is None else [f"{row.upload_mb:g} MB"]
    return text_cell(*([*size, *(f"{value:g}× {way}" for way, value in ways.items() if value is not None)] or [DASH]))


def _texts(result: RowResult, get: Callable[[RunRecord], str]) -> TableCell:
    """Return a text of the runs, each once."""
    return text_cell(*dict.fromkeys(shorten(get(run)) or DASH for run in result.records))


def _cpu(run: RunRecord) -> str:
    return run.machine.get("cpu", "")


def _commit(run: RunRecord) -> str:
    """Return the first letters of a commit, and the sign of one that was changed."""
    commit = run.machine.get("commit", "")
    return commit[:9] + "+" * commit.endswith("+")


RUN_COLUMNS: dict[tuple[str, ...], Callable[[RowResult], TableCell]] = {
    ("row",): lambda result: text_cell(result.row.name),
    ("run",): _command,
    ("reached, %",): _reached,
    ("one upload", "by formula"): _formula,
    ("one upload", "as CSR"): partial(_counted, "csr_bytes_up"),
    ("one upload", "as sent"): lambda result: text_cell(
        _over_seeds(result, lambda run: run.final("upload_bytes"), format_bytes)
    ),
    ("less than dense", "up"): partial(_less, "up"),
    ("less than dense", "down"): partial(_less, "down"),
    ("paper",): _paper_prints,
    ("density",): lambda result: text_cell(_over_seeds(result, lambda run: run.last("density"), format_percent)),
    ("time",): lambda result: text_cell(_over_seeds(result, lambda run: run.total("seconds"), format_duration)),
    ("seeds",): lambda result: text_cell(str(len(result.records))),
    ("CPU",): lambda result: _texts(result, _cpu),
    ("commit",): lambda result: _texts(result, _commit),
}
"""The columns of the second table by their titles, and the cell of each for a row that was run."""


def paper_grids(part: PaperPart, results: Sequence[RowResult], causes: Mapping[str, str]) -> list[TableGrid]:
    """Return the table as printed, and what its runs took where there are any."""
    tables: Iterable[TableGrid | None] = (printed_table(part, results, causes), runs_table(part, results))
    return [table for table in tables if table]
