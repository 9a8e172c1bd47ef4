"""Datasets built from archives of the public form, made small: counted, whole, or refused in one line."""

import gzip
import hashlib
import itertools
import os
import signal
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fedsieve.data as data
from command_line import CommandLine
from fedsieve.data import build, cifar10, mnist, speech_commands, storage
from fedsieve.data.build import verify
from fedsieve.data.storage import locked
from fedsieve.data.version import Version
from fedsieve.types import InputError
from public_archives import built, folder, publish, refuse, speech, tar, zipped
from small_files import _cache, leaf_text, md5, pickled, pixels, refuses  # noqa: F401 (the cache is every test's)

# Each dataset, from each kind of archive


@pytest.mark.parametrize("mode", ["w:gz", "w:bz2", "w:xz", "w"])
def test_cifar10_from_a_tar(tmp_path: Path, root: Path, cifar: dict[str, bytes], mode: str) -> None:
    assert built("cifar10", tar(tmp_path / "a", cifar, mode), root) == 6
    found = data.load_dataset("cifar10", root)
    assert (len(found.train), len(found.test), found.version) == (20, 4, "")
    assert data.dataset_status("cifar10", root) == f"{root}/cifar10: binary version (20 training, 4 test)"
    assert sorted(p.name for p in root.iterdir()) == ["cifar10"]
    names = {p.name for p in (root / "cifar10").iterdir()}
    assert names == {"VERSION.json", "SHA256SUMS", *(f"{name}.bin" for name in cifar10.MD5)}


def test_what_is_built_is_checked_when_it_is_read(tmp_path: Path, root: Path, versions: None) -> None:
    built("speech_commands", tar(tmp_path / "a.tar.gz", speech(("yes", "no"))), root)
    assert verify(root / "speech_commands")["clips"] == 6
    clip = next((root / "speech_commands/yes").iterdir())
    clip.write_bytes(b"RIFF....WAVEother")
    with pytest.raises(InputError, match=f"{clip} is missing or damaged"):
        verify(root / "speech_commands")
    with pytest.raises(InputError, match="the one in SHA256SUMS"):
        speech_commands.read_download(clip, "get it")


def test_mnist_from_a_folder_of_its_files(tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {}
    for name in mnist.MD5:
        shape = (6 if "train" in name else 2, *((28, 28) if "images" in name else ()))
        header = bytes([0, 0, 8, len(shape)]) + np.array(shape, ">u4").tobytes()
        files[f"{name}.gz"] = gzip.compress(header + (pixels(*shape) % 10).tobytes())
    sums = {name.removesuffix(".gz"): (md5(content), "") for name, content in files.items()}
    monkeypatch.setattr(mnist, "MD5", sums)
    publish(monkeypatch, "mnist", Version("", {"training": 6, "test": 2}))
    assert built("mnist", folder(tmp_path / "downloads", files), root) == 4
    assert len(data.load_dataset("mnist", root).train) == 6
    (tmp_path / "downloads/t10k-labels-idx1-ubyte.gz").unlink()
    refuse("mnist", tmp_path / "downloads", root, "has no t10k-labels-idx1-ubyte.gz", "https://")


def test_cifar100_of_100_fine_classes(tmp_path: Path, root: Path, cifar100: dict[str, bytes]) -> None:
    built("cifar100", tar(tmp_path / "a", cifar100), root)
    found = data.load_dataset("cifar100", root)
    assert (len(found.train), len(found.test), len(found.classes)) == (200, 100, 100)
    assert (found.classes[0], found.classes[99], sorted(found.classes)) == ("apple", "worm", [*found.classes])
    assert found.train.y[:3].tolist() == [0, 1, 2]
    rows = np.frombuffer(cifar100["cifar-100-binary/train.bin"], np.uint8).reshape(-1, 3074)
    assert np.array_equal(found.train.x.numpy(), rows[:, 2:].reshape(-1, 3, 32, 32))


def test_cifar100_as_other_tools_unpack_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cifar100: dict[str, bytes]
) -> None:
    folder(tmp_path / "tar", cifar100)
    binary = data.load_dataset("cifar100", tmp_path / "tar")
    rows = {part: np.frombuffer(cifar100[f"cifar-100-binary/{part}.bin"], np.uint8) for part in ("train", "test")}
    batches = {part: row.reshape(-1, 3074)[:, 1:] for part, row in rows.items()}
    files = {part: pickled(batch, labels_=b"fine_labels") for part, batch in batches.items()}
    monkeypatch.setattr(data.cifar100, "PYTHON_MD5", {part: md5(content) for part, content in files.items()})
    folder(tmp_path / "torchvision/cifar-100-python", files)
    python = data.load_dataset("cifar100", tmp_path / "torchvision")
    assert data.dataset_status("cifar100", tmp_path / "torchvision").endswith("python version (200 training, 100 test)")
    assert python.digest == binary.digest
    (tmp_path / "tar/cifar-100-binary/test.bin").write_bytes(b"\1" * 100 * 3074)
    refuses("cifar100", tmp_path / "tar", "test.bin is damaged", "not equally many", "cifar-100-binary.tar.gz")
    (tmp_path / "torchvision/cifar-100-python/test").write_bytes(b"\x80\x02.")
    refuses("cifar100", tmp_path / "torchvision", "test is damaged", "md5")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda rows: rows[:-3074], "bytes instead of 200 rows of 3,074"),
        (lambda rows: rows[:1] + b"\1" + rows[2:], "not equally many images of each"),
        (lambda rows: b"\7" + rows[1:], "belong to several coarse ones"),
    ],
)
def test_other_rows_are_not_cifar100(
    tmp_path: Path, root: Path, cifar100: dict[str, bytes], change: Any, why: str
) -> None:
    cifar100["cifar-100-binary/train.bin"] = change(cifar100["cifar-100-binary/train.bin"])
    refuse("cifar100", tar(tmp_path / "a", cifar100), root, "train.bin", why)


