"""Files: written whole or not at all, without following links; read in one line or refused in one line; and the cache.

A file is written under a random name beside its place, a name that must be new, synced, and renamed: a crash leaves the
old file or the new one, and a link that somebody has put in its place is replaced, never written through.

The cache holds prepared arrays, so that slow decoding happens once. An entry is one ``.npz`` file without pickles, of
which a reader, in this or another process, finds all or nothing. Deleting the folder is always safe.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import secrets
import stat
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fedsieve.types import InputError

Arrays: TypeAlias = dict[str, NDArray[Any]]
"""Arrays by name, as an ``.npz`` keeps them."""

DEEPEST = 50
"""How far JSON may be nested."""
LEAVE_OUT = "restore the file, or leave this run out"
NEW = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
UNREADABLE = (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile, zlib.error)
"""What NumPy raises on a damaged ``.npz``."""
VERSION = 1
"""Part of every key of the cache: to be raised when the same key comes to mean other arrays."""


@contextmanager
def replacing(path: Path, mode: int = 0o666) -> Iterator[BinaryIO]:
    """Yield a file that takes the place of ``path`` when the block ends; if it fails, the old one stays.

    ``mode`` are the permissions, less the process's umask. An OSError names ``path``.
    """
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
    with _naming(path):
        descriptor = os.open(temporary, NEW | os.O_EXCL, mode)
        try:
            with os.fdopen(descriptor, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync(path.parent)


def write(path: Path, content: bytes, mode: int = 0o666) -> None:
    """Write a file so that a crash leaves the old one or the new one, never a part."""
    with replacing(path, mode) as file:
        file.write(content)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write an object as JSON, so that a crash leaves the old file or the new one."""
    write(path, (json.dumps(content, indent=1) + "\n").encode())


def append(path: Path, content: bytes) -> None:
    """Add to a file and sync it; a crash may leave a part of ``content`` at its end. A link is not followed."""
    with _naming(path), os.fdopen(os.open(path, NEW | os.O_APPEND, 0o666), "ab") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def check_output(out: Path, example: str) -> None:
    """Raise InputError unless a file can be written at ``out``; ``example`` is a name that would do."""
    try:
        if out.is_dir():
            raise InputError(f"{out} is a directory: name a file, such as {out / example}")
        if out.exists() and not out.is_file():
            raise InputError(f"{out} is not a regular file: name one, or a new one, such as {example}")
        if not out.parent.is_dir():
            raise InputError(f"{out.parent} is not a folder: create it, or write {example} somewhere else")
    except OSError as error:
        raise InputError(f"{out} cannot be written ({error.strerror}): choose another place") from error


def write_output(out: Path, content: bytes) -> None:
    """Write a file so that a failure leaves the old one. Raises InputError."""
    try:
        write(out, content)
    except OSError as error:
        raise InputError(f"{out} cannot be written ({error.strerror}): choose another place") from error


@contextmanager
def locked(folder: Path, remedy: str) -> Iterator[None]:
    """Make a directory and keep other processes out of it. Raises InputError if another one is at work in it."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(lock), folder.stat()):
                raise OSError("it was renamed or removed, and made anew, before it was locked")
        except OSError:
            raise InputError(f"another process is at work in {folder}: {remedy}") from None
        yield
    finally:
        os.close(lock)


def is_leftover(path: Path) -> bool:
    """Say whether a file is what a crash left of one that was being written."""
    return path.name.endswith(".tmp")


def remove_leftovers(folder: Path) -> None:
    """Remove what crashes left of files being written in ``folder``, where nobody else writes now."""
    for path in folder.glob(".*.tmp"):
        if re.fullmatch(r"\.[0-9a-f]{16}\.tmp", path.name):
            path.unlink(missing_ok=True)


def read_file(path: Path, remedy: str = LEAVE_OUT) -> bytes | None:
    """Return what a regular file holds, None where there is nothing. Raises InputError, which ends in ``remedy``."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe would be waited for
        try:
            if not stat.S_ISREG(kind := os.fstat(descriptor).st_mode):
                why = "Is a directory" if stat.S_ISDIR(kind) else "Not a regular file"
                raise InputError(f"{path} cannot be read ({why}): {remedy}")
            with os.fdopen(descriptor, "rb", closefd=False) as file:
                return file.read()
        finally:
            os.close(descriptor)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): {remedy}") from None


def regular(path: Path) -> Path:
    """Return the path of a regular file, for who opens it by themselves; a pipe would be waited for. Raises OSError."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no regular file")
    return path


def read_json(path: Path, remedy: str = LEAVE_OUT) -> dict[str, Any] | None:
    """Return the object that a JSON file holds, None where there is no file. Raises InputError."""
    content = read_file(path, remedy)
    return None if content is None else object_of(content, str(path), remedy)


def object_of(content: bytes, where: str, remedy: str = LEAVE_OUT) -> dict[str, Any]:
    """Return the object that JSON says, whatever the bytes are. Raises InputError, naming ``where`` they stood."""
    try:
        value = json.loads(content.decode(errors="replace"))
        json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair can be escaped, and never be printed
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict) or _nested(value) > DEEPEST:
        raise InputError(f"{where} is not a JSON object: {remedy}")
    return value


def _nested(value: Any) -> int:
    """Return how deeply lists and objects are nested, without recursion; more than DEEPEST is not told apart."""
    level = [value]
    for depth in range(DEEPEST + 1):
        level = [one for one in level if isinstance(one, dict | list)]
        if not level:
            return depth
        level = [inner for one in level for inner in (one.values() if isinstance(one, dict) else one)]
    return DEEPEST + 1


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Let an OSError of the block name the file that was meant, not a temporary one or none."""
    try:
        yield
    except OSError as error:
        error.filename, error.filename2 = str(path), None
        raise


def sync(folder: Path) -> None:
    """Let what was written, renamed and removed in a folder survive a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def cache_folder() -> Path:
    """Return where entries live: FEDSIEVE_CACHE, else fedsieve/ in XDG_CACHE_HOME, else ~/.cache/fedsieve."""
    if cache := os.environ.get("FEDSIEVE_CACHE"):
        return Path(cache).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fedsieve"


def cached_arrays(key: str, make: Callable[[], Arrays]) -> Arrays:
    """Return the arrays kept under ``key``, or make and keep them; a damaged entry is made again.

    ``key`` says everything that the arrays depend on, the source's name first: ``mnist/...``.
    """
    digest = hashlib.sha256(f"{VERSION}/{key}".encode()).hexdigest()
    try:
        path = cache_folder() / f"{key.partition('/')[0]}-{digest[:16]}.npz"
    except RuntimeError as error:  # no HOME, and a user without an entry, as in a container
        _warn(error)
        return make()
    with suppress(*UNREADABLE), path.open("rb") as entry, np.load(entry, allow_pickle=False) as members:
        return dict(members)
    arrays = make()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, 0o600) as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
    except OSError as error:
        _warn(error)
    return arrays


def _warn(error: Exception) -> None:
    warnings.warn(f"nothing is cached ({error}): set FEDSIEVE_CACHE to a folder to write to", stacklevel=3)
