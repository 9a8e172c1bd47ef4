"""The operations of a training step, as the native library reads them: ``native/abi.h``, field by field."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import POINTER, Structure, c_float, c_int32, c_int64, c_void_p
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any, ClassVar, TypeAlias

from torch import Tensor

from fedsieve.kernels import library

WORDS = 16
"""Of a block: the lanes of a position."""


class Map(Structure):
    """An activation tensor in the layout of the kernels: see ``native/abi.h``."""

    _fields_: ClassVar[list[Any]] = [("data", c_void_p)] + [
        (name, c_int32) for name in ("channels", "blocks", "height", "width", "halo", "packed")
    ]

    @property
    def line(self) -> int:
        """Words from one row of positions to the next."""
        return int(self.width + 2 * self.halo) * 16

    @property
    def channel(self) -> int:
        """Words from one channel to the next."""
        return self.line * int(self.height + 2 * self.halo) * int(self.blocks)


_MAP = POINTER(Map)


class Operation(Structure):
    """One operation: set its fields by name."""

    kind: ClassVar[int]


class Gather(Operation):
    """A sparse product: forward, or the input's gradient."""

    kind = 0
    _fields_: ClassVar[list[Any]] = (
        [("in_", Map), ("out", Map)]
        + [(name, c_void_p) for name in ("row", "offset", "value", "bias")]
        + [("add", _MAP)]
        + [(n, c_int32) for n in ("rows", "height", "width", "stride_in", "stride_out", "top", "left", "relu")]
        + [("tap", c_void_p)]
    )


class Dot(Operation):
    """The gradient of the weights on a mask."""

    kind = 1
    _fields_: ClassVar[list[Any]] = [("of", Gather), ("grad", c_void_p), ("second", c_void_p)]


class Norm(Operation):
    """BatchNorm, bias, sum and ReLU: each of them optional."""

    kind = 2
    _fields_: ClassVar[list[Any]] = (
        [("y", Map), ("out", Map), ("add", _MAP)]
        + [(n, c_void_p) for n in ("gamma", "beta", "running_mean", "running_var", "mean", "invstd")]
        + [("momentum", c_float), ("eps", c_float)]
        + [(name, c_int32) for name in ("samples", "training", "relu")]
    )


class NormBackward(Operation):
    """The gradients of a Norm."""

    kind = 3
    _fields_: ClassVar[list[Any]] = [
        ("of", Norm),
        ("grad", Map),
        ("grad_y", Map),
        ("grad_gamma", c_void_p),
        ("grad_beta", c_void_p),
    ]


class Pool(Operation):
    """Maximum or mean over windows, or its gradient."""

    kind = 4
    _fields_: ClassVar[list[Any]] = [(name, Map) for name in ("in_", "out", "grad_out", "grad_in")] + [
        (name, c_int32) for name in ("kernel", "stride", "padding", "average", "backward", "accumulate")
    ]


class Copy(Operation):
    """A copy, a sum in place, or a change between maps and features."""

    kind = 5
    _fields_: ClassVar[list[Any]] = [("from_", Map), ("to", Map), ("mode", c_int32)]


class Pack(Operation):
    """Samples into a map, or out of it."""

    kind = 6
    _fields_: ClassVar[list[Any]] = [("map", Map), ("plain", c_void_p), ("samples", c_int32), ("unpack", c_int32)]


class Loss(Operation):
    """Mean cross-entropy and its gradient."""

    kind = 7
    _fields_: ClassVar[list[Any]] = [
        ("logits", Map),
        ("grad", Map),
        ("label", c_void_p),
        ("loss", c_void_p),
        ("samples", c_int32),
    ]


class Sgd(Operation):
    """A step of stochastic gradient descent on a vector of numbers."""

    kind = 8
    _fields_: ClassVar[list[Any]] = (
        [(name, c_void_p) for name in ("w", "velocity", "grad")]
        + [("count", c_int64)]
        + [(name, c_float) for name in ("rate", "momentum", "decay", "power")]
        + [("value", c_void_p)]
    )


class Cut(Structure):
    """How many of the largest to take, and the threshold found."""

    _fields_: ClassVar[list[Any]] = [("count", c_int64), ("exact", c_int32)] + [
        (name, c_void_p) for name in ("threshold", "found", "work")
    ]


class Noted(Structure):
    """Which weights reach a threshold, noted as they are written."""

    _fields_: ClassVar[list[Any]] = [(name, c_void_p) for name in ("marks", "value", "count")] + [
        ("room", c_int64),
        ("threshold", c_void_p),
    ]


