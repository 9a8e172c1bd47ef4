"""Multiply-adds that convolutions and linear layers do not count themselves: attention, recurrent layers, functions.

PyTorch's own formulas (``torch.utils.flop_counter``) are applied to every operation of a training step, forward and
backward. What a step multiplies follows from the number of its examples alone: it is found for three small batches,
and is a polynomial of degree two at most in between and beyond (attention over the examples of a batch has that).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

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

    def both(self, n: int) -> float:
        """Return the multiply-adds of a step on ``n`` examples."""
        return extrapolate(self.forward, n) + extrapolate(self.backward, n)


def extrapolate(counts: tuple[float, ...], n: int) -> float:
    """Return the value at ``n`` of the polynomial through ``counts`` at ``SIZES``."""
    a, b, c = counts
    return (a * (n - 3) * (n - 4) - 2 * b * (n - 2) * (n - 4) + c * (n - 2) * (n - 3)) / 2


def count_other_ops(model: nn.Module, x: Tensor, counted: Callable[[], float]) -> OtherOps:
    """Return the multiply-adds of training steps of ``model``, in training mode, that ``counted`` has not.

    ``x`` are examples, as the model takes them. The model's buffers, and PyTorch's generators, are left as they were.
    """
    trained = [w for w in model.parameters() if w.requires_grad]
    x = x[torch.arange(max(SIZES), device=x.device) % len(x)]
    forward, backward, unknown = list[float](), list[float](), dict[str, None]()
    with _restored(model, x), _plain_operations(), _paths(model) as path:
        for n in SIZES:
            before = counted()
            try:
                with _Counter(path, unknown) as counter:
                    loss = F.cross_entropy(model(x[:n]), torch.zeros(n, dtype=torch.int64, device=x.device))
                    forward.append(counter.products - (counted() - before))
                    before, counter.products = counted(), 0.0
                    torch.autograd.grad(loss, trained, allow_unused=True)
                backward.append(counter.products - (counted() - before))
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
        found = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        name = packet._qualified_op_name.split("::")[-1]
        if packet in flop_registry:
            self.products += flop_registry[packet](*args, **(kwargs or {}), out_val=found) / 2
        elif name in SMALL:
            self.products += SMALL[name](*args)
        elif self.path and (func.namespace not in COMMON or any(part in name for part in UNKNOWN)):
            place = self.path[-1]  # of forward: backward has the same places
            self.unknown[f"{place} ({name})" if place else name] = None
        return found


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
    kept = [(buffer, buffer.clone()) for buffer in model.buffers()]
    with torch.random.fork_rng([x.device] if x.is_cuda else []), torch.enable_grad():
        yield
    for buffer, value in kept:
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
