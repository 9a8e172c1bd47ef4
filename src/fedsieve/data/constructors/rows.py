"""Examples as they were read: split, their targets numbered, their owners too."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsieve.data.mapped import chunks
from fedsieve.types import Data, Examples, InputError, leaves, map_examples, rng


@dataclass(frozen=True)
class Rows:
    """Examples: inputs and targets of one tensor or several, [n, ...]; names of classes may stand for targets [n].

    ``owner`` [n] says whose each is, ``columns`` [n] what else is known of it: numbers or texts.
    """

    x: Examples
    y: Examples | NDArray[Any]
    owner: NDArray[Any] | None = None
    columns: Mapping[str, NDArray[Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        targets = [len(self)] if isinstance(self.y, np.ndarray) else [len(one) for one in leaves(self.y)]
        if odd := [n for n in (*(len(one) for one in leaves(self.x)), *targets) if n != len(self)]:
            raise InputError(
                f"there are {odd[0]} examples of one kind and {len(self)} of another: give as many of each"
            )

    def __len__(self) -> int:
        return len(self.y) if isinstance(self.y, np.ndarray) else len(leaves(self.y)[0])

    def subset(self, index: Tensor) -> Rows:
        """Return the examples at ``index``, int64 [m]."""

        def at(one: Tensor) -> Tensor:
            return one.index_select(0, index)

        places = index.numpy()
        y = self.y[places] if isinstance(self.y, np.ndarray) else map_examples(at, self.y)
        columns = {name: column[places] for name, column in self.columns.items()}
        return Rows(map_examples(at, self.x), y, None if self.owner is None else self.owner[places], columns)


class Parts(NamedTuple):
    """What a ``Dataset`` holds beside its name."""

    train: Data
    test: Data
    classes: tuple[str, ...]
    group: Tensor | None
    groups: tuple[str, ...]
    columns: Mapping[str, Tensor]
    test_group: Tensor | None = None


def parts_of(
    train: Rows,
    test: Rows | float,
    classes: Any = None,
    seed: int = 0,
    mean: Any = 0.0,
    std: Any = 1.0,
) -> Parts:
    """Return what a dataset holds: of ``test`` as a share, so much of the examples is held out by chance.

    Targets of whole numbers and names are classes, unless ``classes`` is empty: their names, or their number; None: as
    many as there are. Raises InputError.
    """
    if not isinstance(test, Rows):
        train, test = _held_out(train, test, seed)
    for what, rows in (("training", train), ("test", test)):
        if not len(rows):
            raise InputError(f"there is no {what} example: give some")
    if leaves(train.x)[0].shape[1:] != leaves(test.x)[0].shape[1:]:
        shapes = " and ".join(str(list(leaves(rows.x)[0].shape[1:])) for rows in (train, test))
        raise InputError(f"training and test examples have the shapes {shapes}: give both the same")
    (y, test_y), names = _targets(train.y, test.y, classes)
    group, groups = (None, ()) if train.owner is None else numbered(train.owner)
    owners = None
    if test.owner is not None and groups:
        number = {owner: i for i, owner in enumerate(groups)}
        owners = torch.tensor([number.get(str(owner), -1) for owner in test.owner])  # -1: who trains nothing
    columns = {name: _column(column) for name, column in train.columns.items()}
    parts = Data(train.x, y, mean, std), Data(test.x, test_y, mean, std)
    return Parts(*parts, names, group, groups, columns, owners)


def numbered(values: NDArray[Any]) -> tuple[Tensor, tuple[str, ...]]:
    """Return values as numbers, int64 [n], and their names in the order of the values."""
    names, numbers = np.unique(values, return_inverse=True)
    return torch.from_numpy(numbers.astype(np.int64)), tuple(map(str, names))


def with_owner(rows: Rows, name: str, values: Any) -> Rows:
    """Return the examples with their owners, also as a column. Raises InputError unless each has one."""
    owner = np.asarray(values)
    if owner.shape != (len(rows),):
        raise InputError(f"client must name the owner of each of the {len(rows)} examples, got {list(owner.shape)}")
    return replace(rows, owner=owner, columns={**rows.columns, name: owner})


def as_tensor(values: Any) -> Tensor:
    """Return an array as a tensor that models take: float64 as float32, odd integers as int64."""
    array = np.asarray(values)
    if array.dtype == np.float64:
        array = array.astype(np.float32)
    elif array.dtype in (np.uint16, np.uint32, np.uint64):
        array = array.astype(np.int64)
    if array.dtype.kind not in "fiub":
        raise InputError(f"numbers are needed, got an array of {array.dtype}")
    if not array.flags.writeable or not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    return torch.from_numpy(np.ascontiguousarray(array))


def _held_out(rows: Rows, share: Any, seed: int) -> tuple[Rows, Rows]:
    """Return training and test examples, in the order they had."""
    if not isinstance(share, int | float) or not 0 < share < 1:
        raise InputError(f"test must be test examples, or a share of all between 0 and 1, got {share!r}")
    if not (count := int(share * len(rows))):
        raise InputError(f"a share of {share} of {len(rows)} examples is none: raise test, or give test examples")
    order = torch.randperm(len(rows), generator=rng(seed, "test"))
    return rows.subset(order[count:].sort().values), rows.subset(order[:count].sort().values)


def _targets(train: Any, test: Any, classes: Any) -> tuple[tuple[Examples, Examples], tuple[str, ...]]:
    """Return targets as tensors, and the names of the classes. Raises InputError."""
    number = classes if isinstance(classes, int) and not isinstance(classes, bool) else None
    if isinstance(classes, str) or not (classes is None or number or isinstance(classes, Iterable)):
        raise InputError(f"classes must be the classes' names, or their number, got {classes!r}")
    names = tuple(map(str, range(number) if number else classes or ()))
    if isinstance(train, np.ndarray) or isinstance(test, np.ndarray):
        names = names or tuple(map(str, np.union1d(train, test)))
        return (_numbers(train, names), _numbers(test, names)), names
    if isinstance(train, Tensor) and not train.is_floating_point():
        train, test = (y.long() if y.dtype == torch.bool else y for y in (train, test))
        if classes is None:
            names = _inferred(train, test)
    if names:
        train, test = (map_examples(_labels, y) for y in (train, test))
    return (train, test), names


def _labels(y: Tensor) -> Tensor:
    return y if y.is_floating_point() or y.dtype == torch.int64 else y.long()


def _inferred(train: Tensor, test: Tensor) -> tuple[str, ...]:
    """Return the classes of targets of whole numbers: 0 to the largest. Raises InputError where that is unlikely."""
    ends = [rows.aminmax() for y in (train, test) for rows in chunks(y) if rows.numel()]
    low, high = min((int(one.min) for one in ends), default=0), max((int(one.max) for one in ends), default=0)
    say = "say classes=N if they are N classes, classes=() if they are none"
    if low < 0:
        raise InputError(f"targets begin at {low}, where classes are numbered from 0: number them so, or {say}")
    if high >= train.numel() + test.numel():
        raise InputError(f"targets reach {high} in {len(train) + len(test)} examples: {say}")
    return tuple(map(str, range(high + 1)))


def _numbers(names: NDArray[Any], classes: tuple[str, ...]) -> Tensor:
    """Return the numbers of classes by their names. Raises InputError for a name that is none."""
    places = {name: i for i, name in enumerate(classes)}
    if unknown := sorted({*map(str, names)} - places.keys()):
        raise InputError(f"the label {unknown[0]!r} is none of the classes: add it to classes")
    return torch.tensor([places[str(name)] for name in names])


def _column(values: NDArray[Any]) -> Tensor:
    return as_tensor(values) if values.dtype.kind in "fiub" else numbered(values)[0]
