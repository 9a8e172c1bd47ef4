"""What autograd saves for backward in a client's training step."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class SavedTensors:
    """The size of the tensors that autograd saves in one step: the first that the model trains after ``restart``.

    Parameters are not counted, and every block of memory once.
    """

    def __init__(self, model: nn.Module):
        self.model, self.waiting = model, False
        self.bytes = self.numbers = self.nonzero = 0
        model.register_forward_pre_hook(self._begin)
        model.register_forward_hook(self._end, always_call=True)

    def restart(self) -> None:
        """Wait for the next training step."""
        self.waiting, self.bytes, self.numbers, self.nonzero = True, 0, 0, 0

    def metrics(self) -> dict[str, float]:
        """Return the bytes, and the share of the numbers in them that are not zero."""
        return {"saved_bytes": float(self.bytes), "saved_nonzero": self.nonzero / max(self.numbers, 1)}

    def _begin(self, model: nn.Module, _: object) -> None:
        if self.waiting and model.training:
            self._seen = {w.untyped_storage().data_ptr() for w in model.parameters()}
            self._hooks = torch.autograd.graph.saved_tensors_hooks(self._keep, lambda kept: kept)
            self._hooks.__enter__()

    def _end(self, model: nn.Module, *_: object) -> None:
        if self.waiting and model.training:
            self._hooks.__exit__()
            self.waiting = False

    def _keep(self, x: Tensor) -> Tensor:
        block = x.untyped_storage().data_ptr()
        if block not in self._seen:
            self._seen.add(block)
            self.bytes += x.numel() * x.element_size()
            self.numbers, self.nonzero = self.numbers + x.numel(), self.nonzero + int(x.count_nonzero())
        return x
