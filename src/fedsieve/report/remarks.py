"""What else is to be said of runs: updates that were refused, and what privacy was spent."""

from __future__ import annotations

import re
from collections import Counter
from html import escape

from fedsieve.report.configurations import Configuration
from fedsieve.report.parts import folded
from fedsieve.runs.record import RunRecord
from fedsieve.runs.units import format_number
from fedsieve.server.privacy import EPSILON, REHEARSED

SHOWN = 5
"""So many reasons are shown; the rest is folded."""
ABOUT_NOISE = {
    EPSILON: "",
    REHEARSED: " – of a rehearsal: the noise came from the run\u2019s seed, and whoever has run.json can subtract it. "
    "With method.secret=true it would hold",
}
"""What is said after an epsilon, by its column."""


def refused(every: list[Configuration]) -> str:
    """Return how many updates were refused: by reason, those that differ in numbers together, and by configuration."""
    alike: dict[str, Counter[tuple[str, str]]] = {}
    for one in every:
        for reason, n in sum((run.refused() for run in one.runs), Counter[str]()).items():
            alike.setdefault(re.sub(r"\d[\d.,e+-]*", "#", reason), Counter())[one.label, reason] += n
    if not alike:
        return ""
    lines = [_reason(own, len(every)) for own in sorted(alike.values(), key=lambda own: -own.total())]
    rest = f"<ul class=reasons>{''.join(lines[SHOWN:])}</ul>"
    total = sum(own.total() for own in alike.values())
    shown = f"<p>{total} refused.</p><ul class=reasons>{''.join(lines[:SHOWN])}</ul>"
    return shown + (folded("Further reasons", rest, len(lines) - SHOWN) if len(lines) > SHOWN else "")


def _reason(counts: Counter[tuple[str, str]], configurations: int) -> str:
    reasons, labels = Counter[str](), Counter[str]()
    for (label, reason), n in counts.items():
        reasons[reason] += n
        labels[label] += n
    first, _ = reasons.most_common(1)[0]
    like = f" (and {len(reasons) - 1} like it, of other numbers)" if len(reasons) > 1 else ""
    whose = "; ".join(f"{label} {n}" for label, n in labels.most_common())
    below = f"<br><small>{escape(whose)}</small>" if configurations > 1 else ""
    return f"<li>{counts.total()} × {escape(first)}{like}{below}</li>"


def privacy(every: list[Configuration]) -> str:
    """Return what the rounds of private runs have spent, and of rehearsals what they would have."""
    lines = dict.fromkeys(
        _spent(one, run, spent, kind)
        for one in every
        for run in one.runs
        for kind in ABOUT_NOISE
        if (spent := run.last(kind)) is not None
    )
    about = (
        "One client\u2019s data for another\u2019s; seen in sum, by who does not know the run\u2019s seed: "
        "docs/reference/methods/private.md says against whom."
    )
    return f"<p><small>{about}</small></p><ul class=reasons>{''.join(lines)}</ul>" if lines else ""


def _spent(one: Configuration, run: RunRecord, spent: float, kind: str) -> str:
    delta, rounds = (
        escape(run.settings.get("method.delta", "?")),
        f"{run.last_round} round{'s' * (run.last_round != 1)}",
    )
    number = f"ε = {format_number(spent)} at δ = {delta}, after {rounds}"
    return f"<li><strong>{escape(one.label)}</strong>: {number}{ABOUT_NOISE[kind]}</li>\n"
