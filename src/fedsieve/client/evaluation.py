"""How good a model is on examples, batch by batch; on a GPU each batch is a CUDA graph, captured once and replayed.

The place of the next batch and the sum over those before it lie on the device, so that a test waits for it once.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from fedsieve.client.captured import CudaGraphs, captured
from fedsieve.client.training import load_
from fedsieve.types import Data

BATCH = 500


class EagerTest(UserWarning):
    """A model's test cannot be captured: it runs one operation after another."""


def correct(output: Tensor, target: Tensor) -> Tensor:
    """Return, for each of b outputs [b, classes], whether the largest is the label's: bool [b]."""
    return output.argmax(1) == target


def accuracy(model: nn.Module, data: Data, batch: int = BATCH) -> float:
    """Return the share of ``data`` that the model labels rightly."""
    return Evaluation(model, data, batch=batch).accuracy()


class Evaluation:
    """The test of one resident model on the same examples, again and again with other weights in place of the last."""

    def __init__(self, model: nn.Module, data: Data, graphs: CudaGraphs | None = None, batch: int = BATCH):
        """Take a model, examples, which may lie on its device, and what captures: None for one batch after another."""
        self.model, self.data, self.batch = model, data, batch
        self.where = next((w.device for w in model.parameters()), data.y.device)
        self.graphs = graphs if data.y.device == self.where else None
        self._place = torch.zeros((), dtype=torch.int64, device=data.y.device)
        """Of the first example of the next batch."""
        self._sum = torch.zeros((), dtype=torch.int64, device=self.where)
        self._replays: dict[int, Callable[[], None]] = {}
        """By the number of examples in a batch."""
        self._addresses = list[int]()
        """Of the weights that the graphs know."""

    def of(self, params: Mapping[str, Tensor]) -> float:
        """Return the accuracy of the model with these weights, which stay in it."""
        load_(self.model, params)
        return self.accuracy()

    @torch.no_grad()
    def accuracy(self) -> float:
        """Return the share of the examples that the model labels rightly."""
        self.model.eval()
        if self.graphs:
            try:
                return self._share(self.graphs)
            except RuntimeError as error:
                cause = str(error.__context__ or error).partition("\n")[0]  # a capture that was cut off says only so
                warnings.warn(f"the model's test cannot be captured: it runs eagerly ({cause})", EagerTest, 2)
                self._replays.clear()
                self.graphs = None
        return self._share(None)

    def _share(self, graphs: CudaGraphs | None) -> float:
        """Test all batches, by graphs or without, and wait for the device."""
        self._place.zero_()
        self._sum.zero_()
        sizes = [min(self.batch, len(self.data) - i) for i in range(0, len(self.data), self.batch)]
        if graphs is None:
            for size in sizes:
                self._test(size)
            return int(self._sum) / len(self.data)
        addresses = [v.data_ptr() for v in (*self.model.parameters(), *self.model.buffers())]
        if addresses != self._addresses:
            if self._replays:
                self._replays.clear()
                graphs.renew()
            self._addresses = addresses
        with graphs.own_stream():
            graphs.chance.manual_seed(0)
            for size in sizes:
                self._replay(graphs, size)()
            return int(self._sum) / len(self.data)

    def _replay(self, graphs: CudaGraphs, size: int) -> Callable[[], None]:
        """Return what replays the test of a batch."""
        if size not in self._replays:
            state = [self._place, self._sum, *self.model.buffers()]
            self._replays[size] = captured(graphs, partial(self._test, size), state)
        return self._replays[size]

    def _test(self, size: int) -> None:
        """Test the next batch, which is captured: what changes from one to the next lies in memory."""
        x, y = self.data.batch(self._place + torch.arange(size, device=self._place.device))
        self._sum.add_(correct(self.model(x.to(self.where)), y.to(self.where)).sum())
        self._place.add_(size)
