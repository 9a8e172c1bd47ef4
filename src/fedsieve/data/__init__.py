"""Datasets: a name and a folder become tensors.

``load_dataset("cifar10", root_from(None))`` is all that a run needs; ``partition`` then says who holds what.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from fedsieve.data.cifar10 import Cifar10
from fedsieve.data.cifar100 import Cifar100
from fedsieve.data.dataset import Dataset
from fedsieve.data.diabetes import load_diabetes
from fedsieve.data.digits import load_digits
from fedsieve.data.femnist import Femnist
from fedsieve.data.mnist import Mnist
from fedsieve.data.shakespeare import Shakespeare
from fedsieve.data.source import HUB, Source
from fedsieve.data.speech_commands import SpeechCommands
from fedsieve.types import InputError

__all__ = ["NAMES", "Dataset", "dataset_status", "load_dataset", "root_from"]

SHIPPED: dict[str, Callable[[], Dataset]] = {"digits": load_digits, "diabetes": load_diabetes}
"""What comes with FedSieve."""
SOURCES: dict[str, Source] = {
    source.name: source for source in (Mnist(), Cifar10(), Cifar100(), Femnist(), SpeechCommands(), Shakespeare())
}
NAMES = (*SHIPPED, *SOURCES)


def root_from(data: str | None) -> Path | None:
    """Return the data folder, absolute: ``--data``, else FEDSIEVE_DATA, else None; exactly "hub" gives ``HUB``."""
    name = data or os.environ.get("FEDSIEVE_DATA")
    if not name or name == str(HUB):
        return HUB if name else None
    try:
        return Path(name).expanduser().absolute()
    except RuntimeError:
        raise InputError(f"{name}: no such home folder is known: write the whole path") from None


def load_dataset(name: str, root: Path | None) -> Dataset:
    """Return a dataset from ``root/name/``, or from where other tools unpack it; what is shipped needs no root.

    Raises InputError in one line that says what to do.
    """
    _check(name)
    return SHIPPED[name]() if name in SHIPPED else SOURCES[name].load(root)


def dataset_status(name: str, root: Path | None) -> str:
    """Return in one line where a dataset is and in which form, which version, or how to get it; reads no example."""
    _check(name)
    return "comes with FedSieve" if name in SHIPPED else SOURCES[name].status(root)


def _check(name: str) -> None:
    if name not in NAMES:
        raise InputError(f"no dataset is called {name!r}: take one of {', '.join(NAMES)}")
