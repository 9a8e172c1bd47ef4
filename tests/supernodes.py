"""A deployment on loopback: SuperLink and SuperNodes as processes of their own, insecure or with TLS and node keys."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedsieve.flower.app.guard import GUARD, alive, descendants
from fedsieve.flower.app.superlink import QUIET, free_port, script, unproxied

KEY = "ab" * 32


@dataclass(frozen=True)
class Machines:
    """The server's address, and what enters each machine: the server's, then the nodes'."""

    server: str
    enter: tuple[list[str], ...]


@contextmanager
def three_machines() -> Iterator[Machines | None]:
    """Yield three network namespaces with wires between them; None where this user may not make them."""
    names = [f"fedsieve-{os.getpid()}-{i}" for i in range(3)]
    wires = [f"ip netns add {name}" for name in names] + [f"ip -n {name} link set lo up" for name in names]
    wires += [
        f"ip -n {names[0]} link add wire type bridge",
        f"ip -n {names[0]} addr add 10.77.0.1/24 dev wire",
        f"ip -n {names[0]} link set wire up",
    ]
    for i, name in enumerate(names[1:], 1):
        wires += [
            f"ip link add to{i} netns {names[0]} type veth peer name wire netns {name}",
            f"ip -n {names[0]} link set to{i} master wire",
            f"ip -n {names[0]} link set to{i} up",
            f"ip -n {name} addr add 10.77.0.{1 + i}/24 dev wire",
            f"ip -n {name} link set wire up",
        ]
    try:
        made = all(subprocess.run(one.split(), capture_output=True, check=False).returncode == 0 for one in wires)
    except FileNotFoundError:
        made = False
    try:
        yield Machines("10.77.0.1", tuple(["ip", "netns", "exec", name] for name in names)) if made else None
    finally:
        for name in names:
            with suppress(FileNotFoundError):
                subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


class Deployment:
    """Processes and what is asked of them; ``stop`` ends all that were started, and what they started."""

    def __init__(self, folder: Path, tls: Path | None = None, machines: Machines | None = None, **environment: str):
        self.folder, self.tls, self.port = folder, tls, free_port()
        self.machines = machines or Machines("127.0.0.1", ([], []))
        ours = {**QUIET, **unproxied(os.environ), "FEDSIEVE_KEY": KEY, "FLWR_HOME": str(folder)}
        self.environment = {**os.environ, **ours, **environment}
        self.environment["PATH"] = f"{Path(script('flwr')).parent}:{os.environ['PATH']}"
        self.processes = dict[str, subprocess.Popen[bytes]]()
        trust = f'root-certificates = "{tls}/ca.crt"' if tls else "insecure = true"
        folder.mkdir(exist_ok=True)
        (folder / "config.toml").write_text(
            f'[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "{self.address}"\n{trust}\n'
        )

    def superlink(self) -> None:
        """Start the SuperLink."""
        secure = ["--insecure"]
        if self.tls:
            files = {"ca-certfile": "ca.crt", "certfile": "server.pem", "keyfile": "server.key"}
            secure = [part for o, name in files.items() for part in (f"--ssl-{o}", f"{self.tls}/{name}")]
            secure.append("--enable-supernode-auth")
        before = self.log("superlink").lower().count("running on")
        here = ["--host", self.machines.server, "--port", str(self.port)]
        self.start("superlink", self.machines.enter[0], "flower-superlink", *secure, *here)
        self.wait(lambda: self.log("superlink").lower().count("running on") > before, "the SuperLink", 60)

    @property
    def address(self) -> str:
        """Where the SuperLink is."""
        return f"{self.machines.server}:{self.port}"

    def supernode(self, name: str, config: str, *secure: str, machine: int = 1) -> None:
        """Start a SuperNode."""
        link = ["--superlink", self.address, "--host", "127.0.0.1", "--port", str(free_port())]
        options = [*(secure or ["--insecure"]), *link, "--node-config", config]
        self.start(name, self.machines.enter[machine], "flower-supernode", *options)

    def start(self, name: str, enter: list[str], command: str, *arguments: str) -> None:
        """Start a process that ends with this one."""
        guarded = [*GUARD, *enter, script(command), *arguments]
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                guarded,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=self.environment,
                cwd=self.folder,
                start_new_session=True,
            )

    def kill(self, name: str) -> None:
        """End a process and all that it has started with kill -9, as a power cut would."""
        guard = self.processes.pop(name)
        for pid in descendants(guard.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        guard.wait()
        assert guard.stdin
        guard.stdin.close()

    def flwr(self, *arguments: str) -> dict[str, Any]:
        """Ask the SuperLink."""
        command = [*self.machines.enter[0], script("flwr"), *arguments, "--format", "json"]
        done = subprocess.run(
            command, env=self.environment, cwd=self.folder, capture_output=True, text=True, check=False
        )
        assert "{" in done.stdout, done.stdout + done.stderr
        answer: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{") :])
        return answer

    def run(self, app: Path, **settings: Any) -> str:
        """Start an app's run, and return its number."""
        told = " ".join(f"{name.replace('_', '-')}={json.dumps(value)}" for name, value in settings.items())
        answer = self.flwr("run", str(app), "here", *(["-c", told] if told else []))
        assert answer.get("success"), answer
        return str(answer["run-id"])

    def status(self, run: str) -> dict[str, Any]:
        """Return what Flower says of a run."""
        (told,) = self.flwr("list", "here", "--run-id", run)["runs"]
        found: dict[str, Any] = told
        return found

    def finished(self, run: str, out: Path, seconds: float) -> dict[str, Any]:
        """Wait for the end of a run, and return what Flower says of it."""
        ends = [out / "summary.json"]
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if any(p.exists() for p in ends):
                time.sleep(2)
            told = self.status(run)
            if told["status"].startswith("finished"):
                return told
            time.sleep(2)
        raise AssertionError(f"the run is not over after {seconds} s:\n{self.log('superlink')[-5000:]}")

    def log(self, name: str) -> str:
        """Return what a process has said."""
        path = self.folder / f"{name}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def wait(self, done: Callable[[], bool], what: str, seconds: float) -> None:
        """Wait until something is so."""
        end = time.monotonic() + seconds
        while not done():
            logs = "\n".join(f"--- {name}\n{self.log(name)[-3000:]}" for name in self.processes)
            assert time.monotonic() < end, f"{what}: not within {seconds} s\n{logs}"
            time.sleep(0.2)

    def stop(self) -> None:
        """End everything, by force what does not end by itself."""
        below = [pid for process in self.processes.values() for pid in descendants(process.pid)]
        for process in self.processes.values():
            assert process.stdin
            process.stdin.close()
        for process in self.processes.values():
            process.wait()
        for pid in filter(alive, below):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@contextmanager
def deployment(
    folder: Path, tls: Path | None = None, machines: Machines | None = None, **environment: str
) -> Iterator[Deployment]:
    """Yield a deployment with its SuperLink at work; end it with the block."""
    it = Deployment(folder, tls, machines, **environment)
    try:
        it.superlink()
        yield it
    finally:
        it.stop()


def rows(out: Path) -> list[dict[str, Any]]:
    """Return a run's rows so far, whole ones."""
    path = out / "rounds.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]
