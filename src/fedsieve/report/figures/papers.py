"""The papers' figures: which runs make which lines of which panel. Each takes runs and returns a PaperFigure."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from fedsieve.report.configurations import Runs, Without, group_by_seed, method_name, no_settings
from fedsieve.report.figures import mask_files
from fedsieve.report.figures.series import (
    LackingError,
    Name,
    PaperFigure,
    Points,
    Position,
    accuracy_by_bytes,
    accuracy_line,
    as_share,
    assign_looks,
    density_of,
    label_groups,
    labelled_series,
    level_line,
    mean_line,
    numeric_setting,
    percent_by_round,
    target_settings,
)
from fedsieve.report.plots import Axis, Line, LinePlot, MaskPlot
from fedsieve.runs.record import RunRecord, numeric

ROUND, ACCURACY = Axis("round", whole=True), Axis("accuracy, %", percent=True)
MISMATCH, NONZERO = Axis("mask mismatch, %", percent=True, zero=True), Axis("non-zero, %", percent=True, zero=True)
SETTINGS = ("centralised", "FL, IID", "FL, non-IID")
IID_ALPHA = 100
"""From this alpha on, an LDA partition counts as IID: the papers' IID is 1000."""
UNTESTED = "no run given has a tested round yet: let one go on, or name others"
MEASURE = "run with --measure masks"
ZEROFL = "fedsieve.methods.zerofl:ZeroFL"
MEASURED = " A density is what the method aims at; where it declares none, what was measured."


def zerofl_1(runs: Runs) -> PaperFigure:
    """Accuracy over rounds by sparsity: centralised, federated IID, federated non-IID."""
    parts = [(title, [run for run in runs if _data_setting(run) == title], "accuracy", ACCURACY) for title in SETTINGS]
    panels = _plots_by_round(parts, _sparsity)
    _require(panels, UNTESTED)
    caption = "Accuracy over rounds, by sparsity."
    return PaperFigure("zerofl-1", "ZeroFL, Fig. 1: accuracy by sparsity", caption, panels)


def zerofl_2(runs: Runs, layers: Sequence[str] = ()) -> PaperFigure:
    """Non-zero ratio of every layer of the server's model over rounds, a panel for each run."""
    for run in runs:
        _require(_measured_layers(run), f"{run.folder} did not measure its layers: {MEASURE}, or leave it out")
    names = _choose_layers(list(dict.fromkeys(name for run in runs for name in _measured_layers(run))), layers, 0)
    panels = tuple(
        LinePlot(title, ROUND, NONZERO, _non_empty({_short(n): _layer_line(group, n, i) for i, n in enumerate(names)}))
        for title, group in labelled_series(runs, method_name).items()
    )
    caption = "Share of non-zero weights in each layer of the server's model after aggregation."
    return PaperFigure("zerofl-2", "ZeroFL, Fig. 2: non-zero weights after aggregation", caption, panels)


