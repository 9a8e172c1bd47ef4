"""What a client's training took: steps, seconds, multiply-adds, counted where they happen, and memory for backward.

Multiply-adds that convolutions and linear layers do not count themselves (attention, recurrent layers, functions) are
counted by PyTorch's own formulas (``torch.utils.flop_counter``), applied to every operation of a training step, forward
and backward. What a step multiplies follows from the number of its examples alone: it is found for three small batches,
and is a polynomial of degree two at most in between and beyond (attention over the examples of a batch has that).
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
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from fedsieve.client.products import DENSE, Products
from fedsieve.client.training import DenseSteps, train_
from fedsieve.kernels.dispatch import Kernels, SparseSteps
from fedsieve.sparse.policy import WeightLayer, weight_layers
from fedsieve.types import Device, Examples, Mask, Steps, apply_model, leaves, map_examples, tensors_of

SIZES = (2, 3, 4)
"""The batches that are counted: BatchNorm needs two examples."""
UNKNOWN = ("fft", "cdist", "trilinear", "linalg", "cholesky", "grid_sampler", "sparse", "quantized", "rnn", "attention")
"""Parts of the names of PyTorch's operations that multiply and have no formula."""
SMALL: dict[str, Callable[..., int]] = {
    "mv": lambda a, b: a.numel(),
    "dot": lambda a, b: a.numel(),
    "addmv": lambda y, a, b: a.numel(),
}
"""Multiply-adds of a matrix with a vector, which PyTorch's counter leaves out."""
COMMON = {"aten", "prim", "prims", "profiler"}


class Cost:
    """What a client's training took: steps, seconds, and multiply-adds, at the real densities and were all dense.

    These are forward, input gradient and weight gradient, where they are computed. In dense steps a layer holds the
    densities of its last three products in an attribute ``densities``; without one it is dense, as all is that is not
    a convolution or a linear layer. Of a model of those alone no ``examples`` are needed (as the model takes them, with
    the targets of the ``loss``) to find it.
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
        self.other_ops = OtherOps()
        for layer in weight_layers(model).values():
            trained = any(w.requires_grad for name, w in layer.named_parameters() if name != "bias")  # or what makes it
            layer.register_forward_hook(partial(self._count, fan_in(layer), trained), with_kwargs=True)
        if examples is not None:
            self.other_ops = count_other_ops(train_(model), *examples, lambda: self.products.dense, loss)
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
        layer: nn.Module,
        args: tuple[Tensor, ...],
        kwargs: dict[str, Tensor],
        output: Tensor,
    ) -> None:
        if not layer.training:
            return
        n, needed = float(output.numel() * fan_in), tensors_of((args, kwargs))[0].requires_grad
        densities = getattr(layer, "densities", DENSE)
        self.products.add(layer, n, (1.0, 0.0, 0.0), densities)
        if output.requires_grad:
            backward = (0.0, float(needed), float(trained))
            count = partial(self.products.add, layer, n, backward, densities)  # not called if the loss does not see it
            output.register_hook(lambda _: count())  # type: ignore[no-untyped-call]

    def _count_other_ops(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if model.training:
            forward, backward = self.other_ops.of_step(len(tensors_of((args, kwargs))[0]))
            self.products.add(None, forward, (1.0, 0.0, 0.0))
            if trained := [one for one in tensors_of(output) if one.requires_grad]:
                count = partial(self.products.add, None, backward, (0.0, 1.0, 0.0))
                trained[0].register_hook(lambda _: count())  # type: ignore[no-untyped-call]


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
                more = sum(self.cost.other_ops.of_step(len(index)))
                self.cost.products.on_host += real + more
                self.cost.products.dense += dense + more
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


@dataclass(frozen=True)
class OtherOps:
    """Multiply-adds of a training step's operations other than convolutions and linear layers."""

    forward: tuple[float, ...] = (0.0, 0.0, 0.0)
    """For batches of ``SIZES``."""
    backward: tuple[float, ...] = (0.0, 0.0, 0.0)
    unknown: tuple[str, ...] = ()
    """The parts of the model whose multiply-adds cannot be counted."""

    def __bool__(self) -> bool:
        return any(self.forward + self.backward)

    def of_step(self, n: int) -> tuple[float, float]:
        """Return those of forward and backward on ``n`` examples: the polynomials through the counts at ``SIZES``."""
        forward, backward = (
            (a * (n - 3) * (n - 4) - 2 * b * (n - 2) * (n - 4) + c * (n - 2) * (n - 3)) / 2
            for a, b, c in (self.forward, self.backward)
        )
        return forward, backward


