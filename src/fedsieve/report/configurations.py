"""Which runs are one configuration, differing in their seed alone, and what tells configurations apart.

That is the fewest settings for a label, and for a table all that differs, in how they were set and where they ran.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, TypeAlias

from fedsieve.runs.record import RunRecord, numeric

Runs: TypeAlias = list[RunRecord]
Values: TypeAlias = tuple[str, ...]
Without: TypeAlias = Callable[[RunRecord], Collection[str]]
"""The settings of a run that do not count when it is compared with others."""

SEED, METHOD, TARGET, ENGINE = "seed", "method", "method.target_density", "engine"
BESIDE_SETTINGS = ("kernels", "device", "class")
"""What run.json says beside the settings that runs of one configuration share."""
FIRST = (METHOD, "task.dataset", "task.partition")
LONGEST = 28
"""Letters of a value that a label shows."""
SIDE_BY_SIDE, VALUES = 4, 8
"""Up to so many configurations stand side by side; of more values than that only the ends are shown."""
DISPLAY_NAMES = {
    "fedavg": "FedAvg",
    "fedadam": "FedAdam",
    "fedprox": "FedProx",
    "scaffold": "SCAFFOLD",
    "swat": "SWAT",
    "zerofl": "ZeroFL",
    "topk": "Top-k",
    "sparsefedpp": "SparseFedPP",
    "dnr": "DNR",
    "nst": "NST",
    "pdst": "PDST",
    "flash": "FLASH",
    "hetero_flash": "hetero-FLASH",
    "feddst": "FedDST",
}


@dataclass(frozen=True)
class Configuration:
    """Runs that differ in nothing but their seed, in its order; each carries the label and the place of the look."""

    label: str
    look: int
    runs: Runs

    @property
    def averaged(self) -> Runs:
        """The runs that a mean is taken of: the finished ones, or all where none is."""
        return [run for run in self.runs if run.ended] or self.runs


def group_configurations(runs: Runs) -> list[Configuration]:
    """Return the runs by configuration, in the order of their first ones, with labels of which no two are the same."""
    groups = [sorted(group, key=_seed) for group in group_by_seed(runs)]
    first = [group[0] for group in groups]
    labels = number_duplicates(
        [text or method_name(run) for text, run in zip(distinguishing_settings(first), first, strict=True)]
    )
    return [
        Configuration(label, look, [replace(run, label=label, look=look) for run in group])
        for look, (label, group) in enumerate(zip(labels, groups, strict=True))
    ]


def group_by_seed(runs: Iterable[RunRecord], without: Without = lambda run: ()) -> list[Runs]:
    """Return the runs that differ in nothing but the seed and the settings ``without``, group by group.

    The engine does not change what is computed; where one run is there by two engines, each has a group of its own.
    """
    groups: dict[frozenset[tuple[str, str]], Runs] = {}
    for run in runs:
        groups.setdefault(_key(run, {SEED, *without(run)}), []).append(run)
    return [part for group in groups.values() for part in _by_engine(group)]


def deduplicate(runs: Iterable[RunRecord], suits: Callable[[RunRecord], bool] = lambda run: True) -> Runs:
    """Return the runs, one of those that have the same settings, seed and engine; a warning says which were taken.

    What ``suits`` goes before what does not, then a finished run before others, a longer one, one that measured more,
    and a newer one.
    """
    groups: dict[tuple[frozenset[tuple[str, str]], str], Runs] = {}
    for run in runs:
        groups.setdefault((_key(run, ()), _engine(run)), []).append(run)
    best = {key: max(reversed(group), key=lambda run: (suits(run), *_rank(run))) for key, group in groups.items()}
    remarks = [
        f"{best[key].folder}, not {_first_few([str(run.folder) for run in group if run is not best[key]], 4)}"
        for key, group in groups.items()
        if len(group) > 1
    ]
    if remarks:
        how = "of runs with the same settings and seed one counts (finished, longest, most measured, newest)"
        warnings.warn(f"{how}: {_first_few(remarks, 4, '; ')}", stacklevel=2)
    return list(best.values())


def distinguishing_settings(runs: Sequence[RunRecord], without: Without = lambda run: ()) -> list[str]:
    """Return what tells each run from the others: the method where it differs, then as few settings as will do."""
    rows = [{name: value for name, value in _fields(run).items() if name not in without(run)} for run in runs]
    names = dict.fromkeys([*FIRST, *(name for row in rows for name in row)])
    differing = [name for name in names if len({row.get(name) for row in rows}) > 1]
    fewest = [name for name in differing if name == METHOD]
    while more := [name for name in differing if _distinct(rows, [*fewest, name]) > _distinct(rows, fewest)]:
        fewest.append(max(more, key=lambda name: _distinct(rows, [*fewest, name])))
    for name in fewest[:]:
        rest = [other for other in fewest if other != name]
        fewest = rest if name != METHOD and _distinct(rows, rest) == _distinct(rows, fewest) else fewest
    ordered = sorted(fewest, key=lambda name: not name.startswith("method"))
    texts = [", ".join(format_setting(name, row[name]) for name in ordered if name in row) for row in rows]
    return [text or "default" for text in texts] if fewest else texts


def number_duplicates(names: list[str]) -> list[str]:
    """Return the names, those that occur twice with their places."""
    twins = {name for name in names if names.count(name) > 1}
    return [f"{name} ({i})" if name in twins else name for i, name in enumerate(names, 1)]


def method_name(run: RunRecord) -> str:
    """Return the method's name, as its paper writes it."""
    name = str(run.manifest.get("method", ""))
    return DISPLAY_NAMES.get(name, name) or run.settings.get("method.kind", run.recipe)


