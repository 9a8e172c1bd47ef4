"""A dataset: what it holds."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsieve.data.constructors import (
    class_names_of,
    parts_of,
    rows_of_arrays,
    rows_of_items,
    rows_of_splits,
    rows_of_tables,
)
from fedsieve.data.mapped import chunks
from fedsieve.data.storage import Arrays
from fedsieve.types import Data, InputError
from fedsieve.types.errors import package


@dataclass(frozen=True, eq=False)
class Dataset:
    """A task's data: training and test examples, class names, and who each training example belongs to.

    ``classes`` may also be their number: their names are then 0, 1 and so on; empty where targets are no classes.
    ``group`` int64 [len(train)] numbers the writer or speaker of every training example (None where there is no such
    thing); ``groups`` names them. ``version`` is which of several published ones it is, empty where there is but one.
    ``columns`` are further numbers of every training example [len(train)], by name: what partitions can go by.
    ``test_group`` int64 [len(test)] numbers whose each test example is, as ``group`` does (None where nobody's).
    """

    name: str
    train: Data
    test: Data
    classes: tuple[str, ...] = ()
    group: Tensor | None = None
    groups: tuple[str, ...] = ()
    version: str = ""
    columns: Mapping[str, Tensor] = field(default_factory=dict)
    test_group: Tensor | None = None

    def __post_init__(self) -> None:
        for part in ("train", "test"):
            if not isinstance(data := getattr(self, part), Data):
                raise InputError(f"dataset {self.name}: {part} must be fedsieve.Data(x, y), got {type_name(data)}")
        object.__setattr__(self, "classes", _class_names(self.name, self.classes))
        if self.group is not None:
            object.__setattr__(self, "group", self._column("group", self.group))
        if self.test_group is not None:
            object.__setattr__(self, "test_group", self._column("test_group", self.test_group, "test"))
        columns = {name: self._column(f"column {name}", column) for name, column in self.columns.items()}
        object.__setattr__(self, "columns", columns)

    def _column(self, what: str, values: Any, part: str = "training") -> Tensor:
        """Return a number for each training or test example as a tensor. Raises InputError."""
        n = len(self.test if part == "test" else self.train)
        try:
            column = torch.as_tensor(values)
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"dataset {self.name}: {what} must number the examples' owners ({error})") from None
        if column.shape != (n,):
            raise InputError(
                f"dataset {self.name}: {what} must number the owner of each of the {n} {part} examples, it has the "
                f"shape {list(column.shape)}"
            )
        return column

    def part(self, text: str) -> Dataset:
        """Return the k-th of n parts, ``text`` is ``k/n``: every n-th training example, or all of every n-th group's.

        Groups are numbered anew, their test examples go with them. Raises InputError.
        """
        k, n = parse_part(text)
        if n == 1:
            return self
        if self.group is None:
            keep = torch.arange(len(self.train)) % n == k - 1
            return self._of(keep, torch.ones(len(self.test), dtype=torch.bool))
        owners = self.test_group if self.test_group is not None else torch.full((len(self.test),), k - 1)
        own = self._of(self.group % n == k - 1, owners % n == k - 1)
        group, test_group = (None if v is None else v // n for v in (own.group, own.test_group))
        return replace(own, groups=self.groups[k - 1 :: n], group=group, test_group=test_group)

    def _of(self, train: Tensor, test: Tensor) -> Dataset:
        """Return the examples of two masks. Raises InputError if there are none."""
        if not train.any() or not test.any():
            raise InputError(f"dataset {self.name}: task.part has no examples: make it larger")
        columns = {name: column[train] for name, column in self.columns.items()}
        group = None if self.group is None else self.group[train]
        test_group = None if self.test_group is None else self.test_group[test]
        examples, tests = self.train.subset(train.nonzero()[:, 0]), self.test.subset(test.nonzero()[:, 0])
        return replace(self, train=examples, test=tests, columns=columns, group=group, test_group=test_group)

    @classmethod
    def from_numpy(
        cls, x: Any, y: Any, test: Any = 0.2, *, client: Any = None, name: str = "arrays", **options: Any
    ) -> Dataset:
        """Return the dataset of arrays: ``test`` is ``(x, y)``, or a share that is held out by chance.

        An array may be an ``np.memmap``, or the path of a ``.npy`` file or of a folder of them: those stay where they
        are, and batches are read. ``client`` [n] names the owners.

        ``options`` are those of all ``from_`` functions: ``classes``, the names of the classes or their number, empty
        where targets are none (None: what whole numbers and texts suggest); ``seed``, which a share for ``test`` is
        drawn by; ``mean`` and ``std``, what inputs are normalised by.
        """
        tests = test if isinstance(test, int | float) else rows_of_arrays(*_pair(test))
        return cls(name, **parts_of(rows_of_arrays(x, y, client), tests, **options)._asdict())

    @classmethod
    def from_torch(
        cls,
        train: Any,
        test: Any = 0.2,
        *,
        y: int | str | None = None,
        client: Any = None,
        name: str = "torch",
        **options: Any,
    ) -> Dataset:
        """Return the dataset of map-style datasets of PyTorch, each item of which is read once, transforms included.

        An item is ``(x, y)``, more inputs before the target, or a dictionary: ``y`` and ``client`` are places or names
        in it, ``client`` may also list the owners [n]. ``test`` is another dataset, or a share.
        """
        place = client if isinstance(client, int | str) else None
        tests = test if isinstance(test, float) else rows_of_items(test, y, place)
        options.setdefault("classes", class_names_of(train))
        return cls(name, **parts_of(rows_of_items(train, y, client), tests, **options)._asdict())

    @classmethod
    def from_csv(
        cls,
        train: str | Path,
        test: str | Path | float = 0.2,
        *,
        y: str | Sequence[str],
        x: Sequence[str] | None = None,
        categorical: Collection[str] = (),
        client: str | None = None,
        standardize: bool = False,
        delimiter: str = ",",
        name: str = "",
        **options: Any,
    ) -> Dataset:
        """Return the dataset of a table of comma-separated values with named columns.

        ``y`` is the target's column, ``x`` those of the inputs (None: all others), those that are ``categorical``
        become zeros and a one, ``client`` the owners'. ``standardize`` gives inputs mean 0 and standard deviation 1
        over the training examples. ``test`` is another file, or a share.
        """
        paths = [train] if isinstance(test, int | float) else [train, test]
        rows = rows_of_tables(paths, x, y, categorical, client, delimiter)
        parts = parts_of(rows[0], rows[1] if len(rows) > 1 else float(test), **options)  # type: ignore[arg-type]
        dataset = cls(name or Path(train).stem, **parts._asdict())
        return _standardized(dataset) if standardize else dataset

    @classmethod
    def from_folder(
        cls,
        train: str | Path,
        test: str | Path | float | None = None,
        *,
        size: tuple[int, int] | None = None,
        mode: str | None = None,
        client: Callable[[Path], object] | None = None,
        name: str = "",
        **options: Any,
    ) -> Dataset:
        """Return the dataset of images in folders named after their classes.

        ``train`` may hold the folders ``train`` and ``test``; else ``test`` is another folder, or a share (None: .2).
        ``size`` (height, width) resizes, ``mode`` is L or RGB, and ``client`` says of a file's path whose it is.
        """
        from fedsieve.data.constructors.images import rows_of_folders

        place = Path(train).expanduser()
        inner = [place / part for part in ("train", "test")]
        if test is None:
            test = inner[1] if all(map(Path.is_dir, inner)) else 0.2
        folders = [inner[0] if inner[0].is_dir() else place]
        folders += [] if isinstance(test, int | float) else [Path(test).expanduser()]
        rows = rows_of_folders(folders, size, mode, client)
        tests = rows[1] if len(rows) > 1 else float(test)  # type: ignore[arg-type]
        return cls(name or place.name, **parts_of(rows[0], tests, **options)._asdict())

    @classmethod
    def from_hf(
        cls,
        data: Any,
        test: Any = None,
        *,
        x: str | Sequence[str],
        y: str | Sequence[str],
        client: str | None = None,
        name: str = "",
        **options: Any,
    ) -> Dataset:
        """Return the dataset of a ``datasets.Dataset``, a ``DatasetDict``, or the name of one on the Hugging Face hub.

        ``x``, ``y`` and ``client`` name columns. Of several splits ``train`` and ``test`` are taken; else ``test`` is
        another ``datasets.Dataset``, the name of a split, or a share (None: .2).
        """
        if isinstance(data, str):
            name, data = name or data.rpartition("/")[2], download(data)
        train, tests = _splits(data, test)
        whole = isinstance(tests, int | float)
        rows, names = rows_of_splits([train] if whole else [train, tests], x, y, client)
        options.setdefault("classes", names)
        return cls(name or "splits", **parts_of(rows[0], tests if whole else rows[1], **options)._asdict())

    @property
    def labels(self) -> Tensor | None:
        """The class of every training example, int64 [n]; None where targets are no class labels."""
        y = self.train.y
        if not self.classes or not isinstance(y, Tensor) or y.dim() != 1 or y.is_floating_point():
            return None
        return None if y.dtype == torch.bool else y

    @cached_property
    def digest(self) -> str:
        """A hash of all that it holds."""
        digest = hashlib.sha256(repr((self.name, self.classes, self.groups)).encode())
        for data in (self.train, self.test):
            digest.update(repr(data.form).encode())
        digest.update(repr([*self.columns]).encode() if self.columns else b"")
        owners = [column for column in (self.group, *self.columns.values(), self.test_group) if column is not None]
        for part in filter(Tensor.numel, (*self.train.tensors, *self.test.tensors, *owners)):
            for rows in chunks(part):
                digest.update(rows.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def empty(self) -> Dataset:
        """Return it without its examples, and with its digest: what a process needs that has them otherwise."""
        digest, none = self.digest, torch.arange(0)
        bare = replace(
            self, train=self.train.subset(none), test=self.test.subset(none), group=None, columns={}, test_group=None
        )
        vars(bare)["digest"] = digest
        return bare


def parse_part(text: str) -> tuple[int, int]:
    """Return k and n of ``k/n``; 1 and 1 of the empty text. Raises InputError."""
    k, slash, n = (text or "1/1").partition("/")
    if not (slash and k.isdecimal() and n.isdecimal() and 1 <= int(k) <= int(n)):
        raise InputError(f"task.part must be k/n, such as 1/2, with k from 1 to n, got {text!r}")
    return int(k), int(n)


def _pair(test: Any) -> tuple[Any, Any]:
    if not isinstance(test, tuple | list) or len(test) != 2:
        raise InputError(f"test must be test examples, (x, y), or a share of all between 0 and 1: {type_name(test)}")
    x, y = test
    return x, y


def _splits(data: Any, test: Any) -> tuple[Any, Any]:
    """Return the training split, and the test split or the share to be held out. Raises InputError."""
    if not isinstance(data, Mapping):
        return data, 0.2 if test is None else test
    if "train" not in data:
        raise InputError(f"there is no split train, but {', '.join(data)}: give the two, from_hf(d[...], d[...], ...)")
    test = ("test" if "test" in data else 0.2) if test is None else test
    if isinstance(test, str) and test not in data:
        raise InputError(f"there is no split {test!r}: there are {', '.join(data)}")
    return data["train"], data[test] if isinstance(test, str) else test


def _standardized(dataset: Dataset) -> Dataset:
    """Return a dataset whose inputs [n, d] have mean 0 and standard deviation 1 in training; what is constant is 0."""
    x = dataset.train.x.double()  # type: ignore[union-attr]
    std = x.std(0, correction=0)
    scale: dict[str, Any] = {"mean": x.mean(0).tolist(), "std": torch.where(std > 0, std, 1.0).tolist()}
    return replace(dataset, train=replace(dataset.train, **scale), test=replace(dataset.test, **scale))


def download(repository: str) -> Any:
    """Return the splits that the package ``datasets`` loads from the hub. Raises InputError in one line."""
    try:
        return package("datasets", "hub").load_dataset(repository)
    except InputError:
        raise
    except Exception as error:  # offline, the library raises what its client does
        line = " ".join(str(error).split())
        raise InputError(
            f"{repository} cannot be read from the hub ({line}): check the name and the connection"
        ) from None


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
    owners = torch.from_numpy(arrays["test_group"].astype(np.int64)) if "test_group" in arrays else None
    return Dataset(name, data("train"), data("test"), classes, group, groups, test_group=owners)