def count_other_ops(
    model: nn.Module,
    x: Examples,
    y: Examples,
    count: Callable[[], float],
    loss: Callable[[Any, Any], Tensor] = F.cross_entropy,
) -> OtherOps:
    """Return the multiply-adds of training steps of ``model``, in training mode, that ``count`` has not.

    ``x`` and ``y`` are four examples or more, as model and loss take them. The model's buffers, and PyTorch's
    generators, are left as they were.
    """
    trained = [w for w in model.parameters() if w.requires_grad]
    forward, backward, unknown = list[float](), list[float](), dict[str, None]()
    with _restored(model, leaves(x)[0]), _plain_operations(), _paths(model) as path:
        for n in SIZES:
            before = count()
            try:
                with _Counter(path, unknown) as counter:
                    some = (map_examples(lambda one, n=n: one[:n], part) for part in (x, y))  # type: ignore[misc]
                    value = loss(apply_model(model, next(some)), next(some))
                    forward.append(counter.products - (count() - before))
                    before, counter.products = count(), 0.0
                    torch.autograd.grad(value, trained, allow_unused=True)
                backward.append(counter.products - (count() - before))
            except Exception as error:  # whatever the user's own code raises where its operations are watched
                return OtherOps(unknown=(f"all but convolutions and linear layers ({type(error).__name__})",))
    return OtherOps(tuple(forward), tuple(backward), tuple(unknown))


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the multiply-adds of all operations, and notes where some are that it cannot count."""

    def __init__(self, path: list[str], unknown: dict[str, None]):
        super().__init__()  # type: ignore[no-untyped-call]
        self.path, self.unknown, self.products = path, unknown, 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute as without the mode."""
        result = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        name = packet._qualified_op_name.split("::")[-1]
        if packet in flop_registry:
            self.products += flop_registry[packet](*args, **(kwargs or {}), out_val=result) / 2
        elif name in SMALL:
            self.products += SMALL[name](*args)
        elif self.path and (func.namespace not in COMMON or any(part in name for part in UNKNOWN)):
            place = self.path[-1]  # of forward: backward has the same places
            self.unknown[f"{place} ({name})" if place else name] = None
        return result


@contextmanager
def _plain_operations() -> Iterator[None]:
    """Compute recurrent layers and attention by the products that they consist of, not by one operation."""
    before = torch._C._get_mkldnn_enabled(), torch._C._get_cudnn_enabled()
    torch._C._set_mkldnn_enabled(False)  # torch.backends.mkldnn.flags sets more than that, and warns of it
    torch._C._set_cudnn_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch._C._set_mkldnn_enabled(before[0])
        torch._C._set_cudnn_enabled(before[1])


@contextmanager
def _restored(model: nn.Module, x: Tensor) -> Iterator[None]:
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    with torch.random.fork_rng([x.device] if x.is_cuda else []), torch.enable_grad():
        yield
    for buffer, value in buffers:
        buffer.copy_(value)


@contextmanager
def _paths(model: nn.Module) -> Iterator[list[str]]:
    """Keep the names of the modules that are at work, the innermost last."""
    path, handles = list[str](), []

    def leave(*_: object) -> None:
        path.pop()

    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(lambda *_, name=name: path.append(name)))
        handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        yield path
    finally:
        for handle in handles:
            handle.remove()


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
