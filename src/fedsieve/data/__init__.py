"""Datasets: a name and a folder become tensors.

``load("cifar10", root_from(None))`` is all that a run needs; ``partition`` then says who holds what.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from fedsieve.data import cifar10, digits, femnist, hub, mnist, speech_commands
from fedsieve.data.dataset import Dataset
from fedsieve.types import InputError

__all__ = ["NAMES", "Dataset", "load", "root_from", "status"]


class _Source(NamedTuple):
    """A dataset that users download: how to get it, which form a folder holds, and how to read it."""

    how: str
    form: Callable[[Path], str | None]
    load: Callable[[Path], Dataset]
    folders: tuple[str, ...]
    """Where other tools unpack it, in their root, which is the data folder or the dataset's folder there."""


_SOURCES = {
    "mnist": _Source(mnist.HOW, mnist.form, mnist.load, mnist.FOLDERS),
    "cifar10": _Source(cifar10.HOW, cifar10.form, cifar10.load, cifar10.FOLDERS),
    "femnist": _Source(femnist.HOW, femnist.form, femnist.load, femnist.FOLDERS),
    "speech_commands": _Source(
        speech_commands.HOW, speech_commands.form, speech_commands.load, speech_commands.FOLDERS
    ),
}
NAMES = ("digits", *_SOURCES)


def root_from(data: str | None) -> Path | None:
    """Return the data folder, absolute: ``--data``, else FEDSIEVE_DATA, else None; exactly "hub" gives ``hub.ROOT``."""
    chosen = data or os.environ.get("FEDSIEVE_DATA")
    if not chosen or chosen == str(hub.ROOT):
        return hub.ROOT if chosen else None
    try:
        return Path(chosen).expanduser().absolute()
    except RuntimeError:
        raise InputError(f"{chosen}: no such home folder is known: write the whole path") from None


def load(name: str, root: Path | None) -> Dataset:
    """Return a dataset from ``root/name/``, or from where other tools unpack it; digits need no root.

    Raises InputError in one line that says what to do.
    """
    _check(name)
    if name == "digits":
        return digits.load()
    if root == hub.ROOT:
        return hub.load(name)
    if root is None:
        raise InputError(f"{name} needs a data folder, named by --data or FEDSIEVE_DATA: there, {_SOURCES[name].how}")
    return _SOURCES[name].load(_folder(name, root))


def status(name: str, root: Path | None) -> str:
    """Return in one line where a dataset is and in which form, or how to get it; reads nothing."""
    _check(name)
    if name == "digits":
        return "comes with FedSieve"
    if root == hub.ROOT:
        return hub.status(name)
    form = _SOURCES[name].form(folder := _folder(name, root)) if root else None
    return f"{folder}: {form}" if form else f"not found: {_SOURCES[name].how}"


def _folder(name: str, root: Path) -> Path:
    """Return the folder that holds a dataset: ``root/name``, or the first of the others that does."""
    source = _SOURCES[name]
    others = [place / inner for place in (root / name, root) for inner in source.folders]
    return next((folder for folder in (root / name, *others) if source.form(folder)), root / name)


def _check(name: str) -> None:
    if name not in NAMES:
        raise InputError(f"no dataset is called {name!r}: take one of {', '.join(NAMES)}")
