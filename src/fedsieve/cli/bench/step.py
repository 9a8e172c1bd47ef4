"""The time and the peak memory of a whole training step, sparse against dense.

A step is forward, loss, backward and optimizer on one batch; loading data is excluded. Dense is the faster of PyTorch's
two layouts, in fp32 and under bf16 autocast, compiled too if asked for. On a frozen mask it is masked dense training;
for SWAT, which keeps dense master weights, plain dense training. All variants run in turns in one process; every time
is a median of undisturbed samples, one sample of SWAT being whole periods of steps.

The peak memory of a training step: how far the resident set of a fresh process grows to take three steps.

Counted is everything that the process holds in memory at its fullest beyond what it held just before the network was
made: weights, gradients, momentum, masks and lists, the batch, activations, workspace, code that PyTorch generates,
and for the sparse step the plain network too, as far as ``low_memory`` lets it hold any (its masked layers have no
weights of their own until they are written back). Not counted are the interpreter, the libraries, the pool of threads
and the drawing of a random mask: that has been done before, a small network has been trained for a step each way, and
freed memory given back. Where malloc puts a block differs from time to time, by up to a copy of the largest weight: the
least of three processes counts. The dense step is plain training, without a mask, in the layout that takes less.
"""

from __future__ import annotations

import ctypes
import time
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

from fedsieve.cli.bench.measurement import (
    WALL,
    Effort,
    Measurement,
    RepeatedCall,
    compare_times,
    least,
    measure,
    run_fresh,
    warm_up,
)
from fedsieve.cli.bench.roof import measure_roof, roof_seconds
from fedsieve.cli.bench.workload import LAYOUTS, Workload, dense_step, sparse_step, sparse_trainer
from fedsieve.client.process import keep_freed_memory
from fedsieve.kernels import unavailable_reason

STEPS = PROCESSES = 3
ITSELF = Path("/proc/self")


def measure_step(workload: Workload, effort: Effort) -> Measurement:
    """Return the times and the peak memory of a training step, each measured in a process of its own."""
    peaks = {
        "peak_mb_sparse": sparse_peak(workload, effort.threads),
        "peak_mb_dense": dense_peak(workload.model, workload.batch, effort.threads),
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
    density = roof_ms = None
    if unavailable_reason() is None:
        trainer = sparse_trainer(workload)
        calls["sparse",] = warm_up(sparse_step(trainer, workload), workload.period)
        real, dense = trainer.multiply_adds
        density = real / dense
    times = compare_times(calls, aim)
    if density is not None:
        by_wall = times["clock"] == WALL
        roof = measure_roof(aim.threads) if by_wall else measure_roof(1, time.thread_time)
        roof_ms = 1e3 * roof_seconds(trainer, roof)
    return times | {"density_per_multiply_add": density, "roof_ms": roof_ms}


def sparse_peak(workload: Workload, threads: int) -> float | None:
    """Return the peak of the workload's sparse training, in MB of 10^6 bytes; None where nothing tells it or trains."""
    if unavailable_reason() is not None:
        return None
    return _fresh_peak(workload, threads, kind="sparse")


@cache
def dense_peak(model: str, batch: int, threads: int, kind: str = "fp32") -> float | None:
    """Return the peak of dense training in ``kind`` (fp32, bf16), in MB of 10^6 bytes."""
    workload = Workload(model, batch)
    return least([_fresh_peak(workload, threads, kind=kind, layout=layout) for layout in LAYOUTS])


def _fresh_peak(workload: Workload, threads: int, **options: str) -> float | None:
    return least([run_fresh(memory_growth, workload, threads, **options) for _ in range(PROCESSES)])


def memory_growth(workload: Workload, kind: str = "sparse", layout: str = "") -> float | None:
    """Return the MB by which this process grows for training steps; None where the system does not tell."""
    if not (ITSELF / "clear_refs").exists():
        return None
    small = Workload("digits_net", sparsity=0.5)
    for before in ("fp32", "bf16"):
        dense_step(small, before, "contiguous", frozen=False)()
    if unavailable_reason() is None:
        sparse_step(sparse_trainer(small), small)()
    workload.mask(workload.network())  # drawing it, which is done once, takes more than it
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
    start = _resident("VmRSS")
    (ITSELF / "clear_refs").write_text("5")  # the peak starts anew: proc(5)
    if kind == "sparse":
        step = sparse_step(sparse_trainer(workload, low_memory=True), workload)
    else:
        step = dense_step(workload, kind, layout, frozen=False)
    for _ in range(STEPS):
        step()
    return (_resident("VmHWM") - start) / 1e6


def _resident(field: str) -> int:
    lines = (ITSELF / "status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) * 1024
