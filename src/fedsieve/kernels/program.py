"""Programs: lists of native operations, and of calls of Python in between; and the memory of their maps.

That is one arena, in which a buffer's place is another's once its last reader is done.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Callable
from ctypes import c_int64, c_void_p
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fedsieve.kernels.abi import FeatureMap, Instruction, Operation, address
from fedsieve.kernels.checks import LARGEST, Unsupported
from fedsieve.kernels.library import get_num_threads, native

CACHE_LINE = 64
"""Bytes: maps begin at its multiples."""
MADV_HUGEPAGE = 14

Step: TypeAlias = Operation | Callable[[], None]
"""An operation of the library's, or a call of Python's in between."""


@dataclass
class Program:
    """A list of steps, run in order: successive native operations are one call."""

    steps: list[Step] = field(default_factory=list)
    keep: list[Any] = field(default_factory=list)
    """What the operations point to, kept alive."""

    def run(self, threads: int = 0) -> None:
        """Run all steps with so many threads; 0: ``library.get_num_threads()``."""
        threads = threads or get_num_threads()
        for call in self.calls:
            if isinstance(call, tuple):
                native().fs_run(*call, threads)
            else:
                call()

    @cached_property
    def calls(self) -> list[Any]:
        """The address and length of each run of native operations, and what Python calls in between."""
        calls: list[Any] = []
        for are_native, steps in groupby(self.steps, lambda step: isinstance(step, Operation)):
            ops: list[Any] = [*steps]
            if are_native:
                array = (Instruction * len(ops))(*[Instruction(op.kind, ctypes.addressof(op)) for op in ops])
                self.keep.append((array, ops))
                calls.append((ctypes.addressof(array), len(ops)))
            else:
                calls += ops
        return calls


def run_each(programs: list[Program]) -> None:
    """Run programs that are native from end to end, at once: one thread each."""
    calls = [call for program in programs for call in program.calls]
    ops, counts = zip(*calls, strict=True)
    n = len(calls)
    native().fs_each((c_void_p * n)(*ops), (c_int64 * n)(*counts), n, min(n, get_num_threads()))


class Buffer(FeatureMap):
    """A map in an arena: needed from step ``first`` to ``last``, ``offset`` words behind the arena's beginning.

    ``data`` is set when the arena has settled: until then no operation may be made of it.
    """

    first = last = offset = -1
    __hash__ = object.__hash__

    def __init__(self, channels: int, blocks: int, height: int, width: int, halo: int = 0, gap: int = 0):
        super().__init__(None, channels, blocks, height, width, halo, 0, gap)
        if self.words > LARGEST:
            raise Unsupported("a map of more than 2^31 words")


@dataclass
class Arena:
    """Buffers, and the operations that will use them, in order."""

    packed: bool
    low_memory: bool = False
    """Whether all buffers may take over from one another, not only those of maps of one size, in which each thread has
    the same places. What another core wrote is slow to write."""
    slack: int = 0
    """Words before and behind all buffers, for operations that read beyond one."""
    waiting: list[Callable[[], Step]] = field(default_factory=list)
    buffers: list[Buffer] = field(default_factory=list)
    memory: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int32))

    def step(self, make: Callable[[], Step], *buffers: FeatureMap) -> None:
        """Add an operation that uses ``buffers``; it is made once they have their places."""
        for buffer in buffers:
            assert isinstance(buffer, Buffer)
            if buffer.first < 0:
                buffer.first = len(self.waiting)
                self.buffers.append(buffer)
            buffer.last = len(self.waiting)
        self.waiting.append(make)

    def settle(self) -> Program:
        """Give every buffer its place, and return the program."""
        size, sizes = 0, dict[int, list[Buffer]]()
        for buffer in self.buffers:
            sizes.setdefault(0 if self.low_memory else buffer.channel, []).append(buffer)
        for buffers in sizes.values():
            size += _place(buffers, size)
        self.memory = huge_pages(size + CACHE_LINE // 4 + 2 * self.slack)
        aligned = -(self.memory.data_ptr() + 4 * self.slack) % CACHE_LINE // 4 + self.slack
        for buffer in self.buffers:
            buffer.data, buffer.packed = address(self.memory, aligned + buffer.offset), int(self.packed)
        return Program([make() for make in self.waiting], [self.memory])


def _place(buffers: list[Buffer], start: int) -> int:
    """Place buffers so that those that meet in time do not overlap; return the words taken.

    Those needed longest come first, or those needed last; each as low as can be, or in the tightest gap: the
    least counts.
    """
    orders: list[Callable[[Buffer], int]] = [lambda b: b.first - b.last, lambda b: -b.last]
    tried = [_offsets(sorted(buffers, key=order), tight) for order in orders for tight in (False, True)]
    size, offsets = min(tried, key=lambda one: one[0])
    for buffer, offset in offsets.items():
        buffer.offset = start + offset
    return size


def _offsets(buffers: list[Buffer], tight: bool) -> tuple[int, dict[Buffer, int]]:
    """Place buffers one by one: return the words taken in all, and the offsets."""
    offsets: dict[Buffer, int] = {}
    for buffer in buffers:
        met = [(start, b.words) for b, start in offsets.items() if b.first <= buffer.last and buffer.first <= b.last]
        gaps, end = list[tuple[int, int]](), 0  # (words too many, offset)
        for start, words in sorted(met):
            if end + buffer.words <= start:
                gaps.append((start - end - buffer.words, end))
            end = max(end, start + words)
        offsets[buffer] = (min(gaps)[1] if tight else gaps[0][1]) if gaps else end
    return max(start + buffer.words for buffer, start in offsets.items()), offsets


def huge_pages(words: int) -> Tensor:
    """Return uninitialised int32 memory, in huge pages where Linux gives them: long walks are slow in small ones."""
    memory = torch.empty(words, dtype=torch.int32)
    libc, page = ctypes.CDLL(None), 2 << 20
    start = -(-memory.data_ptr() // page) * page
    size = (memory.data_ptr() + 4 * words - start) // page * page
    if sys.platform == "linux" and size > 0:
        libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), MADV_HUGEPAGE)
    return memory


def lazy_zeros(count: int) -> Tensor:
    """Return float32 zeros [count] that take memory only as they are touched."""
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    return torch.frombuffer(mmap.mmap(-1, 4 * count + 4, **private), dtype=torch.float32)[:count]


def trim_memory() -> None:
    """Return freed memory to the system, where the C library can."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
