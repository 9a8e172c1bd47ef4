"""The time of a whole training step, sparse against dense: forward, loss, backward and optimizer on one batch.

Dense is the faster of PyTorch's two layouts, in fp32 and under bf16 autocast, compiled too if asked for. On a frozen
mask it is masked dense training; for SWAT, which keeps dense master weights, plain dense training. Loading data is
excluded. All variants run in turns in one process; every time is a median of undisturbed samples, one sample of SWAT
being whole periods of steps.
"""

from __future__ import annotations

from itertools import product
from typing import Any

from fedsieve.cli.bench import memory
from fedsieve.cli.bench.clock import RepeatedCall, warm_up
from fedsieve.cli.bench.measurement import Effort, Measurement, compare_times, measure
from fedsieve.cli.bench.training import LAYOUTS, dense_step, sparse_step, sparse_trainer
from fedsieve.cli.bench.workload import PERIOD, Workload
from fedsieve.client.process import keep_freed_memory
from fedsieve.kernels import unavailable_reason


def measure_step(workload: Workload, effort: Effort) -> Measurement:
    """Return the times and the peak memory of a training step, each measured in a process of its own."""
    peaks = {
        "peak_mb_sparse": memory.sparse_peak(workload, effort.threads),
        "peak_mb_dense": memory.dense_peak(workload.model, workload.batch, effort.threads),
    }
    return measure(time_step, workload, effort, **peaks)


def time_step(workload: Workload, **effort: Any) -> dict[str, Any]:
    """Return the times of a training step and its density a multiply-add, measured in this process."""
    keep_freed_memory()
    aim = Effort(**effort)
    variants = product(("fp32", "bf16"), LAYOUTS, (False, True) if aim.compiled else (False,))
    calls: dict[tuple[str, ...], RepeatedCall] = {
        (kind, layout, str(by_compiler)): warm_up(
            dense_step(workload, kind, layout, workload.rule == "frozen", by_compiler)
        )
        for kind, layout, by_compiler in variants
    }
    density = None
    if unavailable_reason() is None:
        trainer = sparse_trainer(workload)
        calls["sparse",] = warm_up(sparse_step(trainer, workload), PERIOD if workload.rule == "swat" else 1)
        real, dense = trainer.multiply_adds
        density = real / dense
    return compare_times(calls, aim) | {"density_per_multiply_add": density}
