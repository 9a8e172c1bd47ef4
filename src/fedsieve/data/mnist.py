"""MNIST: 60,000 + 10,000 handwritten digits, 28x28 grey (LeCun, Bottou, Bengio and Haffner 1998).

Read from the four original idx files, gzipped or not, in ``mnist/`` or torchvision's ``MNIST/raw/``; each is checked by
its published md5.
"""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedsieve.data.source import Source, md5, missing, read_download
from fedsieve.data.storage import Arrays
from fedsieve.data.version import Version

HOW = (
    "download the four idx3/idx1-ubyte.gz files of https://ossci-datasets.s3.amazonaws.com/mnist/ into a folder "
    "and run: fedsieve data mnist --from FOLDER"
)
MD5 = {  # as published, gzipped; and of what is inside
    "train-images-idx3-ubyte": ("f68b3c2dcbeaaa9fbdd348bbdeb94873", "6bbc9ace898e44ae57da46a324031adb"),
    "train-labels-idx1-ubyte": ("d53e105ee54ea40749a09fcbcd1e9432", "a25bea736e30d166cdddb491f175f624"),
    "t10k-images-idx3-ubyte": ("9fb629c4189551a2d022fa330f9573f3", "2646ac647ad5339dbf082846283269ea"),
    "t10k-labels-idx1-ubyte": ("ec29112dd5afa0611ce80d1b7f02629c", "27ae3e4e09519cfbb04c629615203637"),
}


class Mnist(Source):
    """MNIST, uint8 [n, 1, 28, 28], normalised by the training set's mean and standard deviation."""

    name, classes, instructions = "mnist", tuple("0123456789"), HOW
    folders = ("MNIST/raw",)  # as torchvision unpacks it
    hub = ("ylecun/mnist", "image", "L")
    mean, std = 0.1307, 0.3081
    versions = (Version("", {"training": 60_000, "test": 10_000}),)
    files = tuple(f"{name}.gz" for name in MD5)

    def form(self, folder: Path) -> str | None:
        """Return "idx.gz files", "idx files" or None."""
        name = folder / "train-images-idx3-ubyte"
        return "idx.gz files" if name.with_suffix(".gz").is_file() else "idx files" if name.is_file() else None

    def examine(self, target: str, content: bytes) -> dict[str, int]:
        """Return how many images a file holds; ValueError if it is not the published one."""
        name = target.removesuffix(".gz")
        if md5(content) != MD5[name][0]:
            raise ValueError("is not the published file (its md5)")
        part = "test" if name.startswith("t10k") else "training"
        return {part: len(_array(gzip.decompress(content)))} if "images" in name else {}

    def read(self, folder: Path) -> Arrays:
        """Return the arrays of the four files."""
        if self.form(folder) is None:
            raise missing(folder / "train-images-idx3-ubyte.gz", HOW)
        part = {"train": "train", "test": "t10k"}
        images = {f"{name}_x": _idx(folder, f"{file}-images-idx3-ubyte")[:, None] for name, file in part.items()}
        labels = {f"{name}_y": _idx(folder, f"{file}-labels-idx1-ubyte") for name, file in part.items()}
        return images | labels


def _idx(folder: Path, name: str) -> NDArray[np.uint8]:
    """Return the array of an idx file: two zeros, 8 for uint8, the rank, the sizes (big-endian uint32), the numbers."""
    packed = folder / f"{name}.gz"
    gzipped, plain = MD5[name]
    contents = (
        gzip.decompress(read_download(packed, HOW, [gzipped]))
        if packed.is_file()
        else read_download(folder / name, HOW, [plain])
    )
    return _array(contents)


def _array(contents: bytes) -> NDArray[np.uint8]:
    shape = np.frombuffer(contents, ">u4", count=contents[3], offset=4)
    return np.frombuffer(bytearray(contents), np.uint8, offset=4 + 4 * len(shape)).reshape(shape)
