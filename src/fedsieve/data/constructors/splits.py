"""Datasets of the Hugging Face library, by the names of their columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsieve.data.constructors.rows import Rows, as_tensor, with_owner
from fedsieve.types import InputError


def rows_of_splits(
    splits: Sequence[Any], x: str | Sequence[str], y: str | Sequence[str], client: str | None = None
) -> tuple[list[Rows], tuple[str, ...] | None]:
    """Return the examples of each split, a ``datasets.Dataset``, and the names of the classes, None without any.

    ``x`` and ``y`` name columns, several give several inputs by name; images become uint8 [n, channels, height, width].
    Other columns of whole numbers stay, to partition by.
    Raises InputError.
    """
    several = [_rows(split, x, y, client) for split in splits]
    feature = splits[0].features[y] if isinstance(y, str) else None
    names = getattr(feature, "names", None)
    return several, tuple(map(str, names)) if names else None


def _rows(split: Any, x: str | Sequence[str], y: str | Sequence[str], client: str | None) -> Rows:
    if not hasattr(split, "column_names") or not hasattr(split, "__len__"):
        raise InputError(f"{type(split).__name__} cannot be read as a whole: give a datasets.Dataset, not streamed")
    named = [*([x] if isinstance(x, str) else x), *([y] if isinstance(y, str) else y), *([client] if client else [])]
    for name in named:
        if name not in split.column_names:
            raise InputError(f"the dataset has no column {name!r}: it has {', '.join(split.column_names)}")
    inputs = _inputs(split, x) if isinstance(x, str) else {name: _inputs(split, name) for name in x}
    whole = [name for name in split.column_names if _is_whole(split.features[name]) and name not in named]
    columns = {name: _column(split, name) for name in whole}
    if isinstance(y, str):
        labels = _column(split, y)
        columns |= {y: labels} if labels.ndim == 1 else {}
        rows = Rows(inputs, labels if labels.dtype.kind in "US" else as_tensor(labels), columns=columns)
    else:
        rows = Rows(inputs, {name: as_tensor(_column(split, name)) for name in y}, columns=columns)
    return with_owner(rows, client, _column(split, client)) if client else rows


def _is_whole(feature: Any) -> bool:
    """Tell whether a column holds whole numbers, such as one may partition by."""
    return str(getattr(feature, "dtype", "")).startswith(("int", "uint", "bool"))


def _inputs(split: Any, name: str) -> Tensor:
    array = _column(split, name)
    if array.dtype.kind in "US":
        raise InputError(f"column {name!r} holds texts: make numbers of them first, by the dataset's map")
    if type(split.features[name]).__name__ == "Image":
        array = array[:, None] if array.ndim == 3 else array.transpose(0, 3, 1, 2)
    return torch.from_numpy(np.ascontiguousarray(array)) if array.dtype == np.uint8 else as_tensor(array)


def _column(split: Any, name: str) -> NDArray[Any]:
    """Return a column as an array. Raises InputError unless its values are alike."""
    array = np.asarray(split.select_columns([name]).with_format("numpy")[:][name])
    if array.dtype.kind == "O":
        raise InputError(f"column {name!r} holds values of several shapes: pad or resize them by the dataset's map")
    return array
