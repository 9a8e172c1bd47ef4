"""Engines: ways to carry bytes between the server's loop and the clients."""

from fedsieve.engine.local import local
from fedsieve.engine.loop import Engine, Exchange, Round, run
from fedsieve.engine.patience import Patience
from fedsieve.engine.pool import pool
from fedsieve.engine.task import Federation, Run, Task, open_run

__all__ = ["Engine", "Exchange", "Federation", "Patience", "Round", "Run", "Task", "local", "open_run", "pool", "run"]
