"""The papers' figures: which runs make which lines of which panel. Each takes runs and returns a Picture."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from fedsieve.report.configurations import Runs, Without, kind, nothing, seeds
from fedsieve.report.figures import positions
from fedsieve.report.figures.data import (
    LackingError,
    Map,
    Panel,
    Picture,
    Points,
    aims,
    averaged,
    density,
    field,
    labelled,
    level,
    looks,
    over_bytes,
    over_rounds,
    series,
    share,
    swept,
)
from fedsieve.report.style import Axis, Bits, Line
from fedsieve.runs.record import RunRecord, numeric

ROUND, REACHED = Axis("round", whole=True), Axis("accuracy, %", percent=True)
MISMATCH, NONZERO = Axis("mask mismatch, %", percent=True, zero=True), Axis("non-zero, %", percent=True, zero=True)
SETTINGS = ("centralised", "FL, IID", "FL, non-IID")
MOST_IID = 100
"""From this alpha on, an LDA partition counts as IID: the papers' IID is 1000."""
UNTESTED = "no run given has a tested round yet: let one go on, or name others"
MEASURE = "run with --measure masks"
ZEROFL = "fedsieve.methods.zerofl:ZeroFL"
SPREAD = " Bands and bars: the standard deviation over seeds."
HOLLOW = " Hollow: a run that is not finished."
MEASURED = " A density is what the method aims at; where it declares none, what was measured."


def zerofl_1(runs: Runs) -> Picture:
    """Accuracy over rounds by sparsity: centralised, federated IID, federated non-IID."""
    parts = [(title, [run for run in runs if _setting(run) == title], "accuracy", REACHED) for title in SETTINGS]
    panels = _by_round(parts, _sparsity)
    _need(panels, UNTESTED)
    caption = "Accuracy over rounds, by sparsity."
    return _noted(Picture("zerofl-1", "ZeroFL, Fig. 1: accuracy by sparsity", caption, panels))


def zerofl_2(runs: Runs, layers: Sequence[str] = ()) -> Picture:
    """Non-zero ratio of every layer of the server's model over rounds, a panel for each run."""
    for run in runs:
        _need(_layers(run), f"{run.folder} did not measure its layers: {MEASURE}, or leave it out")
    names = _chosen(list(dict.fromkeys(name for run in runs for name in _layers(run))), layers, 0)
    panels = tuple(
        Panel(title, ROUND, NONZERO, _drawn({_short(n): _measured(group, n, i) for i, n in enumerate(names)}))
        for title, group in series(runs, kind).items()
    )
    caption = "Share of non-zero weights in each layer of the server's model after aggregation."
    return _noted(Picture("zerofl-2", "ZeroFL, Fig. 2: non-zero weights after aggregation", caption, panels))


