"""Exact top-k by counting on a GPU: what Triton's kernels are launched with, for one tensor or for a batch of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fedsieve.sparse.selection_kernels import (
    RANGES,
    STATE,
    count_equals,
    count_first_digit,
    count_next_digit,
    write_largest,
)

BLOCK, PROGRAMS = 2048, 2048
"""How many elements a block reads at once, and the most blocks of a pass: beyond, each reads several times."""
INTEGERS = {1: (torch.int8, tl.int8), 2: (torch.int16, tl.int16), 4: (torch.int32, tl.int32)}
"""What the bits of numbers are read as, by their bytes: PyTorch's and Triton's name."""
LARGEST = 2**30
"""The most elements of a tensor: positions are 32-bit integers."""


class Digit(NamedTuple):
    """A part of the key: how many bits are to its right, how many values it has, and the lowest."""

    shift: int
    bins: int
    lowest: int = 0


_HALF = (Digit(7, 256), Digit(0, 128))
DIGITS = {
    torch.float32: (Digit(23, 256), Digit(11, 4096), Digit(0, 2048)),
    torch.float16: _HALF,
    torch.bfloat16: _HALF,
    torch.int32: (Digit(23, 512, -256), Digit(11, 4096), Digit(0, 2048)),
}
"""The digits of the keys, by what they are made of; int32 is a key already."""


def select(x: Tensor, k: int | Tensor, out_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return ``x`` with all but its k largest zeroed, or as bool their mask, and the k-th largest magnitude (0-d).

    ``x``: float32, float16, bfloat16, or int32 keys, of which only a mask can be had; at least one element and at most
    ``LARGEST``. What is contiguous or channels_last is read as it lies, and the result lies like it; of any other a
    contiguous copy is made. ``k``: below 0 it counts as 0, beyond the number of elements as that; an integer on the
    host, or a 0-d tensor beside ``x``. For k = 0 the magnitude is a NaN. ``out_dtype``: bool, that of ``x``, or
    bfloat16 for float32.
    """
    x = x.detach() if _is_dense(x) else x.detach().contiguous()
    n = x.numel()
    out = torch.empty_like(x, dtype=out_dtype)
    threshold = torch.empty((), dtype=x.dtype, device=x.device)
    memory = torch.zeros(1, _words(x.dtype), dtype=torch.int32, device=x.device)
    k = k if isinstance(k, Tensor) else min(max(k, 0), n)
    _launch(x.dtype, out_dtype, memory, _integers(x), _integers(out), _integers(threshold), k, n, _layout(x), n)
    return out, threshold


class Batch:
    """Selections from tensors that stay where they are in memory, in the launches of one.

    ``tensors``: of one dtype and device, contiguous or channels_last, at least one element each. ``k``, ``out_dtype``:
    as for ``select``, but no mask; a tensor [tensors] of int64 on the device is read anew at each call. Raises
    ValueError if they are not so.
    """

    def __init__(self, tensors: Sequence[Tensor], k: Sequence[int] | Tensor, out_dtype: torch.dtype):
        self.tensors = [x.detach() for x in tensors]
        first = self.tensors[0]
        if not all(_is_dense(x) and (x.dtype, x.device) == (first.dtype, first.device) for x in self.tensors):
            raise ValueError("a batch selects from contiguous or channels_last tensors of one dtype and device")
        self.values = [torch.empty_like(x, dtype=out_dtype) for x in self.tensors]
        self.thresholds = torch.empty(len(tensors), dtype=first.dtype, device=first.device)
        self._memory = torch.zeros(len(tensors), _words(first.dtype), dtype=torch.int32, device=first.device)
        self._k = k if isinstance(k, Tensor) else torch.tensor(k, device=first.device)
        if (self._k.shape, self._k.device) != (self.thresholds.shape, first.device) or not self._k.is_contiguous():
            raise ValueError(f"a batch of {len(tensors)} tensors takes as many k, in one piece beside them")
        rows = [
            (x.data_ptr(), out.data_ptr(), x.numel(), *_layout(x))
            for x, out in zip(self.tensors, self.values, strict=True)
        ]
        self._lists = torch.tensor(rows, device=first.device).T.contiguous()

    def __call__(self) -> tuple[list[Tensor], Tensor]:
        """Return all tensors with all but their largest zeroed, and the smallest kept magnitudes [tensors].

        The next call overwrites both.
        """
        first = self.tensors[0]
        x, out, n, *layout = self._lists
        places = [place for pair in zip(self.tensors, self.values, strict=True) for place in pair]
        aligned = all(v.numel() % 16 == 0 and v.data_ptr() % 16 == 0 for v in places)
        _launch(
            first.dtype, self.values[0].dtype, self._memory.zero_(), x, out, _integers(self.thresholds), self._k, n,
            tuple(layout), max(x.numel() for x in self.tensors), BATCH=True, ALIGNED=aligned,
        )  # fmt: skip
        return self.values, self.thresholds


