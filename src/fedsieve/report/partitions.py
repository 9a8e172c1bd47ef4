"""Who holds what: how many examples of each class every client has, a map for each distinct partition."""

from __future__ import annotations

import math
from html import escape

import numpy as np
from numpy.typing import NDArray

from fedsieve.report.configurations import Configuration
from fedsieve.report.parts import folded, whose
from fedsieve.report.svg import heat
from fedsieve.runs.record import RunRecord


def partitions(every: list[Configuration]) -> str:
    """Return a map for each way to split a dataset; the maps of its further seeds are folded."""
    ways: dict[tuple[str, str], list[Configuration]] = {}
    for one in every:
        if any(run.counts is not None for run in one.runs):
            way = (_title(one.runs[0]), one.runs[0].settings.get("task.clients", ""))
            ways.setdefault(way, []).append(one)
    return "".join(_way(i, some, every) for i, some in enumerate(ways.values()))


def _way(place: int, some: list[Configuration], every: list[Configuration]) -> str:
    """Return the maps of one way to split, the first of them with the configurations that it is of."""
    groups: dict[tuple[tuple[str, ...], bytes], list[RunRecord]] = {}
    for run in (run for one in some for run in one.runs):
        if run.counts is not None:
            groups.setdefault((tuple(run.classes), run.counts.tobytes()), []).append(run)
    of = "" if len(some) == len(every) else f"<p>Of: {escape(whose(some, every))}</p>"
    several = len(groups) > 1
    first, *rest = (_map(f"map{place}-{i}", group, "" if i else of, several) for i, group in enumerate(groups.values()))
    return first + (folded("The clients of other seeds", "".join(rest), len(rest)) if rest else "")


def _title(run: RunRecord) -> str:
    return ", ".join(filter(None, (run.settings.get(f"task.{key}", "") for key in ("dataset", "partition"))))


def _map(name: str, group: list[RunRecord], of: str, several: bool) -> str:
    run = group[0]
    assert run.counts is not None
    title, says, (shown, x_name) = _title(run), _says(run.counts), _columns(run.counts)
    seeds = ", ".join(dict.fromkeys(run.settings.get("seed", "–") for run in group))
    title += f", seed {seeds}" if several else ""
    drawn = heat(name, run.classes, shown, len(run.counts), x_name, f"{title}: {says}")
    caption = f"<figcaption><p>{says}</p>{of}</figcaption>"
    return f"<figure class=map><div><h3>{escape(title)}</h3>{drawn}</div>{caption}</figure>\n"


def _says(counts: NDArray[np.float64]) -> str:
    sizes, kinds = counts.sum(1), (counts > 0).sum(1)
    spread = f"{sizes.min():,.0f} to {sizes.max():,.0f} examples (median {np.median(sizes):,.0f})"
    clients = f"{len(counts):,} client{'s' * (len(counts) > 1)}"
    held = spread if sizes.min() < sizes.max() else f"{sizes[0]:,.0f} examples"
    return (
        f"{sizes.sum():,.0f} examples of {counts.shape[1]} classes on {clients}. A client holds {held}, "
        f"of {kinds.mean():.1f} classes on average. A column is a client, a row a class; the stronger the colour, the "
        "more examples."
    )


def _columns(counts: NDArray[np.float64]) -> tuple[NDArray[np.float64], str]:
    """Return what the heat map shows: up to 200 clients as they are; more sorted by main class, up to 400 columns."""
    if len(counts) <= 200:
        return counts, "client"
    main, share = counts.argmax(1), counts.max(1) / np.maximum(counts.sum(1), 1)
    ordered, each = counts[np.lexsort((-share, main))], math.ceil(len(counts) / 400)
    binned = np.stack([ordered[i : i + each].mean(0) for i in range(0, len(counts), each)])
    return binned, "clients by main class" + (f", {each} to a column" if each > 1 else "")
