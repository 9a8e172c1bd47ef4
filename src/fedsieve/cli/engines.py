"""The engines that ``--engine`` names: what each is, and what makes it. A new engine is one more entry here."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from fedsieve.engine import Engine, Quorum, local, pool
from fedsieve.runs.execution import Execution
from fedsieve.types import InputError


class EngineKind(NamedTuple):
    """One entry of the list of engines."""

    about: str
    make: Callable[[Execution, int], Engine] | None
    """Makes the engine from what it is asked for and the number in its name (0: none). None: ``flower/app`` runs it."""
    loses_clients: bool = False
    """Whether a client's answer may be missing, so that quorum and timeout mean something."""


def _inline(execution: Execution, _: int) -> Engine:
    from fedsieve.flower.engine import inline

    return inline(execution.device, execution.kernels, execution.quorum)


ENGINES = {
    "local": EngineKind(
        "one process, one thread, clients one after another (the default)",
        lambda execution, _: local(execution.device, execution.kernels),
    ),
    "pool:N": EngineKind(
        "N worker processes, the same bits as local",
        lambda execution, workers: pool(workers, execution.device, execution.kernels),
    ),
    "flower:N": EngineKind(
        "Flower's simulation on N Ray workers (flower: one a core), the bits of local; docs/how-to/deploy.md",
        None,
        True,
    ),
    "flower:inline": EngineKind("Flower's messages in one process, for a debugger", _inline, True),
}


def find_engine(execution: Execution) -> tuple[EngineKind, int]:
    """Return the engine that ``execution`` names, and the number in its name, 0 where it has none.

    Raises InputError for a name that there is not, or an option that the engine does not have.
    """
    name = execution.engine
    base, _, number = name.partition(":")
    kind = ENGINES.get(name) or (ENGINES.get(f"{base}:N") if number.isdecimal() or name == "flower" else None)
    if kind is None or (kind is ENGINES["flower:N"] and number and not int(number)):
        raise InputError(
            f"unknown engine {name!r}; the engines are {', '.join(ENGINES)} (pool:2 and flower:2 have two processes)"
        )
    if not kind.loses_clients and execution.quorum != Quorum():
        raise InputError("--min-clients and --round-timeout are for --engine flower: no client is lost here")
    if not kind.make and execution.device != "cpu":
        raise InputError("--engine flower computes on the CPU: use --engine local for --device cuda")
    return kind, int(number) if number.isdecimal() else 0
