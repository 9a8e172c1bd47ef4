"""What every source returns: arrays with fixed names become a ``Dataset``."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsieve.data.storage import Arrays
from fedsieve.types import Data, InputError


@dataclass(frozen=True, eq=False)
class Dataset:
    """A task's data: training and test examples, class names, and who each training example belongs to.

    ``classes`` may also be their number: their names are then 0, 1 and so on.
    ``group`` int64 [len(train)] numbers the writer or speaker of every training example (None where there is no such
    thing); ``groups`` names them.
    """

    name: str
    train: Data
    test: Data
    classes: tuple[str, ...]
    group: Tensor | None = None
    groups: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for part in ("train", "test"):
            if not isinstance(data := getattr(self, part), Data):
                raise InputError(f"dataset {self.name}: {part} must be fedsieve.Data(x, y), got {type_name(data)}")
        object.__setattr__(self, "classes", _class_names(self.name, self.classes))
        if self.group is not None:
            try:
                group = torch.as_tensor(self.group)
            except (TypeError, ValueError, RuntimeError) as error:
                raise InputError(f"dataset {self.name}: group must number the examples' owners ({error})") from None
            object.__setattr__(self, "group", group)
            if group.shape != self.train.y.shape:
                raise InputError(
                    f"dataset {self.name}: group must number the owner of each of the {len(self.train)} training "
                    f"examples, it has the shape {list(group.shape)}"
                )

    @cached_property
    def digest(self) -> str:
        """A hash of all that it holds."""
        digest = hashlib.sha256(repr((self.name, self.classes, self.groups)).encode())
        for data in (self.train, self.test):
            digest.update(repr((data.x.shape, data.x.dtype, data.y.shape, data.mean, data.std)).encode())
        parts = (self.train.x, self.train.y, self.test.x, self.test.y, self.group)
        for part in (part for part in parts if part is not None and part.numel()):
            digest.update(part.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def empty(self) -> Dataset:
        """Return it without its examples, and with its digest: what a process needs that has them otherwise."""
        digest, none = self.digest, torch.arange(0)
        bare = replace(self, train=self.train.subset(none), test=self.test.subset(none), group=None)
        vars(bare)["digest"] = digest
        return bare


def type_name(thing: object) -> str:
    """Return what a user gave, in a word."""
    return thing.__name__ if isinstance(thing, type) else type(thing).__name__


def _class_names(dataset: str, classes: Any) -> tuple[str, ...]:
    if isinstance(classes, int) and not isinstance(classes, bool) and classes > 0:
        return tuple(map(str, range(classes)))
    if isinstance(classes, str | int) or not isinstance(classes, Iterable):
        raise InputError(f"dataset {dataset}: classes must be the classes' names, or their number, got {classes!r}")
    return tuple(map(str, classes))


def assemble(name: str, arrays: Arrays, classes: tuple[str, ...], mean: float = 0.0, std: float = 1.0) -> Dataset:
    """Return the dataset of ``arrays``, all channels normalised by the same ``mean`` and ``std``."""

    def data(part: str) -> Data:
        y = torch.from_numpy(arrays[f"{part}_y"].astype(np.int64))
        return Data(torch.from_numpy(arrays[f"{part}_x"]), y, (mean,), (std,))

    group = torch.from_numpy(arrays["group"].astype(np.int64)) if "group" in arrays else None
    groups = tuple(map(str, arrays["groups"])) if "groups" in arrays else ()
    return Dataset(name, data("train"), data("test"), classes, group, groups)
