"""What all tests share: which of them are skipped or quick, a cache of their own, and one thread for the kernels."""

import os
import signal
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import torchvision_operators  # noqa: F401 - before a test imports transformers or timm, which import torchvision
from command_line import CommandLine, Printed
from fedsieve.kernels import library

DATA = os.environ.get("FEDSIEVE_DATA")


QUICK = 2
"""How many cases of a test are marked quick."""


def pytest_configure() -> None:
    """Let Ctrl-C reach the processes that tests start: a shell's background jobs, and their children, ignore it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if "PYTEST_XDIST_WORKER" in os.environ:  # of which there are as many as cores
        torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)  # before -m is looked at
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this machine lacks, and mark quick some cases, evenly spaced, of every test that is none but plain."""
    cases = defaultdict[str, list[pytest.Item]](list)
    for item in items:
        if item.get_closest_marker("data") and not DATA:
            item.add_marker(pytest.mark.skip(reason="FEDSIEVE_DATA is not set"))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
        if not any(map(item.get_closest_marker, ("slow", "system", "data", "gpu"))):
            cases[item.nodeid.partition("[")[0]].append(item)
    for of_one_test in cases.values():
        for item in of_one_test[:: -(-len(of_one_test) // QUICK)]:
            item.add_marker(pytest.mark.quick)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDSIEVE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def data_root() -> Path:
    assert DATA
    return Path(DATA)


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def native(one_thread: None) -> Iterator[None]:
    """The native kernels, one thread, and new memory full of NaN: to read what nobody wrote then shows."""
    if library.unavailable_reason() is not None:
        pytest.skip(str(library.unavailable_reason()))
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def fedsieve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[CommandLine]:
    """The command line in this process, at work in ``tmp_path``; modules of that folder are forgotten afterwards."""
    from fedsieve.cli import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])

    def called(*words: object, code: int = 0) -> Printed:
        monkeypatch.setattr(sys, "argv", ["fedsieve", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            main()
        printed = Printed(*capsys.readouterr())
        assert (stop.value.code or 0) == code, printed.stderr
        return printed

    yield called
    for name, module in [*sys.modules.items()]:
        if str(getattr(module, "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]
