"""Partitioners of flwr-datasets: objects that cut a Hugging Face dataset, of which the indices are kept.

Such an object is known by what it does, ``load_partition``; neither flwr-datasets nor datasets is imported without it.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import dataclass
from io import StringIO
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsieve.data.dataset import Dataset
from fedsieve.types import InputError
from fedsieve.types.errors import package

INDEX = "fedsieve_index"
"""The column that says which training example a row is."""


@dataclass(frozen=True, eq=False)
class FlowerPartitioner:
    """A partitioner of flwr-datasets that no dataset has been assigned to yet, and its settings as a text.

    It sees the training examples as rows of the columns ``label`` (the class), ``group`` (the owner) and the dataset's
    ``columns``, as far as there are any; its own seed is the one that counts. Other processes are sent its text alone.
    """

    partitioner: Any
    text: str

    @classmethod
    def of(cls, partitioner: Any) -> FlowerPartitioner:
        """Return a user's partitioner, copied. Raises InputError if a dataset has been assigned to it already."""
        kind = type(partitioner).__name__
        if getattr(partitioner, "_dataset", None) is not None:
            raise InputError(f"partition {kind}: it has cut another dataset already: give a new one")
        settings = {name.lstrip("_"): _plain(value) for name, value in vars(partitioner).items()}
        arguments = ", ".join(
            f"{name}={value!r}" for name, value in settings.items() if value not in (None, [], {}, False)
        )
        try:
            return cls(copy.deepcopy(partitioner), f"{kind}({arguments})")
        except Exception as error:
            raise InputError(f"partition {kind}: it cannot be copied ({_line(error)})") from None

    def indices(self, dataset: Dataset, clients: int) -> list[Tensor]:
        """Return every client's training examples, int64. Raises InputError if it does not cut the examples so."""
        kind, columns = type(self.partitioner).__name__, _columns(dataset)
        by = getattr(self.partitioner, "_partition_by", None)
        if isinstance(by, str) and by not in columns:
            there = f"they are {', '.join(columns)}" if columns else "there are none"
            raise InputError(f"partition {kind}: {dataset.name} has no column {by!r} ({there}): name one")
        rows = package("datasets", "hub").Dataset.from_dict(
            {name: column.numpy() for name, column in columns.items()} | {INDEX: np.arange(len(dataset.train))}
        )
        partitioner, said = copy.deepcopy(self.partitioner), StringIO()
        try:
            with redirect_stderr(said):  # tqdm's
                partitioner.dataset = rows
                count = int(partitioner.num_partitions)
                parts = [partitioner.load_partition(k) for k in range(count if count == clients else 0)]
        except Exception as error:
            sys.stderr.write(said.getvalue())
            raise InputError(f"partition {kind}: {_line(error)}") from None
        if count != clients:
            raise InputError(f"partition {kind}: it makes {count} clients: set task.clients={count}, not {clients}")
        if any(INDEX not in part.column_names for part in parts):
            raise InputError(f"partition {kind}: it divides columns, not examples: take one that divides examples")
        return [torch.from_numpy(np.array(part[INDEX], dtype=np.int64)) for part in parts]

    def __getstate__(self) -> dict[str, Any]:
        return {"partitioner": None, "text": self.text}

    def __str__(self) -> str:
        """Return its kind and settings."""
        return self.text


def is_partitioner(thing: object) -> bool:
    """Tell whether an object is a partitioner of flwr-datasets, or works like one."""
    return not isinstance(thing, type) and callable(getattr(thing, "load_partition", None))


def _columns(dataset: Dataset) -> dict[str, Tensor]:
    """Return what a partitioner can go by: class, owner and further columns of the training examples."""
    columns = {"label": dataset.labels, "group": dataset.group, **dataset.columns}
    return {name: column for name, column in columns.items() if column is not None}


def _plain(value: Any) -> Any:
    """Return a setting as a text shows it; None of what is none."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, Callable):  # type: ignore[arg-type]
        return getattr(value, "__qualname__", type(value).__name__)
    whole = isinstance(value, str | int | float) or (
        isinstance(value, list | tuple) and all(isinstance(one, str | int | float) for one in value)
    )
    return value if whole else None


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
