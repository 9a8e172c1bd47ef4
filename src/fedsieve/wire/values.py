"""Values as whole numbers: float32 as magnitudes and signs, as distances to a known value, or rounded on request.

Error feedback: what rounding took from a value is added to it the next time it is sent (Seide et al., "1-bit stochastic
gradient descent", Interspeech 2014). The residual belongs in the client's memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from fedsieve.types import Sparse
from fedsieve.wire.known import NOTHING, Array, Known, WireError, array

TYPED, SIGNED, UNSIGNED, DISTANCE, BF16, BF16_UNSIGNED, INT8, INT4, BF16_DISTANCE = range(9)
"""How values travel; the first four keep every bit."""

LOSSY = {"f32": 0, "bf16": BF16, "int8": INT8, "int4": INT4}
"""What float32 values may be rounded to on request, and the mode that stands for it."""

LARGEST = {INT8: 127, INT4: 7}
BLOCK = 1 << 15
"""So many numbers are treated at once: with what is computed on the way, they stay in a core's second cache."""
FEW = 64
_MAGNITUDE = np.uint32(0x7FFFFFFF)
_HALF = np.uint16(0x7FFF)


def distance(words: Array, base: Array) -> Array:
    """Return how many representable floats lie between each base value and the value, modulo 2^32, as int32."""
    step = len(words) // FEW + 1
    if np.array_equal(words[::step], base[::step]) and np.array_equal(words, base):  # in most cases a few say no
        return np.broadcast_to(np.int32(0), len(words))
    into, spare = np.empty(len(words), np.int32), np.empty((2, min(len(words), BLOCK)), np.int32)
    for at in _blocks(len(words)):
        here = into[at]
        _order(words[at].view(np.int32), spare[0], here)
        here -= _order(base[at].view(np.int32), spare[0], spare[1, : len(here)])
    return into


def at_distance(steps: Array, base: Array) -> Array:
    """Return the float32 bits that lie so far from the base values."""
    if not steps[:: len(steps) // FEW + 1].any() and not steps.any():
        return base.copy()
    into, spare = np.empty(len(steps), np.int32), np.empty(min(len(steps), BLOCK), np.int32)
    for at in _blocks(len(steps)):
        here = _order(base[at].view(np.int32), spare, into[at])
        here += steps[at].view(np.int32)
        _order(here, spare, here)
    return into.view(np.uint32)


def _blocks(count: int) -> Iterator[slice]:
    return (slice(first, first + BLOCK) for first in range(0, count, BLOCK))


def _order(signed: Array, spare: Array, into: Array) -> Array:
    """Write and return a block's float32 bits as int32 in the order of the floats, -0.0 just below +0.0.

    It undoes itself; ``into`` may be the block.
    """
    flips = np.right_shift(signed, 31, out=spare[: len(signed)])
    flips &= np.int32(0x7FFFFFFF)
    result: Array = np.bitwise_xor(signed, flips, out=into)
    return result


def finite(values: Tensor) -> bool:
    """Tell whether all numbers are finite: quickly if their sum is."""
    if math.isfinite(float(values.sum())):
        return True
    flat = values.reshape(-1)
    return all(bool(torch.isfinite(flat[at]).all()) for at in _blocks(len(flat)))


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


def rounded(values: Tensor, how: str) -> Tensor:
    """Return float32 values as they arrive when a whole tensor of them is sent as bf16, int8 or int4."""
    mode = LOSSY.get(how)
    if mode is None:
        raise WireError(f"values go as {', '.join(LOSSY)}, not as {how!r}")
    words = array(values).view(np.uint32)
    if mode == BF16:
        words = from_bf16(to_bf16(words))
    elif mode in (INT8, INT4):
        scale, folded = quantised(words, mode)
        words = multiples(folded, float(scale), mode)
    return torch.from_numpy(words.view(np.float32).copy()).view(values.shape)


def compensate(
    tree: Mapping[str, Tensor | Sparse], residual: Mapping[str, Tensor], how: str, known: Known = NOTHING
) -> tuple[dict[str, Tensor | Sparse], dict[str, Tensor]]:
    """Return what to encode with ``values=how``, and the residual to keep: the sum of both equals what was to be sent.

    ``tree`` is flat. Float32 entries of two dimensions and more take part, and values on a mask of such a tensor, where
    ``known`` has a manifest that says so. A residual is as large as what its entry stands for; where a sparse entry
    sends nothing, it waits.
    """
    sums: dict[str, Tensor | Sparse] = {}
    residuals: dict[str, Tensor] = {}
    for name, value in tree.items():
        values = (value.values if isinstance(value, Sparse) else value).detach().cpu()
        if values.dtype != torch.float32 or known.dimensions(name, value.shape) < 2:
            sums[name] = value
            continue
        left = residual[name].clone() if name in residual else torch.zeros(tuple(value.shape))
        if left.shape != tuple(value.shape):
            raise WireError(f"a residual of shape {tuple(left.shape)} for {name}")
        if isinstance(value, Sparse):
            index = value.index.detach().cpu()
            whole = values + left.view(-1)[index]
            left.view(-1)[index] = whole - rounded(whole, how)
            sums[name] = Sparse(whole, index, value.shape)
        else:
            whole = values + left
            left, sums[name] = whole - rounded(whole, how), whole
        residuals[name] = left
    return sums, residuals