class Top(Operation):
    """The largest weights of a dense layer, as lists."""

    kind = 9
    _fields_: ClassVar[list[Any]] = (
        [("cut", Cut), ("dense", c_void_p)]
        + [(name, c_int32) for name in ("out", "in_", "kernel", "stride", "padding")]
        + [(name, c_int64) for name in ("channel", "line", "shift")]
        + [(name, c_void_p) for name in ("row", "offset", "value")]
        + [(name, c_int64) for name in ("back_channel", "back_line", "back_halo")]
        + [(name, c_void_p) for name in ("back_row", "back_offset", "back_value")]
        + [("capacity", c_int64), ("tally", c_void_p), ("noted", Noted)]
    )


class Keep(Operation):
    """The largest activations of a map, as lists."""

    kind = 10
    _fields_: ClassVar[list[Any]] = (
        [("cut", Cut), ("in_", Map)]
        + [(name, c_int32) for name in ("samples", "groups", "group", "stride", "line", "plane", "corner")]
        + [(name, c_void_p) for name in ("start", "position", "value")]
    )


class Prune(Operation):
    """A map's largest activations, zeros for the others."""

    kind = 11
    _fields_: ClassVar[list[Any]] = [("cut", Cut), ("in_", Map), ("out", Map), ("samples", c_int32)]


class Wide(Operation):
    """The gradient of a dense weight from kept inputs, and the step that it makes."""

    kind = 12
    _fields_: ClassVar[list[Any]] = (
        [("grad", Map), ("halo", c_int32), ("blocks", c_void_p), ("from_", POINTER(Keep))]
        + [("kernel", c_int32), ("padding", c_int32)]
        + [(name, c_void_p) for name in ("dense", "velocity", "sums", "grad_out")]
        + [(name, c_float) for name in ("rate", "momentum", "decay")]
        + [("phase", c_int32), ("noted", Noted)]
    )


class Take(Operation):
    """Values picked out of a vector."""

    kind = 13
    _fields_: ClassVar[list[Any]] = [("dense", c_void_p), ("index", c_void_p), ("value", c_void_p), ("count", c_int64)]


class Unfold(Structure):
    """How a sample's map is laid out anew, for a convolution to be a Gather."""

    _fields_: ClassVar = (
        [(name, c_void_p) for name in ("in_", "mask")]
        + [(name, c_int64) for name in ("in_channel", "out_channel")]
        + [(n, c_int32) for n in ("channels", "height", "width", "lines", "rows", "columns")]
        + [(n, c_int32) for n in ("kernel", "stride", "padding")]
    )


class Convolution(Operation):
    """A convolution of one sample."""

    kind = 14
    _fields_: ClassVar = [("in_", Unfold), ("of", Gather)]


class Window(Operation):
    """Maximum or mean over the windows of a sample's map."""

    kind = 15
    _fields_: ClassVar = (
        [(name, c_void_p) for name in ("in_", "out")]
        + [(name, c_int64) for name in ("in_channel", "out_channel")]
        + [(name, c_int32) for name in ("channels", "height", "width", "out_height", "out_width")]
        + [(name, c_int32) for name in ("kernel", "stride", "padding", "average")]
    )


class Linear(Operation):
    """A linear layer of one sample."""

    kind = 16
    _fields_: ClassVar = [(name, c_void_p) for name in ("x", "y", "row", "index", "value", "bias", "add")] + [
        (name, c_int32) for name in ("rows", "relu")
    ]


class _Op(Structure):
    _fields_: ClassVar[list[Any]] = [("kind", c_int64), ("args", c_void_p)]


Step: TypeAlias = Operation | Callable[[], None]
"""An operation of the library's, or a call of Python's in between."""


@cache
def native() -> ctypes.CDLL:
    """Return the library, its functions typed and its structures checked against ours."""
    lib = library.load()
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
    """A list of steps, run in order: runs of native operations are one call each."""

    steps: list[Step] = field(default_factory=list)
    keep: list[Any] = field(default_factory=list)
    """What the operations point to, kept alive."""

    def run(self) -> None:
        """Run all steps with ``library.threads()`` threads."""
        threads = library.threads()
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
                array = (_Op * len(batch))(*[_Op(op.kind, ctypes.addressof(op)) for op in batch])
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
    native().fs_each((c_void_p * n)(*ops), (c_int64 * n)(*counts), n, min(n, library.threads()))


def at(x: Tensor | None, offset: int = 0) -> int | None:
    """Return the address of a contiguous tensor's element."""
    if x is None:
        return None
    assert x.is_contiguous()
    return x.data_ptr() + offset * x.element_size()
