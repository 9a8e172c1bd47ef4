"""How good a model is on examples, batch by batch; on a GPU each batch is a CUDA graph, captured once and replayed.

The place of the next batch and the sum over those before it lie on the device, so that a test waits for it once. On a
CPU the kernels compute the outputs where they are faster (``kernels.dispatch.Inference``).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fedsieve.client.captured import CudaGraphs, captured
from fedsieve.client.metrics import Accumulator, Metric, correct
from fedsieve.client.training import load_
from fedsieve.kernels.dispatch import FEW, Inference
from fedsieve.types import Data, InputError, apply_model, map_examples

BATCH = 500


class EagerTest(UserWarning):
    """A model's test cannot be captured: it runs one operation after another."""


ACCURACY = {"accuracy": Metric(correct)}


def accuracy(model: nn.Module, data: Data, batch: int = BATCH) -> float:
    """Return the share of ``data`` that the model labels rightly."""
    return Evaluation(model, data, batch=batch).metrics()["accuracy"]


class Evaluation:
    """The test of one resident model on the same examples, again and again with other weights in place of the last."""

    def __init__(
        self,
        model: nn.Module,
        data: Data,
        graphs: CudaGraphs | None = None,
        batch: int = BATCH,
        metrics: Mapping[str, Metric] = ACCURACY,
        inference: Inference | None = None,
    ):
        """Take a model, examples, which may lie on its device, and what captures: None for one batch after another."""
        self.model, self.data, self.batch = model, data, batch
        self.inference = inference or Inference(model, "auto")
        self._outputs: Callable[[Any], Any] | None = None
        """What computes outputs in the place of the model."""
        self.where = next((w.device for w in model.parameters()), data.device)
        self.graphs = graphs if data.device == self.where else None
        self.means = {name: one for name, one in metrics.items() if not isinstance(one.function, Accumulator)}
        self.accumulators = {name: one for name, one in metrics.items() if isinstance(one.function, Accumulator)}
        if self.accumulators:
            self.graphs = None
        self._names = [*metrics]
        self._place = torch.zeros((), dtype=torch.int64, device=data.device)
        """Of the first example of the next batch."""
        self._sums = torch.zeros(len(self.means), 2, dtype=torch.float64, device=self.where)
        """Of each mean, what its values add up to, and their weights."""
        self._replays: dict[int, Callable[[], None]] = {}
        """By the number of examples in a batch."""
        self._addresses = list[int]()
        """Of the weights that the graphs know."""

    def of(self, params: Mapping[str, Tensor]) -> dict[str, float]:
        """Return the metrics of the model with these weights, which stay in it."""
        load_(self.model, params)
        return self.metrics()

    @torch.no_grad()
    def metrics(self) -> dict[str, float]:
        """Return the metrics of the model on all examples; NaN where no value counts."""
        self.model.eval()
        if self.graphs:
            try:
                return self._measure(self.graphs)
            except RuntimeError as error:
                cause = str(error.__context__ or error).partition("\n")[0]  # a capture that was cut off says only so
                warnings.warn(f"the model's test cannot be captured: it runs eagerly ({cause})", EagerTest, 2)
                self._replays.clear()
                self.graphs = None
        return self._measure(None)

    def _measure(self, graphs: CudaGraphs | None) -> dict[str, float]:
        """Test all batches, by graphs or without, and wait for the device."""
        self._place.zero_()
        self._sums.zero_()
        for one in self.accumulators.values():
            one.function.reset()  # type: ignore[union-attr]
        sizes = [min(self.batch, len(self.data) - i) for i in range(0, len(self.data), self.batch)]
        if graphs is None:
            x, _ = self.data.batch(slice(0, FEW))
            self._outputs = self.inference.of(x, len(self.data), self.batch)
            for size in sizes:
                self._test(size)
            self._outputs = None  # of these weights
            return self._values()
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
            return self._values()

    def _values(self) -> dict[str, float]:
        """Return the metrics, in the task's order; waits for the device."""
        sums = zip(self.means.items(), self._sums.tolist(), strict=True)
        values = {name: metric.of_sum(total, weight) for (name, metric), (total, weight) in sums}
        for name, one in self.accumulators.items():
            with self._named(name):
                values[name] = float(one.function.compute())  # type: ignore[union-attr]
        return {name: values[name] for name in self._names}

    def _replay(self, graphs: CudaGraphs, size: int) -> Callable[[], None]:
        """Return what replays the test of a batch."""
        if size not in self._replays:
            state = [self._place, self._sums, *self.model.buffers()]
            self._replays[size] = captured(graphs, partial(self._test, size), state)
        return self._replays[size]

    def _test(self, size: int) -> None:
        """Test the next batch, which is captured: what changes from one to the next lies in memory."""
        index = self._place + torch.arange(size, device=self._place.device)
        x, y = (map_examples(lambda one: one.to(self.where), part) for part in self.data.batch(index))
        output = self._outputs(x) if self._outputs else apply_model(self.model, x)
        for sums, (name, metric) in zip(self._sums, self.means.items(), strict=True):
            with self._named(name):
                sums.add_(metric.add_up(output, y, size))
        for name, one in self.accumulators.items():
            with self._named(name):
                one.function.update(output, y)  # type: ignore[union-attr]
        self._place.add_(size)

    @contextmanager
    def _named(self, name: str) -> Iterator[None]:
        """Raise InputError, with the name of the metric, for what it raises where nothing is captured."""
        try:
            yield
        except Exception as error:
            if self.graphs:
                raise
            line = (str(error).splitlines() or [type(error).__name__])[0]
            raise InputError(f"task.metrics[{name!r}] fails on test examples: {line}") from error
