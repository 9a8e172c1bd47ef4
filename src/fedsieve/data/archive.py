"""Public archives, read as they are downloaded: tar (gzip, bzip2, xz or plain), zip, or a folder. Nothing is unpacked.

A tar or zip with a link, a device or a path that leads outside is refused whole. Of what it holds only the files that
a dataset wants are read, and of those each once, from the beginning of the archive to its end.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, TypeAlias

from fedsieve.data.storage import read_file
from fedsieve.types import InputError

DAMAGED = (
    *(tarfile.TarError, gzip.BadGzipFile, zipfile.BadZipFile, zlib.error, lzma.LZMAError),
    *(EOFError, NotImplementedError, RuntimeError, ValueError),
)
"""What Python raises on an archive that is cut, damaged, encrypted or of another kind."""
OPENERS: dict[bytes, Callable[[Any], Any]] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}
"""By the first bytes of a compressed tar."""
READABLE = "check its permissions"
AGAIN = "download it again"

Progress: TypeAlias = Callable[[int, int], None]
"""Called with the bytes that are done and that there are."""


class Archive:
    """A downloaded archive, or a folder; ``target`` says where in the dataset's folder a file goes, None: nowhere."""

    def __init__(self, path: Path, target: Callable[[str], str | None]):
        self.path, self.target = path, target
        self.pickles: list[str] = []
        """Files among those not wanted that begin as pickles do."""
        try:
            kind = path.stat().st_mode
        except OSError as error:
            raise InputError(f"{path} cannot be read ({error.strerror}): name the archive as downloaded") from None
        if not stat.S_ISREG(kind) and not stat.S_ISDIR(kind):
            raise InputError(f"{path} is neither a file nor a folder: name the archive as downloaded")

    def files(self, progress: Progress) -> Iterator[tuple[str, bytes]]:
        """Yield where it goes and what it holds, of every file that is wanted. Raises InputError."""
        targets = set[str]()
        self.pickles.clear()
        try:
            for name, read in _members(self.path, self.target, progress):
                if (target := self.target(name)) is None:
                    if _begins_as_pickle(read(2)):
                        self.pickles.append(name)
                    continue
                if target in targets:
                    raise InputError(f"{self.path} holds {target} twice: {AGAIN}")
                targets.add(target)
                yield target, read(-1)
        except InputError:
            raise
        except DAMAGED as error:
            why = " ".join(str(error).split()) or type(error).__name__
            raise InputError(f"{self.path} is cut, damaged, or no tar or zip ({why}): {AGAIN}") from None


_Member: TypeAlias = tuple[str, Callable[[int], bytes]]
"""A file's name, and what reads so many of its bytes, or with -1 all."""


def _members(path: Path, target: Callable[[str], str | None], progress: Progress) -> Iterator[_Member]:
    if path.is_dir():
        return _folder(path, target, progress)
    with path.open("rb") as file:
        start = file.read(6)
    return _zip(path, progress) if start[:2] == b"PK" else _tar(path, start, progress)


def _tar(path: Path, start: bytes, progress: Progress) -> Iterator[_Member]:
    """Yield a tar's files; the compressed stream is read to its end, where its checksum stands."""
    size = path.stat().st_size
    opener = next((opener for magic, opener in OPENERS.items() if start.startswith(magic)), None)
    with path.open("rb") as raw, opener(raw) if opener else raw as stream:
        with tarfile.open(fileobj=stream, mode="r|") as tar:
            for member in tar:
                if not _is_inside(member.name) or not (member.isfile() or member.isdir()):
                    raise _refused(path, member.name)
                if member.isfile():
                    content = tar.extractfile(member)
                    assert content is not None
                    yield member.name, content.read
                progress(raw.tell(), size)
        while stream.read(1 << 20):
            progress(raw.tell(), size)
    progress(size, size)


def _zip(path: Path, progress: Progress) -> Iterator[_Member]:
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        position, size = 0, sum(member.compress_size for member in members)
        for member in members:
            mode = stat.S_IFMT(member.external_attr >> 16)
            if not _is_inside(member.filename) or mode not in (0, *_PLAIN):
                raise _refused(path, member.filename)
            if not member.is_dir():
                with archive.open(member) as content:
                    yield member.filename, content.read
            progress(position := position + member.compress_size, size)


_PLAIN = (stat.S_IFREG, stat.S_IFDIR)


def _folder(path: Path, target: Callable[[str], str | None], progress: Progress) -> Iterator[_Member]:
    """Yield those of a folder's files that are wanted; the rest, which may be large, is not opened."""
    files = (Path(above, name) for above, _, names in os.walk(path) for name in names)
    files_by_name = {name: file for file in files if target(name := file.relative_to(path).as_posix())}
    for name, file in files_by_name.items():
        if file.is_symlink():
            raise _refused(path, name)
    position, size = 0, sum(file.stat().st_size for file in files_by_name.values())
    for name, file in sorted(files_by_name.items()):
        content = read_file(file, READABLE)
        if content is None:
            raise InputError(f"{file} has gone: leave the folder as it is meanwhile")
        yield name, lambda count, content=content: content[: count if count >= 0 else None]  # type: ignore[misc]
        progress(position := position + len(content), size)


def _is_inside(name: str) -> bool:
    """Tell whether a member's path leads to a place below the folder that it is taken from."""
    path = PurePosixPath(name)
    return "\\" not in name and ".." not in path.parts and not path.is_absolute()


def _refused(path: Path, name: str) -> InputError:
    return InputError(f"{path} holds {name!r}, a link, a device or a path that leads outside: get the original archive")


def _begins_as_pickle(start: bytes) -> bool:
    return len(start) == 2 and start[0] == 0x80 and 2 <= start[1] <= 5
