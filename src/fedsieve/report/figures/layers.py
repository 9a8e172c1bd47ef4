"""The papers' figures of single layers, and the supports that ``--measure masks`` keeps in a run directory, read back.

They are files of a stranger, checked as such: ``masks/000020.safetensors`` holds, for each layer, the flattened support
of the aggregated top 10 % after round 20, eight positions to a byte; its metadata say how many positions there are.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from fedsieve.data.storage import regular
from fedsieve.report.configurations import Runs, group_by_seed, method_name
from fedsieve.report.plots import ROUND, Axis, LinePlot, MaskPlot
from fedsieve.report.series import (
    PaperFigure,
    Points,
    as_share,
    label_groups,
    labelled_series,
    mean_line,
    non_empty,
    require,
)
from fedsieve.runs.record import RunRecord
from fedsieve.types import InputError

NONZERO = Axis("non-zero, %", percent=True, zero=True)
MEASURE = "run with --measure masks"
STRETCHES, LENGTH = 8, 18
"""A large layer is shown by so many stretches of so many neighbouring positions: 18 are two 3x3 kernels."""


def zerofl_2(runs: Runs, layers: Sequence[str] = ()) -> PaperFigure:
    """Non-zero ratio of every layer of the server's model over rounds, a panel for each run."""
    for run in runs:
        require(_measured_layers(run), f"{run.folder} did not measure its layers: {MEASURE}, or leave it out")
    names = _choose_layers(list(dict.fromkeys(name for run in runs for name in _measured_layers(run))), layers, 0)
    panels = []
    for title, group in labelled_series(runs, method_name).items():
        lines = {_short(n): mean_line([_nonzero_by_round(run, n) for run in group], i) for i, n in enumerate(names)}
        panels.append(LinePlot(title, ROUND, NONZERO, non_empty(lines)))
    caption = "Share of non-zero weights in each layer of the server's model after aggregation."
    return PaperFigure("zerofl-2", "ZeroFL, Fig. 2: non-zero weights after aggregation", caption, tuple(panels))


def zerofl_3(runs: Runs, layers: Sequence[str] = ()) -> PaperFigure:
    """Where each layer's aggregated top 10 % lie, over the recorded rounds: a panel for each layer of each run."""
    maps: list[MaskPlot] = []
    alone = [group[0] for group in group_by_seed(runs) if len(group) == 1]

    def name(run: RunRecord) -> str:
        seed = "" if any(run is one for one in alone) else f", seed {run.settings.get('seed', 'unknown')}"
        return method_name(run) + seed

    names = label_groups([[run] for run in runs], name)
    for label, (run,) in names.items():
        files = recorded_rounds(run)
        remedy = "name the run's directory" if run.folder.is_file() else MEASURE
        require(files, f"{run.folder} holds no masks: {remedy}, or leave it out")
        numels = mask_sizes(next(iter(files.values())))
        for layer in _choose_layers(list(numels), layers, max(1, min(6, 24 // len(names)))):
            title = f"{_short(layer)} · {label}" if len(names) > 1 else _short(layer)
            maps.append(_mask_plot(title, files, layer, numels[layer]))
    caption = (
        "Positions of each layer's aggregated top 10 % of weights, flattened; a mark: present. "
        f"Of a large layer, {STRETCHES} stretches of {LENGTH} neighbours, evenly spread."
    )
    columns = min(3, math.ceil(len(maps) / len(names)))
    return PaperFigure("zerofl-3", "ZeroFL, Fig. 3: where the top weights lie", caption, tuple(maps), columns=columns)


def _measured_layers(run: RunRecord) -> list[str]:
    """Return the layers whose ratio a run measured."""
    ratios = (row["layers"] for row in run.rows if isinstance(row.get("layers"), dict))
    return list(dict.fromkeys(name for one in ratios for name, value in one.items() if as_share(value) is not None))


def _nonzero_by_round(run: RunRecord, layer: str) -> Points:
    """Return a layer's non-zero share, in percent, by round."""
    ratios = ((row["round"], row["layers"].get(layer)) for row in run.rows if isinstance(row.get("layers"), dict))
    return {t: (t, 100 * share) for t, value in ratios if (share := as_share(value)) is not None}


def _mask_plot(title: str, files: dict[int, Path], layer: str, numel: int) -> MaskPlot:
    """Return the map of one layer; its axis says how many of the positions it shows."""
    at = sampled_positions(numel)
    y = f"position (all {numel})" if len(at) == numel else f"position ({len(at)} of {_short_number(numel)})"
    rows = tuple((i, _short_number(int(at[i]))) for i in range(0, len(at), LENGTH))
    present = masks_at(files, layer, numel)
    return MaskPlot(title, Axis("round"), Axis(y), present, tuple(map(str, files)), rows)


def _short_number(position: int) -> str:
    """Return a number in a few letters."""
    if position < 10_000:
        return str(position)
    return f"{position / 1e6:.2f} M" if position >= 1e6 else f"{position / 1e3:.0f} k"


def _short(layer: str) -> str:
    return layer.removesuffix(".weight")


def _choose_layers(known: list[str], names: Sequence[str], most: int) -> list[str]:
    """Return the layers of ``names``, with or without .weight; without any, all, or ``most`` chosen evenly."""
    unknown = [name for name in names if _short(name) not in map(_short, known)]
    require(not unknown, f"unknown layer {', '.join(unknown)}; the layers are {', '.join(map(_short, known))}")
    if names or not most:
        return [name for name in known if not names or _short(name) in map(_short, names)]
    return [known[i] for i in dict.fromkeys(np.linspace(0, len(known) - 1, most).round().astype(int).tolist())]


def recorded_rounds(run: RunRecord) -> dict[int, Path]:
    """Return the files of a run's supports by round."""
    paths = {int(p.stem): p for p in (run.folder / "masks").glob("*.safetensors") if p.stem.isdecimal()}
    return dict(sorted(paths.items()))


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
