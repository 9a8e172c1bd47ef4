"""What a round comes to: the next state, from the updates that passed, and whether it is one to go on from."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from fedsieve.client.process import num_threads
from fedsieve.engine.experiment import Run
from fedsieve.engine.metrics import NOBODY, Tally
from fedsieve.engine.rollback import Diverged
from fedsieve.server.robust import Plain, combined
from fedsieve.types import Data, InputError, Update, flatten
from fedsieve.types.method import expected_of
from fedsieve.wire import finite

PROBE = 8
"""The test examples that a round's model must answer with finite numbers."""


@torch.no_grad()
def check_finite(run: Run, t: int, state: Any, model: nn.Module, test: Data) -> None:
    """Raise Diverged unless all numbers of a state are finite, and what its model answers to some test examples."""
    floats = (v for v in flatten(state).values() if v.is_floating_point())
    with num_threads(1):
        if not all(map(finite, floats)) or not finite(model.eval()(test.batch(slice(0, PROBE))[0])):
            raise Diverged(f"round {t}: the model is not finite after it: lower lr (now {run.lr})")


def aggregated(run: Run, t: int, state: Any, updates: Iterable[Update], tally: Tally) -> Any:
    """Return the next state. Raises Diverged, saying why, if no update could be taken."""
    if not isinstance(run.mean, Plain):
        updates = combined(run.mean, updates, expected_of(run.method, state, run.context(t)))
    try:
        return run.method.aggregate(state, updates, run.context(t))
    except InputError:
        if tally.weight or not tally.complete:
            raise
    if not tally.refused:
        raise InputError(f"round {t}: the engine brought no answer")
    first = tally.refused[0]
    who = f"client {first.client}: {first.reason}" if first.client != NOBODY else first.reason
    raise Diverged(
        f"round {t}: no client's update could be taken ({who}); "
        f"if training diverged, lower lr (now {run.lr}){_looser(run)}"
    )


def _looser(run: Run) -> str:
    remedy = {"Fixed": "bound.norm", "Multiple": "bound.times", "Loose": "bound.times"}.get(type(run.bound).__name__)
    return f"; if the bound is too tight, raise {remedy}" if remedy else ""
