"""Arrays in memory, or in files of NumPy that stay where they are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from fedsieve.data.constructors.rows import Rows, as_tensor, with_owner
from fedsieve.data.mapped import FileTensor
from fedsieve.types import Examples, InputError


def rows_of_arrays(x: Any, y: Any, client: Any = None) -> Rows:
    """Return examples of arrays, of ``np.memmap``, or of paths: of a ``.npy`` file, or of a folder of them.

    ``x`` and ``y`` may each be several, in a tuple or by name. Targets of one number each are read; the others, and the
    inputs, stay in their files. Raises InputError.
    """
    inputs, targets = _examples("x", x), _examples("y", y)
    if isinstance(targets, FileTensor) and targets.dim() == 1:
        targets = targets.read()
    if isinstance(targets, np.ndarray) and targets.ndim != 1:
        raise InputError(f"y must hold one name of a class for each example, got {list(targets.shape)}")
    rows = Rows(inputs, targets)  # type: ignore[arg-type]
    if client is None:
        return rows
    return with_owner(rows, "client", _path(client).numpy() if isinstance(client, str | Path) else client)


def _examples(name: str, values: Any) -> Examples | np.ndarray[Any, Any]:
    if isinstance(values, Mapping | tuple) and not values:
        raise InputError(f"{name} is empty: give an array, or several in a tuple or by name")
    if isinstance(values, Mapping):
        return {str(key): _array(f"{name}[{key!r}]", one) for key, one in values.items()}
    if isinstance(values, tuple):
        return tuple(_array(f"{name}[{i}]", one) for i, one in enumerate(values))
    names = np.asarray(values) if name == "y" and not isinstance(values, Tensor | str | Path) else None
    return names if names is not None and names.dtype.kind in "US" else _array(name, values)


def _array(name: str, values: Any) -> Tensor:
    if isinstance(values, Tensor):
        return values
    if isinstance(values, str | Path):
        return _path(values)
    if isinstance(values, np.memmap) and (mapped := FileTensor.of(values)) is not None:
        return mapped
    try:
        return as_tensor(values)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name}: {error}") from None


def _path(place: str | Path) -> FileTensor:
    path = Path(place).expanduser()
    files = sorted(path.glob("*.npy")) if path.is_dir() else [path]
    if not files:
        raise InputError(f"{path} holds no .npy file: name one, or a folder of them")
    return FileTensor.open(files)
