"""Build a dataset's folder from its public archive: whole, of a known version, or not at all.

The archive is read twice. The first time nothing is written: every file is examined and hashed, and what they count
must be a published version. The second time the files that are not there yet go to ``.NAME.partial`` in the data
folder, are read back and compared; last come ``SHA256SUMS`` and ``VERSION.json``, and the folder gets its name. So a
stop at any time leaves nothing that could be taken for a dataset, and the same command goes on from there.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from rich.filesize import decimal

from fedsieve.data.archive import AGAIN, Archive, Progress
from fedsieve.data.source import Source
from fedsieve.data.storage import NEW, locked, write, write_json
from fedsieve.data.version import (
    REBUILD,
    RECORD,
    SUMS,
    Counts,
    Version,
    built_counts,
    format_counts,
    merged,
    version_of,
)
from fedsieve.types import InputError

ELSEWHERE = "move it away, or name another data folder by --data"
OTHER_PROCESS = "wait for it, or name another data folder by --data"

Stages = Callable[[str, int, int], None]
"""Called with what is being done ("check", "write"), and the bytes of the archive that are done and that there are."""


class Contents(NamedTuple):
    """What an archive holds of a dataset: which version, and the size and sha256 of every file by its place."""

    version: Version
    counts: Counts
    files: Mapping[str, tuple[int, str]]


def build_dataset(source: Source, archive: Path, root: Path, stages: Stages) -> int:
    """Build ``root/NAME`` from an archive and return how many files were written, 0 if all were there.

    Raises InputError in one line; what stands at ``root/NAME`` is then as it was.
    """
    final, partial = root / source.name, root / f".{source.name}.partial"
    if partial.is_symlink() or final.is_symlink():
        raise InputError(f"{partial if partial.is_symlink() else final} is a link: {ELSEWHERE}")
    with locked(partial, OTHER_PROCESS):
        try:
            _check_place(final)
            opened = Archive(archive, source.target)
            contents = examine_archive(source, opened, lambda position, size: stages("check", position, size))
            _check_version(final, source, contents.version)
            return _build(opened, contents, final, partial, lambda position, size: stages("write", position, size))
        finally:
            with suppress(OSError):  # it holds what is to be gone on with, or has its name already
                partial.rmdir()


def examine_archive(source: Source, archive: Archive, progress: Progress) -> Contents:
    """Return what an archive holds. Raises InputError unless it is whole and a published version of the dataset."""
    published = source.archive_md5.get(archive.path.name)
    if published and archive.path.is_file() and published != _digest(archive.path, "md5"):
        raise InputError(f"{archive.path} is not the published archive (its md5): {AGAIN}")
    files = dict[str, tuple[int, str]]()

    def tallies() -> Iterator[Mapping[str, int | set[str]]]:
        for target, content in archive.files(progress):
            files[target] = len(content), hashlib.sha256(content).hexdigest()
            try:
                yield source.examine(target, content)
            except ValueError as error:
                raise InputError(f"{archive.path}: {target} {error}: {AGAIN}") from None

    counts = merged(tallies(), source.versions[0].counts)
    if lacking := [name for name in source.files if name not in files] or ([source.pattern] if not files else []):
        pickles = f" but pickles ({archive.pickles[0]}), which can run code," if archive.pickles else ""
        raise InputError(f"{archive.path} has no {lacking[0]}{pickles}: {source.instructions}")
    version = version_of(source.versions, counts)
    if version is None or not version.counts.keys() <= counts.keys():
        known = "; ".join(map(str, source.versions))
        raise InputError(
            f"{archive.path} is no published version of {source.name}: it has {format_counts(counts)} instead of "
            f"{known}: {source.instructions}"
        )
    return Contents(version, counts, files)


def verify(folder: Path) -> Counts:
    """Return the counts of a folder that was built, after checking every file. Raises InputError."""
    counts = built_counts(folder)
    try:
        lines = (folder / SUMS).read_text().splitlines()
    except (OSError, ValueError) as error:
        raise InputError(f"{folder / SUMS} cannot be read ({error}): {REBUILD}") from None
    for digest, _, name in (line.partition("  ") for line in lines):
        if _digest(folder / name) != digest:
            raise InputError(
                f"{folder / name} is missing or damaged: delete it, and build again with --from ARCHIVE, "
                "which brings what is missing"
            )
    return counts or {}


def _check_place(final: Path) -> None:
    """Raise InputError if something is there that was not built."""
    if final.exists() and not final.is_dir():
        raise InputError(f"{final} is a file: {ELSEWHERE}")
    if final.is_dir() and built_counts(final) is None and any(final.iterdir()):
        raise InputError(f"{final} holds files that fedsieve data did not write: {ELSEWHERE}")


def _check_version(final: Path, source: Source, version: Version) -> None:
    """Raise InputError if another version was built there."""
    counts = built_counts(final)
    if counts and (there := version_of(source.versions, counts)) != version:
        name = there.name if there else "another version"
        raise InputError(f"{final} holds {name}, the archive {version.name}: {ELSEWHERE}")


def _build(archive: Archive, contents: Contents, final: Path, partial: Path, progress: Progress) -> int:
    """Write what is missing of the dataset, and return how many files that were."""
    _remove_strays(partial, contents.files)
    is_complete = built_counts(final) is not None
    place = final if is_complete else partial
    there = {name for name in contents.files if (place / name).exists()}
    right = {name for name in there if _digest(place / name) == contents.files[name][1]}
    if is_complete and (wrong := sorted(there - right)):
        raise InputError(f"{final / wrong[0]} is not what the archive holds: delete it to have it written again")
    missing = contents.files.keys() - right
    _check_space(partial.parent, [contents.files[name][0] for name in missing])
    if missing:
        for target, content in archive.files(progress):
            if target in missing:
                _write(partial / target, content, contents.files[target][1])
    if is_complete:
        for name in sorted(missing):
            (final / name).parent.mkdir(parents=True, exist_ok=True)
            (partial / name).rename(final / name)
        _remove_strays(partial, {})
    else:
        _finish(archive, contents, final, partial)
    return len(missing)


def _finish(archive: Archive, contents: Contents, final: Path, partial: Path) -> None:
    """Note what was built, let it survive a loss of power, and give it its name."""
    lines = [f"{digest}  {name}\n" for name, (_, digest) in sorted(contents.files.items())]
    write(partial / SUMS, "".join(lines).encode())
    record = {"dataset": final.name, "version": contents.version.name, "counts": dict(contents.counts)}
    write_json(partial / RECORD, record | {"archive": archive.path.name})
    os.sync()
    partial.rename(final)
    os.sync()


def _remove_strays(partial: Path, files: Mapping[str, tuple[int, str]]) -> None:
    """Remove from the unfinished folder what an archive does not hold: of another version, or put there; and links."""
    for above, folders, names in os.walk(partial, topdown=False):
        for path in (Path(above, name) for name in names):
            if path.is_symlink() or path.relative_to(partial).as_posix() not in files:
                path.unlink()
        for path in (Path(above, name) for name in folders):
            if path.is_symlink():
                path.unlink()
            elif not any(path.iterdir()):
                path.rmdir()


def _check_space(folder: Path, sizes: list[int]) -> None:
    state = os.statvfs(folder)
    block = state.f_frsize
    need, free = sum(-(-size // block) * block for size in sizes), state.f_bavail * block
    if need > free:
        raise InputError(
            f"{folder} has room for {decimal(free)} where {decimal(need)} are to be written: free some, or name "
            "another data folder by --data"
        )


def _write(path: Path, content: bytes, digest: str) -> None:
    """Write a file of the unfinished folder and compare what can be read of it."""
    if hashlib.sha256(content).hexdigest() != digest:
        raise InputError(f"the archive has changed while {path.name} was read: leave it as it is meanwhile")
    path.parent.mkdir(parents=True, exist_ok=True)
    with os.fdopen(os.open(path, NEW | os.O_TRUNC, 0o666), "wb") as file:
        file.write(content)
    if _digest(path) != digest:
        raise InputError(f"{path} does not hold what was written to it: check the disk")


def _digest(path: Path, kind: str = "sha256") -> str | None:
    """Return the sha256, or another hash, of a regular file, None where there is none."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, kind).hexdigest()
