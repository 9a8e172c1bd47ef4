"""The operations of the native library: ``native/abi.h``, structure by structure and field by field."""

from __future__ import annotations

from ctypes import POINTER, Structure, c_float, c_int32, c_int64, c_void_p
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

WORDS = 16
"""Words of a block: the lanes of a position."""


def fields_of(*groups: tuple[Any, str]) -> list[tuple[str, Any]]:
    """Return a structure's fields in order, from pairs of a type and the names that have it."""
    return [(name, kind) for kind, names in groups for name in names.split()]


class FeatureMap(Structure):
    """An activation tensor in the layout of the kernels; ``packed``: bfloat16, two numbers a word."""

    _fields_ = fields_of((c_void_p, "data"), (c_int32, "channels blocks height width halo packed gap"))

    @property
    def line(self) -> int:
        """Words from one row of positions to the next."""
        return int(self.width + 2 * self.halo) * WORDS

    @property
    def channel(self) -> int:
        """Words from one channel to the next."""
        return self.line * int(self.height + 2 * self.halo) * int(self.blocks) + int(self.gap)

    @property
    def words(self) -> int:
        """Words in all."""
        return self.channel * int(self.channels)

    def part(self, first: int, channels: int) -> FeatureMap:
        """Return some of the channels, as a map that lies in this one."""
        place = None if self.data is None else self.data + 4 * self.channel * first
        return FeatureMap(place, channels, self.blocks, self.height, self.width, self.halo, self.packed, self.gap)


MapPointer = POINTER(FeatureMap)


class Operation(Structure):
    """One operation, of a ``kind`` of ``native/abi.h``: set its fields by name."""

    kind: ClassVar[int]


class GatherOp(Operation):
    """A sparse product: forward, or the input's gradient."""

    kind = 0
    _fields_ = fields_of(
        (FeatureMap, "in_ out"),
        (c_void_p, "row offset value bias"),
        (MapPointer, "add"),
        (c_int32, "rows height width stride_in stride_out top left relu"),
        (c_void_p, "tap"),
        (c_int32, "unit kernel padding"),
    )


class DotOp(Operation):
    """The gradient of the weights on a mask."""

    kind = 1
    _fields_ = fields_of((GatherOp, "of"), (c_void_p, "grad second"))


class NormOp(Operation):
    """BatchNorm or GroupNorm, bias, sum and ReLU: each of them optional."""

    kind = 2
    _fields_ = fields_of(
        (FeatureMap, "y out"),
        (MapPointer, "add"),
        (c_void_p, "gamma beta running_mean running_var mean invstd"),
        (c_float, "momentum eps"),
        (c_int32, "samples training relu groups positions"),
        (c_void_p, "sums"),
    )

    def set_group_norm(self, norm: nn.GroupNorm, statistics: Tensor, sums: Tensor) -> None:
        """Make it GroupNorm's, with memory for means and inverse deviations, and for sums (``group_norm_memory``)."""
        self.groups, self.eps = norm.num_groups, norm.eps
        self.mean, self.invstd = (address(row) for row in statistics)
        self.sums = address(sums)


class NormBackwardOp(Operation):
    """The gradients of a NormOp."""

    kind = 3
    _fields_ = fields_of((NormOp, "of"), (FeatureMap, "grad grad_y"), (c_void_p, "grad_gamma grad_beta"))


class PoolOp(Operation):
    """Maximum or mean over windows, or its gradient."""

    kind = 4
    _fields_ = fields_of(
        (FeatureMap, "in_ out grad_out grad_in"), (c_int32, "kernel stride padding average backward accumulate")
    )


class CopyOp(Operation):
    """A copy, a sum in place, or a change between maps and features."""

    kind = 5
    COPY, ADD, FLATTEN, UNFLATTEN, ZERO = range(5)
    _fields_ = fields_of((FeatureMap, "from_ to"), (c_int32, "mode"))


class PackOp(Operation):
    """Samples into a map, or out of it."""

    kind = 6
    _fields_ = fields_of((FeatureMap, "map"), (c_void_p, "plain"), (c_int32, "samples unpack"))


class LossOp(Operation):
    """Mean cross-entropy and its gradient."""

    kind = 7
    _fields_ = fields_of((FeatureMap, "logits grad"), (c_void_p, "label loss"), (c_int32, "samples"))


class SgdOp(Operation):
    """A step of stochastic gradient descent on a vector of numbers."""

    kind = 8
    _fields_ = fields_of(
        (c_void_p, "w velocity grad"),
        (c_int64, "count"),
        (c_float, "rate momentum decay power"),
        (c_void_p, "value"),
        (c_int32, "nesterov chained"),
    )


class SelectionArgs(Structure):
    """How many of the largest numbers to select, and the threshold that they reach: the C structure ``Cut``."""

    _fields_ = fields_of((c_int64, "count"), (c_int32, "exact"), (c_void_p, "threshold selected work"))


class Candidates(Structure):
    """Which weights reach a threshold, recorded as they are written: the C structure ``Noted``."""

    _fields_ = fields_of((c_void_p, "marks value count"), (c_int64, "capacity"), (c_void_p, "threshold"))


