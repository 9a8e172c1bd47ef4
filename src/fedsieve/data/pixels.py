"""Images without loss in fewer bytes than PNG or WebP take: every pixel is predicted, and the differences are coded.

All images are gone through at once: a channel after another (green first, from which red and blue are predicted best),
in it a row after another, in that a pixel after another. A prediction is a weighted sum of the neighbours' values, in
earlier channels also of those to the right and below. Weights are the least squares' of the images themselves, one set
for each of ``CONTEXTS`` degrees of unrest: how far predictions missed at the neighbours, and how far these differ. The
differences of each degree are Huffman-coded by themselves. Weights and sums are whole numbers, so that the same pixels
come out on every machine.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fedsieve.data.storage import Arrays

Numbers: TypeAlias = NDArray[Any]
Place: TypeAlias = tuple[Any, Any]
"""A row and a column, or slices of all rows and columns; both begin with the border."""

OWN = ((0, -1), (0, -2), (-1, -2), (-1, -1), (-1, 0), (-1, 1), (-1, 2), (-2, -1), (-2, 0), (-2, 1))
"""Neighbours in a pixel's own channel, by row and column: those that come before it."""
OTHER = ((0, 0), (0, -1), (-1, -1), (-1, 0), (-1, 1), (0, 1), (1, 0), (1, 1), (1, -1))
"""Neighbours in each earlier channel."""
CONTEXTS = 20
ONE = 1 << 14
"""The weight 1."""
PASSES = 3
"""How often weights are worked out, each time by the misses of those before."""
SAMPLE = 1500
"""How many images weights are worked out from, at most."""
TOGETHER = 10_000
"""How many images are coded with the same weights."""
B = 2
"""How many pixels of border surround an image, in which neighbours outside it lie."""


def pack_images(images: NDArray[np.uint8]) -> Arrays:
    """Return what ``unpack_images`` makes images uint8 [n, channels, height, width] of, n at most ``TOGETHER``."""
    scan = _Scan(*images.shape)
    planes = scan.values[:, B : B + scan.height, B : B + scan.width]
    planes[...] = images.transpose(1, 2, 3, 0)[scan.order]
    for c in range(len(planes)):
        for y in range(scan.height):
            scan.fill_border(c, y)
    scan.fit()
    streams: list[list[bytes]] = [[] for _ in range(scan.channels * CONTEXTS)]

    def differences(c: int, y: int, x: int, predicted: Numbers, context: Numbers) -> Numbers:
        actual: Numbers = planes[c, y, x]
        difference = (actual - predicted).astype(np.uint8)
        for k in range(CONTEXTS):
            streams[c * CONTEXTS + k].append(difference[context == k].tobytes())
        return actual

    scan.run(differences)
    coded = [_coded(b"".join(parts)) for parts in streams]
    lengths = np.array([(len(code), sum(map(len, parts))) for code, parts in zip(coded, streams, strict=True)])
    return {
        "codes": np.frombuffer(b"".join(coded), np.uint8),
        "lengths": lengths.astype(np.int64),
        "weights": scan.weights,
        "limits": scan.limits,
    }


