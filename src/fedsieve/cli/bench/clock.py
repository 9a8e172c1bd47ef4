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

from fedsieve.runs.provenance import cpu

Key = TypeVar("Key")
WAITING = 0.02
"""The share of a sample's time that its threads may have waited on a run queue."""
SHORTEST = 0.02
"""The seconds that a sample takes at least: as many calls as that needs."""
WARM = 3
STEAL = 8
"""The column of /proc/stat that counts stolen time."""


class Timing(NamedTuple):
    """The median of the undisturbed samples in seconds (NaN without one), and how many were kept and dropped."""

    seconds: float
    kept: int
    dropped: int

    @property
    def ms(self) -> float | None:
        """The median in milliseconds, None where nothing was kept."""
        return None if math.isnan(self.seconds) else self.seconds * 1e3


@dataclass(frozen=True)
class RepeatedCall:
    """What one sample times: ``calls`` calls of a function; the sample is their mean."""

    call: Callable[[], object]
    calls: int = 1

    def __call__(self) -> None:
        """Call the function ``calls`` times."""
        for _ in range(self.calls):
            self.call()


def wait_seconds() -> float:
    """Return the seconds that this process's threads have spent runnable but not running (Linux's schedstat)."""
    total = 0
    for task in Path("/proc/self/task").glob("*/schedstat"):
        with suppress(FileNotFoundError, ProcessLookupError):  # the thread has ended
            total += int(task.read_text().split()[1])
    return total / 1e9


def steal_ticks() -> int:
    """Return the ticks that the hypervisor has taken from this machine since it started."""
    stat = Path("/proc/stat")
    return int(stat.read_text().split(maxsplit=STEAL + 1)[STEAL]) if stat.exists() else 0


def time_sample(call: Callable[[], object]) -> tuple[float, bool]:
    """Return how long a call took, in seconds, and whether the machine left it undisturbed."""
    steal, waited, began = steal_ticks(), wait_seconds(), time.perf_counter()
    call()
    seconds = time.perf_counter() - began
    return seconds, wait_seconds() - waited < WAITING * seconds and steal_ticks() == steal


def summarize_samples(samples: list[tuple[float, bool]]) -> Timing:
    """Return the median of the undisturbed samples, in seconds, and how many were kept and dropped."""
    kept = [seconds for seconds, undisturbed in samples if undisturbed]
    return Timing(median(kept) if kept else math.nan, len(kept), len(samples) - len(kept))


def warm_up(call: Callable[[], object], group: int = 1) -> RepeatedCall:
    """Call it a few times, and return samples of it that are long enough, each of whole groups of calls."""
    seconds = min(time_sample(RepeatedCall(call, group))[0] for _ in range(WARM))
    return RepeatedCall(call, group * max(1, math.ceil(SHORTEST / seconds)))


def time_in_turns(calls: Mapping[Key, RepeatedCall], kept: int, seconds: float) -> dict[Key, Timing]:
    """Return the seconds of a call of each, sampled in turns until each has ``kept`` samples or time is up."""
    samples: dict[Key, list[tuple[float, bool]]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    while True:
        for name, call in calls.items():
            duration, undisturbed = time_sample(call)
            samples[name].append((duration / call.calls, undisturbed))
        if time.perf_counter() >= end or all(sum(ok for _, ok in own) >= kept for own in samples.values()):
            return {name: summarize_samples(own) for name, own in samples.items()}


def machine() -> str:
    """Return the hardware and the versions that a figure belongs to, in one line."""
    return f"{cpu()}, {os.cpu_count()} cores, Python {platform.python_version()}, torch {torch.__version__}"
