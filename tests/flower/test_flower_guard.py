"""The guard of a command: nothing that it starts outlives its parent."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedsieve.flower.app import simulation as simulation
from fedsieve.flower.app.guard import GUARD, REMOVE, alive


def guarded(*command: str) -> subprocess.Popen[str]:
    line = [*GUARD, *command]
    return subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_a_guard_returns_its_commands_code() -> None:
    with guarded("sh", "-c", "exit 7") as process:
        assert process.wait() == 7


def test_a_guard_ends_all_that_its_command_started_when_nobody_holds_it() -> None:
    with guarded("sh", "-c", "setsid sleep 300 & echo $! $$; wait") as process:
        assert process.stdin
        assert process.stdout
        pids = [int(word) for word in process.stdout.readline().split()]
        assert all(map(alive, pids))
        process.stdin.close()
        process.wait()
        assert not any(map(alive, pids))


def test_a_guard_ends_what_a_command_that_has_ended_left_behind() -> None:
    with guarded("sh", "-c", "setsid sh -c 'setsid sleep 300 & echo $!'; exit 3") as process:
        assert process.stdout
        left = int(process.stdout.readline())
        assert process.wait() == 3
        assert not alive(left)


@pytest.mark.parametrize("dies", [True, False])
def test_a_guard_removes_the_folder_of_a_parent_that_died(dies: bool, tmp_path: Path) -> None:
    """One that lives has a use for it yet."""
    folder = tmp_path / "home"
    folder.mkdir()
    command = [*GUARD, REMOVE, str(folder), "sleep", "300"]
    ending = "os.kill(os.getpid(), 9)" if dies else "p.stdin.write(b'.'); p.stdin.close(); p.wait()"
    start = f"import os, subprocess as s; p = s.Popen({command!r}, stdin=s.PIPE); print(p.pid, flush=True); {ending}"
    parent = subprocess.run([sys.executable, "-c", start], capture_output=True, text=True, check=False)
    end = time.monotonic() + 30
    while alive(int(parent.stdout)):
        assert time.monotonic() < end
        time.sleep(0.05)
    assert folder.exists() != dies
