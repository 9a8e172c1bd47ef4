"""Which version of a dataset there is: known by what it counts, and noted in the folder that was built from an archive.

``VERSION.json`` says what was built and from which archive; ``SHA256SUMS``, as ``sha256sum`` writes it, what every
file must hold.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from fedsieve.data.storage import read_json
from fedsieve.types import InputError

RECORD = "VERSION.json"
SUMS = "SHA256SUMS"
REBUILD = "remove the folder, and build it anew"

Counts: TypeAlias = Mapping[str, int]
"""How many there are of what: {"training": 60000, "test": 10000}."""


@dataclass(frozen=True)
class Version:
    """A published version of a dataset: what it has how many of, exactly, or between where no more is printed."""

    name: str
    """Empty where there is only one."""
    counts: Mapping[str, int | range]

    def fits(self, counts: Counts) -> bool:
        """Say whether of all that was counted there is as much as this version has."""
        return all(
            counts[what] in expected if isinstance(expected, range) else counts[what] == expected
            for what, expected in self.counts.items()
            if what in counts
        )

    def __str__(self) -> str:
        """Return its name and counts."""
        return f"{self.name}: {format_counts(self.counts)}".removeprefix(": ")


def version_of(versions: Iterable[Version], counts: Counts) -> Version | None:
    """Return the version that has these counts, None if none has."""
    return next((version for version in versions if version.fits(counts)), None)


def merged(tallies: Iterable[Mapping[str, int | set[str]]], order: Iterable[str]) -> dict[str, int]:
    """Return the sums of numbers, and the sizes of the unions of sets; those in ``order`` come first, and in it."""
    numbers, sets = dict[str, int](), dict[str, set[str]]()
    for tally in tallies:
        for what, part in tally.items():
            if isinstance(part, int):
                numbers[what] = numbers.get(what, 0) + part
            else:
                sets.setdefault(what, set()).update(part)
    counts = {what: len(members) for what, members in sets.items()} | numbers
    return {what: counts[what] for what in (*order, *sorted(counts)) if what in counts}


def format_counts(counts: Mapping[str, int | range]) -> str:
    """Return "60,000 training, 10,000 test"; a range of numbers as its two ends."""
    numbers = {
        what: f"{number[0]:,} to {number[-1]:,}" if isinstance(number, range) else f"{number:,}"
        for what, number in counts.items()
    }
    return ", ".join(f"{number} {what}" for what, number in numbers.items())


def built_counts(folder: Path) -> dict[str, int] | None:
    """Return what a folder had of what when it was built, None where it was not. Raises InputError."""
    record = read_version(folder)
    return record and {str(what): int(number) for what, number in record["counts"].items()}


def read_version(folder: Path) -> dict[str, Any] | None:
    """Return ``VERSION.json``: dataset, version, counts, archive; None where there is none. Raises InputError."""
    record = read_json(folder / RECORD, REBUILD)
    if record is None:
        return None
    counts = record.get("counts")
    if not isinstance(counts, dict) or not all(type(number) is int for number in counts.values()):
        raise InputError(f"{folder / RECORD} has no counts: {REBUILD}")
    if not isinstance(record.get("version"), str):
        raise InputError(f"{folder / RECORD} names no version: {REBUILD}")
    return record
