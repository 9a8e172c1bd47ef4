"""Datasets: a name and a folder become tensors."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fedsieve.types import Data


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
