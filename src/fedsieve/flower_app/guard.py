"""Run a command for as long as somebody holds the other end of standard input: nothing outlives a killed parent.

Flower's processes look after one another, some of Ray's stay for minutes: what is still there after a while is killed
(on Linux, which tells who started whom).
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

GUARD = [sys.executable, "-P", __file__]
"""What goes before a command to guard it: this file by itself, which needs nothing else."""
GRACE = 10.0
"""Seconds between asking to end and ending."""
LOOK = 0.2


def main() -> None:
    """Run the arguments as a command in a session of its own, and end all of it when standard input ends."""
    process = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL, start_new_session=True)
    while process.poll() is None and not select.select([0], [], [], LOOK)[0]:
        pass
    if process.poll() is None:
        _end(process)
    sys.exit(process.wait())


def _end(process: subprocess.Popen[bytes]) -> None:
    below, end = [process.pid, *descendants(process.pid)], time.monotonic() + GRACE
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    while (process.poll() is None or any(map(alive, below))) and time.monotonic() < end:
        time.sleep(LOOK)
    for pid in filter(alive, below):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def descendants(pid: int) -> list[int]:
    """Return all processes below one, as far as the system tells."""
    parents = dict[int, int]()
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    found, new = set[int](), {pid}
    while new:
        new = {child for child, parent in parents.items() if parent in new} - found
        found |= new
    return sorted(found)


def alive(pid: int) -> bool:
    """Say whether a process is there, zombies aside; where the system does not tell, it is not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


if __name__ == "__main__":
    main()
