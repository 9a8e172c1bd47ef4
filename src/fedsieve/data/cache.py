"""Prepared arrays on disk, so that slow decoding happens once.

An entry is one ``.npz`` file without pickles. It is written under another name, flushed to the disk and renamed, so a
reader, in this or another process, finds all of it or nothing. Deleting the folder is always safe.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np

from fedsieve.data.dataset import Arrays
from fedsieve.data.downloads import UNREADABLE
from fedsieve.data.storage import replacing

VERSION = 1
"""Part of every key: to be raised when the same key comes to mean other arrays."""


def folder() -> Path:
    """Return where entries live: FEDSIEVE_CACHE, else fedsieve/ in XDG_CACHE_HOME, else ~/.cache/fedsieve."""
    if chosen := os.environ.get("FEDSIEVE_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fedsieve"


def cached_arrays(key: str, make: Callable[[], Arrays]) -> Arrays:
    """Return the arrays kept under ``key``, or make and keep them; a damaged entry is made again.

    ``key`` says everything that the arrays depend on, the source's name first: ``mnist/...``.
    """
    digest = hashlib.sha256(f"{VERSION}/{key}".encode()).hexdigest()
    try:
        path = folder() / f"{key.partition('/')[0]}-{digest[:16]}.npz"
    except RuntimeError as error:  # no HOME, and a user without an entry, as in a container
        _warn(error)
        return make()
    if (found := _read(path)) is not None:
        return found
    arrays = make()
    try:
        _write(path, arrays)
    except OSError as error:
        _warn(error)
    return arrays


def _warn(error: Exception) -> None:
    warnings.warn(f"nothing is cached ({error}): set FEDSIEVE_CACHE to a folder to write to", stacklevel=3)


def _read(path: Path) -> Arrays | None:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as entry:
            return dict(entry)
    except UNREADABLE:
        return None


def _write(path: Path, arrays: Arrays) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, 0o600) as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