def test_the_archive_of_cifar100_is_known_by_its_md5(
    tmp_path: Path, root: Path, cifar100: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = tar(tmp_path / "cifar-100-binary.tar.gz", cifar100)
    refuse("cifar100", archive, root, "cifar-100-binary.tar.gz is not the published archive (its md5)", "again")
    monkeypatch.setattr(data.cifar100.Cifar100, "archive_md5", {archive.name: md5(archive.read_bytes())})
    assert built("cifar100", archive, root) == 2
    assert verify(root / "cifar100") == {"training": 200, "test": 100}


@pytest.mark.parametrize(("words", "version"), [(("yes", "no"), "v0.01"), (("yes", "no", "go"), "v0.02")])
def test_speech_commands_of_either_version(
    tmp_path: Path, root: Path, versions: None, words: tuple[str, ...], version: str
) -> None:
    assert built("speech_commands", tar(tmp_path / "a.tar.gz", speech(words)), root) == 3 * len(words) + 1
    status = data.dataset_status("speech_commands", root)
    assert f"public wav folders ({version}: {len(words)} words, {3 * len(words)} clips, " in status
    next((root / "speech_commands/yes").iterdir()).unlink()
    assert "a selection" in data.dataset_status("speech_commands", root)


def test_the_version_of_folders_that_were_unpacked_by_hand_is_known(root: Path, versions: None) -> None:
    folder(root / "SpeechCommands/speech_commands_v0.02", speech(("yes", "no")))
    assert "v0.01: " in data.dataset_status("speech_commands", root)


@pytest.mark.parametrize("kind", ["tar", "zip", "folder"])
def test_femnist_as_leaf_writes_it(tmp_path: Path, root: Path, leaf: dict[str, bytes], kind: str) -> None:
    make = {"tar": tar, "zip": zipped, "folder": folder}[kind]
    assert built("femnist", make(tmp_path / "a", leaf), root) == 3
    found = data.load_dataset("femnist", root)
    assert (len(found.train), len(found.test), found.groups, found.version) == (6, 3, ("a", "b", "c"), "3 writers")
    status = data.dataset_status("femnist", root)
    assert status.endswith("LEAF json (3 writers: 3 writers, 3 writers tested, 6 training, 3 test)")


def test_leaf_split_by_writer_is_another_version(tmp_path: Path, root: Path, leaf: dict[str, bytes]) -> None:
    leaf["data/test/all_data_0_niid_0_keep_0_test_8.json"] = leaf_text({"d": [1, 2, 3]})
    refuse("femnist", folder(tmp_path / "a", leaf), root, "it has 3 writers, 1 writers tested", "instead of 3 writers")
    del leaf["data/test/all_data_0_niid_0_keep_0_test_8.json"]
    refuse("femnist", folder(tmp_path / "b", leaf), root, "no published version", "TalwalkarLab/leaf")


def test_of_leafs_json_that_lies_there_the_version_is_known_when_it_is_read(root: Path, leaf: dict[str, bytes]) -> None:
    folder(root / "femnist", {name.removeprefix("data/"): content for name, content in leaf.items()})
    assert data.dataset_status("femnist", root) == f"{root}/femnist: LEAF json"
    assert data.load_dataset("femnist", root).version == "3 writers"


# What is there already


def test_what_is_there_is_not_written_again(tmp_path: Path, root: Path, cifar: dict[str, bytes]) -> None:
    archive = tar(tmp_path / "a", cifar)
    built("cifar10", archive, root)
    times = {p: p.stat().st_mtime_ns for p in root.rglob("*")}
    assert built("cifar10", archive, root) == 0
    assert {p: p.stat().st_mtime_ns for p in root.rglob("*")} == times
    (root / "cifar10/test_batch.bin").unlink()
    assert built("cifar10", archive, root) == 1
    assert verify(root / "cifar10") == {"training": 20, "test": 4}
    (root / "cifar10/test_batch.bin").write_bytes(b"mine")
    refuse("cifar10", archive, root, "test_batch.bin is not what the archive holds")


def test_a_stop_leaves_nothing_that_is_taken_for_a_dataset(
    tmp_path: Path, root: Path, cifar: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    archive, write = tar(tmp_path / "a", cifar), build._write
    written = list[str]()

    def stopped(path: Path, content: bytes, digest: str) -> None:
        if len(written) == 3:
            path.write_bytes(content[:-1])
            raise KeyboardInterrupt
        written.append(path.name)
        write(path, content, digest)

    with monkeypatch.context() as patch:
        patch.setattr(build, "_write", stopped)
        with pytest.raises(KeyboardInterrupt):
            built("cifar10", archive, root)
    assert [p.name for p in root.iterdir()] == [".cifar10.partial"]
    assert data.dataset_status("cifar10", root).startswith("not found")
    assert built("cifar10", archive, root) == 3
    assert [p.name for p in root.iterdir()] == ["cifar10"]
    assert verify(root / "cifar10")


def killed(at: int, archive: Path, root: Path) -> bool:
    """Build in a process that kills itself (SIGKILL) at its event ``at`` of the file system; tell whether it did."""
    if not (child := os.fork()):
        try:
            _kill_at(at, root)
            built("cifar10", archive, root)
            os._exit(0)
        finally:
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL)
    return code != 0


def _kill_at(at: int, root: Path) -> None:
    """Count what is opened, renamed or removed below ``root``, and the middle of every file that is written."""
    count, fdopen = itertools.count(1), os.fdopen

    def event(name: str, arguments: tuple[Any, ...]) -> None:
        where = arguments and isinstance(arguments[0], str | Path) and str(arguments[0]).startswith(str(root))
        if where and name in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir") and next(count) == at:
            os.kill(os.getpid(), signal.SIGKILL)

    class Halved:
        """A file that is written in two halves."""

        def __init__(self, file: Any):
            self.file = file

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def write(self, content: bytes) -> None:
            self.file.write(content[: len(content) // 2])
            self.file.flush()
            event("open", (root,))
            self.file.write(content[len(content) // 2 :])

    def halved(fd: int, mode: str = "r", *more: Any, **options: Any) -> Any:
        file = fdopen(fd, mode, *more, **options)
        return Halved(file) if "w" in mode else file

    os.fdopen = halved
    sys.addaudithook(event)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_killed_at_any_moment_it_leaves_nothing_half_written_and_goes_on(
    tmp_path: Path, cifar: dict[str, bytes]
) -> None:
    archive, dead = tar(tmp_path / "a", cifar, "w"), list[bool]()
    while not dead or dead[-1]:
        root = tmp_path / f"data{len(dead)}"
        root.mkdir()
        dead.append(killed(len(dead) + 1, archive, root))
        if data.dataset_status("cifar10", root).startswith("not found"):
            assert not (root / "cifar10").exists()
        else:
            assert verify(root / "cifar10") == {"training": 20, "test": 4}
        built("cifar10", archive, root)
        assert verify(root / "cifar10") == {"training": 20, "test": 4}
        assert [path.name for path in root.iterdir()] == ["cifar10"]
        names = {"VERSION.json", "SHA256SUMS", *(f"{name}.bin" for name in cifar10.MD5)}
        assert {path.name for path in (root / "cifar10").iterdir()} == names
    assert len(dead) > 30


def test_what_another_version_or_anybody_left_unfinished_is_not_built_in(
    tmp_path: Path, root: Path, cifar: dict[str, bytes]
) -> None:
    partial = folder(root / ".cifar10.partial", {"old/clip.wav": b"x", "test_batch.bin": b"cut"})
    (tmp_path / "outside").write_bytes(b"mine")
    (partial / "data_batch_1.bin").symlink_to(tmp_path / "outside")
    (partial / "link").symlink_to(tmp_path)
    assert built("cifar10", tar(tmp_path / "a", cifar), root) == 6
    assert not (root / "cifar10/old").exists()
    assert not any(p.is_symlink() for p in (root / "cifar10").iterdir())
    assert (tmp_path / "outside").read_bytes() == b"mine"


def test_another_dataset_in_the_way_stays(tmp_path: Path, root: Path, cifar: dict[str, bytes], versions: None) -> None:
    archive = tar(tmp_path / "a", cifar)
    (root / "cifar10").mkdir()
    (root / "cifar10/notes.txt").write_text("mine")
    refuse("cifar10", archive, root, "did not write", "--data")
    (root / "cifar10/notes.txt").unlink()
    assert built("cifar10", archive, root) == 6  # an empty folder is in nobody's way
    built("speech_commands", tar(tmp_path / "b", speech(("yes", "no"))), root)
    other = tar(tmp_path / "c", speech(("yes", "no", "go")))
    refuse("speech_commands", other, root, "holds v0.01, the archive v0.02", "--data")
    (root / "mnist").write_text("a file")
    refuse("mnist", archive, root, "mnist is a file")
    (root / "femnist").symlink_to(tmp_path)
    refuse("femnist", archive, root, "femnist is a link")


def test_two_processes_do_not_build_one_dataset(tmp_path: Path, root: Path, cifar: dict[str, bytes]) -> None:
    archive = tar(tmp_path / "a", cifar)
    busy = r"another process is at work in .*cifar10.*: wait for it"
    with locked(root / ".cifar10.partial", "wait"), pytest.raises(InputError, match=busy):
        built("cifar10", archive, root)
    assert built("cifar10", archive, root) == 6


def test_a_folder_that_another_process_finished_before_it_was_locked_is_not_built_in(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial = root / ".cifar10.partial"
    monkeypatch.setattr(storage.fcntl, "flock", lambda *_: partial.rename(root / "cifar10"))
    with pytest.raises(InputError, match="another process is at work"), locked(partial, "wait"):
        pass
    monkeypatch.setattr(storage.fcntl, "flock", lambda *_: (partial.rename(root / "again"), partial.mkdir()))
    with pytest.raises(InputError, match="another process is at work"), locked(partial, "wait"):
        pass


def test_no_room_on_the_disk_is_said_before_anything_is_written(
    tmp_path: Path, root: Path, cifar: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = tar(tmp_path / "a", cifar)
    monkeypatch.setattr(os, "statvfs", lambda _: types.SimpleNamespace(f_frsize=4096, f_bavail=23))
    refuse("cifar10", archive, root, "room for 94.2 kB where 98.3 kB are to be written", "--data")
    monkeypatch.setattr(os, "statvfs", lambda _: types.SimpleNamespace(f_frsize=4096, f_bavail=24))
    assert built("cifar10", archive, root) == 6


# The command


def test_the_command_builds_checks_and_says_what_is_missing(
    fedsieve: CommandLine, tmp_path: Path, root: Path, cifar: dict[str, bytes], cifar100: dict[str, bytes]
) -> None:
    line = fedsieve("data", "cifar10", "--data", root, code=2).stderr
    assert "no archive of cifar10 is in" in line
    assert "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz and run: fedsieve data cifar10 --from" in line
    tar(root / "cifar-10-binary.tar.gz", cifar)
    said = fedsieve("data", "cifar10", "--data", root).stdout.splitlines()
    assert said[0].startswith("checking the archive: ")
    assert said[-2:] == ["6 files written", f"{root}/cifar10: binary version (20 training, 4 test)"]
    assert "every file is as it was written" in fedsieve("data", "cifar10", "--data", root).stdout
    tar(tmp_path / "other.tar.gz", cifar100)
    assert "2 files written" in fedsieve("data", "cifar100", "--from", "other.tar.gz", "--data", root).stdout
    digest = hashlib.sha256((root / "cifar100/train.bin").read_bytes()).hexdigest()
    assert f"{digest}  train.bin\n" in (root / "cifar100/SHA256SUMS").read_text()


def test_the_command_refuses_in_one_line(
    fedsieve: CommandLine, root: Path, versions: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FEDSIEVE_DATA", raising=False)
    assert "comes with FedSieve" in fedsieve("data", "digits", code=2).stderr
    assert "no dataset is called 'imagenet'" in fedsieve("data", "imagenet", code=2).stderr
    assert "name one by --data" in fedsieve("data", "mnist", code=2).stderr
    assert "name one by --data" in fedsieve("data", "mnist", "--data", "hub", code=2).stderr
    for n in (1, 2):
        tar(root / f"speech_commands_v0.0{n}.tar.gz", speech(("yes", "no")))
    assert "name one by --from" in fedsieve("data", "speech_commands", "--data", root, code=2).stderr
