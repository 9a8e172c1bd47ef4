"""The time of a whole training step, sparse against dense: forward, loss, backward and optimizer on one batch.

Dense is the faster of PyTorch's two layouts, in fp32 and under bf16 autocast, compiled too if asked for. On a frozen
mask it is masked dense training; for SWAT, which keeps dense master weights, plain dense training. Loading data is
excluded. All variants run in turns in one process; every time is a median of undisturbed samples, one sample of SWAT
being whole periods of steps.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

from fedsieve.cli.bench import memory
from fedsieve.cli.bench.cases import PERIOD, Case
from fedsieve.cli.bench.clock import Work, warm
from fedsieve.cli.bench.compare import Effort, best, compared
from fedsieve.cli.bench.fresh import fresh
from fedsieve.cli.bench.training import LAYOUTS, dense, sparse, trainer
from fedsieve.client.process import keep_freed_memory
from fedsieve.kernels import reason


@dataclass(frozen=True)
class Row:
    """One case, measured; None where it could not be. Times in ms, memory in MB of 10^6 bytes."""

    model: str
    batch: int
    sparsity: float
    rule: str
    storage: str
    density_per_multiply_add: float | None
    """Multiply-adds of the sparse step over those of the dense one: a speed-up is to be compared with its inverse."""
    ms_sparse: float | None
    ms_dense_fp32: float | None
    ms_dense_bf16: float | None
    ratio_fp32: float | None
    ratio_bf16: float | None
    peak_mb_sparse: float | None
    peak_mb_dense: float | None
    """Of dense training in fp32."""
    samples_kept: int
    samples_dropped: int


def measured(case: Case, effort: Effort) -> Row:
    """Return the case's row; its times and its peaks are each measured in a process of their own."""
    there = reason() is None
    return Row(
        **{name: getattr(case, name) for name in ("model", "batch", "sparsity", "rule", "storage")},
        **best([fresh(timed, case, effort.threads, **asdict(effort)) for _ in range(effort.processes)]),
        peak_mb_sparse=memory.peak(case, effort.threads) if there else None,
        peak_mb_dense=memory.dense_peak(case.model, case.batch, effort.threads),
    )


def timed(case: Case, **effort: Any) -> dict[str, Any]:
    """Return the part of the case's row that tells times and density, measured in this process."""
    keep_freed_memory()
    aim = Effort(**effort)
    variants = product(("fp32", "bf16"), LAYOUTS, (False, True) if aim.compiled else (False,))
    works: dict[tuple[str, ...], Work] = {
        (kind, layout, str(by_compiler)): warm(dense(case, kind, layout, case.rule == "frozen", by_compiler))
        for kind, layout, by_compiler in variants
    }
    density = None
    if reason() is None:
        own = trainer(case)
        works["sparse",] = warm(sparse(own, case), PERIOD if case.rule == "swat" else 1)
        real, whole = own.multiply_adds
        density = real / whole
    return compared(works, aim) | {"density_per_multiply_add": density}
