"""Triton kernels of the exact top-k: radix selection by counting, without a sort and without a look from the host.

A key is an integer that orders like a magnitude. The first pass over a tensor counts how many keys have each value of
their first digit. Every block of the next pass finds in this table the digit of the k-th largest key, and counts the
next digit of the keys that share it. After the last digit the k-th largest key is known, and how many of those equal
to it are kept. Only if that is not all of them, a pass counts the equal ones in 2048 ranges of positions, and every
block of the last pass looks for the first that is not kept in the range where it lies. The last pass writes the
values, or the mask.

Counts are integers, whose order of summation does not matter: the same bits in every run. Passes read memory as it
lies; the positions that decide among equal keys are those of the contiguous order.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, PROGRAMS = 2048, 2048
"""How many elements a block reads at once, and the most blocks of a pass: beyond, each reads several times."""
STATE, RANGES = tl.constexpr(8), tl.constexpr(2048)
"""The words of memory before the tables, and the ranges of positions: 2^11, each as long as a power of two."""
LARGEST = 2**30
"""The most elements of a tensor: positions are 32-bit integers."""
NARROW = tl.constexpr(512)
"""Tables up to this size are summed within a block first; in wider ones each element is an atomic addition."""


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


@triton.jit
def _key(bits: tl.tensor, SIGNED: tl.constexpr) -> tl.tensor:
    """Return int32 keys: bits without the sign, or what is a key already."""
    return bits if SIGNED else bits.to(tl.int32) & ((1 << (bits.dtype.primitive_bitwidth - 1)) - 1)


@triton.jit
def _find(table: tl.tensor, rank: tl.tensor, BINS: tl.constexpr) -> tl.tensor:
    """Return the bin of the rank-th largest, its rank within the bin, and how many the bin has; rank 0: the top bin."""
    b = tl.arange(0, BINS)
    count = tl.load(table + b)
    at_least = tl.sum(count) - tl.cumsum(count) + count
    bin = tl.sum((at_least >= rank).to(tl.int32)) - 1
    above = tl.sum(tl.where(b > bin, count, 0))
    return bin, rank - above, tl.sum(tl.where(b == bin, count, 0))


@triton.jit
def _position(i: tl.tensor, channels: tl.tensor, plane: tl.tensor, CHANNELS_LAST: tl.constexpr) -> tl.tensor:
    """Return the position, in contiguous order, of what lies at place i of memory."""
    if CHANNELS_LAST:
        pixel = i // channels
        image = pixel // plane
        i = (image * channels + i % channels) * plane + pixel % plane
    return i


@triton.jit
def _place(position: tl.tensor, channels: tl.tensor, plane: tl.tensor, CHANNELS_LAST: tl.constexpr) -> tl.tensor:
    """Return the place in memory of what has a position in contiguous order."""
    if CHANNELS_LAST:
        row = position // plane
        image = row // channels
        position = (image * plane + position % plane) * channels + row % channels
    return position


@triton.jit
def _count_first(
    x: tl.tensor,
    table: tl.tensor,
    n: tl.tensor,
    SHIFT: tl.constexpr,
    BINS: tl.constexpr,
    LOWEST: tl.constexpr,
    SIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Count the first digit of all keys."""
    b = tl.arange(0, BINS)
    count = tl.zeros([BINS], tl.int32)
    for start in range(tl.program_id(0) * BLOCK, n, tl.num_programs(0) * BLOCK):
        i = start + tl.arange(0, BLOCK)
        key = _key(tl.load(x + i, mask=i < n, other=0), SIGNED)
        count += tl.histogram((key >> SHIFT) - LOWEST, BINS, mask=i < n)
    tl.atomic_add(table + b, count, mask=count > 0, sem="relaxed")


