"""FEMNIST: handwritten digits and letters of LEAF, by writer: 62 classes, 28x28 grey (Caldas et al. 2018, LEAF).

Read from ``femnist/``, in either form:

- LEAF's own ``all_data_*_train_*.json`` and ``all_data_*_test_*.json``, there or in ``train/`` and ``test/``, or in
  ``data/``, as in a clone of LEAF;
- ``femnist_leaf_subset.npz``: ``X`` uint8, ``y``, ``writer`` (index into ``writers``), and ``split``: 0 and 1 are
  LEAF's training and test images of the same 300 writers, 2 is the test images of 240 other writers.

LEAF's pixels are k / 255 with paper white at 1; here they are k, so 255 is white, and a batch gives LEAF's numbers.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedsieve.data.partition import by_group, hold_out
from fedsieve.data.source import Source, damaged, digest_of_files, missing, read_download, read_npz
from fedsieve.data.storage import Arrays, cached_arrays
from fedsieve.data.version import Counts, Version, built_counts
from fedsieve.types import Data, InputError

CLASSES = tuple("0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz")
SUBSET = "femnist_leaf_subset.npz"
HOW = (
    "in a clone of https://github.com/TalwalkarLab/leaf run data/femnist/preprocess.sh "
    "-s niid --sf 1.0 -k 0 -t sample --tf 0.8, and then: fedsieve data femnist --from leaf/data/femnist/data"
)


class Femnist(Source):
    """FEMNIST, uint8 [n, 1, 28, 28], in 0..1 as LEAF has it, owned by writers."""

    name, classes, instructions = "femnist", CLASSES, HOW
    folders = ("data",)  # in a clone of LEAF, whose own folder data is then the root
    hub = ("flwrlabs/femnist", "image", "L")
    versions = (  # ZeroFL prints "over 652K" and "over 165K"; FLASH prints no numbers of images
        Version(
            "3,597 writers",
            {
                "writers": 3597,
                "writers tested": 3597,
                "training": range(652_000, 653_000),
                "test": range(165_000, 166_000),
            },
        ),
        Version("3,400 writers", {"writers": 3400, "writers tested": 3400}),
    )
    pattern = "all_data_*_train_*.json or all_data_*_test_*.json of LEAF"

    def form(self, folder: Path) -> str | None:
        """Return the npz subset's name, "LEAF json" or None."""
        if (folder / SUBSET).is_file():
            return f"npz subset of LEAF ({SUBSET})"
        return "LEAF json" if _leaf_files(folder, "train") else None

    def target(self, name: str) -> str | None:
        """Return ``train/`` or ``test/`` and the name of one of LEAF's files, None for others."""
        file = re.fullmatch(r"(?:.*/)?(all_data_[0-9A-Za-z_]*_(train|test)_[0-9A-Za-z_]*\.json)", name)
        return file and f"{file[2]}/{file[1]}"

    def examine(self, target: str, content: bytes) -> dict[str, int | set[str]]:
        """Return a file's images and writers; ValueError if it is not as LEAF writes it."""
        owned = _leaf_users(content)
        part, who = ("training", "writers") if target.startswith("train/") else ("test", "writers tested")
        return {part: sum(len(y) for _, (_, y) in owned), who: {writer for writer, _ in owned}}

    def counts(self, folder: Path, arrays: Arrays | None = None) -> Counts | None:
        """Return how many writers and images there are; of json that was not built here only the arrays tell."""
        if arrays is not None:
            return {
                "writers": len(arrays["groups"]),
                "training": len(arrays["train_y"]),
                "test": len(arrays["test_y"]),
            }
        if not (folder / SUBSET).is_file():
            return built_counts(folder)
        table = read_npz(folder / SUBSET, HOW, "writer", "split")
        train, test = table["split"] == 0, table["split"] == 1
        return {
            "writers": len(np.unique(table["writer"][train])),
            "training": int(train.sum()),
            "test": int(test.sum()),
        }

    def read(self, folder: Path) -> Arrays:
        """Return the arrays of the npz subset, else of LEAF's json."""
        if (folder / SUBSET).is_file():
            return _subset(folder)
        train, test = (_leaf_files(folder, part) for part in ("train", "test"))
        if not train or not test:
            raise missing(folder / ("test" if train else "train") / "all_data_0_....json", HOW)
        return cached_arrays(f"femnist/{digest_of_files(train + test)}", lambda: _leaf(train, test))

    def read_hub(self, splits: Any) -> Arrays:
        """Return the arrays of the hub's only split, of which ``hold_out`` takes a tenth of every writer's images."""
        x, y, writer = self.hub_columns(splits["train"], "character", "writer_id")
        groups, group = np.unique(writer, return_inverse=True)
        shards = by_group(torch.from_numpy(group), len(groups), 0)
        parts = zip(*(hold_out(shard, 0.1, 0, k) for k, shard in enumerate(shards)), strict=True)
        train, test = (torch.cat(part).numpy() for part in parts)
        images = {"train_x": x[train], "train_y": y[train], "test_x": x[test], "test_y": y[test]}
        return images | {"group": group[train], "groups": groups, "test_group": group[test]}


