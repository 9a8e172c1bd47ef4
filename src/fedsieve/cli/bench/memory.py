"""The peak memory of a training step: how far the resident set of a fresh process grows to take three steps.

Counted is everything that the process holds in memory at its fullest beyond what it held just before the network was
made: weights, gradients, momentum, masks and lists, the batch, activations, workspace, code that PyTorch generates,
and for the sparse step the plain network too, as far as a lean trainer lets it hold any (its masked layers have no
weights of their own until they are written back). Not counted are the interpreter, the libraries, the pool of threads
and the drawing of a random mask: that has been done before, a small network has been trained for a step each way, and
freed memory given back. Where malloc puts a block differs from time to time, by up to a copy of the largest weight: the
least of three processes counts. The dense step is plain training, without a mask, in the layout that takes less.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

from fedsieve.cli.bench.cases import Case
from fedsieve.cli.bench.fresh import fresh
from fedsieve.cli.bench.training import LAYOUTS, dense, sparse, trainer
from fedsieve.kernels import reason

STEPS = PROCESSES = 3
ITSELF = Path("/proc/self")


def peak(case: Case, threads: int) -> float | None:
    """Return the peak of the case's sparse training, in MB of 10^6 bytes; None where the system does not tell."""
    return _least(case, threads, kind="sparse")


@cache
def dense_peak(model: str, batch: int, threads: int, kind: str = "fp32") -> float | None:
    """Return the peak of dense training in ``kind`` (fp32, bf16), in MB of 10^6 bytes."""
    found = [_least(Case(model, batch), threads, kind=kind, layout=layout) for layout in LAYOUTS]
    return min((value for value in found if value is not None), default=None)


def _least(case: Case, threads: int, **options: str) -> float | None:
    found = [fresh(grown, case, threads, **options) for _ in range(PROCESSES)]
    return min((value for value in found if value is not None), default=None)


def grown(case: Case, kind: str = "sparse", layout: str = "") -> float | None:
    """Return the MB by which this process grows for training steps; None where the system does not tell."""
    if not (ITSELF / "clear_refs").exists():
        return None
    small = Case("digits_net", sparsity=0.5)
    for before in ("fp32", "bf16"):
        dense(small, before, "contiguous", frozen=False)()
    if reason() is None:
        sparse(trainer(small), small)()
    case.mask(case.network())  # drawing it, which is done once, takes more than it
    _give_back()
    start = _resident("VmRSS")
    (ITSELF / "clear_refs").write_text("5")  # the peak starts anew: proc(5)
    step = sparse(trainer(case, lean=True), case) if kind == "sparse" else dense(case, kind, layout, frozen=False)
    for _ in range(STEPS):
        step()
    return (_resident("VmHWM") - start) / 1e6


def _resident(field: str) -> int:
    lines = (ITSELF / "status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) * 1024


def _give_back() -> None:
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
