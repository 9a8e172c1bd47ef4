"""Values as whole numbers: float32 as magnitudes and signs, as distances to a known value, or rounded on request."""

from __future__ import annotations

import numpy as np
import torch

from fedsieve.wire.known import Array, WireError

TYPED, SIGNED, UNSIGNED, DISTANCE, BF16, BF16_UNSIGNED, INT8, INT4, BF16_DISTANCE = range(9)
"""How values travel; the first four keep every bit."""

LOSSY = {"f32": 0, "bf16": BF16, "int8": INT8, "int4": INT4}
"""What float32 values may be rounded to on request, and the mode that stands for it."""

LARGEST = {INT8: 127, INT4: 7}
_MAGNITUDE = np.uint32(0x7FFFFFFF)
_HALF = np.uint16(0x7FFF)


def ordered(words: Array) -> Array:
    """Return float32 bits (uint32) as int32 in the order of the floats, -0.0 just below +0.0; undoes itself."""
    signed = words.view(np.int32)
    result: Array = signed ^ ((signed >> 31) & np.int32(0x7FFFFFFF))
    return result


def distance(words: Array, base: Array) -> Array:
    """Return how many representable floats lie between each base value and the value, modulo 2^32, as int32."""
    result: Array = (ordered(words).view(np.uint32) - ordered(base).view(np.uint32)).view(np.int32)
    return result


def at_distance(steps: Array, base: Array) -> Array:
    """Return the float32 bits that lie so far from the base values."""
    reached = (steps.view(np.uint32) + ordered(base).view(np.uint32)).view(np.int32)
    return ordered(reached).view(np.uint32)


def magnitudes(words: Array) -> Array:
    """Return float32 bits without their signs."""
    result: Array = words & _MAGNITUDE
    return result


def negative(words: Array) -> Array:
    """Tell which float32 (uint32) or bfloat16 (uint16) bits have the sign set."""
    result: Array = words >> np.array(8 * words.itemsize - 1, words.dtype) != 0
    return result


def signed(magnitude: Array, signs: Array) -> Array:
    """Put the signs back. Raises WireError for a magnitude that has one already."""
    if len(magnitude) and magnitude.max() > (_MAGNITUDE if magnitude.itemsize == 4 else _HALF):
        raise WireError("a magnitude with a sign")
    shift = np.array(8 * magnitude.itemsize - 1, magnitude.dtype)
    result: Array = magnitude | (signs.astype(magnitude.dtype) << shift)
    return result


def to_bf16(words: Array) -> Array:
    """Round float32 bits to the nearest bfloat16 bits (uint16), ties to even."""
    floats = torch.from_numpy(words.view(np.float32))
    return floats.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)


def from_bf16(halves: Array) -> Array:
    """Return the float32 bits of bfloat16 bits."""
    result: Array = halves.astype(np.uint32) << np.uint32(16)
    return result


def bf16_distance(halves: Array, base: Array) -> Array:
    """Return how many bfloat16 lie between the base's and the value's, modulo 2^16, folded to 0, -1, 1 ... (uint16)."""
    steps = _ordered_halves(halves) - _ordered_halves(base)
    result: Array = ((steps << 1) ^ (steps >> 15)).view(np.uint16)
    return result


def at_bf16_distance(folded: Array, base: Array) -> Array:
    """Return the bfloat16 bits (uint16) that lie so far from the base's."""
    steps = (folded >> 1).view(np.int16) ^ -(folded & 1).view(np.int16)
    return _ordered_halves((_ordered_halves(base) + steps).view(np.uint16)).view(np.uint16)


def _ordered_halves(halves: Array) -> Array:
    signed = halves.view(np.int16)
    result: Array = signed ^ ((signed >> 15) & np.int16(0x7FFF))
    return result


def quantised(words: Array, mode: int) -> tuple[np.float32, Array]:
    """Return the scale, and values as whole multiples of it, folded to 0, -1, 1, -2 ... (uint16)."""
    floats = words.view(np.float32)
    largest = np.abs(floats).max(initial=np.float32(0))
    if not np.isfinite(largest):
        raise WireError("only finite values can be rounded to whole multiples")
    scale = np.float32(largest / np.float32(LARGEST[mode]))
    if scale == 0:
        return scale, np.zeros(len(floats), np.uint16)
    whole = np.clip(np.rint(floats / scale), -LARGEST[mode], LARGEST[mode]).astype(np.int16)
    return scale, ((whole << 1) ^ (whole >> 15)).view(np.uint16)


def multiples(folded: Array, scale: float, mode: int) -> Array:
    """Return the float32 bits of whole multiples of a scale."""
    if len(folded) and folded.max() > 2 * LARGEST[mode]:
        raise WireError(f"a multiple beyond {LARGEST[mode]}")
    if not (np.isfinite(scale) and scale >= 0):
        raise WireError("a scale that is no finite positive number")
    whole = (folded >> 1).astype(np.int16) ^ -(folded & 1).astype(np.int16)
    with np.errstate(over="ignore"):
        floats = whole.astype(np.float32) * np.float32(scale)
    if not np.isfinite(floats).all():
        raise WireError("multiples beyond the largest float")
    return floats.view(np.uint32)