def zerofl_3(runs: Runs, layers: Sequence[str] = ()) -> PaperFigure:
    """Where each layer's aggregated top 10 % lie, over the recorded rounds: a panel for each layer of each run."""
    maps: list[MaskPlot] = []
    alone = [group[0] for group in group_by_seed(runs) if len(group) == 1]
    names = label_groups(
        [[run] for run in runs],
        lambda run: method_name(run) if any(run is one for one in alone) else f"{method_name(run)}, {_seed(run)}",
    )
    for label, (run,) in names.items():
        files = mask_files.recorded_rounds(run)
        _require(files, f"{run.folder} holds no masks: {MEASURE}, or leave it out")
        numels = mask_files.mask_sizes(next(iter(files.values())))
        for layer in _choose_layers(list(numels), layers, max(1, min(6, 24 // len(names)))):
            maps.append(_mask_plot(_title(layer, label, len(names)), files, layer, numels[layer]))
    caption = (
        "Positions of each layer's aggregated top 10 % of weights, flattened; a mark: present. "
        f"Of a large layer, {mask_files.STRETCHES} stretches of {mask_files.LENGTH} neighbours, evenly spread."
    )
    columns = min(3, math.ceil(len(maps) / len(names)))
    return PaperFigure("zerofl-3", "ZeroFL, Fig. 3: where the top weights lie", caption, tuple(maps), columns=columns)


def zerofl_4(runs: Runs) -> PaperFigure:
    """Accuracy over r_mask, a line for each way to upload."""
    _require([run for run in runs if _r_mask([run]) is not None], "no run given has an r_mask: name runs of zerofl")
    panel = LinePlot("", Axis("r_mask"), ACCURACY, _accuracy_by_setting(runs, _r_mask, _upload_name, _r_mask_setting))
    caption = "Accuracy at the end over the share of further weights that travel."
    return PaperFigure("zerofl-4", "ZeroFL, Fig. 4: accuracy by r_mask", caption, (panel,))


def flash_1(runs: Runs) -> PaperFigure:
    """Accuracy over all bytes sent, a line for each run; and at the end over density, a line for each method."""
    every = labelled_series(
        runs, lambda run: f"{method_name(run)}, {_density(run)}" if (run.target or 1) < 1 else method_name(run)
    )
    places = assign_looks(every)
    sent = {label: mean_line(map(accuracy_by_bytes, group), places[label]) for label, group in every.items()}
    kept = [value for group in every.values() if (value := _sparse_density(group))]
    labelled = [replace(run, look=places[label], label=label) for label, group in every.items() for run in group]
    swept = _accuracy_by_setting(labelled, _sparse_density, method_name, target_settings(runs)) if kept else {}
    panels = [
        LinePlot("accuracy by bytes", Axis("sent up and down, MB", log=True), ACCURACY, _non_empty(sent)),
        LinePlot("accuracy by density", Axis("density", log=bool(kept) and max(kept) > 4 * min(kept)), ACCURACY, swept),
    ]
    panels = [panel for panel in panels if panel.lines]
    _require(panels, UNTESTED)
    caption = "Accuracy over the bytes of all clients so far, and at the end over density."
    title = "FLASH, Fig. 1: accuracy by bytes and by density"
    return PaperFigure("flash-1", title, caption + _density_note(runs), _letter(panels), own_scales=True)


def flash_2(runs: Runs) -> PaperFigure:
    """Accuracy and mask mismatch over rounds by density, centralised and federated."""
    where = {"centralised": [run for run in runs if _data_setting(run) == SETTINGS[0]]}
    where["FL"] = [run for run in runs if _data_setting(run) != SETTINGS[0]]
    measures = (("accuracy", ACCURACY), ("mismatch", MISMATCH))
    parts = [(title, group, name, axis) for name, axis in measures for title, group in where.items()]
    panels = _plots_by_round(parts, _density)
    _require(
        [panel for panel in panels if panel.y is MISMATCH], f"no run given measured its masks in two rounds: {MEASURE}"
    )
    caption = "Accuracy, and the Jaccard distance of the server's mask to that of the round before, by density d."
    title = "FLASH, Fig. 2: accuracy and mask mismatch"
    return PaperFigure("flash-2", title, caption, _letter(panels), columns=2)


def sparsefedpp_1(runs: Runs) -> PaperFigure:
    """Accuracy at the end over sparsity, a line for each method."""
    parts = (
        part
        for group in labelled_series(runs, method_name, target_settings(runs)).values()
        for part in group_by_seed(group)
    )  # as ``_swept`` does
    known = sorted({x for part in parts if (x := _target_sparsity(part)) is not None})
    _require(known, "no run given has a sparsity: name runs of a sparse method")
    lines = _accuracy_by_setting(
        runs, _target_sparsity, method_name, target_settings(runs), steps={x: i for i, x in enumerate(known)}
    )
    panel = LinePlot("", Axis("sparsity", steps=tuple(f"{x:g}" for x in known)), ACCURACY, lines)
    caption = "Accuracy at the end over sparsity, a line for each method." + _density_note(runs)
    return PaperFigure("sparsefedpp-1", "SparseFedPP, Fig. 1: accuracy by sparsity", caption, (panel,))


def _data_setting(run: RunRecord) -> str:
    """Return where a run belongs: one client is centralised; LDA of a large alpha is IID."""
    if numeric_setting(run, "task.clients") == 1:
        return SETTINGS[0]
    how, _, alpha = run.settings.get("task.partition", "").partition(":")
    return SETTINGS[1 if how == "iid" or (how == "lda" and (numeric(alpha) or 0) >= IID_ALPHA) else 2]


def _sparsity(run: RunRecord) -> str:
    """Return what a method aims at, or its name where it does not say."""
    return (
        method_name(run)
        if run.target is None
        else "dense"
        if run.target == 1
        else f"{100 * (1 - run.target):.4g} % sparse"
    )


def _density(run: RunRecord) -> str:
    """Return what a method aims at, or its name where it does not say, or is dense."""
    return method_name(run) if run.target is None else "dense" if run.target == 1 else f"d = {run.target:g}"


def _sparse_density(runs: Runs) -> float | None:
    """Return the density of a configuration that is not dense."""
    return d if (d := density_of(runs)) is not None and d < 1 else None


def _target_sparsity(runs: Runs) -> float | None:
    return None if (d := _sparse_density(runs)) is None else round(1 - d, 12)


def _rank(runs: Runs) -> float:
    return -(density_of(runs) or 0)


def _seed(run: RunRecord) -> str:
    return f"seed {run.settings.get('seed', 'unknown')}"


def _density_note(runs: Runs) -> str:
    """Return the sentence that says so where a run's place is a measured density."""
    return MEASURED if any(run.target is None and _sparse_density([run]) for run in runs) else ""


def _upload_name(run: RunRecord) -> str:
    return run.settings.get("method.upload", "").replace("_", " ") if is_zerofl(run) else method_name(run)


def is_zerofl(run: RunRecord) -> bool:
    """Tell whether a run's method is ZeroFL itself, whose r_mask and upload a figure shows."""
    return run.manifest.get("class") == ZEROFL


def _r_mask(runs: Runs) -> float | None:
    """Return ZeroFL's r_mask where it decides what is sent."""
    run = runs[0]
    there = is_zerofl(run) and run.settings.get("method.upload") != "full"
    return as_share(numeric_setting(run, "method.r_mask")) if there else None


def _r_mask_setting(run: RunRecord) -> tuple[str, ...]:
    return ("method.r_mask",) if is_zerofl(run) else ()


def _measured_layers(run: RunRecord) -> list[str]:
    """Return the layers whose ratio a run measured."""
    held = (row["layers"] for row in run.rows if isinstance(row.get("layers"), dict))
    return list(dict.fromkeys(name for one in held for name, value in one.items() if as_share(value) is not None))


def _layer_line(group: Runs, layer: str, place: int) -> Line:
    """Return a layer's non-zero share, in percent, over rounds."""
    return mean_line([_nonzero_by_round(run, layer) for run in group], place)


def _nonzero_by_round(run: RunRecord, layer: str) -> Points:
    held = ((row["round"], row["layers"].get(layer)) for row in run.rows if isinstance(row.get("layers"), dict))
    return {t: (t, 100 * known) for t, value in held if (known := as_share(value)) is not None}


def _mask_plot(title: str, files: dict[int, Path], layer: str, numel: int) -> MaskPlot:
    """Return the map of one layer; its axis says how many of the positions it shows."""
    at = mask_files.sampled_positions(numel)
    y = f"position (all {numel})" if len(at) == numel else f"position ({len(at)} of {_short_number(numel)})"
    rows = tuple((i, _short_number(int(at[i]))) for i in range(0, len(at), mask_files.LENGTH))
    present = mask_files.masks_at(files, layer, numel)
    return MaskPlot(title, Axis("round"), Axis(y), present, tuple(map(str, files)), rows)


def _title(layer: str, run: str, runs: int) -> str:
    return f"{_short(layer)} · {run}" if runs > 1 else _short(layer)


def _short_number(position: int) -> str:
    """Return a number in a few letters."""
    if position < 10_000:
        return str(position)
    return f"{position / 1e6:.2f} M" if position >= 1e6 else f"{position / 1e3:.0f} k"


def _short(layer: str) -> str:
    return layer.removesuffix(".weight")


def _choose_layers(known: list[str], wanted: Sequence[str], most: int) -> list[str]:
    """Return the layers asked for, by their names with or without .weight; or all, or ``most`` chosen evenly."""
    unknown = [name for name in wanted if _short(name) not in map(_short, known)]
    _require(not unknown, f"unknown layer {', '.join(unknown)}; the layers are {', '.join(map(_short, known))}")
    if wanted or not most:
        return [name for name in known if not wanted or _short(name) in map(_short, wanted)]
    return [known[i] for i in dict.fromkeys(np.linspace(0, len(known) - 1, most).round().astype(int).tolist())]


def _plots_by_round(
    parts: Sequence[tuple[str, Runs, str, Axis]], base: Callable[[RunRecord], str]
) -> tuple[LinePlot, ...]:
    """Return panels of a measure over rounds, the denser lines first; the same label looks the same in all panels."""
    grouped = [labelled_series(runs, base) for _, runs, _, _ in parts]
    every = {label: group for groups in reversed(grouped) for label, group in groups.items()}
    places = assign_looks(dict(sorted(every.items(), key=lambda item: _rank(item[1]))))
    panels = []
    for (title, _, name, axis), groups in zip(parts, grouped, strict=True):
        known = {label: groups[label] for label in places if label in groups}
        lines = {
            label: mean_line([percent_by_round(run, name) for run in known[label]], places[label]) for label in known
        }
        panels.append(LinePlot(title, ROUND, axis, _non_empty(lines)))
    return tuple(panel for panel in panels if panel.lines)


def _accuracy_by_setting(
    runs: Runs,
    at: Position,
    base: Name,
    without: Without = no_settings,
    *,
    steps: dict[float, int] | None = None,
) -> dict[str, Line]:
    """Return the accuracy at the end over a setting, with level lines for those that do not have it.

    ``at`` is the value of runs that differ in their seed alone, ``steps`` the places of values on an axis of names.
    """
    groups = labelled_series(runs, base, without)
    places = assign_looks(groups)
    lines = {name: accuracy_line(group, at, places[name], steps) for name, group in groups.items()}
    xs = [x for line in lines.values() for x in line.x]
    _require(xs, UNTESTED)
    ends = (min(xs), max(xs)) if min(xs) < max(xs) else (xs[0] - (0.1 * xs[0] or 0.1), xs[0] + (0.1 * xs[0] or 0.1))
    flat = {name: group for name, group in groups.items() if all(at(runs) is None for runs in group_by_seed(group))}
    return _non_empty(lines | {name: level_line(group, places[name], ends) for name, group in flat.items()})


def _non_empty(lines: Mapping[str, Line]) -> dict[str, Line]:
    return {label: line for label, line in lines.items() if line.x}


def _letter(panels: Sequence[LinePlot]) -> tuple[LinePlot, ...]:
    if len(panels) == 1:
        return tuple(panels)
    return tuple(replace(one, title=f"({letter}) {one.title}") for letter, one in zip("abcd", panels, strict=False))


def _require(there: object, lacking: str) -> None:
    if not there:
        raise LackingError(lacking)
