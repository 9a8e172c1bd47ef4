"""A SuperLink of one's own, which ends with whoever started it, and what is asked of it."""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import sysconfig
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fedsieve.data.storage import write
from fedsieve.flower.app.guard import GUARD, REMOVE
from fedsieve.types import InputError

QUIET = {
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_TELEMETRY_ENABLED": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "PYTHONUNBUFFERED": "1",
}
"""What keeps Flower and Ray from installing packages, asking for news and telling of us."""
LOOPBACK = "127.0.0.1,localhost"
START = 60.0
CONNECTION = "fedsieve"


@dataclass(frozen=True)
class SuperLink:
    """A SuperLink at work: its folder, which is Flower's home, and its log in it."""

    home: Path
    environment: Mapping[str, str]
    process: subprocess.Popen[bytes]

    @property
    def log(self) -> Path:
        """What it and the apps say."""
        return self.home / "superlink.log"

    def flwr(self, *arguments: str, seconds: float = 300.0) -> dict[str, Any]:
        """Ask with Flower's own command line, and return its answer. Raises InputError, also after ``seconds``."""
        command = [script("flwr"), *arguments, "--format", "json"]
        ask = partial(subprocess.run, capture_output=True, text=True, check=False)
        try:
            process = ask(command, env=self.environment, cwd=self.home, timeout=seconds)
        except subprocess.TimeoutExpired:
            raise InputError(f"flwr {arguments[0]} gave no answer in {seconds:g} s: {last_line(self.log)}") from None
        start = process.stdout.find("{")
        try:
            answer: dict[str, Any] = json.loads(process.stdout[start:]) if start >= 0 else {}
        except ValueError:
            answer = {}
        if process.returncode or not answer or answer.get("success") is False:
            reason = answer.get("error-message") or (process.stderr or process.stdout).strip()
            raise InputError(f"flwr {arguments[0]} failed: {reason}")
        return answer


@contextmanager
def superlink(home: Path, environment: Mapping[str, str]) -> Iterator[SuperLink]:
    """Start a SuperLink on a free port of loopback, simulating; end it, and all it started, with the block."""
    port = free_port()
    config = f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\n'
    write(home / "config.toml", f'{config}address = "127.0.0.1:{port}"\ninsecure = true\n'.encode())
    env = {**os.environ, **QUIET, **unproxied(os.environ), **environment, "FLWR_HOME": str(home)}
    env["PATH"] = f"{sysconfig.get_path('scripts')}{os.pathsep}{env.get('PATH', '')}"
    command = [script("flower-superlink"), "--insecure", "--simulation", "--host", "127.0.0.1", "--port", str(port)]
    command = [*GUARD, REMOVE, str(home), *command]
    with (home / "superlink.log").open("wb") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=env, cwd=home, start_new_session=True
        )
    link = SuperLink(home, env, process)
    try:
        _wait(link, port)
        yield link
    finally:
        assert process.stdin
        with suppress(BrokenPipeError):
            process.stdin.write(b".")
            process.stdin.flush()
        with suppress(BrokenPipeError):
            process.stdin.close()
        process.wait()


def unproxied(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that keep loopback from going through a proxy; hosts that are named already stay so."""
    return {name: ",".join(filter(None, (environment.get(name), LOOPBACK))) for name in ("NO_PROXY", "no_proxy")}


def healthy(port: int) -> bool:
    """Say whether a SuperLink answers on a port of loopback, whatever proxies the environment names."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"http://127.0.0.1:{port}/health", timeout=1):
            return True
    except (OSError, http.client.HTTPException, ValueError):
        return False


def script(name: str) -> str:
    """Return the path of a command that Flower has installed beside this Python."""
    return str(Path(sysconfig.get_path("scripts")) / name)


def free_port() -> int:
    """Return a port of loopback that nobody listens on now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def _wait(link: SuperLink, port: int) -> None:
    end = time.monotonic() + START
    while time.monotonic() < end and link.process.poll() is None:
        if healthy(port):
            return
        time.sleep(0.1)
    raise InputError(f"Flower's SuperLink did not start: {last_line(link.log)}")


def last_line(log: Path) -> str:
    """Return the last line that a log has."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"
