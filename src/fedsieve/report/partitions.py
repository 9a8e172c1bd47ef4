"""Who holds what: how many examples, and of which classes, every client has; plots for each distinct partition."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedsieve.report.configurations import Configuration, name_configurations
from fedsieve.report.plots import Axis, HeatMap, Plot, SizePlot
from fedsieve.runs.record import RunRecord

UNEVEN = 1.2
"""How many times the least a client's number of examples is where it is worth a plot."""


@dataclass(frozen=True)
class PartitionMaps:
    """A way to split a dataset: the configurations that it is of, empty for all, and plots for each of its seeds."""

    owners: str
    maps: list[tuple[list[Plot], str]]
    """Classes and sizes, as far as there is something to see, with the sentences below."""


def partition_maps(every: list[Configuration]) -> list[PartitionMaps]:
    """Return the maps of each way to split a dataset."""
    ways: dict[tuple[str, str], list[Configuration]] = {}
    for one in every:
        if any(run.counts is not None for run in one.runs):
            way = (_title(one.runs[0]), one.runs[0].settings.get("task.clients", ""))
            ways.setdefault(way, []).append(one)
    return [_maps_of(some, every) for some in ways.values()]


def _maps_of(some: list[Configuration], every: list[Configuration]) -> PartitionMaps:
    groups: dict[tuple[tuple[str, ...], bytes], list[RunRecord]] = {}
    for run in (run for one in some for run in one.runs):
        if run.counts is not None:
            groups.setdefault((tuple(run.classes), run.counts.tobytes()), []).append(run)
    owners = "" if len(some) == len(every) else name_configurations(some, every)
    return PartitionMaps(owners, [_map(group, len(groups) > 1) for group in groups.values()])


def _title(run: RunRecord) -> str:
    return ", ".join(filter(None, (run.settings.get(f"task.{key}", "") for key in ("dataset", "partition"))))


def _map(group: list[RunRecord], several: bool) -> tuple[list[Plot], str]:
    run = group[0]
    assert run.counts is not None
    title, caption, sizes = _title(run), _caption(run.counts, len(run.classes)), run.counts.sum(1)
    seeds = ", ".join(dict.fromkeys(run.settings.get("seed", "–") for run in group))
    title += f", seed {seeds}" if several else ""
    plots: list[Plot] = []
    if run.classes:
        counts, x = gather_columns(run.counts)
        plots.append(HeatMap(title, Axis(x), counts, run.classes, len(run.counts), f"{title}: {caption}"))
    if not run.classes or sizes.max() > UNEVEN * sizes.min():
        heights, x = (sizes, "client") if len(sizes) <= 200 else (np.sort(sizes)[::-1], "clients by size")
        plots.append(SizePlot(title, Axis(x), heights, f"{title}: {caption}" if not plots else f"{title}: sizes"))
    return plots, caption


def _caption(counts: NDArray[np.float64], classes: int) -> str:
    sizes, kinds = counts.sum(1), (counts > 0).sum(1)
    spread = f"{sizes.min():,.0f} to {sizes.max():,.0f} examples (median {np.median(sizes):,.0f})"
    clients = f"{len(counts):,} client{'s' * (len(counts) > 1)}"
    each = spread if sizes.min() < sizes.max() else f"{sizes[0]:,.0f} examples"
    if not classes:
        return f"{sizes.sum():,.0f} examples on {clients}. A client holds {each}."
    return (
        f"{sizes.sum():,.0f} examples of {counts.shape[1]} classes on {clients}. A client holds {each}, "
        f"of {kinds.mean():.1f} classes on average. A column is a client, a row a class; the stronger the colour, the "
        "more examples."
    )


def gather_columns(counts: NDArray[np.float64]) -> tuple[NDArray[np.float64], str]:
    """Return what the heat map shows: up to 200 clients as they are; more sorted by main class, up to 400 columns."""
    if len(counts) <= 200:
        return counts, "client"
    main, share = counts.argmax(1), counts.max(1) / np.maximum(counts.sum(1), 1)
    ordered, each = counts[np.lexsort((-share, main))], math.ceil(len(counts) / 400)
    columns = np.stack([ordered[i : i + each].mean(0) for i in range(0, len(counts), each)])
    return columns, "clients by main class" + (f", {each} to a column" if each > 1 else "")
