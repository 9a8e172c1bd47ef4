"""A client's training steps on a GPU: each is captured once, as a CUDA graph, and replayed; nothing waits in between.

What a step reads lies in memory of its own on the device: the client's examples, their order, the augmentation's draws,
the learning rate, and the place in the epoch, which the step moves on itself. There is a graph for each number of
examples in a batch, and of a method that cuts exactly now and then for either kind of step. Where there are no graphs
(on a CPU, or if a model cannot be captured) the same function is called at every step.
"""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fedsieve.client.products import Products, Triple
from fedsieve.client.training import DenseSteps, Precision
from fedsieve.sparse.effective import sparse_parts
from fedsieve.sparse.layers import WeightCuts, sparse_layers
from fedsieve.types import Data, Device, Mask, map_examples

WARM = 2
"""Steps before a capture, in which libraries choose their ways and allocate; their effects are undone."""
_CAPTURING = threading.Lock()
"""Of a process's threads one captures at a time."""


@dataclass(eq=False)
class _Inputs:
    """The memory that captured steps read and write, beside the model's."""

    data: Data
    """The client's examples, raw, in front of others."""
    order: Tensor
    """Those of the epoch, int64 [examples]."""
    draws: Tensor
    """The augmentation's, int64 [examples, numbers], by place in the order."""
    place: Tensor
    """Where in the order the next batch begins, int64 []."""
    lr: Tensor
    """float32 []."""
    losses: Tensor
    """Of the training's steps, float32 [steps]."""
    steps: Tensor
    """Their numbers, int64 [steps]."""
    step: Tensor
    """Which step is next, int64 []."""

    @classmethod
    def of(cls, data: Data, examples: int, steps: int, numbers: int) -> _Inputs:
        """Return memory for so many examples like those of ``data``, steps, and numbers drawn for an example."""
        where = data.device
        index = torch.zeros(examples, dtype=torch.int64, device=where)
        return cls(
            data.map(lambda one: one.new_zeros((examples, *one.shape[1:]))),
            index, index.new_zeros(examples, numbers), index.new_zeros(()), torch.zeros((), device=where),
            torch.zeros(steps, device=where), torch.arange(steps, device=where), index.new_zeros(()),
        )  # fmt: skip

    def fits(self, data: Data, examples: int, steps: int, numbers: int) -> bool:
        """Tell whether there is room for a training."""
        mine, theirs = ([(one.shape[1:], one.dtype) for one in own.tensors] for own in (self.data, data))
        room = mine == theirs and examples <= len(self.data)
        return room and steps <= len(self.losses) and numbers == self.draws.shape[1]


@dataclass(frozen=True)
class _Replay:
    """What takes a captured step, and the multiply-adds of it."""

    take: Callable[[], None]
    record: list[tuple[object, float, Triple]]


@dataclass(frozen=True, eq=False)
class _Training:
    """What trains clients alike, on masks of the same names: velocities, masks, and its captured steps."""

    steps: DenseSteps
    names: tuple[str, ...]
    replays: dict[tuple[Any, ...], _Replay] = field(default_factory=dict)


class CudaGraphs:
    """What captures a worker's steps on a GPU: memory that its graphs share, and chance of its own."""

    def __init__(self, where: torch.device):
        self.where = where
        self.chance = torch.Generator(where)
        """What dropout draws from, in place of the device's one generator, which all workers would draw from."""
        self.stream: torch.cuda.Stream | None = None
        self.renew()

    def renew(self) -> None:
        """Take other memory for graphs to come: that of graphs which are gone cannot be captured into again."""
        self.pool = torch.cuda.graph_pool_handle()

    def capture(self, step: Callable[[], None]) -> Callable[[], None]:
        """Return what replays a step, which is not taken now."""
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.where)
        stream.synchronize()
        with torch.cuda.graph(graph, pool=self.pool, stream=stream, capture_error_mode="thread_local"):
            step()
        return graph.replay

    @contextmanager
    def own_stream(self) -> Iterator[None]:
        """Compute on a stream of these graphs', after what was sent to the present one."""
        if self.stream is None:
            self.stream = torch.cuda.Stream(self.where)  # type: ignore[no-untyped-call]
        self.stream.wait_stream(torch.cuda.current_stream(self.where))
        try:
            with torch.cuda.stream(self.stream):
                yield
        finally:
            torch.cuda.current_stream(self.where).wait_stream(self.stream)

    @contextmanager
    def own_chance(self) -> Iterator[None]:
        """Let PyTorch's operations draw from this worker's generator; one worker at a time."""
        default = torch.cuda.default_generators[self.where.index or 0]
        with _CAPTURING:
            before = default.graphsafe_get_state()
            default.graphsafe_set_state(self.chance)
            try:
                yield
            finally:
                default.graphsafe_set_state(before)


