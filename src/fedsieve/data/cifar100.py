"""CIFAR-100: 50,000 + 10,000 colour images, 32x32, of 100 fine classes, 500 + 100 each (Krizhevsky 2009).

Read from ``cifar100/``, in one of these forms:

- the published binary version, ``train.bin`` and ``test.bin`` there or in ``cifar-100-binary/``: rows of a coarse and a
  fine label and 3,072 pixels, which must be as many, and of as many in every class, as were published; the archive, by
  its published name, must have the published md5;
- the published python version, ``train`` and ``test`` there or, as torchvision unpacks it, in ``cifar-100-python/``:
  pickles of the published md5, of which numbers and strings are read and nothing is executed.
"""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from fedsieve.data.cifar10 import pickled_rows
from fedsieve.data.source import Source, damaged, missing, read_download
from fedsieve.data.storage import Arrays
from fedsieve.data.version import Version

HOW = (
    "download https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz and run: "
    "fedsieve data cifar100 --from cifar-100-binary.tar.gz"
)
FINE = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle
caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant flatfish
forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle
mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine
possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel streetcar
sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle wardrobe whale
willow_tree wolf woman worm
"""
"""The classes' names, in the order of their labels."""
PARTS = {"train": "training", "test": "test"}
PYTHON_MD5 = {"train": "16019d7e3df5f24257cddd939b257f8d", "test": "f0ef6b0ae62326f3e7ffdfab6717acfc"}


class Cifar100(Source):
    """CIFAR-100 by its fine classes, uint8 [n, 3, 32, 32] in red, green, blue, every channel normalised to -1..1."""

    name, instructions, classes = "cifar100", HOW, tuple(FINE.split())
    folders = ("cifar-100-binary", "cifar-100-python")  # as tar, or torchvision, unpacks the archives
    hub = ("uoft-cs/cifar100", "img", "RGB")
    hub_label = "fine_label"
    mean, std = 0.5, 0.5
    versions = (Version("", {"training": 50_000, "test": 10_000}),)
    archives = ("cifar-100-binary.tar.gz",)
    archive_md5 = MappingProxyType({"cifar-100-binary.tar.gz": "03b5dce01913d631647c71ecec9e9cb8"})
    files = tuple(f"{name}.bin" for name in PARTS)

    def form(self, folder: Path) -> str | None:
        """Return "binary version", "python version" or None."""
        if (folder / "train.bin").is_file():
            return "binary version"
        return "python version" if (folder / "train").is_file() else None

    def examine(self, target: str, content: bytes) -> dict[str, int]:
        """Return how many images a file holds; ValueError unless every class has its share of the published ones."""
        part = target.removesuffix(".bin")
        rows = np.frombuffer(content, np.uint8)
        if len(rows) != self._count(part) * 3074:
            raise ValueError(f"has {len(rows):,} bytes instead of {self._count(part):,} rows of 3,074")
        coarse, fine = rows.reshape(-1, 3074)[:, :2].T
        if fine.max() > 99 or (np.bincount(fine, minlength=100) != self._count(part) // 100).any():
            raise ValueError("has not equally many images of each of the 100 classes")
        if len(np.unique(np.stack([coarse, fine]), axis=1).T) != 100:
            raise ValueError("has fine classes that belong to several coarse ones")
        return {PARTS[part]: len(fine)}

    def read(self, folder: Path) -> Arrays:
        """Return the arrays of the two files, whichever form they have."""
        form = self.form(folder)
        if form is None:
            raise missing(folder / "train.bin", HOW)
        read = self._binary if form == "binary version" else _pickled
        rows = {part: read(folder, part) for part in PARTS}
        images = {f"{part}_x": array[:, 1:].reshape(-1, 3, 32, 32) for part, array in rows.items()}
        return images | {f"{part}_y": array[:, 0].copy() for part, array in rows.items()}

    def _count(self, part: str) -> int:
        number = self.versions[0].counts[PARTS[part]]
        assert isinstance(number, int)
        return number

    def _binary(self, folder: Path, part: str) -> NDArray[np.uint8]:
        """Return rows [n, 3073]: a fine label and the pixels."""
        path = folder / f"{part}.bin"
        content = read_download(path, HOW)
        try:
            self.examine(path.name, content)
        except ValueError as error:
            raise damaged(path, f"it {error}", HOW) from None
        return np.frombuffer(bytearray(content), np.uint8).reshape(-1, 3074)[:, 1:]


def _pickled(folder: Path, part: str) -> NDArray[np.uint8]:
    return pickled_rows(folder / part, PYTHON_MD5[part], HOW, "fine_labels")
