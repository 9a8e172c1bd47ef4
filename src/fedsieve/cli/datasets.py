"""``fedsieve data``: build a dataset's folder from its archive, with progress, or say what is missing; pack it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from fedsieve.data import SHIPPED, SOURCES, dataset_status
from fedsieve.data.build import ELSEWHERE, build_dataset, verify
from fedsieve.data.pack import Pack, check_new, find_pack, open_pack, place_pack, write_pack
from fedsieve.data.source import HUB, Source
from fedsieve.data.version import read_version
from fedsieve.types import InputError

STAGES = {"check": "checking the archive", "write": "writing"}
EVERY = 10
"""The seconds between two lines of progress where no terminal shows a bar."""


def build_by_name(name: str, archive: Path | None, root: Path | None, console: Console | None = None) -> None:
    """Build a dataset, or check the one that was built, and print where it is. Raises InputError in one line."""
    console = console or Console(highlight=False, markup=False, soft_wrap=True)
    dataset_status(name, None)  # refuses an unknown name
    if name in SHIPPED:
        raise InputError(f"{name} comes with FedSieve: there is nothing to build")
    if root is None or root == HUB:
        raise InputError("no folder to build in: name one by --data FOLDER or FEDSIEVE_DATA")
    source = SOURCES[name]
    folder = root / name
    if archive and (pack := open_pack(archive)):
        _place(source, pack, root, console)
    elif archive is None and (pack := find_pack(root, name)):
        pack.arrays()
        console.print("every file is as it was packed")
    elif archive is None and read_version(folder):
        verify(folder)
        console.print("every file is as it was written")
    elif archive or source.status(root).startswith("not found"):
        archive = archive or find_archive(source, root)
        with _stages(console) as stages:
            count = build_dataset(source, archive, root, stages)
        console.print(f"{count:,} files written" if count else "every file was there")
    console.print(source.status(root))


def pack_by_name(name: str, out: Path, root: Path | None, console: Console | None = None) -> None:
    """Write a dataset as one file, or several, and print which. Raises InputError in one line."""
    console = console or Console(highlight=False, markup=False, soft_wrap=True)
    dataset_status(name, None)  # refuses an unknown name
    if name in SHIPPED:
        raise InputError(f"{name} comes with FedSieve: there is nothing to pack")
    check_new(out, name)
    arrays, counts = SOURCES[name].arrays(root)
    for file in write_pack(out, name, counts, arrays):
        console.print(f"wrote {file}, {decimal(file.stat().st_size)}")


def _place(source: Source, pack: Pack, root: Path, console: Console) -> None:
    if pack.dataset != source.name:
        raise InputError(f"{pack.files[0]} holds {pack.dataset}: fedsieve data {pack.dataset} --from {pack.files[0]}")
    there = find_pack(root, source.name)
    if there is None and not (status := source.status(root)).startswith("not found"):
        raise InputError(f"{source.name} is there already, in {status}: {ELSEWHERE}")
    if there and there.sha256 != pack.sha256:
        raise InputError(f"{there.files[0]} was packed from something else: {ELSEWHERE}")
    count = place_pack(pack, root / source.name)
    console.print(f"{count:,} files written" if count else "every file was there")


def find_archive(source: Source, root: Path) -> Path:
    """Return the dataset's archive in the data folder or in this one. Raises InputError unless it is there, alone."""
    places = dict.fromkeys((root, Path.cwd()))
    archives = [place / name for name in source.archives for place in places if (place / name).is_file()]
    if len(archives) > 1:
        raise InputError(f"several archives of {source.name} are there: name one by --from, such as {archives[0]}")
    if not archives:
        raise InputError(f"no archive of {source.name} is in {' or '.join(map(str, places))}: {source.instructions}")
    return archives[0]


@contextmanager
def _stages(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """Yield what shows how far reading has come: a bar for each stage in a terminal, elsewhere lines."""
    if not console.is_terminal:
        yield _lines(console)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bars:
        tasks = {stage: bars.add_task(label, visible=False) for stage, label in STAGES.items()}
        yield lambda stage, position, size: bars.update(tasks[stage], completed=position, total=size, visible=True)


def _lines(console: Console) -> Callable[[str, int, int], None]:
    percentages: dict[str, float] = {}

    def line(stage: str, position: int, size: int) -> None:
        now = time.monotonic()
        if now - percentages.get(stage, now - EVERY) >= EVERY:
            percentages[stage] = now
            console.print(f"{STAGES[stage]}: {position / max(size, 1):.0%}")

    return line
