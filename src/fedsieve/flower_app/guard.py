"""Run a command for as long as somebody holds the other end of standard input: nothing outlives a killed parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

GRACE = 10.0
"""Seconds between asking to end and ending."""


def main() -> None:
    """Run the arguments as a command in a process group of its own, and end that when standard input does."""
    process = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL, start_new_session=True)
    threading.Thread(target=_watch, args=(process,), daemon=True).start()
    sys.exit(process.wait())


def _watch(process: subprocess.Popen[bytes]) -> None:
    os.read(0, 1)
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(GRACE)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)


if __name__ == "__main__":
    main()
