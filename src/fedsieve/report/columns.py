"""Any column of the rows by any other, or by a setting: a line for each value of some settings, seeds as bands."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

from fedsieve.data.storage import write_output
from fedsieve.report.configurations import METHOD, SEED, Runs, deduplicate, format_setting, group_by_seed, method_name
from fedsieve.report.figures import encode_figure, figure_kind
from fedsieve.report.plots import Axis, Line, LinePlot
from fedsieve.report.series import PaperFigure, assign_looks, labelled_series, mean_line, non_empty
from fedsieve.runs.frames import run_folders
from fedsieve.runs.record import RunRecord, flatten_settings, number, numeric, read_record
from fedsieve.runs.stopping import unknown_column
from fedsieve.types import InputError

ROUND, TOTAL = "round", "total:"
"""The column of the rounds; what makes of a column its sum over the rounds so far."""


SPREAD_TITLE = "mean ± standard deviation over seeds"
RAISED = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")


def write_plot(y: str, x: str, by: Sequence[str], dirs: Iterable[str | Path], out: Path, log: str = "") -> None:
    """Draw a column of the runs in ``dirs`` to ``out`` (png, pdf or svg). Raises InputError.

    ``y`` is a column of the rows; ``x`` another, or a setting. ``by`` are the settings whose values have lines of their
    own (none: every configuration). ``log`` names the axes that count in powers of ten: x, y or xy.
    """
    kind = figure_kind(out, "plot")
    if log not in ("", "x", "y", "xy"):
        raise InputError(f"--log must be x, y or xy, got {log!r}")
    runs = deduplicate([read_record(folder) for folder in run_folders(dirs)])
    write_output(out, encode_figure(plot_columns(y, x, by, runs, log), kind))


def plot_columns(y: str, x: str, by: Sequence[str], runs: Runs, log: str = "") -> PaperFigure:
    """Return the plot as a figure. Over a column it is each line's mean, round by round, as far as all seeds got.

    Over a setting it is what the runs had at their ends. Raises InputError for names that there are not.
    """
    columns = list(dict.fromkeys(name for run in runs for name in _numbers(run)))
    settings = list(dict.fromkeys(name for run in runs for name in _named(run)))
    over = x.removeprefix(TOTAL) not in columns
    if y.removeprefix(TOTAL) not in columns:
        raise InputError(f"plot: {unknown_column(y, columns)}")
    if over and x not in settings:
        raise InputError(f"plot: {unknown_column(x, [*columns, *settings])}")
    if unknown := [name for name in by if name not in settings]:
        raise InputError(f"plot --by: {unknown_column(unknown[0], settings).replace('column', 'setting', 1)}")
    groups = labelled_series(runs, _label_by(by), (lambda run: {x}) if over else lambda run: ())
    looks = assign_looks(groups)
    line = _line_over_setting if over else _line_over_column
    lines = non_empty({label: line(group, y, x, looks[label]) for label, group in groups.items()})
    if not lines:
        raise InputError(f"plot: no run given has a number of {y} and of {x} yet")
    across, x_unit = _axis(x, [v for line in lines.values() for v in line.x], "x" in log)
    up, y_unit = _axis(y, [v for line in lines.values() for v in line.y], "y" in log)
    title = SPREAD_TITLE if any(any(line.spread) for line in lines.values()) else ""
    scaled = {label: _scaled(line, x_unit, y_unit) for label, line in lines.items()}
    return PaperFigure("plot", title, "", (LinePlot(title, across, up, scaled),))


def _line_over_column(runs: Runs, y: str, x: str, place: int) -> Line:
    return mean_line([points_of(run, y, x) for run in runs], place)


def _line_over_setting(runs: Runs, y: str, x: str, place: int) -> Line:
    """Return the mean and standard deviation at the runs' ends, of every value of the setting that is a number."""
    points: list[tuple[float, float, float, bool]] = []
    for group in group_by_seed(runs) if x != SEED else [[run] for run in runs]:
        at = numeric(_named(group[0]).get(x, ""))
        ends = [values[max(values)] for run in group if (values := values_of(run, y))]
        if at is not None and ends:
            spread = statistics.stdev(ends) if len(ends) > 1 else 0.0
            points.append((at, statistics.fmean(ends), spread, not all(run.ended for run in group)))
    xs, ys, spreads, hollow = ([point[i] for point in sorted(points)] for i in range(4))
    return Line(xs, ys, place, spread=spreads, bars=True, hollow=[bool(one) for one in hollow])


def points_of(run: RunRecord, y: str, x: str) -> dict[float, tuple[float, float]]:
    """Return x and y by round, in the rounds that have both."""
    xs, ys = values_of(run, x), values_of(run, y)
    return {t: (xs[t], ys[t]) for t in ys if t in xs}


def values_of(run: RunRecord, column: str) -> dict[float, float]:
    """Return a column's numbers by round; of ``total:COLUMN`` the sums so far, as far as every round has a number."""
    name = column.removeprefix(TOTAL)
    each = {row[ROUND]: number(flatten_settings(row).get(name)) for row in run.rows}
    if name != column:
        sums = accumulate(math.nan if value is None else value for value in each.values())
        return {t: total for t, total in zip(each, sums, strict=True) if math.isfinite(total)}
    return {t: value for t, value in each.items() if value is not None}


def _numbers(run: RunRecord) -> list[str]:
    """Return the names of the columns that are a number in some round."""
    rows = map(flatten_settings, run.rows)
    return list(dict.fromkeys(name for row in rows for name, value in row.items() if number(value) is not None))


def _named(run: RunRecord) -> Mapping[str, str]:
    """Return the settings by name, and how the method and the recipe are called."""
    return {METHOD: method_name(run), "recipe": run.recipe} | run.settings


def _label_by(by: Sequence[str]) -> Callable[[RunRecord], str]:
    def label(run: RunRecord) -> str:
        known = _named(run)
        return ", ".join(format_setting(name, known.get(name, "–")) for name in by)

    return label if by else method_name


def _axis(name: str, values: Sequence[float], log: bool) -> tuple[Axis, float]:
    """Return the axis of a column, and what its numbers are divided by, which it names: of large ones 10³, 10⁶, ..."""
    if log and min(values) <= 0:
        raise InputError(f"plot: --log is for numbers above 0, and {name} has others")
    exponent = int(math.log10(max(map(abs, values)) or 1)) // 3 * 3
    exponent = exponent if exponent >= 3 and name != ROUND else 0
    unit = f", 10{str(exponent).translate(RAISED)}" if exponent else ""
    text = name.replace(TOTAL, "total ") + unit
    return Axis(text, whole=name == ROUND, log=log, signed=min(values) < 0), 10.0**exponent


def _scaled(line: Line, x: float, y: float) -> Line:
    """Return a line with its numbers divided."""
    return replace(line, x=[v / x for v in line.x], y=[v / y for v in line.y], spread=[v / y for v in line.spread])
