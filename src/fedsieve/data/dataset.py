"""What every source returns: arrays with fixed names become a ``Dataset``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsieve.types import Data

Arrays: TypeAlias = dict[str, NDArray[Any]]
"""``train_x``, ``train_y``, ``test_x``, ``test_y``, and where examples have owners ``group`` and ``groups``."""


@dataclass(frozen=True)
class Dataset:
    """A task's data: training and test examples, class names, and who each training example belongs to.

    ``group`` int64 [len(train)] numbers the writer or speaker of every training example (None where there is no such
    thing); ``groups`` names them.
    """

    name: str
    train: Data
    test: Data
    classes: tuple[str, ...]
    group: Tensor | None = None
    groups: tuple[str, ...] = ()


def assemble(name: str, arrays: Arrays, classes: tuple[str, ...], mean: float = 0.0, std: float = 1.0) -> Dataset:
    """Return the dataset of ``arrays``, all channels normalised by the same ``mean`` and ``std``."""

    def data(part: str) -> Data:
        y = torch.from_numpy(arrays[f"{part}_y"].astype(np.int64))
        return Data(torch.from_numpy(arrays[f"{part}_x"]), y, (mean,), (std,))

    group = torch.from_numpy(arrays["group"].astype(np.int64)) if "group" in arrays else None
    groups = tuple(map(str, arrays["groups"])) if "groups" in arrays else ()
    return Dataset(name, data("train"), data("test"), classes, group, groups)