@triton.jit(do_not_specialize=["k"])
def _count_next(
    x: tl.tensor,
    state: tl.tensor,
    previous: tl.tensor,
    table: tl.tensor,
    k: tl.tensor,
    n: tl.tensor,
    STEP: tl.constexpr,
    K_ON_DEVICE: tl.constexpr,
    PREVIOUS_SHIFT: tl.constexpr,
    PREVIOUS_BINS: tl.constexpr,
    PREVIOUS_LOWEST: tl.constexpr,
    SHIFT: tl.constexpr,
    BINS: tl.constexpr,
    SIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Find the digit of the k-th largest key in the table before, and count the next one of the keys that share it."""
    if STEP == 1:
        prefix = 0
        rank = tl.minimum(tl.maximum(tl.load(k), 0), n).to(tl.int32) if K_ON_DEVICE else k
    else:
        prefix = tl.load(state + 2 * STEP - 4)
        rank = tl.load(state + 2 * STEP - 3)
    bin, rank, _ = _find(previous, rank, PREVIOUS_BINS)
    prefix = prefix * PREVIOUS_BINS + bin + PREVIOUS_LOWEST
    if tl.program_id(0) == 0:
        tl.store(state + 2 * STEP - 2, prefix)
        tl.store(state + 2 * STEP - 1, rank)
    b = tl.arange(0, BINS)
    count = tl.zeros([BINS], tl.int32)
    for start in range(tl.program_id(0) * BLOCK, n, tl.num_programs(0) * BLOCK):
        i = start + tl.arange(0, BLOCK)
        key = _key(tl.load(x + i, mask=i < n, other=0), SIGNED)
        counts = (i < n) & ((key >> PREVIOUS_SHIFT) == prefix)
        digit = (key >> SHIFT) & (BINS - 1)
        if BINS <= NARROW:
            count += tl.histogram(digit, BINS, mask=counts)
        else:  # zeros, or whatever is everywhere the same, would all wait for one address
            lowest = tl.min(tl.where(counts, digit, BINS - 1))
            equal = tl.sum((counts & (digit == lowest)).to(tl.int32))
            tl.atomic_add(table + lowest, equal, mask=equal > 0, sem="relaxed")
            tl.atomic_add(table + digit, 1, mask=counts & (digit > lowest), sem="relaxed")
    if BINS <= NARROW:
        tl.atomic_add(table + b, count, mask=count > 0, sem="relaxed")


@triton.jit(do_not_specialize=["range_bits", "channels", "plane"])
def _count_equals(
    x: tl.tensor,
    state: tl.tensor,
    previous: tl.tensor,
    ranges: tl.tensor,
    n: tl.tensor,
    range_bits: tl.tensor,
    channels: tl.tensor,
    plane: tl.tensor,
    STEPS: tl.constexpr,
    PREVIOUS_BINS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    SIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Find the k-th largest key; if not all that equal it are kept, count them in ranges of positions."""
    prefix = tl.load(state + 2 * STEPS - 4)
    bin, rank, equals = _find(previous, tl.load(state + 2 * STEPS - 3), PREVIOUS_BINS)
    kth = prefix * PREVIOUS_BINS + bin
    if tl.program_id(0) == 0:
        tl.store(state + 5, kth)
        tl.store(state + 6, rank)
        tl.store(state + 7, equals)
    if rank < equals:
        for start in range(tl.program_id(0) * BLOCK, n, tl.num_programs(0) * BLOCK):
            i = start + tl.arange(0, BLOCK)
            key = _key(tl.load(x + i, mask=i < n, other=0), SIGNED)
            part = _position(i, channels, plane, CHANNELS_LAST) >> range_bits
            tl.atomic_add(ranges + part, 1, mask=(i < n) & (key == kth), sem="relaxed")


@triton.jit
def _end_of_equals(
    x: tl.tensor,
    ranges: tl.tensor,
    kth: tl.tensor,
    rank: tl.tensor,
    n: tl.tensor,
    range_bits: tl.tensor,
    channels: tl.tensor,
    plane: tl.tensor,
    CHANNELS_LAST: tl.constexpr,
    SIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """Return the position of the first equal that is not kept: before it lie ``rank`` of them."""
    b = tl.arange(0, RANGES)
    count = tl.load(ranges + b)
    part = tl.sum((tl.cumsum(count) <= rank).to(tl.int32))
    seen = tl.sum(tl.where(b < part, count, 0))
    end = n + 0
    for start in range(part << range_bits, tl.minimum((part + 1) << range_bits, n), BLOCK):
        position = start + tl.arange(0, BLOCK)
        inside = (position < n) & (position >> range_bits == part)
        place = _place(position, channels, plane, CHANNELS_LAST)
        equal = inside & (_key(tl.load(x + place, mask=inside, other=0), SIGNED) == kth)
        before = seen + tl.cumsum(equal.to(tl.int32))
        end = tl.minimum(end, tl.min(tl.where(equal & (before > rank), position, n)))
        seen += tl.sum(equal.to(tl.int32))
    return end


@triton.jit(do_not_specialize=["range_bits", "channels", "plane"])
def _write(
    x: tl.tensor,
    state: tl.tensor,
    ranges: tl.tensor,
    out: tl.tensor,
    threshold: tl.tensor,
    n: tl.tensor,
    range_bits: tl.tensor,
    channels: tl.tensor,
    plane: tl.tensor,
    MASK: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    SIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Write what is kept, zero elsewhere, or the mask of what is kept; and the k-th largest key as a number."""
    kth, rank = tl.load(state + 5), tl.load(state + 6)
    partial = rank < tl.load(state + 7)
    end = n + 0
    if partial:
        end = _end_of_equals(x, ranges, kth, rank, n, range_bits, channels, plane, CHANNELS_LAST, SIGNED, BLOCK)
    for start in range(tl.program_id(0) * BLOCK, n, tl.num_programs(0) * BLOCK):
        i = start + tl.arange(0, BLOCK)
        bits = tl.load(x + i, mask=i < n, other=0)
        key = _key(bits, SIGNED)
        kept = key >= kth
        if partial:
            kept = kept & ((key > kth) | (_position(i, channels, plane, CHANNELS_LAST) < end))
        if MASK:
            tl.store(out + i, kept.to(tl.int8), mask=i < n)
        else:
            tl.store(out + i, tl.where(kept, bits, 0), mask=i < n)
    if tl.program_id(0) == 0:
        tl.store(threshold, kth.to(threshold.dtype.element_ty))


def select(x: Tensor, k: int | Tensor, mask: bool) -> tuple[Tensor, Tensor]:
    """Return ``x`` with all but its k largest zeroed, or the mask of these, and the k-th largest magnitude (0-d).

    ``x``: float32, float16, bfloat16, or int32 keys, of which only a mask can be had; at least one element and at most
    ``LARGEST``. What is contiguous or channels_last is read as it lies, and the result lies like it; of any other a
    contiguous copy is made. ``k``: below 0 it counts as 0, beyond the number of elements as that; an integer on the
    host, or a 0-d tensor beside ``x``. For k = 0 the magnitude is a NaN.
    """
    x, channels, plane = _dense(x.detach())
    n = x.numel()
    digits = DIGITS[x.dtype]
    out = torch.empty_like(x, dtype=torch.bool if mask else None)
    bits = x.view(torch.int32 if x.element_size() == 4 else torch.int16)
    words = [STATE.value, *(digit.bins for digit in digits), RANGES.value]
    state, *tables, ranges = torch.split(torch.zeros(sum(words), dtype=torch.int32, device=x.device), words)
    threshold = torch.empty((), dtype=x.dtype, device=x.device)
    common = {"SIGNED": x.dtype == torch.int32, "BLOCK": BLOCK, "enable_fp_fusion": False}
    layout = (max((n - 1).bit_length() - RANGES.value.bit_length() + 1, 0), channels, plane)
    if not isinstance(k, Tensor):
        k = min(max(k, 0), n)
    grid = (min(triton.cdiv(n, BLOCK), PROGRAMS),)
    with torch.cuda.device(x.get_device()):  # -1, the interpreter's, changes nothing
        _count_first[grid](bits, tables[0], n, *digits[0], **common)
        for step in range(1, len(digits)):
            _count_next[grid](
                bits, state, *tables[step - 1 : step + 1], k, n, step, isinstance(k, Tensor),
                *digits[step - 1], *digits[step][:2], **common,
            )  # fmt: skip
        last = len(digits), digits[-1].bins
        common["CHANNELS_LAST"] = channels > 1
        _count_equals[grid](bits, state, tables[-1], ranges, n, *layout, *last, **common)
        parts = out.view(torch.int8) if mask else out.view(bits.dtype), threshold.view(bits.dtype)
        _write[grid](bits, state, ranges, *parts, n, *layout, mask, **common)
    return out, threshold


def _dense(x: Tensor) -> tuple[Tensor, int, int]:
    """Return a tensor without gaps; if it is channels_last, its channels and positions of an image, else 1 and 1."""
    if x.is_contiguous():
        return x, 1, 1
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return x, x.shape[1], x.shape[2] * x.shape[3]
    return x.contiguous(), 1, 1
