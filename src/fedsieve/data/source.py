"""A dataset that users download: where it lies, in which form, and how it becomes a ``Dataset``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path

from fedsieve.data.dataset import Arrays, Dataset, assemble
from fedsieve.types import InputError


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