def zerofl_3(runs: Runs, layers: Sequence[str] = ()) -> Picture:
    """Where each layer's aggregated top 10 % lie, over the recorded rounds: a panel for each layer of each run."""
    maps: list[Map] = []
    alone = [group[0] for group in seeds(runs) if len(group) == 1]
    names = labelled(
        [[run] for run in runs],
        lambda run: kind(run) if any(run is one for one in alone) else f"{kind(run)}, {_seed(run)}",
    )
    for label, (run,) in names.items():
        files = positions.recorded_rounds(run)
        _need(files, f"{run.folder} holds no masks: {MEASURE}, or leave it out")
        numels = positions.sizes(next(iter(files.values())))
        for layer in _chosen(list(numels), layers, max(1, min(6, 24 // len(names)))):
            maps.append(Map(_title(layer, label, len(names)), _bits(files, layer, numels[layer])))
    caption = (
        "Positions of each layer's aggregated top 10 % of weights, flattened; a mark: present. "
        f"Of a large layer, {positions.STRETCHES} stretches of {positions.LENGTH} neighbours, evenly spread."
    )
    columns = min(3, math.ceil(len(maps) / len(names)))
    return Picture("zerofl-3", "ZeroFL, Fig. 3: where the top weights lie", caption, maps=tuple(maps), columns=columns)


def zerofl_4(runs: Runs) -> Picture:
    """Accuracy over r_mask, a line for each way to upload."""
    _need([run for run in runs if _r_mask([run]) is not None], "no run given has an r_mask: name runs of zerofl")
    panel = Panel("", Axis("r_mask"), REACHED, _swept(runs, _r_mask, _upload, _but_r_mask))
    caption = "Accuracy at the end over the share of further weights that travel."
    return _noted(Picture("zerofl-4", "ZeroFL, Fig. 4: accuracy by r_mask", caption, (panel,)))


def flash_1(runs: Runs) -> Picture:
    """Accuracy over all bytes sent, a line for each run; and at the end over density, a line for each method."""
    every = series(runs, lambda run: f"{kind(run)}, {_density(run)}" if (run.target or 1) < 1 else kind(run))
    places = looks(every)
    sent = {label: averaged(map(over_bytes, group), places[label]) for label, group in every.items()}
    kept = [value for group in every.values() if (value := _sparse(group))]
    seen = [replace(run, look=places[label], label=label) for label, group in every.items() for run in group]
    swept = _swept(seen, _sparse, kind, aims(runs)) if kept else {}
    panels = [
        Panel("accuracy by bytes", Axis("sent up and down, MB", log=True), REACHED, _drawn(sent)),
        Panel("accuracy by density", Axis("density", log=bool(kept) and max(kept) > 4 * min(kept)), REACHED, swept),
    ]
    panels = [panel for panel in panels if panel.lines]
    _need(panels, UNTESTED)
    caption = "Accuracy over the bytes of all clients so far, and at the end over density."
    title = "FLASH, Fig. 1: accuracy by bytes and by density"
    return _noted(Picture("flash-1", title, caption + _measured_some(runs), _lettered(panels), apart=True))


def flash_2(runs: Runs) -> Picture:
    """Accuracy and mask mismatch over rounds by density, centralised and federated."""
    where = {"centralised": [run for run in runs if _setting(run) == SETTINGS[0]]}
    where["FL"] = [run for run in runs if _setting(run) != SETTINGS[0]]
    measures = (("accuracy", REACHED), ("mismatch", MISMATCH))
    parts = [(title, group, name, axis) for name, axis in measures for title, group in where.items()]
    panels = _by_round(parts, _density)
    _need(
        [panel for panel in panels if panel.y is MISMATCH], f"no run given measured its masks in two rounds: {MEASURE}"
    )
    caption = "Accuracy, and the Jaccard distance of the server's mask to that of the round before, by density d."
    title = "FLASH, Fig. 2: accuracy and mask mismatch"
    return _noted(Picture("flash-2", title, caption, _lettered(panels), columns=2))


def sparsefedpp_1(runs: Runs) -> Picture:
    """Accuracy at the end over sparsity, a line for each method."""
    parts = (part for group in series(runs, kind, aims(runs)).values() for part in seeds(group))  # as ``_swept`` does
    known = sorted({x for part in parts if (x := _cut(part)) is not None})
    _need(known, "no run given has a sparsity: name runs of a sparse method")
    lines = _swept(runs, _cut, kind, aims(runs), steps={x: i for i, x in enumerate(known)})
    panel = Panel("", Axis("sparsity", steps=tuple(f"{x:g}" for x in known)), REACHED, lines)
    caption = "Accuracy at the end over sparsity, a line for each method." + _measured_some(runs)
    return _noted(Picture("sparsefedpp-1", "SparseFedPP, Fig. 1: accuracy by sparsity", caption, (panel,)))


def _setting(run: RunRecord) -> str:
    """Return where a run belongs: one client is centralised; LDA of a large alpha is IID."""
    if field(run, "task.clients") == 1:
        return SETTINGS[0]
    how, _, alpha = run.settings.get("task.partition", "").partition(":")
    return SETTINGS[1 if how == "iid" or (how == "lda" and (numeric(alpha) or 0) >= MOST_IID) else 2]


def _sparsity(run: RunRecord) -> str:
    """Return what a method aims at, or its name where it does not say."""
    return kind(run) if run.target is None else "dense" if run.target == 1 else f"{100 * (1 - run.target):.4g} % sparse"


def _density(run: RunRecord) -> str:
    """Return what a method aims at, or its name where it does not say, or is dense."""
    return kind(run) if run.target is None else "dense" if run.target == 1 else f"d = {run.target:g}"


def _sparse(runs: Runs) -> float | None:
    """Return the density of a configuration that is not dense."""
    return d if (d := density(runs)) is not None and d < 1 else None


def _cut(runs: Runs) -> float | None:
    return None if (d := _sparse(runs)) is None else round(1 - d, 12)


def _rank(runs: Runs) -> float:
    return -(density(runs) or 0)


def _seed(run: RunRecord) -> str:
    return f"seed {run.settings.get('seed', 'unknown')}"


def _measured_some(runs: Runs) -> str:
    """Return the sentence that says so where a run's place is a measured density."""
    return MEASURED if any(run.target is None and _sparse([run]) for run in runs) else ""


def _upload(run: RunRecord) -> str:
    return run.settings.get("method.upload", "").replace("_", " ") if is_zerofl(run) else kind(run)


def is_zerofl(run: RunRecord) -> bool:
    """Tell whether a run's method is ZeroFL itself, whose r_mask and upload a figure shows."""
    return run.manifest.get("class") == ZEROFL


def _r_mask(runs: Runs) -> float | None:
    """Return ZeroFL's r_mask where it decides what is sent."""
    run = runs[0]
    there = is_zerofl(run) and run.settings.get("method.upload") != "full"
    return share(field(run, "method.r_mask")) if there else None


def _but_r_mask(run: RunRecord) -> tuple[str, ...]:
    return ("method.r_mask",) if is_zerofl(run) else ()


def _layers(run: RunRecord) -> list[str]:
    """Return the layers whose ratio a run measured."""
    held = (row["layers"] for row in run.rows if isinstance(row.get("layers"), dict))
    return list(dict.fromkeys(name for one in held for name, value in one.items() if share(value) is not None))


def _measured(group: Runs, layer: str, place: int) -> Line:
    """Return a layer's non-zero share, in percent, over rounds."""
    return averaged([_ratio(run, layer) for run in group], place)


def _ratio(run: RunRecord, layer: str) -> Points:
    held = ((row["round"], row["layers"].get(layer)) for row in run.rows if isinstance(row.get("layers"), dict))
    return {t: (t, 100 * known) for t, value in held if (known := share(value)) is not None}


def _bits(files: dict[int, Path], layer: str, numel: int) -> Bits:
    """Return the map of one layer; its axis says how many of the positions it shows."""
    at = positions.shown(numel)
    y = f"position (all {numel})" if len(at) == numel else f"position ({len(at)} of {_brief(numel)})"
    rows = tuple((i, _brief(int(at[i]))) for i in range(0, len(at), positions.LENGTH))
    return Bits(positions.present(files, layer, numel), tuple(str(t) for t in files), rows, "round", y)


def _title(layer: str, run: str, runs: int) -> str:
    return f"{_short(layer)} · {run}" if runs > 1 else _short(layer)


def _brief(position: int) -> str:
    """Return a number in a few letters."""
    if position < 10_000:
        return str(position)
    return f"{position / 1e6:.2f} M" if position >= 1e6 else f"{position / 1e3:.0f} k"


def _short(layer: str) -> str:
    return layer.removesuffix(".weight")


def _chosen(known: list[str], wanted: Sequence[str], most: int) -> list[str]:
    """Return the layers asked for, by their names with or without .weight; or all, or ``most`` chosen evenly."""
    unknown = [name for name in wanted if _short(name) not in map(_short, known)]
    _need(not unknown, f"unknown layer {', '.join(unknown)}; the layers are {', '.join(map(_short, known))}")
    if wanted or not most:
        return [name for name in known if not wanted or _short(name) in map(_short, wanted)]
    return [known[i] for i in dict.fromkeys(np.linspace(0, len(known) - 1, most).round().astype(int).tolist())]


def _by_round(parts: Sequence[tuple[str, Runs, str, Axis]], base: Callable[[RunRecord], str]) -> tuple[Panel, ...]:
    """Return panels of a measure over rounds, the denser lines first; the same label looks the same in all panels."""
    grouped = [series(runs, base) for _, runs, _, _ in parts]
    every = {label: group for groups in reversed(grouped) for label, group in groups.items()}
    places = looks(dict(sorted(every.items(), key=lambda item: _rank(item[1]))))
    panels = []
    for (title, _, name, axis), groups in zip(parts, grouped, strict=True):
        known = {label: groups[label] for label in places if label in groups}
        lines = {label: averaged([over_rounds(run, name) for run in known[label]], places[label]) for label in known}
        panels.append(Panel(title, ROUND, axis, _drawn(lines)))
    return tuple(panel for panel in panels if panel.lines)


def _swept(
    runs: Runs,
    at: Callable[[Runs], float | None],
    base: Callable[[RunRecord], str],
    without: Without = nothing,
    *,
    steps: dict[float, int] | None = None,
) -> dict[str, Line]:
    """Return the accuracy at the end over a setting, with level lines for those that do not have it.

    ``at`` is the value of runs that differ in their seed alone, ``steps`` the places of values on an axis of names.
    """
    groups = series(runs, base, without)
    places = looks(groups)
    lines = {name: swept(group, at, places[name], steps) for name, group in groups.items()}
    xs = [x for line in lines.values() for x in line.x]
    _need(xs, UNTESTED)
    ends = (min(xs), max(xs)) if min(xs) < max(xs) else (xs[0] - (0.1 * xs[0] or 0.1), xs[0] + (0.1 * xs[0] or 0.1))
    flat = {name: group for name, group in groups.items() if all(at(runs) is None for runs in seeds(group))}
    return _drawn(lines | {name: level(group, places[name], ends) for name, group in flat.items()})


def _drawn(lines: Mapping[str, Line]) -> dict[str, Line]:
    return {label: line for label, line in lines.items() if line.x}


def _lettered(panels: Sequence[Panel]) -> tuple[Panel, ...]:
    if len(panels) == 1:
        return tuple(panels)
    return tuple(replace(one, title=f"({letter}) {one.title}") for letter, one in zip("abcd", panels, strict=False))


def _noted(picture: Picture) -> Picture:
    """Return the picture, its caption saying what else it shows."""
    lines = [line for panel in picture.panels for line in panel.lines.values()]
    spread, hollow = any(any(line.spread) for line in lines), any(any(line.hollow) for line in lines)
    return replace(picture, caption=picture.caption + SPREAD * spread + HOLLOW * hollow)


def _need(there: object, lacking: str) -> None:
    if not there:
        raise LackingError(lacking)
