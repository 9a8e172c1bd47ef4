"""The multiply-adds of training steps: counted on the host, or where only a GPU knows what was zero, there."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor

Triple: TypeAlias = tuple[float, float, float]
"""Of a layer's forward product, its input gradient and its weight gradient."""
DENSE = (1.0, 1.0, 1.0)


class Products:
    """Multiply-adds of training steps, at the real densities and were all dense."""

    def __init__(self, where: torch.device):
        self.on_device = torch.zeros((), dtype=torch.float64, device=where)
        """Those at densities that the device alone knows."""
        self.record: list[tuple[object, float, Triple]] | None = None
        """What is added, if that is wanted."""
        self.restart()

    def restart(self) -> None:
        """Begin at nothing."""
        self.on_host = self.dense = 0.0
        self.on_device.zero_()

    @property
    def real(self) -> float:
        """Those at the real densities; to read them waits for the device."""
        return self.on_host + float(self.on_device)

    def add(self, source: object, n: float, which: Triple, densities: tuple[Any, Any, Any] = DENSE) -> None:
        """Add ``n`` multiply-adds times ``which`` for each product of a layer or parameter; None: of neither."""
        pairs = [(one, density) for one, density in zip(which, densities, strict=True) if one]
        for one, density in pairs:
            if isinstance(density, Tensor):
                self.on_device.add_(density, alpha=n * one)
        self.on_host += n * sum(one * density for one, density in pairs if not isinstance(density, Tensor))
        self.dense += n * sum(which)
        if self.record is not None:
            self.record.append((source, n, which))

    def add_again(self, record: list[tuple[object, float, Triple]], times: int) -> None:
        """Add what was recorded, so often, at the present densities; what is on the device was added there."""
        for source, n, which in record:
            pairs = zip(which, getattr(source, "densities", DENSE), strict=True)
            share = sum(one * density for one, density in pairs if not isinstance(density, Tensor))
            self.on_host += times * n * share
            self.dense += times * n * sum(which)
