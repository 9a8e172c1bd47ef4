"""Building a dataset of an archive: once, undisturbed by what lies there, by signals and by other processes."""

import hashlib
import itertools
import os
import signal
import sys
import types
from pathlib import Path
from typing import Any

import pytest

import fedsieve.data as data
from command_line import CommandLine
from fedsieve.data import build, cifar10, storage
from fedsieve.data.build import verify
from fedsieve.data.storage import locked
from fedsieve.types import InputError
from public_archives import built, folder, refuse, speech, tar
from small_files import _cache  # noqa: F401 (the cache is every test's)


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
