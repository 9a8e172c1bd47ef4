"""Seconds worth believing: a sample counts only if its threads were not kept waiting for a processor."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

WAITING = 0.05
"""The share of a sample's time that its threads may have waited on a run queue."""


def waited() -> float:
    """Return the seconds that this process's threads have spent runnable but not running (Linux's schedstat)."""
    total = 0
    for task in Path("/proc/self/task").iterdir():
        try:
            total += int((task / "schedstat").read_text().split()[1])
        except FileNotFoundError:  # the thread has ended
            continue
    return total / 1e9


def sample(work: Callable[[], object]) -> tuple[float, bool]:
    """Return how long ``work`` took, in seconds, and whether the machine left it undisturbed."""
    before, began = waited(), time.perf_counter()
    work()
    seconds = time.perf_counter() - began
    return seconds, waited() - before <= WAITING * seconds


def summary(samples: list[tuple[float, bool]]) -> tuple[float, int, int]:
    """Return the median of the undisturbed samples, in seconds, and how many were kept and dropped."""
    kept = [seconds for seconds, quiet in samples if quiet]
    return (median(kept) if kept else float("nan")), len(kept), len(samples) - len(kept)


def machine() -> str:
    """Return the hardware and the versions that a figure belongs to, in one line."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
    return f"{model}, {os.cpu_count()} cores, Python {platform.python_version()}, torch {torch.__version__}"
