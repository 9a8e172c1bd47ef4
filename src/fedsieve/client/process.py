"""The process that a client trains in: memory, threads, chance and warnings."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from fedsieve.types import Data

DATA = 0.3
"""The share of a GPU's free memory up to which examples are kept there."""
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


def keep_freed_memory() -> None:
    """Ask glibc to reuse freed blocks of megabytes; by default it may hand each to the kernel and fault it in anew.

    A round of ten MNISTNet messages takes a fifth less time. Other C libraries are left as they are.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "gnu_get_libc_version"):
        for option, size in ((M_MMAP_THRESHOLD, 256 << 20), (M_TRIM_THRESHOLD, 512 << 20)):
            libc.mallopt(option, size)


def warn_in_one_line() -> None:
    """Show warnings as the command line shows mistakes: one line each, without the place in the source."""

    def show(message: Warning | str, *_: object, **__: object) -> None:
        print(f"fedsieve: warning: {message}", file=sys.stderr, flush=True)  # noqa: T201

    warnings.showwarning = show


_peaks = [0.0]


def peak_memory_mb(worker: float = 0.0) -> float:
    """Return the peak resident memory (MB of 10^6 bytes) of this process, or of the largest worker it was told of."""
    unit = 1 if sys.platform == "darwin" else 1024
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
    _peaks[0] = max(_peaks[0], own, worker)
    return round(_peaks[0], 1)


def usable_cores() -> int:
    """Return how many cores this process may use, where the system tells, or else how many there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def to_device(data: Data, where: str) -> Data:
    """Return examples on a device; those that take more than ``DATA`` of a GPU's free memory where they lie."""
    if where != "cpu" and data.nbytes > DATA * torch.cuda.mem_get_info(where)[0]:
        return data
    return data.to(where)


@contextmanager
def seeded(seed: int, cuda: list[torch.device]) -> Iterator[None]:
    """Seed PyTorch's own generators (dropout draws from them) for the block, then restore the caller's state."""
    with torch.random.fork_rng(cuda):
        torch.default_generator.manual_seed(seed)
        for device in cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


@contextmanager
def num_threads(n: int) -> Iterator[None]:
    """Compute with ``n`` threads inside the block: the bits of a result must not depend on the machine's cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def exact(device: str, precision: str = "fp32") -> Iterator[None]:
    """Compute on GPUs in a precision, and always to the same bits, for the block; on a CPU that is so."""
    if device == "cpu":
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what PyTorch asks for where bits must not change
    products = "ieee" if precision == "fp32" else "tf32"
    backends: Any = torch.backends
    settings: list[tuple[Any, str, Any]] = [
        (backends.cuda.matmul, "fp32_precision", products),
        (backends.cudnn.conv, "fp32_precision", products),
        (backends.cudnn.rnn, "fp32_precision", products),
        (backends.cudnn, "benchmark", False),
        (torch.utils.deterministic, "fill_uninitialized_memory", False),
    ]
    before = [getattr(place, name) for place, name, _ in settings]
    deterministic = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    for place, name, value in settings:
        setattr(place, name, value)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        for (place, name, _), value in zip(settings, before, strict=True):
            setattr(place, name, value)
        torch.use_deterministic_algorithms(deterministic[0], warn_only=deterministic[1])
