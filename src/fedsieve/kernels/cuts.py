"""Operations that select the largest numbers of something, and the memory that they share."""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

MADV_HUGEPAGE = 14


@dataclass
class Cutting:
    """An operation that selects: exactly every ``period`` steps, ``count(n)`` numbers of n samples."""

    op: Any
    period: int
    count: Callable[[int], int]
    each: Callable[[int], float]
    """What a number that passed multiplies, in a step of n samples."""
    threshold: Tensor = field(default_factory=lambda: torch.zeros(1))
    found: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.int64))

    def work(self, samples: int) -> float:
        """Return the multiply-adds of the last step."""
        return int(self.found) * self.each(samples)


class Scratch:
    """Memory that layers use one after another."""

    def __init__(self) -> None:
        self.sizes = dict.fromkeys(("lists", "starts", "blocks", "sums", "second"), 0)
        self.threads = 0

    def need(self, **sizes: int) -> None:
        """Grow to the largest of all layers."""
        self.sizes = {name: max(size, sizes.get(name, 0)) for name, size in self.sizes.items()}

    def make(self) -> None:
        """Allocate what does not depend on the number of threads."""
        self.position, self.value = huge(self.sizes["lists"]), huge(self.sizes["lists"]).view(torch.float32)
        self.start = torch.empty(self.sizes["starts"], dtype=torch.int32)
        self.block = huge(self.sizes["blocks"]).view(torch.float32)
        self.second = torch.empty(self.sizes["second"])

    def grow(self, threads: int) -> bool:
        """Allocate for at least this many threads; tells whether anything moved."""
        if threads <= self.threads:
            return False
        self.threads = threads
        self.sums = torch.empty(threads * self.sizes["sums"])
        self.work = torch.empty(threads * 4 * 2048, dtype=torch.int32)
        return True


def huge(words: int) -> Tensor:
    """Return uninitialised int32 memory, in huge pages where Linux gives them: long walks are slow in small ones."""
    memory = torch.empty(words, dtype=torch.int32)
    libc, page = ctypes.CDLL(None), 2 << 20
    start = -(-memory.data_ptr() // page) * page
    size = (memory.data_ptr() + 4 * words - start) // page * page
    if sys.platform == "linux" and size > 0:
        libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), MADV_HUGEPAGE)
    return memory


def zeros(count: int) -> Tensor:
    """Return float32 zeros [count] that take memory only as they are touched."""
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    return torch.frombuffer(mmap.mmap(-1, 4 * count + 4, **private), dtype=torch.float32)[:count]


def give_back() -> None:
    """Return freed memory to the system, where the C library can."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