def _launch(
    dtype: torch.dtype,
    out_dtype: torch.dtype,
    memory: Tensor,
    x: Tensor,
    out: Tensor,
    threshold: Tensor,
    k: int | Tensor,
    n: int | Tensor,
    layout: tuple[Any, Any, Any],
    longest: int,
    BATCH: bool = False,
    ALIGNED: bool = False,
) -> None:
    """Launch all passes; of a batch ``x``, ``out``, ``n`` and ``layout`` are lists on the device."""
    digits = DIGITS[dtype]
    state, *tables, ranges = torch.split(memory, _parts(dtype), dim=1)
    grid = (min(triton.cdiv(longest, BLOCK), PROGRAMS), len(memory))
    common: dict[str, Any] = {"SIGNED": dtype == torch.int32, "BLOCK": BLOCK, "WORDS": memory.shape[1]}
    common |= {"BITS": INTEGERS[dtype.itemsize][1], "BATCH": BATCH, "ALIGNED": ALIGNED, "enable_fp_fusion": False}
    with torch.cuda.device(memory.get_device()):  # -1, the interpreter's, changes nothing
        count_first_digit[grid](x, tables[0], n, *digits[0], **common)
        for step in range(1, len(digits)):
            before, digit = digits[step - 1 : step + 1]
            count_next_digit[grid](
                x, state, *tables[step - 1 : step + 1], k, n, step, isinstance(k, Tensor),
                *before, digit.shift, digit.bins, **common,
            )  # fmt: skip
        common["CHANNELS_LAST"] = BATCH or layout[1] > 1
        count_equals[grid](x, state, tables[-1], ranges, n, *layout, len(digits), digits[-1].bins, **common)
        mask = out_dtype == torch.bool
        out_bits = INTEGERS[out_dtype.itemsize][1]
        write_largest[grid](x, state, ranges, out, threshold, n, *layout, out_bits, mask, **common)


def _parts(dtype: torch.dtype) -> list[int]:
    """Return the words of state, tables and ranges."""
    return [STATE.value, *(digit.bins for digit in DIGITS[dtype]), RANGES.value]


def _words(dtype: torch.dtype) -> int:
    return sum(_parts(dtype))


def _integers(x: Tensor) -> Tensor:
    """Return a tensor's bits as signed integers."""
    return x.view(INTEGERS[x.element_size()][0])


def _is_dense(x: Tensor) -> bool:
    return x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))


def _layout(x: Tensor) -> tuple[int, int, int]:
    """Return the bits of a position within its range, and of what is channels_last channels and positions, else 1."""
    range_bits = max((x.numel() - 1).bit_length() - RANGES.value.bit_length() + 1, 0)
    return (range_bits, 1, 1) if x.is_contiguous() else (range_bits, x.shape[1], x.shape[2] * x.shape[3])
