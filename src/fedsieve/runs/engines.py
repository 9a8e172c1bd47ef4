"""The engines that a run can name (``--engine``), those of Flower aside, which ``cli.run`` adds to them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from fedsieve.client.process import usable_cores
from fedsieve.engine import Engine, Federation, Quorum, cohort, pool
from fedsieve.engine.cohorts import check_precision, in_process
from fedsieve.engine.engines import check_sendable
from fedsieve.runs.execution import Execution
from fedsieve.types import InputError, apply_model


class EngineKind(NamedTuple):
    """One entry of the list of engines."""

    about: str
    make: Callable[[Execution, int], Engine] | None
    """Makes the engine from what it is asked for and the number in its name (0: none). None: ``flower/app`` runs it, or
    ``choose_engine`` chooses another."""
    loses_clients: bool = False
    """Whether a client's answer may be missing, so that quorum and timeout mean something."""


OWN_ENGINES = {
    "auto": EngineKind("pool:N where a run lasts, with a process for each core, or else local", None),
    "local": EngineKind(
        "one process, clients one after another; on a GPU as many at once as keep it busy",
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


SHARED_MEMORY = Path("/dev/shm")
LASTING = 2e12
"""Multiply-adds of a run's trainings, were they dense, that outlast a pool's start: a minute or two of a core."""


def choose_engine(execution: Execution, federation: Federation) -> Execution:
    """Return an execution by the engine that ``auto`` stands for: local, or a pool of a process for each core.

    There is a pool if the run's trainings last, on a CPU, in float32, and processes can be sent the run. PyTorch's
    number of threads (OMP_NUM_THREADS) is that of the cores.
    """
    if execution.engine != "auto":
        return execution
    cores = min(usable_cores(), torch.get_num_threads(), federation.run.most_clients)
    several = execution.device == "cpu" and execution.precision == "fp32" and cores > 1
    if (
        several
        and dense_multiply_adds(federation, execution.last_round(federation.run)) >= LASTING
        and sendable(federation)
    ):
        return replace(execution, engine=f"pool:{cores}")
    return replace(execution, engine="local")


def dense_multiply_adds(federation: Federation, rounds: int) -> float:
    """Return about how many multiply-adds the clients' trainings of all rounds are, were they dense.

    They are three times those of a forward pass for each example.
    """
    run, train = federation.run, federation.dataset.train
    x, _ = train.batch(torch.arange(2) % max(1, len(train)))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        apply_model(federation.model().eval(), x)
    examples = len(train) * (1 - run.task.validation) * run.most_clients / max(1, run.task.clients)
    products = float(counter.get_total_flops()) / 2 / 2
    return 3 * products * examples * run.epochs * rounds


def sendable(federation: Federation) -> bool:
    """Tell whether other processes can be sent the run, and shared memory has room for its training examples twice."""
    try:
        check_sendable(federation)
        return shutil.disk_usage(SHARED_MEMORY).free > 2 * federation.dataset.train.nbytes
    except InputError:
        return False
    except OSError:  # no such folder: the system has no limit of its own
        return True


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
    if execution.precision != "fp32" and base not in ("auto", "local", "cohort"):
        raise InputError(f"--precision {execution.precision} is for --engine local and cohort:N")
    if base == "flower" and not kind.make and execution.device != "cpu":
        raise InputError("--engine flower computes on the CPU: use --engine local for --device cuda")
    return kind, int(number) if number.isdecimal() else 0


def _elsewhere(base: str, kinds: Mapping[str, EngineKind]) -> str:
    """Return where Flower's engines are, if one of them is asked for and is not of ``kinds``."""
    if base != "flower" or "flower:N" in kinds:
        return ""
    return "; over Flower: fedsieve run RECIPE --engine flower, or from Python engine=fedsieve.flower.engine.inline()"
