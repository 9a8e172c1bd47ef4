"""Engines: ways to carry bytes between the server's loop and the clients."""

from fedsieve.engine.cohorts import cohort
from fedsieve.engine.engines import Engine, Exchange, local, pool
from fedsieve.engine.experiment import Run, Task
from fedsieve.engine.federation import Federation
from fedsieve.engine.loop import rounds
from fedsieve.engine.quorum import Quorum
from fedsieve.engine.round import Round
from fedsieve.engine.setup import open_run

__all__ = [
    "Engine",
    "Exchange",
    "Federation",
    "Quorum",
    "Round",
    "Run",
    "Task",
    "cohort",
    "local",
    "open_run",
    "pool",
    "rounds",
]
