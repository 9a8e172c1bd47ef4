"""How the runs were set, and where they ran: what differs between the configurations, and what is alike in all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from fedsieve.report.configurations import Configuration, name_configurations
from fedsieve.runs.record import RunRecord, numeric

Values: TypeAlias = tuple[str, ...]
SIDE_BY_SIDE, VALUES = 4, 8
"""Up to so many configurations stand side by side; of more values than that only the ends are shown."""


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


def _summary(values: Sequence[str], most: int = 3) -> str | None:
    """Return the values, or how many they are and the first and last of them; None without one."""
    if len(values) <= most:
        return "; ".join(values) if values else None
    ordered = sorted(values, key=lambda value: (numeric(value) is None, numeric(value) or 0, value))
    return f"{len(values)} values from {ordered[0]} to {ordered[-1]}"
