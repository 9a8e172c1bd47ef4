"""A dataset as one file that travels, or as several of at most 50 MB: ``fedsieve data NAME --pack FILE``.

A line of JSON, which says what it is and what the rest must hold, then an ``.npz`` of the arrays, without pickles;
images in the code of ``pixels`` where that is smaller. A larger file is cut into ``FILE.1``, ``FILE.2`` and so on. In
the data folder, or in the dataset's there, ``NAME.pack`` is read as it is.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from itertools import count, takewhile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsieve.data.pixels import TOGETHER, pack_images, unpack_images
from fedsieve.data.storage import UNREADABLE, Arrays, check_output, object_of, read_file, write, write_output
from fedsieve.data.version import Counts
from fedsieve.types import InputError

MAGIC = b"fedsieve pack 1 "
LARGEST = 50_000_000
"""Bytes of a file."""
LONGEST = 1 << 20
"""Bytes of the line of JSON, at most."""
AGAIN = "copy it again, or pack it anew (fedsieve data NAME --pack FILE)"
CODED = ("codes", "lengths", "weights", "limits")
"""What ``pixels`` makes of images."""


@dataclass(frozen=True)
class Pack:
    """A packed dataset: its files, in order, and what its first line says."""

    files: tuple[Path, ...]
    dataset: str
    counts: Counts | None
    size: int
    """Bytes after the line."""
    sha256: str
    """Of these."""

    def content(self) -> bytes:
        """Return the bytes after the line, which are those that were packed. Raises InputError."""
        content = b"".join(read_file(file, AGAIN) or b"" for file in self.files).partition(b"\n")[2]
        if len(content) != self.size:
            first, after = self.files[0], self.files[0].with_suffix(f".{len(self.files) + 1}")
            which = f"{first} is cut" if first.suffix != ".1" else f"{after} is missing, or one before it is cut"
            raise InputError(f"{which}: {len(content):,} of {self.size:,} bytes are there: {AGAIN}")
        if hashlib.sha256(content).hexdigest() != self.sha256:
            raise InputError(f"{self.files[0]} is not as it was packed (its sha256): {AGAIN}")
        return content

    def arrays(self) -> Arrays:
        """Return the dataset's arrays. Raises InputError."""
        try:
            return _unpacked(self.content())
        except InputError:
            raise
        except (*UNREADABLE, IndexError, TypeError) as error:
            raise InputError(f"{self.files[0]} cannot be unpacked ({error}): {AGAIN}") from None


def find_pack(root: Path, dataset: str) -> Pack | None:
    """Return the pack of a dataset in a data folder, None where there is none. Raises InputError."""
    name = f"{dataset}.pack"
    place = next((place for place in (root / dataset / name, root / name) if _files(place)), None)
    if place is None:
        return None
    if (pack := open_pack(place)) is None:
        raise InputError(f"{place} is no packed dataset: {AGAIN}")
    if pack.dataset != dataset:
        raise InputError(f"{pack.files[0]} holds {pack.dataset}, not {dataset}: rename or remove it")
    return pack


def open_pack(path: Path) -> Pack | None:
    """Return the pack at FILE, of which FILE.1 may also be named; None where it is no pack. Raises InputError."""
    files = _files(path.with_suffix("") if path.suffix == ".1" else path)
    if not files:
        return None
    with files[0].open("rb") as file:
        line = file.readline(LONGEST)
    if not line.startswith(MAGIC):
        return None
    head = object_of(line.removeprefix(MAGIC), f"the first line of {files[0]}", AGAIN)
    counts = head.get("counts")
    match head:
        case {"dataset": str(dataset), "bytes": int(size), "sha256": str(digest)} if _are_counts(counts):
            return Pack(files, dataset, counts, size, digest)
    raise InputError(f"the first line of {files[0]} does not say what it holds: {AGAIN}")


def check_new(out: Path, dataset: str) -> None:
    """Raise InputError unless a pack can be written at ``out``, where there is none."""
    check_output(out, f"{dataset}.pack")
    if files := _files(out):
        raise InputError(f"{files[0]} is there already: name a new file, or delete it first")


