"""A dataset that users download: found and checked file by file, or one line that says which file and what to do."""

from __future__ import annotations

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

from fedsieve.data.dataset import Arrays, Dataset, assemble
from fedsieve.types import InputError
from fedsieve.types.errors import install

FOLDERS = ("mnist", "cifar10", "femnist", "speech_commands")
"""What lies directly in the data folder."""
UNPACKED = ("MNIST", "cifar-10-batches-bin", "cifar-10-batches-py", "SpeechCommands")
"""What other tools put there, or into those folders."""


def missing(path: Path, how: str) -> InputError:
    """Return the error for a file that is not there; ``how`` says how to get it."""
    return InputError(f"{path} is missing: {how} (--data or FEDSIEVE_DATA names the folder above {_place(path).name}/)")


def damaged(path: Path, why: str, how: str) -> InputError:
    """Return the error for a file that is not what it should be."""
    return InputError(f"{path} is damaged ({' '.join(why.split())}): delete it and {how}")


def read_download(path: Path, how: str, sums: Collection[str] = ()) -> bytes:
    """Return the contents of a file after checking them.

    They must have one of the published md5 ``sums`` where any are given, and the sum that a file ``SHA256SUMS`` (as
    ``sha256sum`` writes it) states in the data folder, where there is one. Raises InputError.
    """
    try:
        contents = path.read_bytes()
    except FileNotFoundError:
        raise missing(path, how) from None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): check its permissions") from None
    if sums and md5(contents) not in sums:
        raise damaged(path, "its md5 is not the published one", how)
    for root in _roots(path):
        stated = _sums(root / "SHA256SUMS").get(path.relative_to(root).as_posix())
        if stated and hashlib.sha256(contents).hexdigest() != stated:
            raise damaged(path, "its sha256 is not the one in SHA256SUMS", how)
    return contents


def md5(contents: bytes) -> str:
    """Return the checksum that data sets are published with."""
    return hashlib.md5(contents, usedforsecurity=False).hexdigest()


def digest_of_files(paths: Iterable[Path]) -> str:
    """Return a hash of the files' names, sizes and times: what the cache goes by to notice a change."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        state = path.stat()
        digest.update(f"{path.resolve()} {state.st_size} {state.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def package(name: str, extra: str) -> Any:
    """Import an optional package, or say which extra brings it."""
    try:
        return import_module(name)
    except ImportError:
        raise InputError(f"the package {name} is not installed: {install(extra)}") from None


def _place(path: Path) -> Path:
    """Return the data set's folder that holds a file: the nearest above it with a known name, else the one it is in."""
    named = [folder for known in (FOLDERS, UNPACKED) for folder in path.parents if folder.name in known]
    return next(iter(named), path.parent)


def _roots(path: Path) -> list[Path]:
    """Return what may be the data folder of a file: those that hold a folder of a known name above it."""
    known = (*FOLDERS, *UNPACKED)
    return [folder.parent for folder in path.parents if folder.name in known] or [path.parent.parent]


@lru_cache
def _sums(path: Path) -> dict[str, str]:
    """Return the sha256 of every file that ``SHA256SUMS`` names, by its path in the data folder."""
    if not path.is_file():
        return {}
    try:
        text = path.read_bytes().decode(errors="replace")
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): check its permissions") from None
    return dict(_sum(line, f"{path} line {i}") for i, line in enumerate(text.split("\n"), 1) if line.strip())


def _sum(line: str, where: str) -> tuple[str, str]:
    """Return the file's path and its sum, as a line of ``sha256sum`` states them."""
    if not (parts := re.fullmatch(r"([0-9a-fA-F]{64})\s+\*?(?:\./)*(\S.*?)\s*", line)):
        raise InputError(f"{where} is not a sha256 and a file's name, as sha256sum writes them: correct or remove it")
    return parts[2], parts[1].lower()


class Source(ABC):
    """One downloaded dataset, which may lie in several folders, in one of several forms."""

    name: str
    classes: tuple[str, ...]
    instructions: str
    """How to get it, in one line."""
    folders: tuple[str, ...] = ()
    """Where other tools unpack it, in their root, which is the data folder or the dataset's folder there."""
    mean: float = 0.0
    std: float = 1.0

    @abstractmethod
    def form(self, folder: Path) -> str | None:
        """Return which form of the dataset ``folder`` holds, None if it holds none; reads no file."""

    @abstractmethod
    def read(self, folder: Path) -> Arrays:
        """Return the arrays that ``folder`` holds. Raises InputError for a missing or damaged file."""

    def dataset(self, arrays: Arrays) -> Dataset:
        """Return the dataset of ``arrays``, all channels normalised by ``mean`` and ``std``, or the arrays' own."""
        mean, std = map(float, arrays.get("scale", (self.mean, self.std)))
        return assemble(self.name, arrays, self.classes, mean, std)

    def load(self, root: Path | None) -> Dataset:
        """Return the dataset from the data folder ``root``. Raises InputError in one line that says what to do."""
        if root is None:
            raise InputError(
                f"{self.name} needs a data folder, named by --data or FEDSIEVE_DATA: there, {self.instructions}"
            )
        return self.dataset(self.read(self._folder(root)))

    def status(self, root: Path | None) -> str:
        """Return in one line where the dataset is and in which form, or how to get it; reads nothing."""
        form = self.form(folder := self._folder(root)) if root else None
        return f"{folder}: {form}" if form else f"not found: {self.instructions}"

    def _folder(self, root: Path) -> Path:
        """Return the folder that holds the dataset: ``root/name``, or the first of the others that does."""
        own = root / self.name
        others = [place / inner for place in (own, root) for inner in self.folders]
        return next((folder for folder in (own, *others) if self.form(folder)), own)
