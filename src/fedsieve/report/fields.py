"""How the runs were set, and where they ran: what differs first, alike together, and the rest folded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from typing import TypeAlias

from fedsieve.report.configurations import Configuration
from fedsieve.report.parts import NONE, folded, soft, whose, wide
from fedsieve.runs.record import RunRecord, numeric

Values: TypeAlias = tuple[str, ...]
SIDE_BY_SIDE, VALUES = 4, 8
"""Up to so many configurations stand side by side; of more values than that only the ends are shown."""


def fields(every: list[Configuration], of: Callable[[RunRecord], dict[str, str]]) -> str:
    """Return what differs between the configurations as a table, and the rest folded."""
    each = [[of(run) for run in one.runs] for one in every]
    names = dict.fromkeys(name for runs in each for one in runs for name in one)
    ordered = sorted(names, key=lambda name: name.split(".")[0] != "method")
    values = {name: [_known(runs, name) for runs in each] for name in ordered}
    differs = {name: row for name, row in values.items() if len(set(row)) > 1}
    same = {name: row[:1] for name, row in values.items() if name not in differs}
    table = _side_by_side(["Value"], same, "same")
    if not differs:
        return f"<details open><summary>All fields <small>({len(same)})</small></summary>{table}</details>"
    labels = [one.label for one in every]
    first = _side_by_side(labels, differs, "differs") if len(every) <= SIDE_BY_SIDE else _alike(every, differs)
    return first + (folded("The same for every run", table, len(same)) if same else "")


def _known(runs: Sequence[dict[str, str]], name: str) -> Values:
    """Return the distinct values that the runs of one configuration have of a field."""
    return tuple(dict.fromkeys(one[name] for one in runs if name in one))


def _shown(values: Values, most: int = 3) -> str:
    """Return the values, or how many they are and the first and last of them."""
    if len(values) <= most:
        return "; ".join(values)
    ordered = sorted(values, key=lambda value: (numeric(value) is None, numeric(value) or 0, value))
    return f"{len(values)} values from {ordered[0]} to {ordered[-1]}"


def _side_by_side(heads: list[str], rows: dict[str, list[Values]], kind: str) -> str:
    top = "".join(f"<th scope=col>{soft(head)}</th>" for head in ["Field", *heads])
    body = "".join(_row(name, values, kind) for name, values in rows.items())
    return wide(f"<thead><tr>{top}</tr></thead>\n<tbody>\n{body}</tbody>", "fields")


def _row(name: str, values: list[Values], kind: str) -> str:
    cells = "".join(f"<td>{escape(_shown(own)) if own else NONE}</td>" for own in values)
    return f"<tr class={kind}><th scope=row>{soft(name)}</th>{cells}</tr>\n"


def _alike(every: list[Configuration], rows: dict[str, list[Values]]) -> str:
    """Return a row for every value of a field, with the configurations that have it."""
    body = "".join(_values(name, values, every) for name, values in rows.items())
    top = "<thead><tr><th scope=col>Field</th><th scope=col>Value</th><th scope=col>Of</th></tr></thead>\n"
    return wide(f"{top}{body}", "fields")


def _values(name: str, values: list[Values], every: list[Configuration]) -> str:
    """Return the rows of one field, the rarest value first; the last is that of all others."""
    having: dict[Values, list[Configuration]] = {}
    for one, own in zip(every, values, strict=True):
        if own:
            having.setdefault(own, []).append(one)
    if len(having) > VALUES:
        distinct = tuple(dict.fromkeys(value for own in having for value in own))
        return f"<tbody>{_value(name, 1, _shown(distinct), '')}</tbody>\n"
    ordered = sorted(having, key=lambda own: len(having[own]))
    said = [whose(having[own], every) for own in ordered]
    if len(ordered) > 1 and () not in values:
        said[-1] = "all others"
    rows = [
        _value(name if not i else "", len(ordered), _shown(own), of)
        for i, (own, of) in enumerate(zip(ordered, said, strict=True))
    ]
    return f"<tbody>{''.join(rows)}</tbody>\n"


def _value(name: str, rows: int, value: str, of: str) -> str:
    head = f"<th scope=rowgroup rowspan={rows}>{soft(name)}</th>" if name else ""
    return f"<tr class=differs>{head}<td>{escape(value)}</td><td>{escape(of)}</td></tr>"
