"""What a client's training took: steps, seconds, multiply-adds, counted where they happen, and memory for backward.

Convolutions and linear layers that are called count themselves; all else is counted beforehand (``client.operations``).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedsieve.client.operations import OtherOps, count_other_ops
from fedsieve.client.products import DENSE, Products, Triple
from fedsieve.client.training import DenseSteps, train_
from fedsieve.kernels.dispatch import Kernels, SparseSteps
from fedsieve.sparse.layers import SparseLayer
from fedsieve.sparse.policy import WeightLayer, weight_layers
from fedsieve.types import Device, Examples, Mask, Steps, tensors_of


class Cost:
    """What a client's training took: steps, seconds, and multiply-adds, at the real densities and were all dense.

    These are forward, input gradient and weight gradient, where they are computed. In dense steps a sparse layer, or a
    parameter, holds the densities of its last three products in an attribute ``densities``; without one it is dense, as
    products without a parameter are. Of a model of convolutions and linear layers alone no ``examples`` are needed (as
    the model takes them, with the targets of the ``loss``) to find it.
    """

    def __init__(
        self,
        model: nn.Module,
        kernels: Kernels | None = None,
        examples: tuple[Examples, Examples] | None = None,
        loss: Callable[[Any, Any], Tensor] = F.cross_entropy,
    ):
        self.kernels = kernels
        self.dense_steps: Callable[[Device, Mask], Steps] = DenseSteps
        """What begins a training that the kernels do not take."""
        self.products = Products(next((w.device for w in model.parameters()), torch.device("cpu")))
        self.restart()
        self.other_ops, self.weights = OtherOps(), dict(model.named_parameters())
        owners = {id(w): name for name, w in self.weights.items()}
        for path, layer in weight_layers(model).items():
            weight = layer._parameters.get("weight")
            makers = [w for name, w in layer.named_parameters() if name != "bias"] if weight is None else [weight]
            trained = any(w.requires_grad for w in makers)
            own = None if isinstance(layer, SparseLayer) else layer._parameters.get("weight")
            source = layer if own is None else own  # what has the densities
            owners.setdefault(id(source), f"{path}.weight")
            layer.register_forward_hook(partial(self._count, fan_in(layer), trained, source), with_kwargs=True)
        if examples is not None:
            self.other_ops = count_other_ops(train_(model), *examples, self.products, owners, loss)
            self.restart()
        if self.other_ops:
            model.register_forward_hook(self._count_other_ops, with_kwargs=True)

    def restart(self) -> None:
        """Forget what was counted."""
        self.products.restart()
        self.seconds = 0.0
        self.times, self.losses, self.why = list[float](), list[Tensor](), ""
        self.sparse: SparseSteps | None = None

    def report(self) -> dict[str, Any]:
        """Return the multiply-adds as ``work``; the steps, seconds, and which steps they were and why as ``notes``."""
        why = {self.why: 1.0} if self.why else {}
        notes = {"steps": float(self.steps), "seconds": self.seconds, "sparse": float(bool(self.sparse)), "why": why}
        return {"work": {"real": self.products.real, "dense": self.products.dense}, "notes": notes}

    def nonfinite_step(self) -> int:
        """Return the first step whose loss was NaN or infinite, counted from 1; 0 if there was none."""
        odd = ~torch.stack(self.losses).isfinite() if self.losses else torch.zeros(1)
        return 1 + int(odd.int().argmax()) if odd.any() else 0

    def begin(self, device: Device, mask: Mask) -> Steps:
        """Return the steps of a training, sparse or dense, which will be counted; ``why`` holds the reason if dense."""
        with self.clock():
            steps = self.kernels.take(device, mask) if self.kernels else ""
            if isinstance(steps, str):
                self.why = steps
                return _CountedSteps(self.dense_steps(device, mask), self, device.batch)
            self.sparse = steps
            return _CountedSteps(steps, self, device.batch)

    @property
    def steps(self) -> int:
        """The number of steps; ``times`` has the seconds of each, ``seconds`` those before and after them as well."""
        return len(self.times)

    @contextmanager
    def clock(self) -> Iterator[None]:
        """Count the seconds of the block."""
        began = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - began

    def _count(
        self,
        fan_in: int,
        trained: bool,
        source: object,
        layer: nn.Module,
        args: tuple[Tensor, ...],
        kwargs: dict[str, Tensor],
        output: Tensor,
    ) -> None:
        if not layer.training:
            return
        given = args[0] if args and isinstance(args[0], Tensor) else tensors_of((args, kwargs))[0]
        n, needed = float(output.numel() * fan_in), given.requires_grad
        densities = getattr(source, "densities", DENSE)
        self.products.add(source, n, (1.0, 0.0, 0.0), densities)
        if output.requires_grad:
            backward = (0.0, float(needed), float(trained))
            count = partial(self.products.add, source, n, backward, densities)  # not called if the loss does not see it
            output.register_hook(lambda _: count())  # type: ignore[no-untyped-call]

    def _count_other_ops(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if model.training:
            n = len(tensors_of((args, kwargs))[0])
            self.add_other_ops(n, (1.0, 0.0, 0.0))
            if trained := [one for one in tensors_of(output) if one.requires_grad]:
                trained[0].register_hook(lambda _: self.add_other_ops(n, (0.0, 1.0, 1.0)))  # type: ignore[no-untyped-call]

    def add_other_ops(self, n: int, which: Triple) -> None:
        """Add what a step on ``n`` examples multiplies beside layers that count, of the products that are 1."""
        for name, (forward, inner, own) in self.other_ops.of_step(n).items():
            source = self.weights.get(name)
            densities = getattr(source, "densities", DENSE)
            self.products.add(source, 1.0, (which[0] * forward, which[1] * inner, which[2] * own), densities)


@dataclass
class _CountedSteps:
    """Steps whose cost is counted."""

    steps: Steps
    cost: Cost
    batch: int

    def epoch(self, order: Tensor, draws: Tensor | None) -> Iterator[Tensor]:
        losses = iter(self.steps.epoch(order, draws))
        for index in torch.split(order, self.batch):
            before = self.cost.seconds
            with self.cost.clock():
                loss = next(losses)
            self.cost.times.append(self.cost.seconds - before)
            self.cost.losses.append(loss.detach())
            if isinstance(self.steps, SparseSteps):
                real, dense = self.steps.multiply_adds(len(index))
                self.cost.products.on_host += real
                self.cost.products.dense += dense
                self.cost.add_other_ops(len(index), (1.0, 1.0, 1.0))
            yield loss

    def put_(self, mask: Mask) -> None:
        with self.cost.clock():
            self.steps.put_(mask)

    def write_(self) -> None:
        with self.cost.clock():
            self.steps.write_()


def fan_in(layer: WeightLayer) -> int:
    """Return how many products each output of a convolution or linear layer is the sum of."""
    if isinstance(layer, nn.Linear):
        return layer.in_features
    return layer.in_channels // layer.groups * math.prod(layer.kernel_size)


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
            self._hooks = torch.autograd.graph.saved_tensors_hooks(self._keep, lambda x: x)
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
