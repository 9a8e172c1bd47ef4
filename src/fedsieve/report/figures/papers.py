"""The papers' figures of whole runs: which make which lines of which panel. Each takes runs, returns a PaperFigure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

from fedsieve.report.configurations import Runs, group_by_seed, method_name
from fedsieve.report.figures.layers import MEASURE
from fedsieve.report.plots import ACCURACY, ROUND, Axis, Line, LinePlot
from fedsieve.report.series import (
    LackingError,
    Name,
    PaperFigure,
    Position,
    accuracy_by_bytes,
    accuracy_line,
    as_share,
    assign_looks,
    density_of,
    labelled_series,
    level_line,
    mean_line,
    non_empty,
    numeric_setting,
    percent_by_round,
    require,
    target_settings,
)
from fedsieve.runs.record import RunRecord, numeric

VALIDATION = Axis("validation accuracy, %", percent=True)
MISMATCH = Axis("mask mismatch, %", percent=True, zero=True)
SETTINGS = ("centralised", "FL, IID", "FL, non-IID")
IID_ALPHA = 100
"""From this alpha on, an LDA partition counts as IID: the papers' IID is 1000."""
UNTESTED = "no run given has a tested round yet: let one go on, or name others"
ZEROFL = "fedsieve.methods.zerofl:ZeroFL"
MEASURED = " A density is what the method aims at; where it declares none, what was measured."


def zerofl_1(runs: Runs) -> PaperFigure:
    """Accuracy over rounds by sparsity: centralised, federated IID, federated non-IID.

    As in the paper it is that on the validation examples, in a panel whose runs all measured it; else on the test set.
    """
    where = {title: [run for run in runs if _data_setting(run) == title] for title in SETTINGS}
    panels = _plots_by_round([(title, own, *_accuracy_of(own)) for title, own in where.items()], _sparsity)
    require(panels, UNTESTED)
    validated = any(panel.y is VALIDATION for panel in panels)
    caption = "Accuracy over rounds, by sparsity." + " Validation: on what the clients hold out." * validated
    return PaperFigure("zerofl-1", "ZeroFL, Fig. 1: accuracy by sparsity", caption, panels)


def zerofl_4(runs: Runs) -> PaperFigure:
    """Accuracy over r_mask, a line for each way to upload, a panel for each sparsity; other runs are in every panel."""
    swept = {run.target: _sparsity(run) for run in runs if _r_mask([run]) is not None}
    require(swept, "no run given has an r_mask: name runs of zerofl")

    def upload(run: RunRecord) -> str:
        return run.settings.get("method.upload", "").replace("_", " ") if is_zerofl(run) else method_name(run)

    def without(run: RunRecord) -> tuple[str, ...]:
        return ("method.r_mask",) if is_zerofl(run) else ()

    targets = sorted(swept, key=lambda target: -(target or 0))
    parts = [[run for run in runs if not is_zerofl(run) or run.target not in {*swept} - {target}] for target in targets]
    series = [labelled_series(own, upload, without) for own in parts]
    places, panels = assign_looks(_merge(series)), []
    for target, groups in zip(targets, series, strict=True):
        with suppress(LackingError):
            lines = _accuracy_by_setting(groups, _r_mask, places)
            panels.append(LinePlot(swept[target], Axis("r_mask"), ACCURACY, lines))
    require(panels, UNTESTED)
    caption = "Accuracy at the end over the share of further weights that travel."
    return PaperFigure("zerofl-4", "ZeroFL, Fig. 4: accuracy by r_mask", caption, tuple(panels))


def flash_1(runs: Runs) -> PaperFigure:
    """Accuracy over all bytes sent, a line for each run; and at the end over density, a line for each method."""
    every = labelled_series(
        runs, lambda run: f"{method_name(run)}, {_density(run)}" if (run.target or 1) < 1 else method_name(run)
    )
    places = assign_looks(every)
    traffic = {label: mean_line(map(accuracy_by_bytes, group), places[label]) for label, group in every.items()}
    densities = [d for group in every.values() if (d := _sparse_density(group))]
    labelled = [replace(run, look=places[label], label=label) for label, group in every.items() for run in group]
    groups = labelled_series(labelled, method_name, target_settings(runs))
    swept = _accuracy_by_setting(groups, _sparse_density, assign_looks(groups)) if densities else {}
    density = Axis("density", log=bool(densities) and max(densities) > 4 * min(densities))
    panels = [
        LinePlot("accuracy by bytes", Axis("sent up and down, MB", log=True), ACCURACY, non_empty(traffic)),
        LinePlot("accuracy by density", density, ACCURACY, swept),
    ]
    panels = [panel for panel in panels if panel.lines]
    require(panels, UNTESTED)
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
    mismatches = [panel for panel in panels if panel.y is MISMATCH]
    require(mismatches, f"no run given measured its masks in two rounds: {MEASURE}")
    caption = "Accuracy, and the Jaccard distance of the server's mask to that of the round before, by density d."
    title = "FLASH, Fig. 2: accuracy and mask mismatch"
    return PaperFigure("flash-2", title, caption, _letter(panels), columns=2)


