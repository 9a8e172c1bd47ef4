"""What a person sees of a run: a live line in a terminal, plain lines elsewhere, and a short summary at the end."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from rich.console import Console, Group
from rich.filesize import decimal
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from fedsieve.data.storage import read_json
from fedsieve.engine import Federation
from fedsieve.runs.record import MANIFEST, format_kernels, metrics_of_manifest, read_rows, read_summary, without_numbers
from fedsieve.runs.units import format_ratio

Row: TypeAlias = Mapping[str, Any]
"""A row of ``rounds.jsonl``."""


QUIET = 60.0
"""Seconds without a finished round after which plain lines tell of clients."""
SHORT = 2.0
"""Seconds of a round before a terminal tells of its clients."""


class ClientProgress:
    """How many clients of the round that is at work have answered: ``answer`` is called at each of them."""

    def __init__(self) -> None:
        self.console: Console | None = None
        """Where a line is printed once a minute of a long round; None in a terminal, which shows this object."""
        self.round, self.text, self.began, self.last_line = 0, "", time.monotonic(), time.monotonic()

    def answer(self, t: int, answers: int, clients: int) -> None:
        """Note that ``answers`` of round t's ``clients`` are there."""
        now = time.monotonic()
        if t != self.round:
            self.round, self.began = t, now
        self.text = f"round {t}: {answers} of {clients} clients" if answers < clients else ""
        if self.console and self.text and now > self.last_line + QUIET:
            self.last_line = now
            self.console.print(self.text)

    def __rich__(self) -> str:
        return self.text if time.monotonic() > self.began + SHORT else ""


def show_run(
    folder: Path,
    federation: Federation,
    rows: Iterator[Row],
    last: int,
    console: Console | None = None,
    clients: ClientProgress | None = None,
) -> None:
    """Follow the rows of a run in ``folder`` to its end, round ``last``, then print its summary."""
    clients = clients or ClientProgress()
    console = console or Console(highlight=False, markup=False, soft_wrap=not sys.stdout.isatty())
    run, task = federation.run, federation.run.task
    version = f" ({federation.dataset.version})" if federation.dataset.version else ""
    dealt = task.partition if isinstance(task.partition, str) else "a partition of its own"
    console.print(
        f"{run.method.name} on {federation.dataset.name}{version}: {run.rounds} rounds, {run.per_round} of "
        f"{task.clients} clients a round ({dealt}), {len(federation.dataset.train)} training examples"
    )
    for remark in federation.remarks:
        console.print(remark)
    before = read_rows(folder)
    show = _live if console.is_terminal else _plain
    show(rows, before[-1]["round"] if before else 0, last, console, clients, next(iter(federation.metrics)))
    console.print(summary_table(folder))
    console.print(f"{folder} holds the rounds, checkpoints, summary and model.safetensors")


def progress_bar(unit: str, console: Console) -> Progress:
    """Return a live bar that counts in ``unit`` and tells when the last one will be done."""
    columns = (TextColumn(unit), MofNCompleteColumn(), BarColumn(None), TextColumn("ETA"), TimeRemainingColumn())
    return Progress(*columns, console=console, expand=True, speed_estimate_period=600)


def _live(rows: Iterator[Row], first: int, last: int, console: Console, clients: ClientProgress, metric: str) -> None:
    printed, bar = set[str](), progress_bar("round", console)
    task, value = bar.add_task("", total=last, completed=first), None
    with Live(Group(bar, clients), console=console, refresh_per_second=4) as live:
        for row in rows:
            value = row[metric] if row[metric] is not None else value
            bar.update(task, completed=max(row["round"], 0))
            live.update(Group(bar, format_round(row, value, metric), clients))
            _print_remarks(row, console, printed)


def _plain(rows: Iterator[Row], first: int, last: int, console: Console, clients: ClientProgress, metric: str) -> None:
    began, printed = time.perf_counter(), set[str]()
    clients.console = console
    for row in rows:
        clients.last_line = time.monotonic()
        t = row["round"]
        left = (time.perf_counter() - began) / max(t - first, 1) * (last - t)
        console.print(f"round {t}/{last}  {format_round(row, row[metric], metric)}  ETA {format_clock(left)}")
        _print_remarks(row, console, printed)


def _print_remarks(row: Row, console: Console, printed: set[str]) -> None:
    """Print what was refused; once why clients train densely, and once what of their metrics and notes is left out."""
    if row["dense_because"] and "dense" not in printed:
        printed.add("dense")
        console.print(f"kernels: dense, because {row['dense_because']}")
    for remark in row["warnings"]:
        if (kind := without_numbers(remark["reason"])) not in printed:
            printed.add(kind)
            console.print(f"round {row['round']}: client {remark['client']}: {remark['reason']}")
    for one in row["left_out"]:
        console.print(f"round {row['round']} again, without the update of client {one['client']}: {one['reason']}")
    for one in row["refused"]:
        console.print(f"round {row['round']}: the update of client {one['client']} was refused: {one['reason']}")


