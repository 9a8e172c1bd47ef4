"""How much of the maps of tokens a step computes: what its tokens fill, where the batch is smaller than the largest."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Mapping
from ctypes import Structure
from typing import Any

from fedsieve.kernels.abi import WORDS, FeatureMap, GatherOp, KeepOp, MapPointer
from fedsieve.kernels.program import Step


class TokenWidths:
    """All maps of tokens in a program's operations. Their channels stay where they are: what is left out is gap."""

    def __init__(self, steps: Iterable[Step], lengths: Mapping[int, int], lanes: int):
        """``lengths``: the tokens of a sample, by the width of a map of the largest batch."""
        self.lengths, self.lanes, self.samples = lengths, lanes, 0
        self._maps: dict[int, tuple[FeatureMap, int, int]] = {}
        self._products: list[tuple[GatherOp, int]] = []
        self._lists: list[tuple[KeepOp, int]] = []
        for step in steps:
            if isinstance(step, Structure):
                self._collect(step)

    def _collect(self, x: Any) -> None:
        if isinstance(x, FeatureMap):
            if x.width in self.lengths and ctypes.addressof(x) not in self._maps:
                self._maps[ctypes.addressof(x)] = x, int(x.width), int(x.gap)
            return
        for name, kind, *_ in x._fields_:
            if kind is MapPointer:
                if pointer := getattr(x, name):
                    self._collect(pointer.contents)
            elif isinstance(kind, type) and issubclass(kind, Structure):
                self._collect(getattr(x, name))
        if isinstance(x, GatherOp) and x.width in self.lengths:
            self._products.append((x, int(x.width)))
        if isinstance(x, KeepOp):
            self._lists.append((x, int(x.plane)))

    def set(self, samples: int) -> None:
        """Compute so many samples from now on."""
        if samples == self.samples:
            return
        self.samples = samples
        widths = {full: -(-samples * length // self.lanes) for full, length in self.lengths.items()}
        for own, full, gap in self._maps.values():
            own.width, own.gap = widths[full], gap + WORDS * (full - widths[full])
        for product, full in self._products:
            product.width = widths[full]
        for keep, full in self._lists:
            keep.line = keep.plane = widths[full]