class TopOp(Operation):
    """The largest weights of a dense layer, as lists."""

    kind = 9
    _fields_ = fields_of(
        (SelectionArgs, "top_k"),
        (c_void_p, "dense"),
        (c_int32, "out in_ kernel stride padding"),
        (c_int64, "channel line shift"),
        (c_void_p, "row offset value"),
        (c_int64, "back_channel back_line back_halo"),
        (c_void_p, "back_row back_offset back_value"),
        (c_int64, "capacity"),
        (c_void_p, "tally"),
        (Candidates, "candidates"),
    )


class KeepOp(Operation):
    """The largest activations of a map, as lists."""

    kind = 10
    _fields_ = fields_of(
        (SelectionArgs, "top_k"),
        (FeatureMap, "in_"),
        (c_int32, "samples groups group stride line plane corner"),
        (c_void_p, "start position value"),
    )


class PruneOp(Operation):
    """A map's largest activations, zeros for the others."""

    kind = 11
    _fields_ = fields_of((SelectionArgs, "top_k"), (FeatureMap, "in_ out"), (c_int32, "samples"))


class WideOp(Operation):
    """The gradient of a dense weight from selected inputs, and the step of SGD that it makes."""

    kind = 12
    _fields_ = fields_of(
        (FeatureMap, "grad"),
        (c_int32, "halo"),
        (c_void_p, "blocks"),
        (POINTER(KeepOp), "from_"),
        (c_int32, "kernel padding"),
        (c_void_p, "dense velocity sums grad_out"),
        (c_float, "rate momentum decay"),
        (c_int32, "phase"),
        (Candidates, "candidates"),
    )


class TakeOp(Operation):
    """Values picked out of a vector."""

    kind = 13
    _fields_ = fields_of((c_void_p, "dense index value"), (c_int64, "count"))


class Unfold(Structure):
    """How a sample's map is laid out anew, for a convolution to be a GatherOp."""

    _fields_ = fields_of(
        (c_void_p, "in_ mask"),
        (c_int64, "in_channel out_channel"),
        (c_int32, "channels height width lines rows columns kernel stride padding"),
    )


class ConvolutionOp(Operation):
    """A convolution of one sample."""

    kind = 14
    _fields_ = fields_of((Unfold, "in_"), (GatherOp, "of"))


class WindowOp(Operation):
    """Maximum or mean over the windows of a sample's map."""

    kind = 15
    _fields_ = fields_of(
        (c_void_p, "in_ out"),
        (c_int64, "in_channel out_channel"),
        (c_int32, "channels height width out_height out_width kernel stride padding average"),
    )


class LinearOp(Operation):
    """A linear layer of one sample."""

    kind = 16
    _fields_ = fields_of((c_void_p, "x y row index value bias add"), (c_int32, "rows relu"))


class AdamOp(Operation):
    """A step of Adam on a vector of numbers."""

    kind = 17
    _fields_ = fields_of(
        (c_void_p, "w mean square grad"),
        (c_int64, "count"),
        (c_float, "fresh_mean fresh_square eps decay keep rate root power"),
        (c_void_p, "value"),
        (c_int32, "chained"),
    )


class AdjustOp(Operation):
    """What becomes of a gradient before the step."""

    kind = 18
    PART = 4096
    """Numbers whose squares make one of the sums."""
    _fields_ = fields_of(
        (c_void_p, "grad w start shift"), (c_int64, "count"), (c_float, "power mu"), (c_void_p, "sums")
    )


class ClipOp(Operation):
    """A gradient scaled down, by the norm of several."""

    kind = 19
    _fields_ = fields_of(
        (c_void_p, "grad"), (c_int64, "count"), (c_void_p, "sums"), (c_int64, "parts"), (c_float, "most")
    )


class ActivationOp(Operation):
    """An activation, or its gradient."""

    kind = 20
    FUNCTIONS = ("sigmoid", "silu", "gelu", "gelu_tanh", "hardswish", "tanh")
    _fields_ = fields_of((FeatureMap, "in_ grad out"), (c_int32, "function"))

    @classmethod
    def of(cls, function: str, x: FeatureMap, out: FeatureMap, grad: FeatureMap | None = None) -> ActivationOp:
        """Return that of a function by name; of its gradient, where there is the output's."""
        return cls(x, grad or FeatureMap(), out, cls.FUNCTIONS.index(function))


class ScatterOp(Operation):
    """The input's gradient of a product whose rows share their entries."""

    kind = 21
    _fields_ = fields_of((GatherOp, "of"), (c_int32, "accumulate"))


class RoofOp(Operation):
    """Multiply-adds in registers, or on numbers that are read: what the machine can do at most."""

    kind = 22
    _fields_ = fields_of((c_void_p, "memory"), (c_int64, "count times"), (c_int32, "reads"))


def group_norm_memory(groups: int, channels: int, blocks: int, packed: bool) -> tuple[Tensor, Tensor]:
    """Return memory for GroupNorm's statistics [2, ...], and for its sums, on maps of so many blocks."""
    samples = 2 * WORDS if packed else WORDS
    sums = torch.empty((7 + blocks) * (2 * groups * samples + 2 * channels))
    return torch.zeros(2, blocks * groups * samples), sums


class Instruction(Structure):
    """An operation in a program's list: its kind and its address."""

    _fields_ = fields_of((c_int64, "kind"), (c_void_p, "args"))


def address(x: Tensor | None, offset: int = 0) -> int | None:
    """Return the address of element ``offset`` of a contiguous tensor; None of None."""
    if x is None:
        return None
    assert x.is_contiguous()
    return x.data_ptr() + offset * x.element_size()
