"""The peak memory of a training step: how far the resident set of a fresh process grows to take three steps.

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
from functools import cache
from pathlib import Path

from fedsieve.cli.bench.fresh import run_fresh
from fedsieve.cli.bench.measurement import least
from fedsieve.cli.bench.training import LAYOUTS, dense_step, sparse_step, sparse_trainer
from fedsieve.cli.bench.workload import Workload
from fedsieve.kernels import unavailable_reason

STEPS = PROCESSES = 3
ITSELF = Path("/proc/self")


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
    _trim_heap()
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


def _trim_heap() -> None:
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
