"""What a person sees of a run: a live line in a terminal, plain lines elsewhere, and a short summary at the end."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.filesize import decimal
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from fedsieve.data.storage import read_json
from fedsieve.engine import Federation
from fedsieve.runs.recorded import trained_by
from fedsieve.runs.store import read_rows
from fedsieve.runs.units import format_ratio


class Shown(Protocol):
    """What is shown of a round: a ``Round``, or its row."""

    @property
    def t(self) -> int: ...  # noqa: D102
    @property
    def accuracy(self) -> float | None: ...  # noqa: D102
    @property
    def density(self) -> float: ...  # noqa: D102
    @property
    def bytes_up(self) -> int: ...  # noqa: D102
    @property
    def bytes_down(self) -> int: ...  # noqa: D102
    @property
    def bytes_dense_up(self) -> int: ...  # noqa: D102
    @property
    def bytes_dense_down(self) -> int: ...  # noqa: D102
    @property
    def dense_because(self) -> str | None: ...  # noqa: D102
    @property
    def refused(self) -> Iterable[Any]: ...  # noqa: D102
    @property
    def warnings(self) -> Iterable[Any]: ...  # noqa: D102
    @property
    def left_out(self) -> Iterable[Any]: ...  # noqa: D102


def show(
    folder: Path, federation: Federation, rounds: Iterator[Shown], last: int, console: Console | None = None
) -> None:
    """Follow the rounds to the end of the run in ``folder``, then print its summary."""
    console = console or Console(highlight=False, markup=False, soft_wrap=not sys.stdout.isatty())
    run, task = federation.run, federation.run.task
    dealt = task.partition if isinstance(task.partition, str) else "a partition of its own"
    console.print(
        f"{run.method.name} on {federation.dataset.name}: {run.rounds} rounds, {run.per_round} of "
        f"{task.clients} clients a round ({dealt}), {len(federation.dataset.train)} training examples"
    )
    for remark in federation.remarks:
        console.print(remark)
    rows = read_rows(folder)
    done = rows[-1]["round"] if rows else 0
    (_live if console.is_terminal else _plain)(rounds, done, last, console)
    console.print(_summary(folder))
    console.print(f"{folder} holds the rounds, checkpoints, summary and model.safetensors")


def _live(rounds: Iterator[Shown], done: int, last: int, console: Console) -> None:
    columns = (TextColumn("round"), MofNCompleteColumn(), BarColumn(None), TextColumn("ETA"), TimeRemainingColumn())
    said = set[str]()
    bar = Progress(*columns, console=console, expand=True, speed_estimate_period=600)
    task, accuracy = bar.add_task("", total=last, completed=done), None
    grid = Table.grid()
    with Live(grid, console=console, refresh_per_second=4) as live:
        live.update(bar)
        for round in rounds:
            accuracy = round.accuracy if round.accuracy is not None else accuracy
            bar.update(task, completed=round.t)
            grid = Table.grid()
            grid.add_row(bar)
            grid.add_row(line(round, accuracy))
            live.update(grid)
            _complain(round, console, said)


def _plain(rounds: Iterator[Shown], done: int, last: int, console: Console) -> None:
    began, said = time.perf_counter(), set[str]()
    for round in rounds:
        left = (time.perf_counter() - began) / max(round.t - done, 1) * (last - round.t)
        console.print(f"round {round.t}/{last}  {line(round, round.accuracy)}  ETA {clock(left)}")
        _complain(round, console, said)


def _complain(round: Shown, console: Console, said: set[str]) -> None:
    """Print what was refused; once why clients train densely, and once what of their metrics and notes is left out."""
    if round.dense_because and "dense" not in said:
        said.add("dense")
        console.print(f"kernels: dense, because {round.dense_because}")
    for remark in round.warnings:
        if remark.reason not in said:
            said.add(remark.reason)
            console.print(f"round {round.t}: client {remark.client}: {remark.reason}")
    for one in round.left_out:
        console.print(f"round {round.t} again, without the update of client {one.client}: {one.reason}")
    for refusal in round.refused:
        console.print(f"round {round.t}: the update of client {refusal.client} was refused: {refusal.reason}")


def line(round: Shown, accuracy: float | None) -> str:
    """Return a round in one line: accuracy of the deployed model, MB and factors against dense, density."""
    known = "     -" if accuracy is None else f"{accuracy:6.1%}"
    up, down = _sent(round.bytes_up, round.bytes_dense_up), _sent(round.bytes_down, round.bytes_dense_down)
    return f"accuracy {known}  up {up}  down {down}  density {round.density:.1%}"


def _sent(size: int, dense: int) -> str:
    return megabytes(size) + (f" ({factor})" if (factor := format_ratio(dense, size)) else "")


def megabytes(size: float) -> str:
    """Return a size in MB of 10^6 bytes, with three digits that matter."""
    value = size / 1e6
    return f"{value:.0f} MB" if value >= 100 else f"{value:.1f} MB" if value >= 10 else f"{value:.2f} MB"


def clock(seconds: float) -> str:
    """Return a duration as h:mm:ss."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def _summary(folder: Path) -> Table:
    """Return the summary of a run as a table."""
    told, rows = read_json(folder / "summary.json") or {}, read_rows(folder)
    refused = sum(len(row["refused"]) for row in rows)
    paper = f", {decimal(int(told['paper_bytes_up']))} by the paper's formula" if told["paper_bytes_up"] else ""
    table = Table.grid(padding=(0, 2))
    table.add_row("accuracy", "-" if told["accuracy"] is None else f"{told['accuracy']:.2%}", "of the deployed model")
    if told["accuracy_validation"] is not None:
        table.add_row("validation", f"{told['accuracy_validation']:.2%}", "accuracy on what all clients hold out")
    if "accuracy_pruned" in told:
        table.add_row("pruned", f"{told['accuracy_pruned']:.2%}", "accuracy of the model cut to the target density")
    whole = f"of its weights; {told['density_of_all']:.2%} of all its parameters"
    table.add_row("density", f"{told['density']:.2%}", whole)
    for way in ("up", "down"):
        sent, dense = told[f"bytes_{way}"], told[f"bytes_dense_{way}"]
        table.add_row(f"sent {way}", megabytes(sent), format_ratio(dense, sent, than="dense"))
    table.add_row("one upload", decimal(int(told["upload_bytes"])), f"measured{paper}")
    work, skipped = told["multiply_adds"], list(told["kernels"]) == ["sparse"]
    factor = format_ratio(told["multiply_adds_dense"], work, ("fewer", "more"), "dense")
    table.add_row("multiply-adds", f"{work:.3g}", factor if skipped else f"{factor}, were zeros skipped")
    if told["multiply_adds_not_counted"]:
        table.add_row("", "not counted", ", ".join(told["multiply_adds_not_counted"]))
    table.add_row("time", clock(told["seconds"]), f"peak memory {told['peak_memory_mb']:.0f} MB")
    if told["kernels"]:
        table.add_row("kernels", trained_by(told["kernels"]), _step(told))
    for way, of in told.get("kernels_measured", {}).items():
        table.add_row("", way, of.get("because") or f"{_step(of)}, peak memory {of['peak_memory_mb']:.0f} MB")
    if refused:
        table.add_row("refused", str(refused), "updates: see rounds.jsonl")
    return table


def _step(told: Mapping[str, Any]) -> str:
    return "" if told["ms_per_step"] is None else f"{told['ms_per_step']:.3g} ms a step"
