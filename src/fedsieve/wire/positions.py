"""Positions as whole numbers: gaps, or changes against what both sides know, in the order of the known magnitudes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from fedsieve.wire.known import Array, Known, WireError

ALL, MASK, GAPS, CHANGES, RANKED = range(5)
"""How positions travel: every one; a known mask's; gaps; flips against the base's support; flips by its magnitudes."""

STEP, ABOVE, BELOW = 19, 16, 8
"""A step is a sixteenth of an octave (the exponent and four bits of the mantissa); so many are told apart."""

LAST_EDGE = 0x7FFFFFFF >> STEP
BLOCK = 1 << 16
LARGE, SAMPLED, APART = 1 << 17, 1 << 15, 61
"""What a large tensor is; and of those with more elements than SAMPLED every 61st is looked at, a prime: all taps."""

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
        split = int(np.searchsorted(changed, len(self.likely)))
        near = changed[:split] if self.way is None else self.way[changed[:split]]
        keep = np.zeros(len(self.likely), bool)
        if self.way is None or foreseen == len(self.likely):
            keep[:foreseen] = True
        else:
            keep[self.way[:foreseen]] = True
        keep[near] ^= True
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
    return Order(len(words), np.concatenate([at for at, _ in _likely(words, 1)]), None)


def ranked(words: Array, edge: int) -> Order | None:
    """Return the elements whose step is near ``edge`` or above it, those of the highest steps first; then the rest.

    ``ABOVE`` steps above the edge are one class with all that are higher; ``BELOW`` under it, the rest begins. Zeros
    belong to the rest. None if most elements of a large tensor are likely: that tells little, and takes memory.
    """
    most, top = max(len(words) // 2, LARGE), np.uint32(edge + ABOVE)
    many, likely, classes = 0, [], []
    for at, steps in _likely(words, max((edge - BELOW) << STEP, 1)):
        many += len(at)
        if many > most:
            return None
        likely.append(at)
        classes.append((top - np.minimum(steps, top)).astype(np.uint8))
    found = np.concatenate(likely)
    del likely
    return Order(len(words), found, _sorted(np.concatenate(classes)))


def edge_of(words: Array, count: int) -> int:
    """Return about which step the ``count`` largest magnitudes reach down to."""
    apart = APART if len(words) > SAMPLED else 1
    some = words[::apart] & _MAGNITUDE
    some.sort()
    return int(some[max(0, len(some) - 1 - count // apart)]) >> STEP if len(some) else 0


def _likely(words: Array, least: int) -> Iterator[tuple[Array, Array]]:
    """Yield, block by block, the positions (uint32) of magnitudes of ``least`` bits or more, and their steps."""
    for first in range(0, max(len(words), 1), BLOCK):
        sizes = words[first : first + BLOCK] & _MAGNITUDE
        at = np.flatnonzero(sizes >= np.uint32(least))
        yield (at + first).astype(np.uint32), sizes[at] >> np.uint32(STEP)


def _sorted(classes: Array) -> Array:
    """Return the places (uint32) of small numbers in their order, equal ones as they come."""
    starts = range(0, len(classes), BLOCK)
    counts = np.array([np.bincount(classes[i : i + BLOCK], minlength=ABOVE + BELOW + 1) for i in starts])
    way = np.empty(len(classes), np.uint32)
    if not len(classes):
        return way
    ends = np.cumsum(counts.T).reshape(counts.T.shape).T  # of each class in each block
    for first, many, end in zip(starts, counts, ends, strict=True):
        order = np.argsort(classes[first : first + BLOCK], kind="stable") + first
        for part, to in zip(np.split(order, np.cumsum(many)[:-1]), end, strict=True):
            way[to - len(part) : to] = part
    return way
