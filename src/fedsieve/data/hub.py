"""The same datasets from the Hugging Face hub, with ``--data hub`` (needs the package ``datasets`` and the internet).

flwrlabs/femnist has no test split: ``hold_out`` takes a tenth of every writer's images.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from fedsieve.data.dataset import Arrays, Dataset
from fedsieve.data.partition import by_group, hold_out
from fedsieve.data.source import Source, package
from fedsieve.data.storage import cached_arrays
from fedsieve.types import InputError

ROOT = Path("hub")
"""What ``--data hub`` becomes."""


class Repository(NamedTuple):
    """A repository of the hub, and how its splits are read."""

    path: str
    read: Callable[[Any], Arrays]


def hub_status(name: str) -> str:
    """Return in one line where a dataset is read from, or that it is not."""
    return f"huggingface.co/datasets/{REPOSITORIES[name].path}" if name in REPOSITORIES else _refusal(name)


def load_from_hub(source: Source) -> Dataset:
    """Return a dataset read through the ``datasets`` package, then kept in the cache. Raises InputError."""
    name = source.name
    if name not in REPOSITORIES:
        raise InputError(_refusal(name))
    path, read = REPOSITORIES[name]
    return source.dataset(cached_arrays(f"{name}/hub", lambda: read(_download(path))))


def _refusal(name: str) -> str:
    return f"{name} cannot be read from the hub: download the public archive and name the folder above it by --data"


def _download(repository: str) -> Any:
    try:
        return package("datasets", "hub").load_dataset(repository)
    except OSError as error:
        raise InputError(f"{repository} cannot be read from the hub ({error}): check the connection") from None


def _columns(split: Any, image: str, mode: str, *names: str) -> list[NDArray[Any]]:
    """Return images uint8 [n, channels, height, width] and further columns, in one pass, which decodes once."""
    rows = ((np.asarray(row[image].convert(mode)), *(row[name] for name in names)) for row in split)
    images, *rest = zip(*rows, strict=True)
    x = np.stack(images)
    x = x[:, None] if mode == "L" else np.ascontiguousarray(x.transpose(0, 3, 1, 2))
    return [x, *map(np.array, rest)]


def _images(splits: Any, image: str, mode: str) -> Arrays:
    (x, y), (test_x, test_y) = (_columns(splits[part], image, mode, "label") for part in ("train", "test"))
    return {"train_x": x, "train_y": y, "test_x": test_x, "test_y": test_y}


def _femnist(splits: Any) -> Arrays:
    x, y, writer = _columns(splits["train"], "image", "L", "character", "writer_id")
    groups, group = np.unique(writer, return_inverse=True)
    held = [hold_out(shard, 0.1, 0, k) for k, shard in enumerate(by_group(torch.from_numpy(group), len(groups), 0))]
    train, test = (torch.cat(part).numpy() for part in zip(*held, strict=True))
    images = {"train_x": x[train], "train_y": y[train], "test_x": x[test], "test_y": y[test]}
    return images | {"group": group[train], "groups": groups}


REPOSITORIES = {
    "mnist": Repository("ylecun/mnist", partial(_images, image="image", mode="L")),
    "cifar10": Repository("uoft-cs/cifar10", partial(_images, image="img", mode="RGB")),
    "femnist": Repository("flwrlabs/femnist", _femnist),
}
