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

import triton
import triton.language as tl

STATE, RANGES = tl.constexpr(8), tl.constexpr(2048)
"""The words of memory before the tables, and the ranges of positions: 2^11, each as long as a power of two."""
NARROW = tl.constexpr(512)
"""Tables up to this size are summed within a block first; in wider ones each element is an atomic addition."""


@triton.jit
def _tensor(x: tl.tensor, n: tl.tensor, BITS: tl.constexpr, BATCH: tl.constexpr, ALIGNED: tl.constexpr) -> tl.tensor:
    """Return where this program's tensor begins, and its size; of a batch, which has lists of addresses and sizes."""
    n = _own(n, BATCH)
    if BATCH and ALIGNED:
        n = tl.multiple_of(n, 16)
    return _address(x, BITS, BATCH, ALIGNED), n


@triton.jit
def _address(x: tl.tensor, KIND: tl.constexpr, BATCH: tl.constexpr, ALIGNED: tl.constexpr) -> tl.tensor:
    """Return the pointer to a dtype that a batch's list of addresses has for this program's tensor; else ``x``."""
    if BATCH:
        x = tl.load(x + tl.program_id(1)).to(tl.pointer_type(KIND))
        if ALIGNED:
            x = tl.multiple_of(x, 16)
    return x


@triton.jit
def _own(number: tl.tensor, BATCH: tl.constexpr) -> tl.tensor:
    """Return what a batch's list has for this program's tensor; else the number itself."""
    return tl.load(number + tl.program_id(1)).to(tl.int32) if BATCH else number


@triton.jit
def _key(bits: tl.tensor, SIGNED: tl.constexpr) -> tl.tensor:
    """Return int32 keys: bits without the sign, or what is a key already."""
    return bits if SIGNED else bits.to(tl.int32) & ((1 << (bits.dtype.primitive_bitwidth - 1)) - 1)


@triton.jit
def _to_bfloat16(bits: tl.tensor) -> tl.tensor:
    """Return bfloat16's bits of float32's, rounded to the nearest, ties to even."""
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC0, rounded).to(tl.int16)


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
def count_first_digit(
    x: tl.tensor,
    table: tl.tensor,
    n: tl.tensor,
    SHIFT: tl.constexpr,
    BINS: tl.constexpr,
    LOWEST: tl.constexpr,
    SIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    BITS: tl.constexpr,
    BATCH: tl.constexpr,
    ALIGNED: tl.constexpr,
    WORDS: tl.constexpr,
) -> None:
    """Count the first digit of all keys."""
    x, n = _tensor(x, n, BITS, BATCH, ALIGNED)
    if tl.program_id(0) * BLOCK >= n:
        return
    table += tl.program_id(1) * WORDS
    b = tl.arange(0, BINS)
    count = tl.zeros([BINS], tl.int32)
    for start in range(tl.program_id(0) * BLOCK, n, tl.num_programs(0) * BLOCK):
        i = start + tl.arange(0, BLOCK)
        key = _key(tl.load(x + i, mask=i < n, other=0), SIGNED)
        count += tl.histogram((key >> SHIFT) - LOWEST, BINS, mask=i < n)
    tl.atomic_add(table + b, count, mask=count > 0, sem="relaxed")


@triton.jit(do_not_specialize=["k"])
def count_next_digit(
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
    BITS: tl.constexpr,
    BATCH: tl.constexpr,
    ALIGNED: tl.constexpr,
    WORDS: tl.constexpr,
) -> None:
    """Find the digit of the k-th largest key in the table before, and count the next one of the keys that share it."""
    x, n = _tensor(x, n, BITS, BATCH, ALIGNED)
    if tl.program_id(0) * BLOCK >= n:
        return
    state += tl.program_id(1) * WORDS
    previous += tl.program_id(1) * WORDS
    table += tl.program_id(1) * WORDS
    if STEP == 1:
        prefix = 0
        rank = tl.minimum(tl.maximum(tl.load(k + tl.program_id(1)), 0), n).to(tl.int32) if K_ON_DEVICE else k
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
def count_equals(
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
    BITS: tl.constexpr,
    BATCH: tl.constexpr,
    ALIGNED: tl.constexpr,
    WORDS: tl.constexpr,
) -> None:
    """Find the k-th largest key; if not all that equal it are kept, count them in ranges of positions."""
    x, n = _tensor(x, n, BITS, BATCH, ALIGNED)
    if tl.program_id(0) * BLOCK >= n:
        return
    state += tl.program_id(1) * WORDS
    previous += tl.program_id(1) * WORDS
    ranges += tl.program_id(1) * WORDS
    range_bits, channels, plane = _own(range_bits, BATCH), _own(channels, BATCH), _own(plane, BATCH)
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
def write_largest(
    x: tl.tensor,
    state: tl.tensor,
    ranges: tl.tensor,
    out: tl.tensor,
    threshold: tl.tensor,
    n: tl.tensor,
    range_bits: tl.tensor,
    channels: tl.tensor,
    plane: tl.tensor,
    OUT: tl.constexpr,
    MASK: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    SIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    BITS: tl.constexpr,
    BATCH: tl.constexpr,
    ALIGNED: tl.constexpr,
    WORDS: tl.constexpr,
) -> None:
    """Write what is kept, rounded or not, zero elsewhere, or its mask; and the k-th largest key as a number."""
    x, n = _tensor(x, n, BITS, BATCH, ALIGNED)
    if tl.program_id(0) * BLOCK >= n:
        return
    state += tl.program_id(1) * WORDS
    ranges += tl.program_id(1) * WORDS
    threshold += tl.program_id(1)
    range_bits, channels, plane = _own(range_bits, BATCH), _own(channels, BATCH), _own(plane, BATCH)
    out = _address(out, OUT, BATCH, ALIGNED)
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
            value = tl.where(kept, bits, 0)
            if OUT != BITS:
                value = _to_bfloat16(value)
            tl.store(out + i, value, mask=i < n)
    if tl.program_id(0) == 0:
        tl.store(threshold, kth.to(threshold.dtype.element_ty))
