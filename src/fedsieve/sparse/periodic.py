"""What a sparse layer keeps of a tensor, on a CPU, or on a GPU without waiting for it."""

from __future__ import annotations

import torch
from torch import Tensor

from fedsieve.sparse.masks import top, topk_count
from fedsieve.sparse.selection import cut


class PeriodicTopK:
    """Keep the top share of a tensor: exactly every ``period`` calls, by the last threshold in between."""

    def __init__(self, density: float, period: int):
        self.density, self.period = density, period
        self.threshold = torch.zeros(())
        self.values: Tensor | None = None
        """What the next call returns, where that is known."""
        self.restart()

    def restart(self) -> None:
        """Forget the threshold: the next call cuts exactly."""
        self.step, self.values = 0, None

    @property
    def exact(self) -> bool:
        """Whether the next call cuts exactly."""
        return self.step % self.period == 0

    def __call__(self, x: Tensor) -> Tensor:
        """Return ``x``, zero off its support."""
        exact, self.step = self.exact, self.step + 1
        if not exact:
            return x * (x.abs() >= self.threshold)
        if on_device(x):
            if self.values is None:
                self.set(*cut(x, topk_count(self.density, x.numel())))
            values, self.values = self.values, None
            assert values is not None
            return values
        support = top(x, self.density)
        if self.period > 1:
            self.threshold = x.abs()[support].min()
        return x * support

    def set(self, values: Tensor, threshold: Tensor) -> None:
        """Let the next call, an exact one, return ``values``, whose smallest magnitude is the threshold."""
        self.values = values
        if self.period > 1:
            self.threshold = assign(self.threshold, threshold)


def on_device(x: Tensor) -> bool:
    """Tell whether a tensor is on a GPU, which must not be waited for: what is computed of it stays there."""
    return x.is_cuda


def assign(buffer: Tensor | None, value: Tensor) -> Tensor:
    """Write a value where the last one was, whose place captured steps know, and return the place."""
    if buffer is None or (buffer.device, buffer.dtype) != (value.device, value.dtype):
        return value.clone()
    return buffer.copy_(value)


def share(x: Tensor) -> float | Tensor:
    """Return the share of non-zeros; of a tensor on a GPU there, float64 []."""
    if on_device(x):
        count: Tensor = torch.linalg.vector_norm(x, 0, dtype=torch.float64)  # in one pass and one launch
        return count / max(x.numel(), 1)
    return int(x.count_nonzero()) / max(x.numel(), 1)
