"""The engines that a run can name (``--engine``), those of Flower aside, which ``cli.run`` adds to them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from fedsieve.engine import Engine, Quorum, cohort, pool
from fedsieve.engine.cohorts import check_precision, in_process
from fedsieve.runs.execution import Execution
from fedsieve.types import InputError


class EngineKind(NamedTuple):
    """One entry of the list of engines."""

    about: str
    make: Callable[[Execution, int], Engine] | None
    """Makes the engine from what it is asked for and the number in its name (0: none). None: ``flower/app`` runs it."""
    loses_clients: bool = False
    """Whether a client's answer may be missing, so that quorum and timeout mean something."""


OWN_ENGINES = {
    "local": EngineKind(
        "one process, clients one after another; on a GPU as many at once as keep it busy (the default)",
        lambda execution, _: in_process(execution.device, execution.kernels, execution.precision),
    ),
    "pool:N": EngineKind(
        "N worker processes, the same bits as local",
        lambda execution, workers: pool(workers, execution.device, execution.kernels),
    ),
    "cohort:N": EngineKind(
        "N clients at once on each GPU (on a CPU one after another), the bits of local there",
        lambda execution, clients: cohort(clients, execution.device, execution.kernels, execution.precision),
    ),
}


def find_engine(execution: Execution, kinds: Mapping[str, EngineKind] = OWN_ENGINES) -> tuple[EngineKind, int]:
    """Return the engine of ``kinds`` that ``execution`` names, and the number in its name, 0 where it has none.

    Raises InputError for a name that there is not, or an option that the engine does not have.
    """
    name = execution.engine
    base, _, number = name.partition(":")
    kind = kinds.get(name) or (kinds.get(f"{base}:N") if number.isdecimal() or name == "flower" else None)
    numbered = base in ("flower", "cohort")
    if kind is None or (numbered and number.isdecimal() and not int(number)):
        raise InputError(
            f"unknown engine {name!r}; the engines are {', '.join(kinds)} (pool:2 has two processes)"
            + _elsewhere(base, kinds)
        )
    if not kind.loses_clients and execution.quorum != Quorum():
        raise InputError("--min-clients and --round-timeout are for --engine flower: no client is lost here")
    check_precision(execution.precision, execution.device, execution.kernels)
    if execution.precision != "fp32" and base not in ("local", "cohort"):
        raise InputError(f"--precision {execution.precision} is for --engine local and cohort:N")
    if not kind.make and execution.device != "cpu":
        raise InputError("--engine flower computes on the CPU: use --engine local for --device cuda")
    return kind, int(number) if number.isdecimal() else 0


def _elsewhere(base: str, kinds: Mapping[str, EngineKind]) -> str:
    """Return where Flower's engines are, if one of them is asked for and is not of ``kinds``."""
    if base != "flower" or "flower:N" in kinds:
        return ""
    return "; over Flower: fedsieve run RECIPE --engine flower, or from Python engine=fedsieve.flower.engine.inline()"
