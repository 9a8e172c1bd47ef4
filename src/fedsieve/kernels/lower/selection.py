"""Operations that select the largest numbers of something (top-k), and the memory that they share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedsieve.kernels.abi import KeepOp, PruneOp, TopOp, address
from fedsieve.kernels.program import huge_pages


@dataclass
class Selection:
    """An operation that selects: exactly every ``period`` steps, ``count(n)`` numbers of n samples."""

    op: TopOp | KeepOp | PruneOp
    period: int
    count: Callable[[int], int]
    each: Callable[[int], float]
    """What a selected number multiplies, in a step of n samples."""
    threshold: Tensor = field(default_factory=lambda: torch.zeros(1))
    selected: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.int64))

    def __post_init__(self) -> None:
        self.op.top_k.threshold, self.op.top_k.selected = address(self.threshold), address(self.selected)

    def begin(self, step: int, samples: int) -> None:
        """Set how many numbers are selected in a step, and whether exactly."""
        self.op.top_k.count, self.op.top_k.exact = self.count(samples), int(step % self.period == 0)
        if not isinstance(self.op, TopOp):
            self.op.samples = samples

    def multiply_adds(self, samples: int) -> float:
        """Return the multiply-adds of the last step."""
        return int(self.selected) * self.each(samples)


class Scratch:
    """Memory that layers use one after another."""

    def __init__(self) -> None:
        self.sizes = dict.fromkeys(("lists", "starts", "blocks", "sums", "second"), 0)
        self.threads = 0

    def need(self, **sizes: int) -> None:
        """Grow to the largest of all layers."""
        self.sizes = {name: max(size, sizes.get(name, 0)) for name, size in self.sizes.items()}

    def allocate(self) -> None:
        """Allocate what does not depend on the number of threads."""
        lists, blocks = self.sizes["lists"], self.sizes["blocks"]
        self.position, self.value = huge_pages(lists), huge_pages(lists).view(torch.float32)
        self.start = torch.empty(self.sizes["starts"], dtype=torch.int32)
        self.block = huge_pages(blocks).view(torch.float32)
        self.second = torch.empty(self.sizes["second"])

    def grow(self, threads: int) -> bool:
        """Allocate for at least this many threads; tell whether anything moved."""
        if threads <= self.threads:
            return False
        self.threads = threads
        self.sums = torch.empty(threads * self.sizes["sums"])
        self.work = torch.empty(threads * 4 * 2048, dtype=torch.int32)
        return True
