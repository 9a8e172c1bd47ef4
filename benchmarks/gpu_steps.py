"""Training steps of plain PyTorch on a GPU, or on a CPU in small: what FedSieve's rounds are measured against there.

A step is forward, cross-entropy, backward and SGD (foreach, no momentum), the model in channels_last, its whole data on
the device; on a GPU captured as a CUDA graph, if that is wanted.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fedsieve.client.models import MODELS

PRECISIONS = ("bf16", "fp32", "tf32")
"""In the order in which they are measured: the aims are of bf16, the default is fp32."""
WARM = 3
SHORTEST = 0.02
"""Seconds that a sample takes at least."""
SEED = 0


@dataclass(frozen=True)
class Work:
    """What is trained, and where: a round of ``clients`` with ``examples`` each."""

    device: str = "cuda"
    model: str = "resnet18"
    channels: int = 3
    side: int = 32
    classes: int = 10
    batch: int = 16
    clients: int = 10
    examples: int = 500
    matmul: int = 8192
    """The side of the matrices that the device's speed is measured with."""

    @property
    def is_gpu(self) -> bool:
        """Whether there are streams and graphs."""
        return self.device.startswith("cuda")

    @property
    def steps(self) -> int:
        """The steps of a client's epoch."""
        return math.ceil(self.examples / self.batch)

    def network(self) -> nn.Module:
        """Return the network, always with the same weights."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            return MODELS[self.model](self.channels, self.classes)

    def data(self) -> tuple[Tensor, Tensor]:
        """Return every client's examples: uint8 [clients, examples, channels, side, side] and labels, of noise."""
        generator = torch.Generator().manual_seed(SEED)
        shape = (self.clients, self.examples, self.channels, self.side, self.side)
        x = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
        return x, torch.randint(self.classes, shape[:2], generator=generator)

    def wait(self) -> None:
        """Wait until the device has done all that it was given."""
        if self.is_gpu:
            torch.cuda.synchronize(self.device)

    def flops(self) -> int:
        """Return the floating-point operations of a step: two for each multiply-add of its products."""
        model = self.network()
        x = torch.zeros(self.batch, self.channels, self.side, self.side)
        with FlopCounterMode(display=False) as counter:
            F.cross_entropy(model(x), torch.zeros(self.batch, dtype=torch.int64)).backward()
        return counter.get_total_flops()


SMALL = Work("cpu", "digits_net", 1, 8, 10, 16, 10, 32, 256)
"""A work of seconds, for a CPU."""


@contextmanager
def products_in(precision: str, work: Work) -> Iterator[None]:
    """Multiply float32 on a GPU as ``precision`` says, convolutions by what is tried to be fastest, for the block."""
    cudnn: Any = torch.backends.cudnn
    settings: tuple[Any, ...] = (torch.backends.cuda.matmul, cudnn.conv)
    before, benchmark = [one.fp32_precision for one in settings], cudnn.benchmark
    for one in settings if work.is_gpu else ():
        one.fp32_precision = "ieee" if precision == "fp32" else "tf32"
    cudnn.benchmark = work.is_gpu
    try:
        yield
    finally:
        cudnn.benchmark = benchmark
        for one, old in zip(settings, before, strict=True):
            one.fp32_precision = old


