"""Files: whole or not there, no link followed, and one line for what cannot be read."""

import json
import os
import resource
from pathlib import Path

import pytest

from fedsieve import InputError
from fedsieve.data.storage import append, read_file, read_json, remove_leftovers, replacing, write
from fedsieve.flower.app.client import _file

SURPRISES = [
    b"",
    b"nothing",
    b"[]",
    b'{"a": 1',
    b"[" * 100_000,
    b'{"a":' * 60 + b"1" + b"}" * 60,
    b'{"a": ' + b"9" * 5000 + b"}",
    b'{"a": "\\ud800"}',
    b"\xff\xfe\x00",
]
"""What is no JSON object that can be gone on with."""


def test_a_link_is_replaced_and_never_written_through(tmp_path: Path) -> None:
    other, link = tmp_path / "other", tmp_path / "link"
    other.write_bytes(b"mine")
    link.symlink_to(other)
    write(link, b"new")
    assert (other.read_bytes(), link.read_bytes(), link.is_symlink()) == (b"mine", b"new", False)
    (tmp_path / "added").symlink_to(other)
    with pytest.raises(OSError, match="symbolic") as error:
        append(tmp_path / "added", b"more")
    assert error.value.filename == str(tmp_path / "added")
    assert other.read_bytes() == b"mine"


def test_temporary_files_have_names_that_nobody_can_foresee(tmp_path: Path) -> None:
    names = set[str]()
    for _ in range(2):
        with replacing(tmp_path / "file") as file:
            file.write(b"x")
            names |= {path.name for path in tmp_path.iterdir()} - {"file"}
    assert len(names) == 2
    assert all(name.startswith(".") and name.endswith(".tmp") for name in names)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write(path, b"old", 0o600)
    assert path.stat().st_mode & 0o777 == 0o600
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))  # a disk that is full after 10,000 bytes
    try:
        with pytest.raises(OSError, match="large") as error:
            write(path, bytes(20_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert error.value.filename == str(path)
    with pytest.raises(ZeroDivisionError), replacing(path) as file:
        file.write(b"half" * (1 // 0))
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError) as error:
        write(tmp_path / "folder", b"x")
    assert (error.value.filename, error.value.filename2) == (str(tmp_path / "folder"), None)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]
    assert path.read_bytes() == b"old"


def test_what_a_crash_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    for name in (".0123456789abcdef.tmp", ".mine.tmp", "run.json.tmp", ".0123456789abcdef"):
        (tmp_path / name).touch()
    remove_leftovers(tmp_path)
    remove_leftovers(tmp_path / "absent")
    assert sorted(p.name for p in tmp_path.iterdir()) == [".0123456789abcdef", ".mine.tmp", "run.json.tmp"]


@pytest.mark.parametrize("content", SURPRISES, ids=range(len(SURPRISES)))
def test_what_is_no_object_is_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(InputError, match=r"a\.json is not a JSON object: do this$"):
        read_json(tmp_path / "a.json", "do this")


def test_what_is_no_file_is_one_line(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name, why in (("", "Is a directory"), ("pipe", "Not a regular file"), ("n" * 300, "File name too long")):
        with pytest.raises(InputError, match=rf"cannot be read \({why}\): do this"):
            read_file(tmp_path / name, "do this")
    assert read_file(tmp_path / "absent") is None
    (tmp_path / "a.json").write_text(json.dumps({"a\u2028b": 1}, ensure_ascii=False))
    assert read_file(tmp_path / "a.json/absent") is None
    assert read_json(tmp_path / "a.json") == {"a\u2028b": 1}


@pytest.mark.parametrize("name", ["x.safetensors", "x.npz"])
def test_no_pipe_is_waited_for_in_the_place_of_data(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(InputError, match="is no regular file"):
        _file(tmp_path / name)
