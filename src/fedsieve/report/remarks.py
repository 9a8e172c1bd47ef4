"""What else is to be said of runs: updates that were refused, and what privacy was spent."""

from __future__ import annotations

import re
from collections import Counter

from fedsieve.methods.private import EPSILON, REHEARSED
from fedsieve.report.configurations import Configuration
from fedsieve.runs.record import RunRecord
from fedsieve.runs.units import format_number

ABOUT_NOISE = {
    EPSILON: "",
    REHEARSED: " – of a rehearsal: the noise came from the run\u2019s seed, and whoever has run.json can subtract it. "
    "With method.secret=true it would hold",
}
"""What is said after an epsilon, by its column."""


def refused_updates(every: list[Configuration]) -> list[tuple[int, str, str]]:
    """Return how many updates were refused, why, and of which configurations; reasons that differ in numbers as one."""
    alike: dict[str, Counter[tuple[str, str]]] = {}
    for one in every:
        for reason, n in sum((run.refused() for run in one.runs), Counter[str]()).items():
            alike.setdefault(re.sub(r"\d[\d.,e+-]*", "#", reason), Counter())[one.label, reason] += n
    return [_reason(own) for own in sorted(alike.values(), key=lambda own: -own.total())]


def _reason(counts: Counter[tuple[str, str]]) -> tuple[int, str, str]:
    reasons, labels = Counter[str](), Counter[str]()
    for (label, reason), n in counts.items():
        reasons[reason] += n
        labels[label] += n
    first, _ = reasons.most_common(1)[0]
    like = f" (and {len(reasons) - 1} like it, of other numbers)" if len(reasons) > 1 else ""
    return counts.total(), first + like, "; ".join(f"{label} {n}" for label, n in labels.most_common())


def privacy_spent(every: list[Configuration]) -> dict[tuple[str, str], None]:
    """Return what the rounds of private runs have spent, and of rehearsals what they would have: label and sentence."""
    return dict.fromkeys(
        (one.label, _sentence(run, spent) + about)
        for one in every
        for run in one.runs
        for column, about in ABOUT_NOISE.items()
        if (spent := run.last(column)) is not None
    )


def _sentence(run: RunRecord, spent: float) -> str:
    delta, rounds = run.settings.get("method.delta", "?"), f"{run.last_round} round{'s' * (run.last_round != 1)}"
    return f"ε = {format_number(spent)} at δ = {delta}, after {rounds}"
