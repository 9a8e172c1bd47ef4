"""Every finding of the doctor, from a machine that has it and from one that has not."""

import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch

from command_line import CommandLine
from fedsieve.cli import doctor
from fedsieve.cli.doctor import examine

WELL = {
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_TELEMETRY_ENABLED": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "FEDSIEVE_KEY": "ab" * 32,
    "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": "9",
}


@pytest.fixture(autouse=True)
def _kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sparse kernels that are there and use PyTorch's threads, whatever this machine has."""
    monkeypatch.setattr(doctor, "unavailable_reason", lambda: None)
    monkeypatch.setattr(doctor, "get_num_threads", torch.get_num_threads)


def lines(level: str, cores: int = 4, **environment: str) -> list[str]:
    return [found.line for found in examine(WELL | environment, cores) if found.level == level]


def test_a_well_set_machine_has_nothing_to_mend() -> None:
    assert lines("mend") == []


@pytest.mark.parametrize(("levels", "code"), [(["ok", "mend", "note"], 1), (["ok", "note"], 0), ([], 0)])
def test_the_exit_code_is_one_if_anything_is_to_be_mended(
    levels: list[str], code: int, monkeypatch: pytest.MonkeyPatch, fedsieve: CommandLine
) -> None:
    monkeypatch.setattr(doctor, "examine", lambda: [doctor.Finding(level, "a line") for level in levels])
    assert fedsieve("doctor", code=code).stdout == "".join(f"{level}  a line\n" for level in levels)


@pytest.mark.parametrize(
    ("environment", "line"),
    [
        (
            {"FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "0"},
            "export FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1",
        ),
        ({"FLWR_TELEMETRY_ENABLED": "1"}, "export FLWR_TELEMETRY_ENABLED=0"),
        ({"RAY_USAGE_STATS_ENABLED": "1"}, "export RAY_USAGE_STATS_ENABLED=0"),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, "OMP_WAIT_POLICY=active"),
        ({"OMP_NUM_THREADS": "5"}, "OMP_NUM_THREADS=5 on 4 cores"),
        ({"FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": "abc"}, "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT=abc is no port"),
        ({"FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": "65536"}, "is no port: unset it"),
    ],
)
def test_settings_to_mend(environment: dict[str, str], line: str) -> None:
    (found,) = lines("mend", **environment)
    assert line in found


def test_missing_kernels_and_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "unavailable_reason", lambda: "no compiler")
    kernels, cores = sorted(lines("mend", cores=1), reverse=True)
    assert "no sparse kernels (no compiler)" in kernels
    assert "here is 1: nobody would ever train" in cores


def test_the_threads_of_kernels_and_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.get_num_threads", lambda: 3)
    monkeypatch.setattr(doctor, "get_num_threads", lambda: 3)
    assert any(line.endswith("use as many threads as PyTorch: 3") for line in lines("fine"))
    monkeypatch.setattr(doctor, "get_num_threads", lambda: 1)
    (kernels,) = lines("mend")
    assert "the sparse kernels use 1 thread, PyTorch 3: " in kernels


def test_a_missing_or_old_flower(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "version", lambda name: {"flwr": "1.40.2", "ray": "2"}[name])
    assert "1.41 is the oldest" in doctor._extra().line
    for new in ("1.41", "1.42.0rc1", "1.42rc1.dev3", "2.0rc1"):
        monkeypatch.setattr(doctor, "version", lambda name, new=new: {"flwr": new, "ray": "2"}[name])
        assert doctor._extra().level == "fine"

    def missing(name: str) -> str:
        raise doctor.PackageNotFoundError(name)

    monkeypatch.setattr(doctor, "version", missing)
    assert doctor._extra().line == "no flwr: --engine flower needs it: pip install '.[flower]' in FedSieve's checkout"


@pytest.fixture
def superlink() -> Iterator[str]:
    """Something that says it is well, as a SuperLink does."""

    class Well(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Well)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield str(server.server_port)
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_superlink_that_was_left_over(superlink: str) -> None:
    (found,) = lines("mend", FLWR_LOCAL_SUPERLINK_HTTP_API_PORT=superlink)
    assert f"on port {superlink}" in found


def test_a_superlink_is_found_whatever_proxy_is_named(superlink: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    assert doctor._superlink({"FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": superlink}).level == "mend"


def test_a_listener_that_speaks_no_http_is_no_superlink() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def speak() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(1024)
                connection.sendall(b"SSH-2.0-OpenSSH\r\n")

        thread = threading.Thread(target=speak)
        thread.start()
        found = doctor._superlink({"FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(server.getsockname()[1])})
        thread.join()
    assert found.line == "no local SuperLink is left over"


def test_little_shared_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 64 << 20}))
    assert doctor._shared_memory(tmp_path).level == "note"
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1 << 60}))
    assert doctor._shared_memory(tmp_path).level == "fine"
