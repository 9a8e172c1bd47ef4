"""How what a user has downloaded becomes a dataset.

A download is found and checked file by file, or there is one line that says which file and what to do. The same
datasets come from the Hugging Face hub with ``--data hub`` (needs the package ``datasets`` and the internet).
"""

from __future__ import annotations

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from functools import lru_cache
from io import BytesIO
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fedsieve.data.dataset import Dataset, assemble, download
from fedsieve.data.pack import find_pack
from fedsieve.data.storage import UNREADABLE, Arrays, cached_arrays, read_file
from fedsieve.data.version import SUMS, Counts, Version, built_counts, version_of
from fedsieve.types import InputError

FOLDERS = ("mnist", "cifar10", "cifar100", "femnist", "speech_commands", "shakespeare")
"""What lies directly in the data folder."""
UNPACKED = (
    *("MNIST", "cifar-10-batches-bin", "cifar-10-batches-py", "cifar-100-binary", "cifar-100-python"),
    "SpeechCommands",
)
"""What other tools put there, or into those folders."""
CHECK = "check its permissions"

HUB = Path("hub")
"""What ``--data hub`` becomes."""
NOT_ON_HUB = "{} cannot be read from the hub: download the public archive and name the folder above it by --data"


class Source(ABC):
    """One downloaded dataset, which may lie in several folders, in one of several forms, or on the hub."""

    name: str
    classes: tuple[str, ...]
    instructions: str
    """How to get it, in one line."""
    versions: tuple[Version, ...]
    """What has been published under its name."""
    unpublished = "a selection"
    """What is said of a folder whose counts are none of theirs."""
    archives: tuple[str, ...] = ()
    """The names of its archives as downloaded, which are looked for where none is named."""
    archive_md5: ClassVar[Mapping[str, str]] = MappingProxyType({})
    """The published md5 of those archives, by name, whose files have none of their own."""
    files: tuple[str, ...] = ()
    """What its archive holds of it, by name, where that is always the same."""
    pattern = "file of it"
    """What it holds otherwise, in a few words."""
    folders: tuple[str, ...] = ()
    """Where other tools unpack it, in their root, which is the data folder or the dataset's folder there."""
    hub: tuple[str, str, str] | None = None
    """Its repository on the hub, and there the column of its images and their mode; None: it is not read from there."""
    hub_label = "label"
    """The column of its classes there."""
    mean: float = 0.0
    std: float = 1.0

    @abstractmethod
    def form(self, folder: Path) -> str | None:
        """Return which form of the dataset ``folder`` holds, None if it holds none; reads no file."""

    @abstractmethod
    def read(self, folder: Path) -> Arrays:
        """Return the arrays that ``folder`` holds. Raises InputError for a missing or damaged file.

        They are ``train_x``, ``train_y``, ``test_x``, ``test_y``; where examples have owners ``group`` and ``groups``.
        """

    @abstractmethod
    def examine(self, target: str, content: bytes) -> Mapping[str, int | set[str]]:
        """Return what a file of the archive adds to the counts: a number, or a set of which the size counts.

        Raises ValueError, which says what is wrong with it.
        """

    def target(self, name: str) -> str | None:
        """Return where in the dataset's folder a file of the archive goes, None if it is not wanted."""
        last = PurePosixPath(name).name
        return last if last in self.files else None

    def counts(self, folder: Path, arrays: Arrays | None = None) -> Counts | None:
        """Return how many there are of what in ``folder``, whose arrays these are; None where only they would tell.

        A dataset of one version is either that or refused when it is read.
        """
        (only, *others) = self.versions
        exact = {what: number for what, number in only.counts.items() if isinstance(number, int)}
        return built_counts(folder) if others else exact

    def version(self, counts: Counts | None) -> str:
        """Return the name of the version that has these counts, empty where there is only one or nothing counted."""
        if counts is None:
            return ""
        version = version_of(self.versions, counts)
        return version.name if version else self.unpublished

    def read_hub(self, splits: Any) -> Arrays:
        """Return the arrays of the splits that the package ``datasets`` loads from the hub."""
        (x, y), (test_x, test_y) = (self.hub_columns(splits[part], self.hub_label) for part in ("train", "test"))
        return {"train_x": x, "train_y": y, "test_x": test_x, "test_y": test_y}

    def hub_columns(self, split: Any, *names: str) -> list[NDArray[Any]]:
        """Return images uint8 [n, channels, height, width] and further columns, in one pass, which decodes once."""
        assert self.hub
        _, image, mode = self.hub
        rows = ((np.asarray(row[image].convert(mode)), *(row[name] for name in names)) for row in split)
        images, *rest = zip(*rows, strict=True)
        x = np.stack(images)
        x = x[:, None] if mode == "L" else np.ascontiguousarray(x.transpose(0, 3, 1, 2))
        return [x, *map(np.array, rest)]

    def dataset(self, arrays: Arrays) -> Dataset:
        """Return the dataset of ``arrays``, all channels normalised by ``mean`` and ``std``, or the arrays' own."""
        mean, std = map(float, arrays.get("scale", (self.mean, self.std)))
        return assemble(self.name, arrays, self.classes, mean, std)

    def load(self, root: Path | None) -> Dataset:
        """Return the dataset from a data folder or the hub. Raises InputError in one line that says what to do."""
        arrays, counts = self.arrays(root)
        return replace(self.dataset(arrays), version=self.version(counts))

    def arrays(self, root: Path | None) -> tuple[Arrays, Counts | None]:
        """Return the arrays in a data folder or of the hub, and how many there are of what. Raises InputError."""
        if root is None:
            raise InputError(
                f"{self.name} needs a data folder, named by --data or FEDSIEVE_DATA: there, {self.instructions}"
            )
        if root == HUB:
            if not self.hub:
                raise InputError(NOT_ON_HUB.format(self.name))
            repository = self.hub[0]
            return cached_arrays(f"{self.name}/hub", lambda: self.read_hub(download(repository))), None
        if not self.form(folder := self._folder(root)) and (pack := find_pack(root, self.name)):
            return cached_arrays(f"{self.name}/{digest_of_files(pack.files)}", pack.arrays), pack.counts
        arrays = self.read(folder)
        return arrays, self.counts(folder, arrays)

    def status(self, root: Path | None) -> str:
        """Return in one line where the dataset is, in which form and version, or how to get it; reads no example."""
        if root == HUB:
            return f"huggingface.co/datasets/{self.hub[0]}" if self.hub else NOT_ON_HUB.format(self.name)
        if root is None:
            return f"not found: {self.instructions}"
        form = self.form(folder := self._folder(root))
        try:
            pack = None if form else find_pack(root, self.name)
            if not form and not pack:
                return f"not found: {self.instructions}"
            counts = pack.counts if pack else self.counts(folder)
        except InputError as error:
            return f"{folder}: {form or 'packed'} ({error})"
        place = f"{pack.files[0]}: packed" if pack else f"{folder}: {form}"
        return place + (f" ({Version(self.version(counts), counts)})" if counts else "")

    def _folder(self, root: Path) -> Path:
        """Return the folder that holds the dataset: ``root/name``, or the first of the others that does."""
        own = root / self.name
        others = [place / inner for place in (own, root) for inner in self.folders]
        return next((folder for folder in (own, *others) if self.form(folder)), own)


