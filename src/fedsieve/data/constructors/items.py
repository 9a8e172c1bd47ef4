"""Map-style datasets of PyTorch: items of inputs and target become tensors, each item read once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from fedsieve.data.constructors.rows import Rows, with_owner
from fedsieve.types import InputError

TARGETS = ("label", "labels", "target", "targets", "y")
"""What the target is called in items with names, where nobody says."""

Key: TypeAlias = int | str
Leaves: TypeAlias = dict[tuple[Key, ...], Tensor | str]


def rows_of_items(dataset: Any, y: Key | None = None, client: Any = None) -> Rows:
    """Return the examples of a dataset with ``len`` and ``[i]``: tuples or dictionaries of inputs, target, and more.

    ``y`` is the target's place or name in an item; None: the last, or the first of ``TARGETS`` that there is.
    ``client`` is the owner's, or the owners of all items. What is left are the inputs. Tensors, arrays, numbers and
    images (as uint8 [channels, height, width]) will do, alike in all items; a part may itself be a tuple or dictionary
    of such. Raises InputError.
    """
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise InputError(f"{type(dataset).__name__} has no length or no items by number: make a list of its items")
    columns = _stacked(dataset)
    keys = [*dict.fromkeys(path[0] for path in columns)]
    owner = [_place(client, keys, "client")] if isinstance(client, int | str) else []
    target = _place(y, [key for key in keys if key not in owner], "y")
    inputs = [key for key in keys if key != target and key not in owner]
    if not inputs:
        raise InputError(f"an item holds a target and no input: give (x, y), it has {', '.join(map(repr, keys))}")
    rows = Rows(_joined(columns, inputs, "inputs"), _joined(columns, [target], "targets"))
    if client is None:
        return rows
    return with_owner(rows, "client", np.asarray(_joined(columns, owner, "client")) if owner else client)


def class_names_of(dataset: Any) -> tuple[str, ...] | None:
    """Return the names of classes that a dataset, or the one it is a part of, has as torchvision's do; None: none."""
    while not hasattr(dataset, "classes") and hasattr(dataset, "dataset"):
        dataset = dataset.dataset
    classes = getattr(dataset, "classes", None)
    return tuple(map(str, classes)) if isinstance(classes, list | tuple) and classes else None


def _place(key: Key | None, keys: list[Key], what: str) -> Any:
    """Return which part of an item is meant. Raises InputError."""
    named = isinstance(keys[0], str)
    if key is None:
        key = next((name for name in TARGETS if name in keys), None) if named else keys[-1]
    if isinstance(key, int) and not named and key < 0:
        key += keys[-1] + 1  # type: ignore[operator]
    if key not in keys:
        raise InputError(f"{what} must be a part of an item, one of {', '.join(map(repr, keys))}: got {key!r}")
    return key


def _stacked(dataset: Any) -> dict[tuple[Key, ...], Tensor | list[str]]:
    """Return what items hold by its place in them, each stacked [n, ...]. Raises InputError unless they are alike."""
    out: dict[tuple[Key, ...], Any] = {}
    n = len(dataset)
    if not n:
        raise InputError("the dataset has no item")
    for i in range(n):
        try:
            item = _leaves(dataset[i])
        except InputError as error:
            raise InputError(f"item {i} of the dataset: {error}") from None
        except Exception as error:
            line = " ".join(str(error).split()) or type(error).__name__
            raise InputError(f"item {i} of the dataset cannot be read ({line}): mend the dataset") from error
        if not i:
            out = {k: [] if isinstance(v, str) else torch.empty((n, *v.shape), dtype=v.dtype) for k, v in item.items()}
        if item.keys() != out.keys():
            raise InputError(f"item {i} of the dataset has other parts than the first: give all the same")
        for key, value in item.items():
            column = out[key]
            if isinstance(value, str) and isinstance(column, list):
                column.append(value)
            elif isinstance(value, Tensor) and isinstance(column, Tensor) and value.shape == column.shape[1:]:
                if value.dtype != column.dtype:
                    column = out[key] = column.to(torch.promote_types(value.dtype, column.dtype))
                column[i] = value
            else:
                raise InputError(_unlike(i, value, column))
    return out


def _unlike(i: int, value: Tensor | str, column: Tensor | list[str]) -> str:
    now = f"the shape {list(value.shape)}" if isinstance(value, Tensor) else "a text"
    first = f"the shape {list(column.shape[1:])}" if isinstance(column, Tensor) else "a text"
    return f"item {i} of the dataset has {now}, the first {first}: crop, pad or resize in the dataset's transform"


def _leaves(item: Any, path: tuple[Key, ...] = ()) -> Leaves:
    """Return the tensors and texts of an item by their places. Raises InputError."""
    if isinstance(item, Mapping):
        parts = {(*path, str(key)): value for key, value in item.items()}
    elif isinstance(item, tuple) or (isinstance(item, list) and not path):
        parts = {(*path, i): value for i, value in enumerate(item)}
    elif not path:
        raise InputError(f"it is {type(item).__name__}, where (x, y) or a dictionary is needed")
    else:
        return {path: _leaf(item)}
    if len(path) > 1:
        raise InputError("inputs and targets may be tuples or dictionaries of tensors, but not of such again")
    return {place: leaf for key, value in parts.items() for place, leaf in _leaves(value, key).items()}


def _leaf(value: Any) -> Tensor | str:
    if isinstance(value, str):
        return value
    if isinstance(value, Tensor):
        return value.detach().cpu()
    array = np.asarray(value)
    if hasattr(value, "getbands"):  # an image of Pillow's
        array = np.asarray(value.convert("L")) if value.mode == "1" else array
        array = array[None] if array.ndim == 2 else array.transpose(2, 0, 1)
    if array.dtype.kind not in "fiub":
        raise InputError(f"{type(value).__name__} is no tensor, array, number or image: give one, by a transform")
    tensor = torch.as_tensor(array.copy())
    return tensor.float() if tensor.dtype == torch.float64 else tensor


def _joined(columns: dict[tuple[Key, ...], Any], keys: list[Key], what: str) -> Any:
    """Return some parts of the items as examples: one tensor, a tuple of several, or several by name."""
    chosen = {path: columns[path] for path in columns if path[0] in keys}
    depths = {len(path) for path in chosen}
    if depths == {1} and len(keys) == 1:
        column = chosen[(keys[0],)]
        if isinstance(column, list) and what == "inputs":
            raise InputError("an input is a text: make numbers of it, by a transform")
        return np.array(column) if isinstance(column, list) else column
    if len(keys) > 1 and depths != {1}:
        raise InputError(f"{what} are several of which one is several: give one dictionary of tensors")
    if any(isinstance(column, list) for column in chosen.values()):
        raise InputError(f"one of the {what} is a text: make numbers of it, by a transform")
    if isinstance(next(iter(chosen))[-1], str):
        return {str(path[-1]): column for path, column in chosen.items()}
    return tuple(chosen.values())
