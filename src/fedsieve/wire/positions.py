"""Positions as whole numbers: gaps, or changes against what both sides know, in the order of the known magnitudes."""

from __future__ import annotations

import numpy as np

from fedsieve.wire.known import Array, WireError

ALL, MASK, GAPS, CHANGES, RANKED = range(5)
"""How positions travel: every one; a known mask's; gaps; flips against the base's support; flips by its magnitudes."""


def gaps_of(index: Array) -> Array:
    """Return the first position, then each position minus the one before it minus one (uint32)."""
    gaps = np.empty(len(index), np.uint32)
    if len(index):
        gaps[0] = index[0]
        np.subtract(index[1:], index[:-1], out=gaps[1:], casting="unsafe")
        gaps[1:] -= np.uint32(1)
    return gaps


def from_gaps(gaps: Array, numel: int) -> Array:
    """Return the positions (int64). Raises WireError where one lies beyond the last element."""
    index = np.cumsum(gaps, dtype=np.int64)
    index += np.arange(len(gaps))
    if len(index) and index[-1] >= numel:
        raise WireError(f"a position beyond the last of {numel} elements")
    return index


def order(words: Array, mode: int) -> tuple[Array, int]:
    """Return all positions in the order that the base makes likely, and how many belong to its support.

    CHANGES: first the base's non-zeros, then its zeros. RANKED: by falling magnitude, in steps of a quarter octave
    (the exponent and two bits of the mantissa); within a step, and within CHANGES' two, by position.
    """
    if mode == CHANGES:
        ones, zeros = np.flatnonzero(words << np.uint32(1)), np.flatnonzero(words << np.uint32(1) == 0)
        return np.concatenate([ones, zeros]), len(ones)
    steps = words & np.uint32(0x7FFFFFFF)
    empty = steps == 0
    steps >>= np.uint32(21)
    np.subtract(steps.max(initial=0), steps, out=steps)
    np.minimum(steps, np.uint32(254), out=steps)
    below = steps.astype(np.uint8)
    below[empty] = 255
    held = len(words) - int(empty.sum())
    del steps, empty
    return np.argsort(below, kind="stable"), held


def flips(index: Array, words: Array, mode: int) -> Array:
    """Return where, in the base's order, the positions differ from what is foreseen: ascending."""
    way, held = order(words, mode)
    mask = np.zeros(len(words), bool)
    mask[index] = True
    told = mask[way]
    foreseen = held if mode == CHANGES else len(index)
    return np.flatnonzero(np.concatenate([~told[:foreseen], told[foreseen:]]))


def from_flips(changed: Array, count: int, words: Array, mode: int) -> Array:
    """Return the positions that the flips leave (int64, ascending). Raises WireError where they are not ``count``."""
    way, held = order(words, mode)
    told = np.zeros(len(words), bool)
    told[: held if mode == CHANGES else count] = True
    told[changed] ^= True
    index = way[told]
    del way, told
    index.sort()
    if len(index) != count:
        raise WireError(f"{count} positions announced, {len(index)} found")
    return index
