"""Positions as whole numbers: gaps, or changes against what both sides know, in the order of the known magnitudes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from fedsieve.wire.known import LARGEST, SMALLEST, Array, Budget, Known, WireError
from fedsieve.wire.sharing import EACH, Sharing
from fedsieve.wire.values import magnitudes

ALL, MASK, GAPS, CHANGES, RANKED = range(5)
"""How positions travel: every one; a known mask's; gaps; flips against the base's support; flips by its magnitudes."""
IN_UNITS = 3
"""Added to one of the last three where positions are of units (``sharing``), not of elements."""

STEP, ABOVE, BELOW = 19, 16, 8
"""A step is a sixteenth of an octave (the exponent and four bits of the mantissa); so many are told apart."""

LAST_EDGE = 0x7FFFFFFF >> STEP
SORTING = 28
"""Bytes that are set aside for every element of a block that is sorted."""
LARGE, SAMPLED, APART = 1 << 17, 1 << 15, 61
"""What a large tensor is; and of those with more elements than SAMPLED every 61st is looked at, a prime: all taps."""


def gaps_of(index: Array) -> Array:
    """Return the first position, then each position minus the one before it minus one (uint32)."""
    gaps = np.empty(len(index), np.uint32)
    if len(index):
        gaps[0] = index[0]
        np.subtract(index[1:], index[:-1], out=gaps[1:], casting="unsafe")
        gaps[1:] -= np.uint32(1)
    return gaps


def from_gaps(gaps: Array, numel: int, block: int) -> Iterator[tuple[slice, Array]]:
    """Yield, block by block, which positions, and these (int64). Raises WireError where one lies beyond the last."""
    start = 0
    for first in range(0, len(gaps), block):
        index = np.cumsum(gaps[first : first + block], dtype=np.int64)
        index += np.arange(start, start + len(index))
        if index[-1] >= numel:
            raise WireError(f"a position beyond the last of {numel} elements")
        start = int(index[-1]) + 1
        yield slice(first, first + len(index)), index


def positions_of(mask: Array, count: int, block: int) -> Array:
    """Return where a mask is true as it is kept: few positions as int64, many as bits, the lowest first (uint8)."""
    if 8 * count > len(mask):
        return np.packbits(mask, bitorder="little")
    index, many = np.empty(count, np.int64), 0
    for first in range(0, len(mask), block):
        where = np.flatnonzero(mask[first : first + block])
        np.add(where, first, out=index[many : many + len(where)])
        many += len(where)
    return index


def parts(positions: Array | None, numel: int, block: int) -> Iterator[tuple[slice, Array | slice]]:
    """Yield, block by block, which values there are, and where: at kept positions or, with None, at all of them."""
    if positions is None or positions.dtype != np.uint8:
        for first in range(0, numel if positions is None else len(positions), block):
            at = slice(first, min(first + block, numel if positions is None else len(positions)))
            yield at, at if positions is None else positions[at]
        return
    many = 0
    for first in range(0, numel, block):
        where = _true(positions, first, block, numel)
        where += first
        yield slice(many, many + len(where)), where
        many += len(where)


def _true(bits: Array, first: int, block: int, numel: int) -> Array:
    """Return which elements of a block are true, counted from its start: ``bits`` are all elements', ``numel``."""
    some = np.unpackbits(bits[first // 8 : (first + block) // 8], count=min(block, numel - first), bitorder="little")
    return np.flatnonzero(some.view(bool))


def scatter(values: Array, whole: Array, positions: Array | None, block: int) -> None:
    """Write values at the kept positions of a tensor, 0 everywhere else; with None, at all positions.

    Values may stand at the end of the tensor's own memory or behind it, in the same array: no element lies behind where
    its value stands, so that none is overwritten before its turn.
    """
    many, numel = 0, len(whole)
    for first in range(0, numel, block):
        here = whole[first : first + block]
        if positions is None:
            here[:] = values[first : first + block].copy()
            continue
        if positions.dtype == np.uint8:
            where = _true(positions, first, block, numel)
        else:
            start, end = np.searchsorted(positions, (first, first + block))
            where = positions[start:end] - first
        some = values[many : many + len(where)].copy()
        here[:] = 0
        here[where] = some
        many += len(where)


@dataclass(frozen=True)
class Ranking:
    """All elements in the order that a base makes likely: some by class, then position; after them the rest.

    It is kept by blocks of elements, whose places in a block need two bytes.
    """

    words: Array
    """The base's bits."""
    least: int
    """Likely are magnitudes of so many bits or more."""
    block: int
    before: Array
    """How many likely elements come before each block, and at last how many there are (int64)."""
    near: Array | None = None
    """The likely elements of every block by class, then position, counted from its start (uint16); None: they are many,
    and all of one class."""
    starts: Array | None = None
    """Where in the order the elements of each class and block begin, a row a class (uint32)."""
    slots: Array | None = None
    """Where in ``near`` they begin."""

    @property
    def many(self) -> int:
        """How many elements are likely."""
        return int(self.before[-1])

    @property
    def weight(self) -> int:
        """The bytes that it takes once the likely elements are sorted: two for each, and eight a class and block."""
        return 2 * self.many + 8 * (ABOVE + BELOW + 1) * (len(self.before) - 1)

    def likely(self, at: int) -> Array:
        """Tell which elements of a block are likely."""
        result: Array = magnitudes(self.words[at * self.block : (at + 1) * self.block]) >= np.uint32(self.least)
        return result

    def first(self, count: int) -> Array:
        """Return a mask of the first ``count`` likely elements: of one class, of all."""
        mask = np.zeros(len(self.words), bool)
        for at, first in enumerate(range(0, len(mask), self.block)):
            here = mask[first : first + self.block]
            if self.near is None or self.starts is None or self.slots is None:
                here[:] = self.likely(at)
                continue
            start, end = self.before[at : at + 2]
            last = max(0, int(np.searchsorted(self.starts[:, at], count)) - 1)  # the class that the count ends in
            behind = int(self.slots[last + 1, at]) if last + 1 < len(self.slots) else int(end)
            end = min(behind, int(self.slots[last, at]) + max(0, count - int(self.starts[last, at])))
            here[self.near[start:end]] = True
        return mask

    def elements(self, places: Array) -> Array:
        """Return the elements (int64) at ascending places in the order."""
        split = int(np.searchsorted(places, self.many))
        elements = np.empty(len(places), np.int64)
        if self.near is None or self.starts is None or self.slots is None:
            self._pick(places[:split], self.before, True, elements[:split])
        else:
            cell = np.searchsorted(self.starts.reshape(-1), places[:split], side="right") - 1
            slots = places[:split] - self.starts.reshape(-1)[cell] + self.slots.reshape(-1)[cell]
            cell %= len(self.before) - 1
            np.add(cell * self.block, self.near[slots], out=elements[:split])
        rest = np.minimum(np.arange(len(self.before)) * self.block, len(self.words)) - self.before
        self._pick(places[split:] - self.many, rest, False, elements[split:])
        return elements

    def flips(self, index: Array, foreseen: int) -> Array:
        """Return the places (uint32, ascending) in the order where positions differ from its first ``foreseen``."""
        mask = np.zeros(len(self.words), bool)
        mask[index] = True
        differ, near, far = np.logical_xor(mask, self.first(foreseen), out=mask), [], []
        for at, (start, end) in enumerate(pairwise(self.before.tolist())):
            first = at * self.block
            here = differ[first : first + self.block]
            if self.near is None or self.starts is None or self.slots is None:
                places = start + np.flatnonzero(here[self.likely(at)])
            else:
                slot = start + np.flatnonzero(here[self.near[start:end]])
                kind = np.searchsorted(self.slots[:, at], slot, side="right") - 1
                places = self.starts[kind, at] + (slot - self.slots[kind, at])
            near.append(places)
            if np.count_nonzero(here) > len(places):  # none of the unlikely is among the first
                far.append(self.many + first - start + np.flatnonzero(here[~self.likely(at)]))
        places = np.concatenate([np.sort(np.concatenate(near)), *far]) if near else np.zeros(0)
        return places.astype(np.uint32)

    def _pick(self, ranks: Array, before: Array, likely: bool, into: Array) -> None:
        """Find the elements at ascending ranks among those that are likely, or among those that are not."""
        cuts = np.searchsorted(ranks, before)
        for at in np.flatnonzero(np.diff(cuts)).tolist():
            here = slice(cuts[at], cuts[at + 1])
            elements = np.flatnonzero(self.likely(at) == likely)
            into[here] = elements[ranks[here] - before[at]]
            into[here] += at * self.block


def ranking_of(
    known: Known, name: str, edge: int | None, budget: Budget | None = None, sharing: Sharing = EACH
) -> Ranking | None:
    """Return the order that the base's tensor of that name gives: its support's, or of magnitudes, about an edge.

    Of units, where rows share positions, it is the order of their largest magnitudes. Kept with ``known``: a server
    reads many answers against one base. None where there is no such order. What is set aside is drawn from ``budget``.
    """
    words, key = known.words(name), f"{'support' if edge is None else 'sizes'} of {name}"
    if words is None:
        return None
    last = known.orders.get(key)
    if last is not None and last[0] == (edge or 0, *sharing):
        same: Ranking | None = last[1]
        return same
    ranking: Ranking | None
    words, own = _of_units(words, sharing, budget)
    if edge is None:  # the base's non-zeros, all of one class, then its zeros
        ranking = _counted(words, 1)
        if 2 * ranking.many <= len(words):
            ranking = _sorted(ranking, np.uint32(0), budget)
    else:
        ranking = ranked(words, edge, budget)
    if ranking is None or ranking.near is None or 2 * ranking.many <= len(words):
        known.orders[key] = (edge or 0, *sharing), ranking
    elif budget:
        budget.give(ranking.weight + own)  # it goes before there are values
    return ranking


def _of_units(words: Array, sharing: Sharing, budget: Budget | None) -> tuple[Array, int]:
    """Return a base's bits, or those of its units' largest magnitudes, and how many bytes these are."""
    if sharing.unit == 1:
        return words, 0
    size = words.itemsize * sharing.units(len(words))
    if budget:
        budget.draw(size)
        with budget.lent(size):
            return sharing.largest(words), size
    return sharing.largest(words), size


def order_ahead(known: Known, last: Known) -> None:
    """Digest and order a base as messages against ``last`` needed it: what comes is read or written faster, alike."""
    _ = known.digest
    for key, ((edge, *sharing), _) in [*last.orders.items()]:
        what, _, name = key.partition(" of ")
        ranking_of(known, name, None if what == "support" else edge, sharing=Sharing(*sharing))


def ranked(words: Array, edge: int, budget: Budget | None = None) -> Ranking | None:
    """Return the elements whose step is near ``edge`` or above it, those of the highest steps first; then the rest.

    ``ABOVE`` steps above the edge are one class with all that are higher; ``BELOW`` under it, the rest begins. Zeros
    belong to the rest. None if most elements of a large tensor are likely: that tells little, and takes memory.
    """
    order, top = _counted(words, max((edge - BELOW) << STEP, 1)), np.uint32(edge + ABOVE)
    if order.many > max(len(words) // 2, LARGE):
        return None
    return _sorted(order, top, budget)


def _sorted(order: Ranking, top: np.uint32, budget: Budget | None) -> Ranking:
    """Return an order whose likely elements are sorted by class, ``top`` being the first step of the highest."""
    if budget:
        budget.draw(order.weight)
        with budget.lent(SORTING * order.block):
            return _sorted(order, top, None)
    words = order.words
    near, counts = np.empty(order.many, np.uint16), np.empty((len(order.before) - 1, ABOVE + BELOW + 1), np.uint32)
    for at, (start, end) in enumerate(pairwise(order.before)):
        sizes = magnitudes(words[at * order.block : (at + 1) * order.block])
        elements = np.flatnonzero(sizes >= np.uint32(order.least))
        classes = (top - np.minimum(sizes[elements] >> np.uint32(STEP), top)).astype(np.uint8)
        near[start:end] = elements[np.argsort(classes, kind="stable")]
        counts[at] = np.bincount(classes, minlength=ABOVE + BELOW + 1)
    return replace(order, near=near, starts=_starts(counts.T), slots=np.ascontiguousarray(_starts(counts).T))


def _starts(counts: Array) -> Array:
    """Return what comes before each count, row by row (uint32)."""
    ends = np.cumsum(counts, dtype=np.uint32).reshape(counts.shape)
    ends -= counts
    return ends


def _counted(words: Array, least: int) -> Ranking:
    """Return the order of one class: magnitudes of ``least`` bits or more, then the rest."""
    block = min(max(len(words) // 16, SMALLEST), LARGEST)
    blocks = (magnitudes(words[first : first + block]) for first in range(0, len(words), block))
    many = [np.count_nonzero(sizes >= np.uint32(least)) for sizes in blocks]
    return Ranking(words, least, block, np.cumsum([0, *many]))


def edge_of(words: Array, count: int) -> int:
    """Return about which step the ``count`` largest magnitudes reach down to."""
    apart = APART if len(words) > SAMPLED else 1
    some = magnitudes(words[::apart])
    some.sort()
    return int(some[max(0, len(some) - 1 - count // apart)]) >> STEP if len(some) else 0
