"""CIFAR-10: 50,000 + 10,000 colour images, 32x32, 10 classes (Krizhevsky 2009).

Read from ``cifar10/``, in one of these forms:

- the published binary version, ``data_batch_1..5.bin`` and ``test_batch.bin`` there or in ``cifar-10-batches-bin/``;
- the published python version, ``data_batch_1..5`` and ``test_batch`` there or, as torchvision unpacks it, in
  ``cifar-10-batches-py/``: pickles, of which numbers and strings are read and nothing is executed;
- lossless WebP sheets of 32x32 tiles in the original order, ``data_batch_1..5.webp`` and ``test_batch.webp``, with
  ``labels.npz`` (``train``, ``test``), from which the binary version is rebuilt.

All are checked by the published md5 sums, the last one by those of the binary version.
"""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from pickletools import genops
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsieve.data.source import Source, damaged, digest_of_files, md5, missing, read_download, read_npz
from fedsieve.data.storage import Arrays, cached_arrays
from fedsieve.data.version import Version

HOW = (
    "download https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz and run: "
    "fedsieve data cifar10 --from cifar-10-binary.tar.gz"
)
MD5 = {
    "data_batch_1": "5dd7e06a14cb22eb9f671a540d1b7c25",
    "data_batch_2": "5ea93a67294ea407fff1d09f752e9692",
    "data_batch_3": "942cd6a4bcdd0dd3c604fbe906cb4421",
    "data_batch_4": "ae636b3ba5c66a11e91e8cb52e771fcb",
    "data_batch_5": "53f37980c15c3d472c316c40844f3f0d",
    "test_batch": "803d5f7f4d78ea53de84dbe85f74fb6d",
}
PYTHON_MD5 = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
}
WEBP_TEST_MD5 = "4fd89b928a74095080b56355876466c0"
"""Of the WebP form's test batch, in which 20 images (19 ships, 1 horse) come from JPEG copies."""


class Cifar10(Source):
    """CIFAR-10, uint8 [n, 3, 32, 32] in red, green, blue, every channel normalised to -1..1."""

    name, instructions = "cifar10", HOW
    classes = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    folders = ("cifar-10-batches-bin", "cifar-10-batches-py")  # as torchvision, or tar, unpacks the archives
    hub = ("uoft-cs/cifar10", "img", "RGB")
    mean, std = 0.5, 0.5
    versions = (Version("", {"training": 50_000, "test": 10_000}),)
    archives = ("cifar-10-binary.tar.gz",)
    files = tuple(f"{name}.bin" for name in MD5)

    def form(self, folder: Path) -> str | None:
        """Return "binary version", "python version", "WebP sheets" or None."""
        if (folder / "data_batch_1.bin").is_file():
            return "binary version"
        if (folder / "data_batch_1").is_file():
            return "python version"
        return "WebP sheets" if (folder / "data_batch_1.webp").is_file() else None

    def examine(self, target: str, content: bytes) -> dict[str, int]:
        """Return how many images a batch of the binary version holds; ValueError if it is not the published one."""
        if md5(content) != MD5[target.removesuffix(".bin")]:
            raise ValueError("is not the published file (its md5)")
        return {"test" if target == "test_batch.bin" else "training": len(content) // 3073}

    def read(self, folder: Path) -> Arrays:
        """Return the arrays of the six batches, whichever form they have."""
        match self.form(folder):
            case "binary version":
                return _arrays({name: _binary(folder / f"{name}.bin", MD5[name]) for name in MD5})
            case "python version":
                return _arrays({name: pickled_rows(folder / name, PYTHON_MD5[name], HOW) for name in MD5})
            case "WebP sheets":
                sheets = [*folder.glob("*.webp"), folder / "labels.npz"]
                if not sheets[-1].is_file():
                    raise missing(sheets[-1], HOW)
                return cached_arrays(f"cifar10/{digest_of_files(sheets)}", lambda: _arrays(_sheets(folder)))
        raise missing(folder / "cifar-10-batches-bin" / "data_batch_1.bin", HOW)


def _arrays(batches: dict[str, NDArray[np.uint8]]) -> Arrays:
    """Return images and labels from batches [n, 3073] of the binary version: a label, then red, green, blue planes."""
    test = batches.pop("test_batch")
    train = np.concatenate(list(batches.values()))
    return {
        f"{part}_{name}": array
        for part, rows in (("train", train), ("test", test))
        for name, array in (("x", rows[:, 1:].reshape(-1, 3, 32, 32)), ("y", rows[:, 0].copy()))
    }


def _binary(path: Path, md5_: str) -> NDArray[np.uint8]:
    return np.frombuffer(bytearray(read_download(path, HOW, [md5_])), np.uint8).reshape(-1, 3073)


def pickled_rows(path: Path, md5_: str, how: str, labels_: str = "labels") -> NDArray[np.uint8]:
    """Return rows [n, 3073] of a pickled batch, a label of the list ``labels_`` and the pixels.

    Its opcodes are gone through, and none is executed. Raises InputError, which ends in ``how``.
    """
    labels, images, name = list[int](), b"", ""
    try:
        value: Any
        for opcode, value, _ in genops(read_download(path, how, [md5_])):
            if opcode.name == "BININT1" and name == labels_:
                labels.append(value)
            elif opcode.name == "BINSTRING":
                images = value.encode("latin-1")
            elif opcode.name == "SHORT_BINSTRING":
                name = value
        if not labels:
            raise ValueError("it has no labels")
        rows = np.frombuffer(images, np.uint8).reshape(len(labels), 3072)
        return np.concatenate([np.array(labels, np.uint8)[:, None], rows], axis=1)
    except (ValueError, OverflowError) as error:
        raise damaged(path, f"no batch of the python version: {error}", how) from None


def _sheets(folder: Path) -> dict[str, NDArray[np.uint8]]:
    labels = read_npz(folder / "labels.npz", HOW, "train", "test")
    targets = dict(zip(MD5, [*np.array_split(labels["train"], 5), labels["test"]], strict=True))
    return {name: _sheet(folder / f"{name}.webp", target) for name, target in targets.items()}


def _sheet(path: Path, labels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the binary version's rows [n, 3073] of one sheet: image i is the tile at row i // columns, i % columns."""
    from PIL import Image, UnidentifiedImageError

    contents = BytesIO(read_download(path, HOW))
    try:
        with Image.open(contents) as image:
            sheet = np.asarray(image.convert("RGB"))
    except (OSError, UnidentifiedImageError):
        raise damaged(path, "not a WebP image", HOW) from None
    height, width = sheet.shape[0] // 32, sheet.shape[1] // 32
    tiles = sheet.reshape(height, 32, width, 32, 3).transpose(0, 2, 4, 1, 3).reshape(height * width, 3072)
    rows = np.concatenate([labels[:, None], tiles], axis=1)
    if md5(rows.tobytes()) not in (MD5[path.stem], WEBP_TEST_MD5):
        raise damaged(path, "the binary version made of it has not the published md5", HOW)
    return rows
