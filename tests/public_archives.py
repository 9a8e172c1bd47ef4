"""Archives of the public form, made small: what they hold, and what builds datasets of them."""

import io
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

import fedsieve.data as data
from fedsieve.data import cifar10, speech_commands
from fedsieve.data.build import build_dataset
from fedsieve.data.version import Version
from fedsieve.types import InputError
from small_files import _cache, leaf_text, md5, pickled, pixels, refuses  # noqa: F401 (the cache is every test's)


def quiet(*_: object) -> None:
    """Show no progress."""


def tar(path: Path, files: Mapping[str, bytes], mode: str = "w:gz", **links: str) -> Path:
    """Write a tar of files, and of symbolic links by what they lead to."""
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        for name, target in links.items():
            member = tarfile.TarInfo(name)
            member.type, member.linkname = tarfile.SYMTYPE, target
            archive.addfile(member)
    return path


def zipped(path: Path, files: Mapping[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def folder(path: Path, files: Mapping[str, bytes]) -> Path:
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def publish(monkeypatch: pytest.MonkeyPatch, name: str, *versions: Version) -> None:
    """Let small versions be the published ones."""
    monkeypatch.setattr(type(data.SOURCES[name]), "versions", versions)


@pytest.fixture
def cifar(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """The files of a small CIFAR-10 archive, 20 + 4 images."""
    batches = {name: np.concatenate([pixels(4, 1) % 10, pixels(4, 3072)], 1).tobytes() for name in cifar10.MD5}
    monkeypatch.setattr(cifar10, "MD5", {name: md5(batch) for name, batch in batches.items()})
    publish(monkeypatch, "cifar10", Version("", {"training": 20, "test": 4}))
    inside = {f"cifar-10-batches-bin/{name}.bin": batch for name, batch in batches.items()}
    return {"cifar-10-batches-bin/readme.html": b"<html>"} | inside


@pytest.fixture
def cifar100(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """The files of a small CIFAR-100 archive, two + one images of each class."""
    publish(monkeypatch, "cifar100", Version("", {"training": 200, "test": 100}))

    def rows(count: int) -> bytes:
        fine = np.arange(count, dtype=np.uint8)[:, None] % 100
        return np.concatenate([fine // 5, fine, pixels(count, 3072)], 1).tobytes()

    return {"cifar-100-binary/train.bin": rows(200), "cifar-100-binary/test.bin": rows(100)}


def speech(words: tuple[str, ...]) -> dict[str, bytes]:
    """Return the files of a small Speech Commands archive: a clip of each partition a word, and noise."""
    people = {speech_commands.which_set(f"{i:08x}_nohash_0.wav"): f"{i:08x}" for i in range(60)}
    wav = b"RIFF\0\0\0\0WAVEfmt "
    clips = {f"./{word}/{who}_nohash_0.wav": wav + word.encode() for word in words for who in people.values()}
    noise = {"./_background_noise_/hum.wav": wav, "./_background_noise_/README.md": b"noise"}
    return {"./README.md": b"about", "./testing_list.txt": b""} | clips | noise


@pytest.fixture
def versions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two small versions of Speech Commands, of two words and of three."""
    parts = ("training", "validation", "testing")
    small = [
        Version(name, {"words": n, "clips": 3 * n, **dict.fromkeys(parts, n), "recordings of noise": 1})
        for name, n in (("v0.01", 2), ("v0.02", 3))
    ]
    publish(monkeypatch, "speech_commands", *small)


@pytest.fixture
def leaf(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """What LEAF writes of three writers, beside what else is there."""
    exact = {"writers": 3, "writers tested": 3, "training": range(5, 7), "test": 3}
    publish(monkeypatch, "femnist", Version("3 writers", exact), Version("2 writers", {"writers": 2}))
    one, two = leaf_text({"a": [1, 2], "b": [3]}), leaf_text({"c": [4, 5, 61]})
    return {
        "data/train/all_data_0_niid_0_keep_0_train_8.json": one,
        "data/train/all_data_1_niid_0_keep_0_train_8.json": two,
        "data/test/all_data_0_niid_0_keep_0_test_8.json": leaf_text({"a": [1], "b": [2], "c": [3]}),
        "data/all_data/all_data_0.json": b"{}",
        "data/intermediate/write_files.pkl": b"\x80\x04.",
    }


def built(name: str, archive: Path, root: Path) -> int:
    return build_dataset(data.SOURCES[name], archive, root, quiet)


def refuse(name: str, archive: Path, root: Path, *words: str) -> None:
    """Building is refused in one line that has all words, and leaves the data folder as it was."""
    before = snapshot(root)
    with pytest.raises(InputError) as caught:
        built(name, archive, root)
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert snapshot(root) == before


def snapshot(root: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(root)): p.read_bytes() if p.is_file() else None for p in sorted(root.rglob("*"))}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A data folder."""
    folder = tmp_path / "data"
    folder.mkdir()
    return folder
