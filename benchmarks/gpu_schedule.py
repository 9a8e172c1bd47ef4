"""Who waits for whom in a round: clients go through stages, each with so many places and one speed for all in it.

A client that has a worker keeps it from the first stage to the last of those that need one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """A part of what a client goes through."""

    name: str
    work: float
    speed: Callable[[int], float]
    """The work that is done in a second for all who are in it, shared alike, by their number."""
    places: int = 1 << 30
    """How many may be in it; the others wait."""


def seconds_of(stages: list[Stage], clients: int, workers: int, holding: tuple[str, ...]) -> float:
    """Return when the last of a round's clients has gone through all stages; those in ``holding`` keep a worker."""
    waiting: list[list[int]] = [[*range(clients)], *([] for _ in stages)]
    active: list[dict[int, float]] = [{} for _ in stages]
    with_worker = sum(stage.name in holding for stage in stages)
    now = 0.0
    while len(waiting[-1]) < clients:
        for at, stage in enumerate(stages):
            while waiting[at] and len(active[at]) < stage.places:
                busy = sum(map(len, active[:with_worker])) + sum(map(len, waiting[1:with_worker]))
                if at == 0 and busy == workers:
                    break
                active[at][waiting[at].pop(0)] = stage.work
        rates = [
            stage.speed(len(some)) / len(some) if some else 0.0 for stage, some in zip(stages, active, strict=True)
        ]
        step = min(left / rate for some, rate in zip(active, rates, strict=True) for left in some.values())
        now += step
        for at, (some, rate) in enumerate(zip(active, rates, strict=True)):
            for client, left in [*some.items()]:
                some[client] = left - step * rate
                if some[client] <= 1e-9 * stages[at].work:
                    del some[client]
                    waiting[at + 1].append(client)
    return now