def missing(path: Path, how: str) -> InputError:
    """Return the error for a file that is not there; ``how`` says how to get it."""
    return InputError(f"{path} is missing: {how} (--data or FEDSIEVE_DATA names the folder above {_place(path).name}/)")


def damaged(path: Path, why: str, how: str) -> InputError:
    """Return the error for a file that is not what it should be."""
    return InputError(f"{path} is damaged ({' '.join(why.split())}): delete it and {how}")


def read_download(path: Path, how: str, sums: Collection[str] = ()) -> bytes:
    """Return the contents of a file after checking them.

    They must have one of the published md5 ``sums`` where any are given, and the sum that a file ``SHA256SUMS`` (as
    ``sha256sum`` writes it) states in the data folder or the dataset's, where there is one: in any folder of a known
    name above the file, and in those that hold one. Raises InputError.
    """
    contents = read_file(path, CHECK)
    if contents is None:
        raise missing(path, how)
    if sums and md5(contents) not in sums:
        raise damaged(path, "its md5 is not the published one", how)
    known = (*FOLDERS, *UNPACKED)
    named = [place for folder in path.parents if folder.name in known for place in (folder.parent, folder)]
    for root in named or [path.parent.parent]:
        stated = _sums(root / SUMS).get(path.relative_to(root).as_posix())
        if stated and hashlib.sha256(contents).hexdigest() != stated:
            raise damaged(path, "its sha256 is not the one in SHA256SUMS", how)
    return contents


def read_npz(path: Path, how: str, *names: str) -> Arrays:
    """Return arrays of an ``.npz`` file, after checking it. Raises InputError."""
    contents = BytesIO(read_download(path, how))
    try:
        with np.load(contents, allow_pickle=False) as file:
            return {name: file[name] for name in names}
    except UNREADABLE as error:
        raise damaged(path, str(error), how) from None


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


def _place(path: Path) -> Path:
    """Return the data set's folder that holds a file: the nearest above it with a known name, else the one it is in."""
    named = [folder for known in (FOLDERS, UNPACKED) for folder in path.parents if folder.name in known]
    return next(iter(named), path.parent)


@lru_cache
def _sums(path: Path) -> dict[str, str]:
    """Return the sha256 of every file that ``SHA256SUMS`` names, by its path in the data folder."""
    if not path.is_file():
        return {}
    text = (read_file(path, CHECK) or b"").decode(errors="replace")
    return dict(_sum(line, f"{path} line {i}") for i, line in enumerate(text.split("\n"), 1) if line.strip())


def _sum(line: str, where: str) -> tuple[str, str]:
    """Return the file's path and its sum, as a line of ``sha256sum`` states them."""
    if not (parts := re.fullmatch(r"([0-9a-fA-F]{64})\s+\*?(?:\./)*(\S.*?)\s*", line)):
        raise InputError(f"{where} is not a sha256 and a file's name, as sha256sum writes them: correct or remove it")
    return parts[2], parts[1].lower()
