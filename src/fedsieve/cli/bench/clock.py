"""Seconds worth believing: what is compared runs in turns in one process, and a disturbed sample does not count.

A sample is disturbed if this process's threads waited more than 2 % of it on a run queue, or if the hypervisor took
time from the machine (steal) meanwhile. Where the system tells neither (outside Linux), every sample counts.
"""

from __future__ import annotations

import math
import os
import platform
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import NamedTuple, TypeVar

import torch

from fedsieve.runs.environment import cpu

Key = TypeVar("Key")
WAITING = 0.02
"""The share of a sample's time that its threads may have waited on a run queue."""
SHORTEST = 0.02
"""The seconds that a sample takes at least: as many calls as that needs."""
WARM = 3
STEAL = 8
"""The column of /proc/stat that counts stolen time."""


class Timing(NamedTuple):
    """The median of the undisturbed samples (NaN without one), and how many were kept and dropped."""

    seconds: float
    kept: int
    dropped: int

    @property
    def ms(self) -> float | None:
        """The median in milliseconds, None where nothing was kept."""
        return None if math.isnan(self.seconds) else self.seconds * 1e3


@dataclass(frozen=True)
class Work:
    """What one sample times: ``calls`` calls; the sample is their mean."""

    call: Callable[[], object]
    calls: int = 1

    def __call__(self) -> None:
        """Do all of it."""
        for _ in range(self.calls):
            self.call()


def waited() -> float:
    """Return the seconds that this process's threads have spent runnable but not running (Linux's schedstat)."""
    total = 0
    for task in Path("/proc/self/task").glob("*/schedstat"):
        with suppress(FileNotFoundError, ProcessLookupError):  # the thread has ended
            total += int(task.read_text().split()[1])
    return total / 1e9


def stolen() -> int:
    """Return the ticks that the hypervisor has taken from this machine since it started."""
    stat = Path("/proc/stat")
    return int(stat.read_text().split(maxsplit=STEAL + 1)[STEAL]) if stat.exists() else 0


def sample(work: Callable[[], object]) -> tuple[float, bool]:
    """Return how long ``work`` took, in seconds, and whether the machine left it undisturbed."""
    taken, before, began = stolen(), waited(), time.perf_counter()
    work()
    seconds = time.perf_counter() - began
    return seconds, waited() - before < WAITING * seconds and stolen() == taken


def summary(samples: list[tuple[float, bool]]) -> Timing:
    """Return the median of the undisturbed samples, in seconds, and how many were kept and dropped."""
    kept = [seconds for seconds, quiet in samples if quiet]
    return Timing(median(kept) if kept else math.nan, len(kept), len(samples) - len(kept))


def warm(call: Callable[[], object], group: int = 1) -> Work:
    """Call it a few times, and return samples of it that are long enough, each of whole groups of calls."""
    took = []
    for _ in range(WARM):
        began = time.perf_counter()
        Work(call, group)()
        took.append(time.perf_counter() - began)
    return Work(call, group * max(1, math.ceil(SHORTEST / min(took))))


def in_turns(works: Mapping[Key, Work], kept: int, seconds: float) -> dict[Key, Timing]:
    """Return the seconds of a call of each, sampled in turns until each has ``kept`` samples or time is up."""
    found: dict[Key, list[tuple[float, bool]]] = {name: [] for name in works}
    end = time.perf_counter() + seconds
    while True:
        for name, work in works.items():
            took, quiet = sample(work)
            found[name].append((took / work.calls, quiet))
        if time.perf_counter() >= end or all(sum(quiet for _, quiet in own) >= kept for own in found.values()):
            return {name: summary(own) for name, own in found.items()}


def machine() -> str:
    """Return the hardware and the versions that a figure belongs to, in one line."""
    return f"{cpu()}, {os.cpu_count()} cores, Python {platform.python_version()}, torch {torch.__version__}"