def captured(
    graphs: CudaGraphs, step: Callable[[], None], state: list[Tensor], undo: Callable[[], None] = lambda: None
) -> Callable[[], None]:
    """Return what replays a ``step``, which changes ``state``, and what ``undo`` puts back: nothing is changed now."""
    offset, before = graphs.chance.get_offset(), [v.clone() for v in state]

    @torch.no_grad()
    def put_back() -> None:
        undo()
        graphs.chance.set_offset(offset)
        for tensor, value in zip(state, before, strict=True):
            tensor.copy_(value)

    with graphs.own_chance():
        try:
            chance = torch.get_rng_state(), random.getstate()
            for _ in range(WARM):
                step()
                put_back()
            if not torch.equal(chance[0], torch.get_rng_state()) or chance[1] != random.getstate():
                raise RuntimeError("it draws by chance on the CPU in its forward, which a graph would not repeat")
            return graphs.capture(step)
        finally:
            put_back()


class Capture:
    """What a worker trains its resident model with, client after client: the memory of its steps, and their graphs."""

    def __init__(self, model: nn.Module, products: Products, precision: Precision, graphs: CudaGraphs | None):
        self.model, self.products, self.precision, self.graphs = model, products, precision, graphs
        self.layers = sparse_parts(model)
        self.cut_weights = WeightCuts(sparse_layers(model).values(), torch.bfloat16 if precision == "bf16" else None)
        self.seed, self.watches = 0, False
        """PyTorch's own chance in the next training; whether hooks must see its first step."""
        self.examples = self.steps = 0
        """Room that a training will need, as far as it is known."""
        self._inputs: _Inputs | None = None
        self._trainings: dict[tuple[Any, ...], _Training] = {}
        for weight in model.parameters():
            weight.data = self.laid_out(weight.data)

    def laid_out(self, x: Tensor) -> Tensor:
        """Return inputs or weights with their channels last in memory, where a GPU multiplies with fewer bits."""
        last = self.graphs is not None and self.precision != "fp32" and x.dim() == 4
        return x.contiguous(memory_format=torch.channels_last) if last else x

    def begin(self, device: Device, mask: Mask) -> CapturedSteps:
        """Return the steps of a client's training on a mask."""
        return CapturedSteps(self, device, mask)

    def inputs(self, device: Device) -> _Inputs:
        """Return the memory of the steps, with a client's examples in it, at its first step."""
        data, numbers = device.data, device.augment.draw(0, device.rng).shape[1] if device.augment else 0
        n, steps = len(data), device.epochs * max(1, -(-len(data) // device.batch))
        if self._inputs is None or not self._inputs.fits(data, n, steps, numbers):
            self.examples, self.steps = max(self.examples, n), max(self.steps, steps)
            self._trainings.clear()
            if self.graphs:
                self.graphs.renew()
            self._inputs = _Inputs.of(data, self.examples, self.steps, numbers)
        inputs = self._inputs
        for into, values in zip(inputs.data.tensors, data.tensors, strict=True):
            into[:n].copy_(values)
        inputs.step.zero_()
        inputs.lr.fill_(device.lr)
        return inputs

    def training(self, device: Device, mask: Mask, inputs: _Inputs) -> _Training:
        """Return what trains as a device does on such a mask, its memory at rest."""
        own = (
            *(device.momentum, device.weight_decay, device.norm_weight_decay, device.batch, device.augment is not None),
            *(device.loss, device.optimizer, device.clip_norm, device.correction and device.correction.kind),
        )
        weights = [(w.requires_grad, w.data_ptr()) for w in device.model.parameters()]  # which graphs know by address
        key = (*own, tuple(mask), *weights)
        if (training := self._trainings.get(key)) is None:
            steps = DenseSteps(device, {}, self.precision)
            if self.graphs:
                steps.allocate_()
            steps.masked = [(w, torch.zeros_like(w)) for w in map(device.model.get_parameter, mask)]
            training = self._trainings[key] = _Training(steps, tuple(mask))
        training.steps.rest_(device, inputs.lr if self.graphs else device.lr)
        return training

    def replay(self, graphs: CudaGraphs, step: Callable[[], None], state: list[Tensor]) -> _Replay:
        """Return what replays a ``step``, which changes ``state``: nothing is changed now."""
        steps, counts = [layer.step for layer in self.layers], (self.products.on_host, self.products.dense)
        record: list[tuple[object, float, Triple]] = []

        def recorded() -> None:
            record.clear()
            self.products.record = record
            step()

        def undo() -> None:
            self.products.record = None
            self.products.on_host, self.products.dense = counts
            for layer, number in zip(self.layers, steps, strict=True):
                layer.step = number

        return _Replay(captured(graphs, recorded, state, undo), record)


class CapturedSteps:
    """The steps of one training, in the memory of a worker's ``Capture``."""

    def __init__(self, capture: Capture, device: Device, mask: Mask):
        self.capture, self.device = capture, device
        self.inputs = capture.inputs(device)
        self.training = capture.training(device, mask, self.inputs)
        self.number, self.taken = 0, Counter[tuple[Any, ...]]()
        """The next step, and how often each captured step was taken whose multiply-adds are not counted yet."""
        if capture.graphs:
            capture.graphs.chance.manual_seed(capture.seed)
        self.put_(mask)

    def epoch(self, order: Tensor, draws: Tensor | None) -> Iterator[Tensor]:
        """Train on an epoch's batches, and yield their losses."""
        inputs, n = self.inputs, len(order)
        for into, values in ((inputs.order, order), (inputs.draws, draws)):
            if values is not None:  # from pinned memory, so that the host does not wait
                pinned = values.pin_memory() if into.is_cuda else values
                into[:n].copy_(pinned, non_blocking=True)
        inputs.place.zero_()
        for index in torch.split(order, self.device.batch):
            self._take(len(index))
            self.number += 1
            yield inputs.losses[self.number - 1]

    def put_(self, mask: Mask) -> None:
        """Go on with another mask."""
        self.training.steps.forget_()
        if tuple(mask) != self.training.names:
            before, self.training = self.training, self.capture.training(self.device, mask, self.inputs)
            for own, last in zip(self.training.steps.state(), before.steps.state(), strict=True):
                own.copy_(last)
        for (_, buffer), own in zip(self.training.steps.masked, mask.values(), strict=True):
            buffer.copy_(own.to(buffer.device))  # as it is: a quarter of the bytes
        self.training.steps.project_()

    def write_(self) -> None:
        """Wait for the steps: the model holds its weights."""
        self._count()
        self.training.steps.write_()

    def _take(self, size: int) -> None:
        """Take a step on the next ``size`` examples."""
        capture, layers = self.capture, self.capture.layers
        if not capture.graphs:
            self._step(size)
            return
        if capture.watches and self.number == 0:
            with capture.graphs.own_chance():
                self._step(size)
            return
        key, replays = (size, *(layer.exact for layer in layers)), self.training.replays
        if key not in replays:
            replays[key] = capture.replay(capture.graphs, partial(self._step, size), self._state())
        replays[key].take()
        for layer in layers:
            layer.step += 1
        self.taken[key] += 1

    def _step(self, size: int) -> None:
        """Take the step, which is captured: all that changes from one to the next lies in the inputs."""
        inputs, augment = self.inputs, self.device.augment
        if self.capture.graphs:
            self.capture.cut_weights()
        at = inputs.place + torch.arange(size, device=inputs.place.device)
        change = None if augment is None else partial(augment, draws=inputs.draws[at])
        x, y = inputs.data.batch(inputs.order[at], change)
        loss = self.training.steps.step(map_examples(self.capture.laid_out, x), y)
        torch.where(inputs.steps == inputs.step, loss, inputs.losses, out=inputs.losses)
        inputs.place.add_(size)
        inputs.step.add_(1)

    def _state(self) -> list[Tensor]:
        """Return what a step changes."""
        capture, inputs = self.capture, self.inputs
        thresholds = [threshold for layer in capture.layers for threshold in layer.thresholds()]
        model, state = capture.model, self.training.steps.state()
        own = [inputs.place, inputs.step, capture.products.on_device]
        return [*model.parameters(), *model.buffers(), *state, *thresholds, *own]

    def _count(self) -> None:
        """Count the multiply-adds of the replayed steps, before densities change or somebody reads them."""
        for key, times in self.taken.items():
            self.capture.products.add_again(self.training.replays[key].record, times)
        self.taken.clear()
