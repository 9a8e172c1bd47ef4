"""Run a command for as long as somebody holds the other end of standard input: nothing outlives a killed parent.

Flower's processes look after one another, some of Ray's stay for minutes: what is still there after a while is killed
(on Linux, which tells who started whom, and gives this process the children of those that died).

    python guard.py [--remove FOLDER] COMMAND ...

FOLDER goes with a parent that died and could not remove it: one that lives writes a byte before it lets go.
"""

from __future__ import annotations

import ctypes
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

GUARD = [sys.executable, "-P", __file__]
"""What goes before a command to guard it: this file by itself, which needs nothing else."""
REMOVE = "--remove"
GRACE = 10.0
"""Seconds between asking to end and ending."""
LOOK = 0.2
PR_SET_CHILD_SUBREAPER = 36


def run_guarded() -> None:
    """Run the arguments as a command in a session of its own, and end all of it with it, or with standard input."""
    command, folder = sys.argv[1:], None
    if command[0] == REMOVE:
        folder, command = command[1], command[2:]
    with suppress(OSError, AttributeError):  # be the parent of whatever loses its own below, where a system can do that
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    while process.poll() is None and not select.select([0], [], [], LOOK)[0]:
        pass
    _end(process)
    if folder and select.select([0], [], [], 0)[0] and not os.read(0, 1):
        shutil.rmtree(folder, ignore_errors=True)
    sys.exit(process.wait())


def _end(process: subprocess.Popen[bytes]) -> None:
    below, end = descendants(os.getpid()), time.monotonic() + GRACE
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGTERM)
    _signal(below, signal.SIGTERM)
    while (process.poll() is None or any(map(alive, below))) and time.monotonic() < end:
        time.sleep(LOOK)
    _signal({*below, *descendants(os.getpid())}, signal.SIGKILL)


def _signal(pids: Iterable[int], number: signal.Signals) -> None:
    for pid in filter(alive, pids):
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def descendants(pid: int) -> list[int]:
    """Return all processes below one, as far as the system tells."""
    parents = dict[int, int]()
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    below, new = set[int](), {pid}
    while new:
        new = {child for child, parent in parents.items() if parent in new} - below
        below |= new
    return sorted(below)


def alive(pid: int) -> bool:
    """Say whether a process is there, zombies aside; where the system does not tell, it is not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


if __name__ == "__main__":
    run_guarded()
