"""Where datasets are looked for, and the cache: kept, made again, done without."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fedsieve.data as data
from fedsieve.data import storage
from fedsieve.types import InputError
from small_files import _cache, homeless, refuses  # noqa: F401 (the cache is every test's)


@pytest.mark.slow
def test_import_is_light() -> None:
    code = (
        "import sys, fedsieve.data; print([m for m in ('PIL', 'librosa', 'soundfile', 'sklearn') if m in sys.modules])"
    )
    lines = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert lines.strip() == "[]"


def test_root_from_option_then_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDSIEVE_DATA", "/there")
    assert data.root_from("here") == Path.cwd() / "here"
    assert data.root_from(None) == Path("/there")
    monkeypatch.delenv("FEDSIEVE_DATA")
    assert data.root_from(None) is None


@pytest.mark.parametrize(("said", "root"), [("./hub", "hub"), ("hub/", "hub"), ("../hub", "../hub"), ("HUB", "HUB")])
def test_only_exactly_hub_is_the_hub(monkeypatch: pytest.MonkeyPatch, said: str, root: Any) -> None:
    assert data.root_from("hub") == Path("hub")
    assert data.root_from(said) == Path.cwd() / root
    monkeypatch.setenv("HOME", "/home/ada")
    assert data.root_from("~/hub") == Path("/home/ada/hub")
    assert data.dataset_status("mnist", data.root_from("hub")).startswith("huggingface.co")
    assert data.dataset_status("mnist", data.root_from(said)).startswith("not found")


def test_root_in_an_unknown_home_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "expanduser", homeless)
    with pytest.raises(InputError, match="write the whole path"):
        data.root_from("~/data")


def test_unknown_name_lists_the_names() -> None:
    refuses("cifar", None, "'cifar'", *data.NAMES)
    with pytest.raises(InputError, match="speech_commands"):
        data.dataset_status("cifar", None)


@pytest.mark.parametrize("name", [*data.SOURCES])
def test_nothing_there_says_how_to_get_it(name: str, tmp_path: Path) -> None:
    assert "https://" in data.dataset_status(name, None) or "http://" in data.dataset_status(name, None)
    assert data.dataset_status(name, tmp_path).startswith("not found: ")
    refuses(name, None, name, "--data", "FEDSIEVE_DATA", "http")
    refuses(name, tmp_path / "nowhere", str(tmp_path / "nowhere" / name), "missing", "--data", "http")


# The cache


def test_cache_keeps_and_remakes_what_is_damaged(tmp_path: Path) -> None:
    calls = []

    def make() -> dict[str, np.ndarray]:
        calls.append(1)
        return {"a": np.arange(1000), "names": np.array(["x", "yz"])}

    for _ in range(2):
        found = storage.cached_arrays("toy/1", make)
        assert found["a"].tolist() == list(range(1000))
        assert found["names"].tolist() == ["x", "yz"]
    assert len(calls) == 1
    (entry,) = (tmp_path / "cache").iterdir()
    whole = entry.read_bytes()
    for contents in (whole[:-100], b"", b"nonsense", whole[:500] + b"\xff" + whole[501:]):
        entry.write_bytes(contents)
        assert storage.cached_arrays("toy/1", make)["a"].tolist() == list(range(1000))
    assert len(calls) == 5
    assert list((tmp_path / "cache").iterdir()) == [entry]


def test_cache_that_cannot_be_written_warns_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("FEDSIEVE_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.warns(UserWarning, match="FEDSIEVE_CACHE"):
        assert storage.cached_arrays("toy/1", lambda: {"a": np.arange(3)})["a"].tolist() == [0, 1, 2]


def test_cache_without_a_home_warns_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEDSIEVE_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    with pytest.warns(UserWarning, match="FEDSIEVE_CACHE"):
        assert storage.cached_arrays("toy/1", lambda: {"a": np.arange(3)})["a"].tolist() == [0, 1, 2]


def test_cache_leaves_nothing_behind_when_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage.os, "fsync", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        storage.cached_arrays("toy/1", lambda: {"a": np.arange(3)})
    assert list((tmp_path / "cache").iterdir()) == []


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert storage.cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("FEDSIEVE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert storage.cache_folder() == Path("/xdg/fedsieve")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert storage.cache_folder() == Path.home() / ".cache" / "fedsieve"
