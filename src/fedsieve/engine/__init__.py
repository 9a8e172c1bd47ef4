"""Engines: ways to carry bytes between the server's loop and the clients."""

from fedsieve.engine.experiment import Run, Task
from fedsieve.engine.federation import Federation
from fedsieve.engine.loop import Engine, Exchange, run
from fedsieve.engine.processes import pool
from fedsieve.engine.quorum import Quorum
from fedsieve.engine.round import Round
from fedsieve.engine.serial import local
from fedsieve.engine.setup import open_run

__all__ = ["Engine", "Exchange", "Federation", "Quorum", "Round", "Run", "Task", "local", "open_run", "pool", "run"]