class Stepper:
    """One client's model, and the step that trains it on the batch at ``order`` of its examples."""

    def __init__(self, work: Work, precision: str, lr: float = 0.01, grouped: int = 0):
        self.work, self.precision, self.lr, self.grouped = work, precision, lr, grouped
        network = group(work.network(), grouped) if grouped else work.network()
        self.model = network.to(work.device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
        self.weights = list(self.model.parameters())
        self.x, self.y = (part.to(work.device) for part in work.data())
        if grouped:
            self.x = self.x[:grouped].movedim(0, 1).flatten(1, 2)
            self.y = self.y[:grouped].T.contiguous()
        else:
            self.x, self.y = self.x.flatten(0, 1), self.y.flatten()
        self.order = torch.arange(work.batch, device=work.device)

    def step(self, order: Tensor | None = None) -> None:
        """Train on a batch."""
        order = self.order if order is None else order
        x = self.x[order].float().sub_(127.5).div_(127.5).contiguous(memory_format=torch.channels_last)
        device = torch.device(self.work.device).type
        with torch.autocast(device, torch.bfloat16, enabled=self.precision == "bf16", cache_enabled=False):
            logits = self.model(x)
            if self.grouped:
                loss = F.cross_entropy(logits.movedim(1, 2), self.y[order], reduction="sum") / len(order)
            else:
                loss = F.cross_entropy(logits, self.y[order])
        gradients = torch.autograd.grad(loss, self.weights)
        with torch.no_grad():
            torch._foreach_add_(self.weights, gradients, alpha=-self.lr)


def captured(call: Callable[[], None], work: Work) -> Callable[[], None]:
    """Return what replays a call as a CUDA graph; on a CPU, the call."""
    if not work.is_gpu:
        return call
    stream, now = torch.cuda.Stream(), torch.cuda.current_stream()
    stream.wait_stream(now)
    with torch.cuda.stream(stream):
        for _ in range(WARM):
            call()
    now.wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()

    def replay(holder: object = call) -> None:
        """Take the step; ``holder`` keeps the memory that the graph reads and writes."""
        graph.replay()

    return replay


def on_streams(calls: list[Callable[[], None]], work: Work) -> Callable[[], None]:
    """Return what makes all calls at once, each on a stream of its own; on a CPU, one after another."""
    streams = [torch.cuda.Stream() for _ in calls] if work.is_gpu else []

    def together() -> None:
        if not streams:
            for call in calls:
                call()
            return
        now = torch.cuda.current_stream()
        for call, stream in zip(calls, streams, strict=True):
            stream.wait_stream(now)
            with torch.cuda.stream(stream):
                call()
        for stream in streams:
            now.wait_stream(stream)

    return together


class PlainLoop:
    """FedAvg as a good engineer writes it: one resident model, one client after another, captured steps, nothing sent.

    Weights and BatchNorm's statistics are summed on the device. No message is encoded, nothing is checked or tested.
    """

    def __init__(self, work: Work, precision: str):
        self.work, self.stepper = work, Stepper(work, precision)
        self.state = [v for v in self.stepper.model.state_dict(keep_vars=True).values() if v.is_floating_point()]
        self.mean = [v.detach().clone() for v in self.state]
        self.sums = [torch.empty_like(v) for v in self.mean]
        self.orders, self.calls = dict[int, Tensor](), dict[int, Callable[[], None]]()
        for size in {work.batch, work.examples % work.batch or work.batch}:
            order = torch.arange(size, device=work.device)
            self.orders[size] = order
            self.calls[size] = captured(lambda order=order: self.stepper.step(order), work)  # type: ignore[misc]

    def train(self, client: int) -> None:
        """Train the model on a client's examples for an epoch."""
        order = client * self.work.examples + torch.randperm(self.work.examples, device=self.work.device)
        for batch in torch.split(order, self.work.batch):
            self.orders[len(batch)].copy_(batch)
            self.calls[len(batch)]()

    @torch.no_grad()
    def round(self) -> None:
        """Train every client from the mean of the last round, and take the mean of what they reach."""
        torch._foreach_zero_(self.sums)
        for client in range(self.work.clients):
            torch._foreach_copy_(self.state, self.mean)
            with torch.enable_grad():
                self.train(client)
            torch._foreach_add_(self.sums, self.state, alpha=1 / self.work.clients)
        torch._foreach_copy_(self.mean, self.sums)
        self.work.wait()


def group(model: nn.Module, clients: int) -> nn.Module:
    """Return one network in place of ``clients`` equal ones: [b, clients * channels, h, w] -> [b, clients, classes].

    Convolutions are grouped, so that a client's channels meet its own weights alone; a norm's statistics are a
    channel's anyway; linear layers are products of batches.
    """
    model = copy.deepcopy(model)
    for name, layer in [*model.named_modules()]:
        own: nn.Module | None = None
        if isinstance(layer, nn.Conv2d):
            sizes: Any = (clients * layer.in_channels, clients * layer.out_channels, layer.kernel_size)
            shape: Any = {"stride": layer.stride, "padding": layer.padding, "groups": clients * layer.groups}
            own = nn.Conv2d(*sizes, **shape, bias=layer.bias is not None)
        elif isinstance(layer, nn.BatchNorm2d):
            own = nn.BatchNorm2d(clients * layer.num_features, layer.eps, layer.momentum)
        elif isinstance(layer, nn.Linear):
            own = _GroupedLinear(layer, clients)
        if own is None:
            continue
        if not isinstance(own, _GroupedLinear):
            repeated = {
                key: value.repeat(clients, *[1] * (value.dim() - 1)) if value.dim() else value
                for key, value in layer.state_dict().items()
            }
            own.load_state_dict(repeated)
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, own)
    return model


class _GroupedLinear(nn.Module):
    def __init__(self, layer: nn.Linear, clients: int):
        super().__init__()
        self.clients = clients
        self.weight = nn.Parameter(layer.weight.detach().repeat(clients, 1, 1))
        self.bias = nn.Parameter(layer.bias.detach().repeat(clients, 1))

    def forward(self, x: Tensor) -> Tensor:
        """[b, clients * in], or [b, clients, in] -> [b, clients, out]."""
        inputs = x.reshape(len(x), self.clients, -1).transpose(0, 1)
        return torch.baddbmm(self.bias[:, None], inputs, self.weight.transpose(1, 2)).transpose(0, 1)


def matmul(work: Work, precision: str) -> Callable[[], None]:
    """Return a product of two square matrices."""
    kind = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.randn(work.matmul, work.matmul, device=work.device, dtype=kind) for _ in range(2))

    def multiply() -> None:
        a @ b

    return multiply


def milliseconds(
    calls: Mapping[str, Callable[[], None]], work: Work, seconds: float, most: int = 200
) -> dict[str, float]:
    """Return the median time of a call of each, in ms, all in turns for so many seconds; each at least 3 times."""
    counts = {}
    for name, call in calls.items():
        one = min(_seconds(call, 1, work) for _ in range(WARM))
        counts[name] = max(1, math.ceil(SHORTEST / one)) if work.is_gpu else 1
    samples: dict[str, list[float]] = {name: [] for name in calls}
    end = time.monotonic() + seconds
    while (turns := min(map(len, samples.values()))) < WARM or (time.monotonic() < end and turns < most):
        for name, call in calls.items():
            samples[name].append(_seconds(call, counts[name], work))
    return {name: 1000 * median(own) for name, own in samples.items()}


def _seconds(call: Callable[[], None], count: int, work: Work) -> float:
    work.wait()
    began = time.perf_counter()
    for _ in range(count):
        call()
    work.wait()
    return (time.perf_counter() - began) / count