def unpack_images(packed: Arrays, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """Return images of a shape. Raises ValueError or zlib.error where ``packed`` is no code of them."""
    scan = _Scan(*shape)
    scan.weights, scan.limits = packed["weights"], packed["limits"]
    ends = packed["lengths"][:, 0].cumsum().tolist()
    parts = (packed["codes"][end - size : end] for end, size in zip(ends, packed["lengths"][:, 0], strict=True))
    streams = [np.frombuffer(zlib.decompress(part.tobytes(), -15), np.uint8) for part in parts]
    if [len(stream) for stream in streams] != packed["lengths"][:, 1].tolist():
        raise ValueError("a stream has not its length")
    position = [0] * len(streams)

    def actual(c: int, y: int, x: int, predicted: Numbers, context: Numbers) -> Numbers:
        difference = np.empty(len(context), np.uint8)
        for k, count in enumerate(np.bincount(context, minlength=CONTEXTS).tolist()):
            stream = c * CONTEXTS + k
            difference[context == k] = streams[stream][position[stream] : position[stream] + count]
            position[stream] += count
        return (predicted + difference).astype(np.uint8)

    scan.run(actual)
    planes = scan.values[:, B : B + scan.height, B : B + scan.width]
    images = np.empty(shape, np.uint8)
    images.transpose(1, 2, 3, 0)[scan.order] = planes
    return images


class _Scan:
    """Images in the order in which they are coded: values and misses [channels, height, width, n], with a border."""

    weights: Numbers
    """int32 [channels, CONTEXTS, 1 + neighbours], in units of 1 / ``ONE``: a constant, then the neighbours'."""
    limits: Numbers
    """int32 [channels, CONTEXTS - 1]: where a degree of unrest ends and the next begins."""

    def __init__(self, n: int, channels: int, height: int, width: int):
        self.channels, self.height, self.width = channels, height, width
        self.order = [1, 0, 2] if channels == 3 else [*range(channels)]
        padded = (channels, height + B + 1, width + 2 * B, n)
        self.values, self.misses = np.full(padded, 128, np.uint8), np.zeros(padded, np.uint8)

    def run(self, pixel: Callable[[int, int, int, Numbers, Numbers], Numbers]) -> None:
        """Go through all pixels: ``pixel`` returns the values [n] at a channel, row and column, as they are.

        It is given what was predicted, and the degree of unrest.
        """
        self.misses[...] = 0
        for c in range(self.channels):
            weights = self.weights[c].T.copy()
            for y in range(self.height):
                for x in range(self.width):
                    place = B + y, B + x
                    context = np.searchsorted(self.limits[c], self._unrest(c, place)).astype(np.uint8)
                    neighbours = np.stack(self._neighbours(c, place)).astype(np.int32)
                    sums = (neighbours * weights[1 : 1 + len(neighbours), context]).sum(0, dtype=np.int32)
                    predicted = (sums + weights[0, context] + ONE // 2 >> ONE.bit_length() - 1).clip(0, 255)
                    actual = pixel(c, y, x, predicted, context)
                    self.values[c, B + y, B + x] = actual
                    self.misses[c, B + y, B + x] = abs(predicted - actual)
                self.fill_border(c, y)

    def fill_border(self, c: int, y: int) -> None:
        """Fill the border to the right of a row, to the left of the next, and below the last one."""
        for plane in (self.values[c], self.misses[c]):
            plane[B + y, -B:] = plane[B + y, -B - 1]
            plane[B + y + 1, :B] = plane[B + y, B]
            if y + 1 == self.height:
                plane[B + y + 1, B:] = plane[B + y, B:]

    def _neighbours(self, c: int, place: Place) -> list[Numbers]:
        own = [_moved(self.values[c], place, step) for step in OWN]
        return own + [_moved(plane, place, step) for plane in self.values[:c] for step in OTHER]

    def _unrest(self, c: int, place: Place) -> Numbers:
        miss = [_moved(self.misses[c], place, step).astype(np.int32) for step in ((0, -1), (-1, 0), (-1, -1), (-1, 1))]
        left, above, corner, right = (_moved(self.values[c], place, step).astype(np.int32) for step in _AROUND)
        unrest = 6 * (miss[0] + miss[1]) + 3 * (miss[2] + miss[3])
        unrest += abs(left - corner) + abs(above - corner) + abs(above - right)
        for plane in self.misses[:c]:
            here, *around = (_moved(plane, place, step).astype(np.int32) for step in _HERE)
            unrest += 8 * here + sum(around)
        return unrest

    def fit(self) -> None:
        """Work out weights and limits from every so many-th image."""
        step = -(-self.values.shape[-1] // SAMPLE)
        values = np.ascontiguousarray(self.values[..., ::step])
        sample = _Scan(values.shape[-1], self.channels, self.height, self.width)
        sample.values = values
        self.weights, self.limits = map(np.stack, zip(*map(sample.fit_channel, range(self.channels)), strict=True))

    def fit_channel(self, c: int) -> tuple[Numbers, Numbers]:
        """Return a channel's weights and limits; its misses and those of earlier channels become what these give."""
        place = slice(B, B + self.height), slice(B, B + self.width)
        actual = self.values[c][place].ravel().astype(np.float32)
        neighbours = np.stack([np.ones_like(actual), *(part.ravel() for part in self._neighbours(c, place))], axis=1)
        for _ in range(PASSES):
            unrest = self._unrest(c, place).ravel()
            limits = np.quantile(unrest, np.linspace(0, 1, CONTEXTS + 1)[1:-1]).astype(np.int32)
            context = np.searchsorted(limits, unrest)
            weights = np.stack(
                [_least_squares(neighbours[at], actual[at]) for at in (context == k for k in range(CONTEXTS))]
            )
            predicted = (neighbours * weights[context]).sum(1).round().clip(0, 255)
            self.misses[c][place] = abs(predicted - actual).reshape(self.values[c][place].shape)
            for y in range(self.height):
                self.fill_border(c, y)
        padding = ((0, 0), (0, len(OTHER) * (self.channels - 1 - c)))
        return np.pad((ONE * weights).round().astype(np.int32), padding), limits


def _least_squares(inputs: Numbers, outputs: Numbers) -> Numbers:
    """Return the weights of inputs [n, neighbours] that give the outputs [n] best."""
    inputs = inputs.astype(np.float64)
    weights: Numbers = np.linalg.solve(inputs.T @ inputs + np.eye(inputs.shape[1]), inputs.T @ outputs)
    return weights


_AROUND = ((0, -1), (-1, 0), (-1, -1), (-1, 1))
_HERE = ((0, 0), (0, 1), (1, 0), (0, -1), (-1, 0))


def _moved(plane: NDArray[np.uint8], place: Place, step: tuple[int, int]) -> NDArray[np.uint8]:
    """Return the neighbours at a step from a place: [n], or [height, width, n] of slices."""
    row, column = (
        slice(at.start + by, at.stop + by) if isinstance(at, slice) else at + by
        for at, by in zip(place, step, strict=True)
    )
    return plane[row, column]


def _coded(content: bytes) -> bytes:
    """Return a stream by Huffman's code alone or, where that is less, by repetitions too."""
    codes = []
    for strategy in (zlib.Z_HUFFMAN_ONLY, zlib.Z_DEFAULT_STRATEGY):
        coder = zlib.compressobj(9, zlib.DEFLATED, -15, 9, strategy)
        codes.append(coder.compress(content) + coder.flush())
    return min(codes, key=len)
