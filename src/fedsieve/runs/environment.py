"""What computed a run, and where: version, commit, hardware."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from fedsieve.kernels import library


def describe_environment() -> dict[str, Any]:
    """Return version, commit, time and hardware as plain JSON."""
    return {
        "version": version("fedsieve"),
        "commit": _commit(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": {
            "cpu": cpu(),
            "cores": os.cpu_count(),
            "memory_mb": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 10**6,
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "system": platform.platform(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "isa": library.loaded_isa() if (why := library.unavailable_reason()) is None else f"none ({why})",
        },
    }


def cpu() -> str:
    """Return the processor's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _commit() -> str | None:
    """Return the commit of the source tree that is running, with a + if it was changed; None outside a tree."""
    here = Path(__file__).parent
    try:
        command = ["git", "-C", str(here), "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"]
        tracked = subprocess.run(["git", "-C", str(here), "ls-files", "--error-unmatch", __file__], capture_output=True)
        commit = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return None
    return commit.stdout.strip() or None if tracked.returncode == 0 else None


def usable_cores() -> int:
    """Return how many cores this process may use, where the system tells, or else how many there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
