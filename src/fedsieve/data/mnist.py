"""MNIST: 60,000 + 10,000 handwritten digits, 28x28 grey (LeCun, Bottou, Bengio and Haffner 1998).

Read from the four original idx files, gzipped or not, in ``mnist/`` or torchvision's ``MNIST/raw/``; each is checked by
its published md5.
"""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedsieve.data.dataset import Arrays, Dataset, assemble
from fedsieve.data.downloads import missing, read

CLASSES = tuple("0123456789")
HOW = "download the four idx3/idx1-ubyte.gz files of https://ossci-datasets.s3.amazonaws.com/mnist/ into mnist/"
FOLDERS = ("MNIST/raw",)
"""As torchvision unpacks it."""
MD5 = {  # as published, gzipped; and of what is inside
    "train-images-idx3-ubyte": ("f68b3c2dcbeaaa9fbdd348bbdeb94873", "6bbc9ace898e44ae57da46a324031adb"),
    "train-labels-idx1-ubyte": ("d53e105ee54ea40749a09fcbcd1e9432", "a25bea736e30d166cdddb491f175f624"),
    "t10k-images-idx3-ubyte": ("9fb629c4189551a2d022fa330f9573f3", "2646ac647ad5339dbf082846283269ea"),
    "t10k-labels-idx1-ubyte": ("ec29112dd5afa0611ce80d1b7f02629c", "27ae3e4e09519cfbb04c629615203637"),
}


def form(folder: Path) -> str | None:
    """Return what ``folder`` holds, or None."""
    name = "train-images-idx3-ubyte"
    return "idx.gz files" if (folder / f"{name}.gz").is_file() else "idx files" if (folder / name).is_file() else None


def load(folder: Path) -> Dataset:
    """Return MNIST, uint8 [n, 1, 28, 28]."""
    if form(folder) is None:
        raise missing(folder / "train-images-idx3-ubyte.gz", HOW)
    part = {"train": "train", "test": "t10k"}
    images = {f"{name}_x": _idx(folder, f"{file}-images-idx3-ubyte")[:, None] for name, file in part.items()}
    labels = {f"{name}_y": _idx(folder, f"{file}-labels-idx1-ubyte") for name, file in part.items()}
    return dataset(images | labels)


def dataset(arrays: Arrays) -> Dataset:
    """Return the dataset, normalised by the training set's mean and standard deviation."""
    return assemble("mnist", arrays, CLASSES, mean=0.1307, std=0.3081)


def _idx(folder: Path, name: str) -> NDArray[np.uint8]:
    """Return the array of an idx file: two zeros, 8 for uint8, the rank, the sizes (big-endian uint32), the numbers."""
    packed = folder / f"{name}.gz"
    gzipped, plain = MD5[name]
    contents = gzip.decompress(read(packed, HOW, [gzipped])) if packed.is_file() else read(folder / name, HOW, [plain])
    shape = np.frombuffer(contents, ">u4", count=contents[3], offset=4)
    return np.frombuffer(bytearray(contents), np.uint8, offset=4 + 4 * len(shape)).reshape(shape)