def sparsefedpp_1(runs: Runs) -> PaperFigure:
    """Accuracy at the end over sparsity, a line for each method."""
    groups = labelled_series(runs, method_name, target_settings(runs))
    parts = [part for group in groups.values() for part in group_by_seed(group)]  # as ``_accuracy_by_setting`` does
    sparsities = sorted({x for part in parts if (x := _target_sparsity(part)) is not None})
    require(sparsities, "no run given has a sparsity: name runs of a sparse method")
    steps: dict[float | None, int] = {x: i for i, x in enumerate(sparsities)}
    lines = _accuracy_by_setting(groups, lambda part: steps.get(_target_sparsity(part)), assign_looks(groups))
    panel = LinePlot("", Axis("sparsity", steps=tuple(f"{x:g}" for x in sparsities)), ACCURACY, lines)
    caption = "Accuracy at the end over sparsity, a line for each method." + _density_note(runs)
    return PaperFigure("sparsefedpp-1", "SparseFedPP, Fig. 1: accuracy by sparsity", caption, (panel,))


def _data_setting(run: RunRecord) -> str:
    """Return where a run belongs: one client is centralised; LDA of a large alpha is IID."""
    if numeric_setting(run, "task.clients") == 1:
        return SETTINGS[0]
    how, _, alpha = run.settings.get("task.partition", "").partition(":")
    return SETTINGS[1 if how == "iid" or (how == "lda" and (numeric(alpha) or 0) >= IID_ALPHA) else 2]


def _accuracy_of(runs: Runs) -> tuple[str, Axis]:
    """Return which accuracy is shown of runs: on the validation examples, if all that were tested measured it."""
    validated = [bool(run.series("accuracy_validation")[0]) for run in runs if run.series("accuracy")[0]]
    return ("accuracy_validation", VALIDATION) if validated and all(validated) else ("accuracy", ACCURACY)


def _sparsity(run: RunRecord) -> str:
    """Return what a method aims at, or its name where it does not say."""
    if run.target is None:
        return method_name(run)
    return "dense" if run.target == 1 else f"{100 * (1 - run.target):.4g} % sparse"


def _density(run: RunRecord) -> str:
    """Return what a method aims at, or its name where it does not say, or is dense."""
    return method_name(run) if run.target is None else "dense" if run.target == 1 else f"d = {run.target:g}"


def _sparse_density(runs: Runs) -> float | None:
    """Return the density of a configuration that is not dense."""
    return d if (d := density_of(runs)) is not None and d < 1 else None


def _target_sparsity(runs: Runs) -> float | None:
    return None if (d := _sparse_density(runs)) is None else round(1 - d, 12)


def _density_note(runs: Runs) -> str:
    """Return the sentence that says so where a run's place is a measured density."""
    return MEASURED if any(run.target is None and _sparse_density([run]) for run in runs) else ""


def is_zerofl(run: RunRecord) -> bool:
    """Tell whether a run's method is ZeroFL itself, whose r_mask and upload a figure shows."""
    return run.manifest.get("class") == ZEROFL


def _r_mask(runs: Runs) -> float | None:
    """Return ZeroFL's r_mask where it decides what is sent."""
    run = runs[0]
    there = is_zerofl(run) and run.settings.get("method.upload") != "full"
    return as_share(numeric_setting(run, "method.r_mask")) if there else None


def _plots_by_round(parts: Sequence[tuple[str, Runs, str, Axis]], base: Name) -> tuple[LinePlot, ...]:
    """Return panels of a measure over rounds, the denser lines first; the same label looks the same in all panels."""
    series = [labelled_series(runs, base) for _, runs, _, _ in parts]
    places = assign_looks(dict(sorted(_merge(series).items(), key=lambda item: -(density_of(item[1]) or 0))))
    panels = []
    for (title, _, name, axis), groups in zip(parts, series, strict=True):
        lines = {
            label: mean_line([percent_by_round(run, name) for run in groups[label]], place)
            for label, place in places.items()
            if label in groups
        }
        panels.append(LinePlot(title, ROUND, axis, non_empty(lines)))
    return tuple(panel for panel in panels if panel.lines)


def _merge(series: Iterable[Mapping[str, Runs]]) -> dict[str, Runs]:
    """Return the groups of all panels by their labels, those of the first panel that has the label."""
    return {label: group for groups in reversed([*series]) for label, group in groups.items()}


def _accuracy_by_setting(groups: Mapping[str, Runs], at: Position, places: Mapping[str, int]) -> dict[str, Line]:
    """Return the accuracy at the end over a setting, with level lines for those that do not have it.

    ``at`` is the value of runs that differ in their seed alone, ``places`` those of the groups' looks.
    """
    lines = {name: accuracy_line(group, at, places[name]) for name, group in groups.items()}
    xs = [x for line in lines.values() for x in line.x]
    require(xs, UNTESTED)
    ends = (min(xs), max(xs)) if min(xs) < max(xs) else (xs[0] - (0.1 * xs[0] or 0.1), xs[0] + (0.1 * xs[0] or 0.1))
    flat = {name: group for name, group in groups.items() if all(at(runs) is None for runs in group_by_seed(group))}
    return non_empty(lines | {name: level_line(group, places[name], ends) for name, group in flat.items()})


def _letter(panels: Sequence[LinePlot]) -> tuple[LinePlot, ...]:
    if len(panels) == 1:
        return tuple(panels)
    return tuple(replace(one, title=f"({letter}) {one.title}") for letter, one in zip("abcd", panels, strict=False))