def unseen_writers(root: Path | None) -> Data:
    """Return the 7,086 images of the npz subset's 240 writers who never train: smaller script, more letters, harder."""
    if root is None or not (root / "femnist" / SUBSET).is_file():
        raise InputError(f"writers kept out of training come only with femnist/{SUBSET} under --data or FEDSIEVE_DATA")
    table = _table(root / "femnist")
    unseen = table["split"] == 2
    return Data(torch.from_numpy(table["X"][unseen]), torch.from_numpy(table["y"][unseen].astype(np.int64)))


def _subset(folder: Path) -> Arrays:
    table = _table(folder)
    x, y, train, test = table["X"], table["y"], table["split"] == 0, table["split"] == 1
    ids, group = np.unique(table["writer"][train], return_inverse=True)
    images = {"train_x": x[train], "train_y": y[train], "test_x": x[test], "test_y": y[test]}
    owners = np.searchsorted(ids, table["writer"][test])  # who tests trains, too
    return images | {"group": group, "groups": table["writers"][ids].astype(str), "test_group": owners}


def _table(folder: Path) -> Arrays:
    table = read_npz(folder / SUBSET, HOW, "X", "y", "writer", "writers", "split")
    return table | {"X": table["X"][:, None]}


def _leaf_files(folder: Path, part: str) -> list[Path]:
    places = (folder, folder / part)
    return sorted(file for place in places for file in place.glob(f"all_data_*_{part}_*.json"))


def _leaf(train: list[Path], test: list[Path]) -> Arrays:
    (x, y, writers), (test_x, test_y, _) = _leaf_part(train), _leaf_part(test)
    groups, group = np.unique(writers, return_inverse=True)
    return {"train_x": x, "train_y": y, "test_x": test_x, "test_y": test_y, "group": group, "groups": groups}


def _leaf_part(files: list[Path]) -> tuple[NDArray[np.uint8], NDArray[np.uint8], list[str]]:
    """Return images, labels and every image's writer."""
    owned = [samples for path in files for samples in _leaf_file(path)]
    images, labels = (np.concatenate([samples[i] for _, samples in owned]) for i in (0, 1))
    return images, labels, [writer for writer, (_, y) in owned for _ in y]


def _leaf_file(path: Path) -> list[tuple[str, tuple[NDArray[np.uint8], NDArray[np.uint8]]]]:
    """Return every writer's images and labels; a file holds {"user_data": {writer: {"x": [[784]], "y": []}}}."""
    try:
        return _leaf_users(read_download(path, HOW))
    except InputError:
        raise
    except ValueError as error:
        raise damaged(path, str(error), HOW) from None


def _leaf_users(contents: bytes) -> list[tuple[str, tuple[NDArray[np.uint8], NDArray[np.uint8]]]]:
    """Return every writer's images and labels; ValueError where they are not as LEAF writes them."""
    try:
        users = json.loads(contents)["user_data"].items()
        owned = [(writer, _leaf_samples(samples["x"], samples["y"])) for writer, samples in users]
        if not any(len(y) for _, (_, y) in owned):
            raise ValueError("no images")
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(f"not LEAF json: {error!r}") from None
    return owned


def _leaf_samples(x: Any, y: Any) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return images [n, 1, 28, 28] and labels [n]; ValueError where they are not 784 pixels in 0..1 and a class."""
    pixels, labels = np.array(x, np.float64), np.array(y, np.float64)
    if labels.ndim != 1 or (pixels.shape != (len(labels), 784) and (pixels.size or len(labels))):
        raise ValueError(f"x is {list(pixels.shape)} and y {list(labels.shape)} instead of [n, 784] and [n]")
    if not ((pixels >= 0) & (pixels <= 1)).all():
        raise ValueError("a pixel is not in 0..1")
    if not np.isin(labels, range(len(CLASSES))).all():
        raise ValueError(f"a label is not one of 0 to {len(CLASSES) - 1}")
    return (255 * pixels).round().astype(np.uint8).reshape(-1, 1, 28, 28), labels.astype(np.uint8)
