"""Positions as whole numbers: gaps, or changes against what both sides know, in the order of the known magnitudes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedsieve.wire.known import Array, Known, WireError

ALL, MASK, GAPS, CHANGES, RANKED = range(5)
"""How positions travel: every one; a known mask's; gaps; flips against the base's support; flips by its magnitudes."""

STEP, ABOVE, BELOW = 19, 16, 8
"""A step is a sixteenth of an octave (the exponent and four bits of the mantissa); so many are told apart."""

LAST_EDGE = 0x7FFFFFFF >> STEP
BLOCK = 1 << 16
LARGE, APART = 1 << 17, 61
"""Of tensors of more elements every 61st is looked at: a prime, so that no tap of a kernel is left out."""

_MAGNITUDE = np.uint32(0x7FFFFFFF)


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


@dataclass(frozen=True)
class Order:
    """All elements in the order that a base makes likely: some by class, then position; after them the rest."""

    numel: int
    likely: Array
    """The positions (uint32, ascending) of those that have a class."""
    way: Array | None
    """Their places in ``likely`` in order (uint32); None: as they are."""

    def flips(self, index: Array, foreseen: int) -> Array:
        """Return the places (uint32, ascending) in the order where positions differ from its first ``foreseen``."""
        mask = np.zeros(self.numel, bool)
        mask[index] = True
        told = mask[self.likely]
        if self.way is not None:
            told = told[self.way]
        many = int(np.count_nonzero(told))
        told[:foreseen] ^= True
        near = np.flatnonzero(told).astype(np.uint32)
        if many == len(index):
            return near
        mask[index] = False
        mask[self.likely] = True
        far = index[~mask[index]].astype(np.uint32)
        for first in range(0, len(far), BLOCK):
            part = far[first : first + BLOCK]
            part += (len(self.likely) - np.searchsorted(self.likely, part)).astype(np.uint32)
        return np.concatenate([near, far])

    def from_flips(self, changed: Array, foreseen: int) -> Array:
        """Return the positions (int64, ascending) that differ from the first ``foreseen`` of the order as told."""
        keep = np.zeros(len(self.likely), bool)
        split = int(np.searchsorted(changed, len(self.likely)))
        if self.way is None:
            keep[:foreseen] = True
            keep[changed[:split]] ^= True
        else:
            keep[self.way[:foreseen]] = True
            keep[self.way[changed[:split]]] ^= True
        index = self.likely[np.flatnonzero(keep)].astype(np.int64)
        if split == len(changed):
            return index
        rest = changed[split:] - len(self.likely)
        before = np.searchsorted(self.likely - np.arange(len(self.likely)), rest, side="right")
        index = np.concatenate([index, rest + before])
        index.sort(kind="stable")  # merges the two, each of which is in order
        return index


def order_of(known: Known, name: str, edge: int | None) -> Order | None:
    """Return the order that the base's tensor of that name gives: its support's, or of magnitudes, about an edge.

    Kept with ``known``: a server reads many answers against one base. None where there is no such order.
    """
    words, key = known.words(name), f"{'support' if edge is None else 'sizes'} of {name}"
    if words is None:
        return None
    kept = known.orders.get(key)
    if kept is not None and kept[0] == (edge or 0):
        same: Order | None = kept[1]
        return same
    found = supported(words) if edge is None else ranked(words, edge)
    if found is None or 2 * len(found.likely) <= len(words):
        known.orders[key] = edge or 0, found
    return found


def supported(words: Array) -> Order:
    """Return the base's non-zeros, all of one class, then its zeros."""
    return Order(len(words), _likely(words, 1)[0], None)


def ranked(words: Array, edge: int) -> Order | None:
    """Return the elements whose step is near ``edge`` or above it, those of the highest steps first; then the rest.

    ``ABOVE`` steps above the edge are one class with all that are higher; ``BELOW`` under it, the rest begins. Zeros
    belong to the rest. None if most elements of a large tensor are likely: that tells little, and takes memory.
    """
    likely, steps = _likely(words, max((edge - BELOW) << STEP, 1))
    if len(likely) > max(len(words) // 2, LARGE):
        return None
    classes = np.uint32(edge + ABOVE) - np.minimum(steps, np.uint32(edge + ABOVE))
    return Order(len(words), likely, np.argsort(classes.astype(np.uint8), kind="stable").astype(np.uint32))


def edge_of(words: Array, count: int) -> int:
    """Return about which step the ``count`` largest magnitudes reach down to."""
    apart = APART if len(words) > LARGE else 1
    some = words[::apart] & _MAGNITUDE
    some.sort()
    return int(some[max(0, len(some) - 1 - count // apart)]) >> STEP if len(some) else 0


def _likely(words: Array, least: int) -> tuple[Array, Array]:
    """Return the positions (uint32) of magnitudes of ``least`` bits or more, and their steps."""
    found, steps = [np.zeros(0, np.uint32)], [np.zeros(0, np.uint32)]
    for first in range(0, len(words), BLOCK):
        sizes = words[first : first + BLOCK] & _MAGNITUDE
        at = np.flatnonzero(sizes >= np.uint32(least))
        steps.append(sizes[at] >> np.uint32(STEP))
        found.append((at + first).astype(np.uint32))
    return np.concatenate(found), np.concatenate(steps)