def format_round(row: Row, value: float | None, metric: str = "accuracy") -> str:
    """Return a round in one line: metric of the deployed model, MB and factors against dense, density."""
    share = "     -" if value is None else f"{value:6.1%}" if metric == "accuracy" else f"{value:6.4g}"
    up, down = (_sent(row[f"bytes_{way}"], row[f"bytes_dense_{way}"]) for way in ("up", "down"))
    own = row.get("density_of_policy")
    policy = "" if own is None else f" ({own:.1%} of the policy's)"
    return f"{metric} {share}  up {up}  down {down}  density {row['density']:.1%}{policy}"


def _sent(size: int, dense: int) -> str:
    return _megabytes(size) + (f" ({factor})" if (factor := format_ratio(dense, size)) else "")


def _megabytes(size: float) -> str:
    """Return a size in MB of 10^6 bytes, with three digits that matter."""
    value = size / 1e6
    return f"{value:.0f} MB" if value >= 100 else f"{value:.1f} MB" if value >= 10 else f"{value:.2f} MB"


def format_clock(seconds: float) -> str:
    """Return a duration as h:mm:ss."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def summary_table(folder: Path) -> Table:
    """Return the summary of a run as a table."""
    summary, rows = read_summary(folder) or {}, read_rows(folder)
    refused = sum(len(row["refused"]) for row in rows)
    about = {"paper_bytes_up": "by the paper's formula", "csr_bytes_up": "as CSR"}
    others = "".join(f", {decimal(int(size))} {how}" for name, how in about.items() if (size := summary.get(name)))
    table = Table.grid(padding=(0, 2))
    if why := summary.get("stopped_because"):
        table.add_row("ended", f"in round {summary['stopped_at']}", f"by {why}; --resume --until ROUND goes on")
    for metric in metrics_of_manifest(read_json(folder / MANIFEST) or {}):
        value, form = summary.get(metric), ".2%" if metric == "accuracy" else ".5g"
        table.add_row(metric, "-" if value is None else format(value, form), "of the deployed model")
        if metric != "accuracy" and (value := summary.get(f"{metric}_validation")) is not None:
            table.add_row("", format(value, form), "on what all clients hold out")
        if (mean := summary.get(f"{metric}_clients")) is not None:
            worst, spread = (summary.get(f"{metric}_{what}") for what in ("worst_tenth", "spread"))
            tenth = f"the clients' mean; worst tenth {worst:{form}}, spread {spread:{form}}"
            table.add_row("", format(mean, form), tenth)
    if summary["accuracy_validation"] is not None:
        table.add_row("validation", f"{summary['accuracy_validation']:.2%}", "accuracy on what all clients hold out")
    if "accuracy_pruned" in summary:
        table.add_row("pruned", f"{summary['accuracy_pruned']:.2%}", "accuracy of the model cut to the target density")
    own = summary.get("density_of_policy")
    policy = "" if own is None else f"{own:.2%} of the policy's; "
    whole = f"of its weights; {policy}{summary['density_of_all']:.2%} of all its parameters"
    table.add_row("density", f"{summary['density']:.2%}", whole)
    for way in ("up", "down"):
        size, dense = summary[f"bytes_{way}"], summary[f"bytes_dense_{way}"]
        table.add_row(f"sent {way}", _megabytes(size), format_ratio(dense, size, than="dense"))
    table.add_row("one upload", decimal(int(summary["upload_bytes"])), f"measured{others}")
    work, skipped = summary["multiply_adds"], list(summary["kernels"]) == ["sparse"]
    factor = format_ratio(summary["multiply_adds_dense"], work, ("fewer", "more"), "dense")
    before = sum(row["multiply_adds"] or 0 for row in rows if row["round"] == 0)
    if before > work / 100:  # such as FLASH's first stage
        factor += f"; {before / work:.0%} of it before the first round, where dense has none"
    table.add_row("multiply-adds", f"{work:.3g}", factor if skipped else f"{factor}, were zeros skipped")
    if summary["multiply_adds_not_counted"]:
        table.add_row("", "not counted", ", ".join(summary["multiply_adds_not_counted"]))
    table.add_row("time", format_clock(summary["seconds"]), f"peak memory {summary['peak_memory_mb']:.0f} MB")
    if summary["kernels"]:
        table.add_row("kernels", format_kernels(summary["kernels"]), _step(summary))
    for way, of in summary.get("kernels_measured", {}).items():
        table.add_row("", way, of.get("because") or f"{_step(of)}, peak memory {of['peak_memory_mb']:.0f} MB")
    if refused:
        table.add_row("refused", str(refused), "updates: see rounds.jsonl")
    return table


def _step(summary: Mapping[str, Any]) -> str:
    return "" if summary["ms_per_step"] is None else f"{summary['ms_per_step']:.3g} ms a step"
