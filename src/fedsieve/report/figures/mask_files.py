"""The supports that ``--measure masks`` keeps in a run directory, read back: files of a stranger, checked as such.

``masks/000020.safetensors`` holds, for each layer, the flattened support of the aggregated top 10 % after round 20,
eight positions to a byte; its metadata say how many positions there are.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from fedsieve.data.storage import regular
from fedsieve.runs.record import RunRecord
from fedsieve.types import InputError

STRETCHES, LENGTH = 8, 18
"""A large layer is shown by so many stretches of so many neighbouring positions: 18 are two 3x3 kernels."""


def recorded_rounds(run: RunRecord) -> dict[int, Path]:
    """Return the files of a run's supports by round."""
    found = [path for path in (run.folder / "masks").glob("*.safetensors") if path.stem.isdecimal()]
    return {int(path.stem): path for path in sorted(found, key=lambda path: int(path.stem))}


def mask_sizes(path: Path) -> dict[str, int]:
    """Return how many positions each layer has, in the layers' order; InputError if the file is damaged."""
    try:
        with safe_open(regular(path), "np") as file:
            numel = json.loads((file.metadata() or {})["numel"])
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            packed = {name: part.get_shape() for name, part in slices.items() if part.get_dtype() == "U8"}
        if numel and all(type(n) is int and n > 0 and packed.get(name) == [(n + 7) // 8] for name, n in numel.items()):
            return dict(numel)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    raise InputError(f"{path} is damaged: restore the file, or remove it")


def sampled_positions(numel: int) -> NDArray[np.int64]:
    """Return the positions that stand for a layer: all of them, or stretches spread evenly from the first to the last.

    Single positions at equal distances would all be the same place of their kernels.
    """
    if numel <= STRETCHES * LENGTH:
        return np.arange(numel)
    starts = np.linspace(0, numel - LENGTH, STRETCHES).round().astype(np.int64)
    return (starts[:, None] + np.arange(LENGTH)).reshape(-1)


def masks_at(files: dict[int, Path], layer: str, numel: int) -> NDArray[np.bool_]:
    """Return what of a layer is present [shown positions, rounds]; InputError names a file that lacks the layer."""
    columns = []
    for path in files.values():
        if mask_sizes(path).get(layer) != numel:
            raise InputError(f"{path} does not hold {numel} positions of {layer} as the run's first does: remove it")
        with safe_open(regular(path), "np") as file:
            columns.append(np.unpackbits(file.get_tensor(layer), count=numel)[sampled_positions(numel)])
    return np.stack(columns, axis=1).astype(bool)
