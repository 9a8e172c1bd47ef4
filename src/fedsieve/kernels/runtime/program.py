"""Programs: lists of native operations, and of calls of Python in between."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import c_int64, c_void_p
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any, TypeAlias

from fedsieve.kernels.runtime import library
from fedsieve.kernels.runtime.abi import Instruction, Operation

Step: TypeAlias = Operation | Callable[[], None]
"""An operation of the library's, or a call of Python's in between."""


@cache
def native() -> ctypes.CDLL:
    """Return the library, its functions typed and its structures checked against ours."""
    lib = library.load_library()
    lib.fs_run.argtypes = [c_void_p, c_int64, ctypes.c_int]
    lib.fs_run.restype = lib.fs_each.restype = None
    lib.fs_each.argtypes = [c_void_p, c_void_p, c_int64, ctypes.c_int]
    lib.fs_size.restype = c_int64
    for name, numbers, lists in (("fs_entries", 6, 3), ("fs_transposed", 8, 4)):
        getattr(lib, name).restype = None
        getattr(lib, name).argtypes = [c_void_p] + [c_int64] * numbers + [c_void_p] * lists
    for kind in Operation.__subclasses__():
        assert lib.fs_size(kind.kind) == ctypes.sizeof(kind), kind.__name__
    return lib


@dataclass
class Program:
    """A list of steps, run in order: successive native operations are one call."""

    steps: list[Step] = field(default_factory=list)
    keep: list[Any] = field(default_factory=list)
    """What the operations point to, kept alive."""

    def run(self) -> None:
        """Run all steps with ``library.get_num_threads()`` threads."""
        threads = library.get_num_threads()
        for call in self.calls:
            if isinstance(call, tuple):
                native().fs_run(*call, threads)
            else:
                call()

    @cached_property
    def calls(self) -> list[Any]:
        """The address and length of each run of native operations, and what Python calls in between."""
        calls: list[Any] = []
        batch: list[Operation] = []

        def flush() -> None:
            if batch:
                array = (Instruction * len(batch))(*[Instruction(op.kind, ctypes.addressof(op)) for op in batch])
                self.keep.append((array, list(batch)))
                calls.append((ctypes.addressof(array), len(batch)))
                batch.clear()

        for step in self.steps:
            if isinstance(step, Operation):
                batch.append(step)
            else:
                flush()
                calls.append(step)
        flush()
        return calls


def run_each(programs: list[Program]) -> None:
    """Run programs that are native from end to end, at once: one thread each."""
    calls = [call for program in programs for call in program.calls]
    ops, counts = zip(*calls, strict=True)
    n = len(calls)
    native().fs_each((c_void_p * n)(*ops), (c_int64 * n)(*counts), n, min(n, library.get_num_threads()))
