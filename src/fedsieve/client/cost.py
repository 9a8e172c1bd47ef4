"""What a client's training took: steps, seconds, and multiply-adds, counted where they happen."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from fedsieve.client.flops import OtherOps, count_other_ops, extrapolate
from fedsieve.client.training import DenseSteps, train_
from fedsieve.kernels.dispatch import Kernels, SparseSteps
from fedsieve.sparse.policy import weight_layers
from fedsieve.types import Device, Mask, Steps

DENSE = (1.0, 1.0, 1.0)


class Cost:
    """What a client's training took: steps, seconds, and multiply-adds, at the real densities and were all dense.

    These are forward, input gradient and weight gradient, where they are computed. In dense steps a layer holds the
    densities of its last three products in an attribute ``densities``; without one it is dense, as all is that is not
    a convolution or a linear layer. Of a model of those alone no ``examples`` are needed, normalised ones, to find it.
    """

    def __init__(self, model: nn.Module, kernels: Kernels | None = None, examples: Tensor | None = None):
        self.kernels = kernels
        self.restart()
        self.other_ops = OtherOps()
        for layer in weight_layers(model).values():
            layer.register_forward_hook(partial(self._count, fan_in(layer), _is_trained(layer)), with_kwargs=True)
        if examples is not None:
            self.other_ops = count_other_ops(train_(model), examples, lambda: self.dense)
            self.restart()
        if self.other_ops:
            model.register_forward_hook(self._count_other_ops, with_kwargs=True)

    def restart(self) -> None:
        """Forget what was counted."""
        self.real = self.dense = self.seconds = 0.0
        self.times, self.why = list[float](), ""
        self.sparse: SparseSteps | None = None

    def report(self) -> dict[str, Any]:
        """Return the multiply-adds as ``work``; the steps, seconds, and which steps they were and why as ``notes``."""
        why = {self.why: 1.0} if self.why else {}
        notes = {"steps": float(self.steps), "seconds": self.seconds, "sparse": float(bool(self.sparse)), "why": why}
        return {"work": {"real": self.real, "dense": self.dense}, "notes": notes}

    def begin(self, device: Device, mask: Mask) -> Steps:
        """Return the steps of a training, sparse or dense, which will be counted; ``why`` holds the reason if dense."""
        with self.clock():
            steps = self.kernels.take(device, mask) if self.kernels else ""
            if isinstance(steps, str):
                self.why = steps
                return _CountedSteps(DenseSteps(device, mask), self)
            self.sparse = steps
            return _CountedSteps(steps, self)

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
        layer: nn.Module,
        args: tuple[Tensor, ...],
        kwargs: dict[str, Tensor],
        output: Tensor,
    ) -> None:
        if not layer.training:
            return
        products, needed = output.numel() * fan_in, _first(args, kwargs).requires_grad
        forward, grad_in, grad_w = getattr(layer, "densities", DENSE)
        backward = products * (grad_in * needed + grad_w * trained), products * (needed + trained)
        self._add(products * forward, products)
        if output.requires_grad:
            count = partial(self._add, *backward)  # for a layer that the loss does not see it is never called
            output.register_hook(lambda _: count())  # type: ignore[no-untyped-call]

    def _count_other_ops(
        self, model: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], logits: Tensor
    ) -> None:
        if model.training:
            n = len(_first(args, kwargs))
            forward, backward = extrapolate(self.other_ops.forward, n), extrapolate(self.other_ops.backward, n)
            self._add(forward, forward)
            if logits.requires_grad:
                logits.register_hook(lambda _: self._add(backward, backward))  # type: ignore[no-untyped-call]

    def _add(self, real: float, dense: float) -> None:
        self.real += real
        self.dense += dense


def fan_in(layer: nn.Module) -> int:
    """Return how many products each output of a convolution or linear layer is the sum of."""
    if isinstance(layer, nn.Linear):
        return layer.in_features
    assert isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    return layer.in_channels // layer.groups * math.prod(layer.kernel_size)


def _is_trained(layer: nn.Module) -> bool:
    """Tell whether a layer's weight needs a gradient, also one that is computed from other parameters."""
    return any(w.requires_grad for name, w in layer.named_parameters() if name != "bias")


def _first(args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> Tensor:
    return args[0] if args else next(iter(kwargs.values()))


@dataclass
class _CountedSteps:
    """Steps whose cost is counted."""

    steps: DenseSteps | SparseSteps
    cost: Cost

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        before = self.cost.seconds
        with self.cost.clock():
            loss = self.steps.step(x, y)
        self.cost.times.append(self.cost.seconds - before)
        if isinstance(self.steps, SparseSteps):
            real, dense = self.steps.multiply_adds(len(x))
            more = self.cost.other_ops.both(len(x))
            self.cost._add(real + more, dense + more)
        return loss

    def put_(self, mask: Mask) -> None:
        with self.cost.clock():
            self.steps.put_(mask)

    def write_(self) -> None:
        with self.cost.clock():
            self.steps.write_()
