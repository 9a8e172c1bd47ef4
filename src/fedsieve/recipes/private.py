"""FLASH with client-level differential privacy: clipped and noised on the clients, on the mask's values alone."""

from __future__ import annotations

from dataclasses import replace

from fedsieve.engine import Run
from fedsieve.methods import FLASH, Private
from fedsieve.recipes import presets


def digits() -> Run:
    """FLASH at density .1 on the handwritten digits, 100 equal clients, 50 a round, noise of one clip of .3."""
    run = presets.digits(FLASH(), "iid")
    task = replace(run.task, clients=100)
    run = replace(run, task=task, rounds=40, per_round=50, epochs=5, batch=8, lr=0.3, lr_end=0.075)
    return replace(run, method=Private(FLASH(c_d=50), clip=0.3, noise=1.0, cohort=50))