def _fields(run: RunRecord) -> dict[str, str]:
    """Return all that can tell a run from others but its seed."""
    own = {name: value for name, value in run.settings.items() if name != SEED}
    method = {name: value for name, value in own.items() if name.startswith("method.")}
    target = {} if run.target is None else {TARGET: f"{run.target:g}"}
    return {METHOD: method_name(run), **method, **target, **own, **_beside_settings(run), ENGINE: _engine(run)}


def _key(run: RunRecord, without: Collection[str]) -> frozenset[tuple[str, str]]:
    if not run.settings:
        return frozenset({("folder", str(run.folder))})
    return frozenset(item for item in (run.settings | _beside_settings(run)).items() if item[0] not in without)


def _beside_settings(run: RunRecord) -> dict[str, str]:
    return {name: str(run.manifest[name]) for name in BESIDE_SETTINGS if name in run.manifest}


def _engine(run: RunRecord) -> str:
    return str(run.manifest.get(ENGINE, ""))


def _by_engine(group: Runs) -> list[Runs]:
    if len({_key(run, ()) for run in group}) == len(group):
        return [group]
    return [[run for run in group if _engine(run) == engine] for engine in dict.fromkeys(map(_engine, group))]


def _seed(run: RunRecord) -> tuple[bool, float, str]:
    text = run.settings.get(SEED, "")
    return (False, float(text), "") if text.isdecimal() and len(text) < 300 else (True, 0.0, text)


def _rank(run: RunRecord) -> tuple[bool, int, int, float]:
    measures: Any = run.manifest.get("measure")
    start = 0.0
    with suppress(ValueError, OverflowError):
        start = datetime.fromisoformat(str(run.manifest.get("started"))).timestamp()
    return run.ended, run.last_round, len(measures) if isinstance(measures, list) else 0, start


def _first_few(texts: list[str], most: int, between: str = ", ") -> str:
    return between.join([*texts[:most], *([f"and {len(texts) - most} more"] if len(texts) > most else [])])


def _distinct(rows: list[dict[str, str]], names: Sequence[str]) -> int:
    """Return how many of the rows differ in these fields."""
    return len({tuple(row.get(name) for name in names) for row in rows})


def format_setting(name: str, value: str) -> str:
    """Return a setting as a label has it: its last name and a value that is not too long, of the method its name."""
    short = value if len(value) <= LONGEST else value[: LONGEST - 1] + "…"
    if name == METHOD:
        return short
    return f"{'density' if name == TARGET else name.removesuffix('.kind').split('.')[-1]} {short}"


def name_configurations(some: Sequence[Configuration], every: Sequence[Configuration]) -> str:
    """Return which configurations are meant: all, all of a method, or by their labels, as far as there is room."""
    if len(some) == len(every):
        return "all"
    many = Counter(method_name(one.runs[0]) for one in every)
    labels: dict[str, list[str]] = {}
    for one in some:
        labels.setdefault(method_name(one.runs[0]), []).append(one.label)
    parts = [
        text
        for name, own in labels.items()
        for text in ([f"{name} (all {len(own)})"] if 1 < len(own) == many[name] else own)
    ]
    return _first_few(parts, 6, "; ")


@dataclass(frozen=True)
class SettingsTable:
    """The values of every field as text, None where a configuration has none.

    What differs stands with a column for each of ``labels``; or, of more configurations than there is room for, in
    ``groups``: by field, each value with the configurations that have it.
    """

    same: dict[str, str | None]
    labels: list[str]
    differing: dict[str, list[str | None]] = field(default_factory=dict)
    groups: dict[str, list[tuple[str, str]]] = field(default_factory=dict)


def settings_table(every: list[Configuration], of: Callable[[RunRecord], dict[str, str]]) -> SettingsTable:
    """Return what ``of`` tells of each run, side by side, the method's own fields first."""
    each = [[of(run) for run in one.runs] for one in every]
    names = dict.fromkeys(name for runs in each for one in runs for name in one)
    values = {
        name: [tuple(dict.fromkeys(one[name] for one in runs if name in one)) for runs in each]
        for name in sorted(names, key=lambda name: name.split(".")[0] != "method")
    }
    differing = {name: row for name, row in values.items() if len(set(row)) > 1}
    same = {name: _summary(row[0]) for name, row in values.items() if name not in differing}
    labels = [one.label for one in every]
    if len(every) <= SIDE_BY_SIDE:
        return SettingsTable(same, labels, {name: [*map(_summary, row)] for name, row in differing.items()})
    return SettingsTable(same, labels, groups={name: _by_value(row, every) for name, row in differing.items()})


def _by_value(values: list[Values], every: list[Configuration]) -> list[tuple[str, str]]:
    """Return each value with the configurations that have it, the rarest first; the last is that of all others."""
    having: dict[Values, list[Configuration]] = {}
    for one, own in zip(every, values, strict=True):
        if own:
            having.setdefault(own, []).append(one)
    if len(having) > VALUES:
        return [(_summary(tuple(dict.fromkeys(value for own in having for value in own))) or "", "")]
    ordered = sorted(having, key=lambda own: len(having[own]))
    owners = [name_configurations(having[own], every) for own in ordered]
    if len(ordered) > 1 and () not in values:
        owners[-1] = "all others"
    return [(_summary(own) or "", of) for own, of in zip(ordered, owners, strict=True)]


def _summary(values: Sequence[str]) -> str | None:
    """Return the values, or how many they are and the first and last of them; None without one."""
    if len(values) <= 3:
        return "; ".join(values) if values else None
    ordered = sorted(values, key=lambda value: (numeric(value) is None, numeric(value) or 0, value))
    return f"{len(values)} values from {ordered[0]} to {ordered[-1]}"