def write_pack(out: Path, dataset: str, counts: Counts | None, arrays: Arrays) -> tuple[Path, ...]:
    """Write a dataset's arrays and return the files. Raises InputError if there is anything already."""
    check_new(out, dataset)
    content = _packed(arrays)
    head = {"dataset": dataset, "counts": counts, "bytes": len(content)}
    head["sha256"] = hashlib.sha256(content).hexdigest()
    whole = MAGIC + json.dumps(head).encode() + b"\n" + content
    parts = -(-len(whole) // LARGEST)
    size = -(-len(whole) // parts)
    names = tuple(out.with_name(f"{out.name}.{i + 1}") for i in range(parts)) if parts > 1 else (out,)
    for i, name in enumerate(names):
        write_output(name, whole[i * size : (i + 1) * size])
    return names


def place_pack(pack: Pack, folder: Path) -> int:
    """Copy a pack's files into a dataset's folder, verified, and return how many were not there. Raises InputError."""
    pack.arrays()
    folder.mkdir(parents=True, exist_ok=True)
    written = 0
    for i, file in enumerate(pack.files, 1):
        target = folder / f"{pack.dataset}.pack{f'.{i}' if len(pack.files) > 1 else ''}"
        content = file.read_bytes()
        if (there := read_file(target, "move it away")) not in (None, content):
            raise InputError(f"{target} holds something else: move it away, or name another data folder by --data")
        if there is None:
            write(target, content)
            written += 1
    return written


def _files(path: Path) -> tuple[Path, ...]:
    """Return FILE, or FILE.1, FILE.2 and so on."""
    if path.is_file():
        return (path,)
    names = (path.with_name(f"{path.name}.{i}") for i in count(1))
    return tuple(takewhile(Path.is_file, names))


def _are_counts(counts: object) -> bool:
    return counts is None or (isinstance(counts, dict) and all(type(number) is int for number in counts.values()))


def _packed(arrays: Arrays) -> bytes:
    """Return arrays as a compressed ``.npz``: as they are, or the codes of so many images."""
    members: Arrays = {}
    for name, array in arrays.items():
        if not _is_smaller_coded(array):
            members[name] = array
            continue
        members[f"{name}/shape"] = np.array(array.shape)
        for i, images in enumerate(_together(array)):
            members |= {f"{name}/{i}/{part}": coded for part, coded in pack_images(images).items()}
    file = BytesIO()
    np.savez_compressed(file, **members)  # type: ignore[arg-type]
    content = file.getvalue()
    restored = _unpacked(content)
    assert restored.keys() == arrays.keys()
    assert all(np.array_equal(restored[name], array) for name, array in arrays.items())
    return content


def _unpacked(content: bytes) -> Arrays:
    """Return what ``_packed`` was given. Raises what is in ``UNREADABLE``."""
    with np.load(BytesIO(content), allow_pickle=False) as file:
        members = dict(file)
    arrays = {name: array for name, array in members.items() if "/" not in name}
    for name in (name.removesuffix("/shape") for name in members if name.endswith("/shape")):
        images = np.empty(tuple(members[f"{name}/shape"].tolist()), np.uint8)
        for i, part in enumerate(_together(images)):
            part[...] = unpack_images({key: members[f"{name}/{i}/{key}"] for key in CODED}, part.shape)
        arrays[name] = images
    return arrays


def _together(images: NDArray[np.uint8]) -> Iterator[NDArray[np.uint8]]:
    return (images[i : i + TOGETHER] for i in range(0, len(images), TOGETHER))


def _is_smaller_coded(array: NDArray[Any]) -> bool:
    """Say whether an array is of images that take fewer bytes in their own code; some are tried."""
    if array.dtype != np.uint8 or array.ndim != 4 or not array.size:
        return False
    some = array[:: -(-len(array) // 1000)]
    size: int = sum(part.nbytes for part in pack_images(some).values())
    return size < len(zlib.compress(some.tobytes()))
