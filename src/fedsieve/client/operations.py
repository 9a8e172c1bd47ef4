"""The multiply-adds of a training step's operations that no layer counts itself, by the weight that they multiply by.

They are counted by PyTorch's own formulas (``torch.utils.flop_counter``), applied to every operation of a training
step, forward and backward. What a step multiplies follows from the number of its examples alone: it is found for three
small batches, and is a polynomial of degree two at most in between and beyond (attention over the examples of a batch
has that).
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from fedsieve.client.products import Products, Triple
from fedsieve.types import Examples, apply_model, leaves, map_examples

SIZES = (2, 3, 4)
"""The batches that are counted: BatchNorm needs two examples."""
UNKNOWN = ("fft", "cdist", "trilinear", "linalg", "cholesky", "grid_sampler", "sparse", "quantized", "rnn", "attention")
"""Parts of the names of PyTorch's operations that multiply and have no formula."""
COMMON = {"aten", "prim", "prims", "profiler"}
COPIES = ("clone", "_to_copy")
"""Operations whose result has the numbers of their input in memory of its own."""
BySize: TypeAlias = tuple[float, float, float]
"""A number for each batch of ``SIZES``."""


def _trilinear(
    a: Tensor, b: Tensor, c: Tensor, new_a: list[int], new_b: list[int], new_c: list[int], sums: list[int], _: int = 1
) -> int:
    """Return the multiply-adds of ``nn.Bilinear``'s operation: of two tensors, then of what is left with the third."""
    several: list[list[int]] = [_unsqueezed(one.shape, new) for one, new in ((a, new_a), (b, new_b), (c, new_c))]
    first = [max(sizes) for sizes in zip(*several[:2], strict=True)]
    left = [1 if d in sums and d in new_c else size for d, size in enumerate(first)]
    second = [max(sizes) for sizes in zip(left, several[2], strict=True)]
    products: int = math.prod(first) + math.prod(second)
    return products


def _unsqueezed(shape: tuple[int, ...], new: list[int]) -> list[int]:
    sizes = [*shape]
    for d in sorted(new):
        sizes.insert(d, 1)
    return sizes


def _convolution_backward(g: Tensor, x: Tensor, w: Tensor, *rest: Any) -> int:
    """Return the multiply-adds of a convolution's gradients, of channels of one group alone, as PyTorch's are not."""
    transposed, mask = rest[4], rest[-1]
    products: int = (x if transposed else g).numel() * w[0].numel() * (mask[0] + mask[1])
    return products


OWN: dict[str, Callable[..., int]] = {
    "mv": lambda a, b: a.numel(),
    "dot": lambda a, b: a.numel(),
    "addmv": lambda y, a, b: a.numel(),
    "_trilinear": _trilinear,
    "convolution_backward": _convolution_backward,
}
"""Multiply-adds of operations that PyTorch's counter leaves out, or counts otherwise."""


@dataclass(frozen=True)
class OtherOps:
    """Multiply-adds of a training step's operations other than those of convolutions and linear layers that count."""

    weights: Mapping[str, tuple[BySize, BySize, BySize]] = field(default_factory=dict)
    """Of those with a parameter: forward, input gradient and weight gradient, by its name."""
    rest: tuple[BySize, BySize] = ((0.0,) * 3, (0.0,) * 3)
    """Of all others: forward and backward."""
    unknown: tuple[str, ...] = ()
    """The parts of the model whose multiply-adds cannot be counted."""

    def __bool__(self) -> bool:
        return bool(self.weights) or any(map(any, self.rest))

    def of_step(self, n: int) -> dict[str, Triple]:
        """Return those of forward, input and weight gradient on ``n`` examples by parameter; "": with none.

        Of operations with no parameter both gradients are the second number.
        """
        forward, backward = (_at(counts, n) for counts in self.rest)
        several = {name: (_at(f, n), _at(g, n), _at(w, n)) for name, (f, g, w) in self.weights.items()}
        return several | {"": (forward, backward, 0.0)}


def _at(counts: BySize, n: int) -> float:
    """Return the polynomial through the counts at ``SIZES``."""
    a, b, c = counts
    return (a * (n - 3) * (n - 4) - 2 * b * (n - 2) * (n - 4) + c * (n - 2) * (n - 3)) / 2


def count_other_ops(
    model: nn.Module,
    x: Examples,
    y: Examples,
    products: Products,
    owners: Mapping[int, str],
    loss: Callable[[Any, Any], Tensor] = F.cross_entropy,
) -> OtherOps:
    """Return the multiply-adds of training steps of ``model``, in training mode, that ``products`` does not count.

    ``x`` and ``y`` are four examples or more, as model and loss take them; ``owners`` says whose weight's name what is
    added to ``products`` belongs to, by the id of its layer or parameter. The model's buffers, and PyTorch's
    generators, are left as they were.
    """
    named = {name: w for name, w in model.named_parameters() if w.requires_grad}
    steps, unknown = list[tuple[dict[str, Triple], tuple[float, float]]](), dict[str, None]()
    record = products.record = list[tuple[Any, float, Triple]]()
    try:
        with _restored(model, leaves(x)[0]), plain_operations(), _paths(model) as path:
            for n in SIZES:
                some = [map_examples(lambda one, n=n: one[:n], part) for part in (x, y)]  # type: ignore[misc]
                with _Counter(model, path, unknown) as counter:
                    value = loss(apply_model(model, some[0]), some[1])
                    forward, layers = counter.taken(), _of_layers(record, owners)
                    gradients = torch.autograd.grad(value, list(named.values()), allow_unused=True)
                trained = {name for name, g in zip(named, gradients, strict=True) if g is not None}
                steps.append(_split(forward, layers, counter.taken(), _of_layers(record, owners), trained))
    except Exception as error:  # whatever the user's own code raises where its operations are watched
        return OtherOps(unknown=(f"all but convolutions and linear layers ({type(error).__name__})",))
    finally:
        products.record = None
    names = [name for name in dict(model.named_parameters()) if any(any(own.get(name, ())) for own, _ in steps)]
    weights: Any = {
        name: tuple(tuple(own.get(name, (0.0, 0.0, 0.0))[i] for own, _ in steps) for i in range(3)) for name in names
    }
    rest: Any = tuple(tuple(rest[i] for _, rest in steps) for i in range(2))
    return OtherOps(weights, rest, tuple(unknown))


@dataclass
class _Taken:
    """The multiply-adds of a pass: all, by the weight that is multiplied by, and of those with one weight alone."""

    total: float = 0.0
    weights: Counter[str] = field(default_factory=Counter)
    single: Counter[str] = field(default_factory=Counter)


def _of_layers(record: list[tuple[Any, float, Triple]], owners: Mapping[int, str]) -> tuple[float, Counter[str]]:
    """Return what layers have counted in a pass, all of it and by weight without weight gradients, and forget it."""
    total, weights = 0.0, Counter[str]()
    for owner, n, which in record:
        total += n * sum(which)
        weights[owners.get(id(owner), "")] += n * (which[0] + which[1])  # type: ignore[assignment]
    record.clear()
    return total, weights


def _split(
    forward: _Taken,
    forward_layers: tuple[float, Counter[str]],
    backward: _Taken,
    backward_layers: tuple[float, Counter[str]],
    trained: set[str],
) -> tuple[dict[str, Triple], tuple[float, float]]:
    """Return a step's multiply-adds by weight, and the others of forward and backward, without what layers counted.

    A weight's gradient takes as many as the products with it: of which weight an operation makes the gradient it does
    not tell.
    """
    weights = dict[str, Triple]()
    for name in forward.weights.keys() | backward.weights.keys():
        f, g = (
            max(0.0, taken.weights[name] - layers[1][name])
            for taken, layers in ((forward, forward_layers), (backward, backward_layers))
        )
        own = min(f, forward.single[name]) if name in trained else 0.0
        if f or g:
            weights[name] = (f, g, own)
    left = forward.total - forward_layers[0] - sum(f for f, _, _ in weights.values())
    return weights, (left, backward.total - backward_layers[0] - sum(g + w for _, g, w in weights.values()))


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the multiply-adds of all operations, and notes where some are that it cannot count."""

    def __init__(self, model: nn.Module, path: list[str], unknown: dict[str, None]):
        super().__init__()  # type: ignore[no-untyped-call]
        self.path, self.unknown, self.counts = path, unknown, _Taken()
        self.blocks = list[tuple[int, int, str]]()
        """Where weights lie in memory: first byte, what follows the last one, name; in order."""
        self.kept = list[Tensor]()
        self.handle = model.register_forward_pre_hook(self._locate)

    def taken(self) -> _Taken:
        """Return what was counted, and begin at nothing."""
        counts, self.counts = self.counts, _Taken()
        return counts

    def __exit__(self, *error: Any) -> None:
        self.handle.remove()
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute as without the mode."""
        result = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        name = packet._qualified_op_name.split("::")[-1]
        if name in OWN:
            self._add(name, args, OWN[name](*args))
        elif packet in flop_registry:
            self._add(name, args, flop_registry[packet](*args, **(kwargs or {}), out_val=result) / 2)
        elif name in COPIES and (owner := self._name(args[0])):
            self._put(owner, result)
        elif self.path and (func.namespace not in COMMON or any(part in name for part in UNKNOWN)):
            place = self.path[-1]  # of forward: backward has the same places
            self.unknown[f"{place} ({name})" if place else name] = None
        return result

    def _add(self, name: str, args: Any, n: float) -> None:
        self.counts.total += n
        owners = [own for one in args if isinstance(one, Tensor) and (own := self._name(one))]
        if not owners:
            return
        if name == "convolution_backward":  # of whose gradients the second is the weight's
            inner, own = args[-1][:2]
            n *= inner / max(1, inner + own)
        self.counts.weights[owners[0]] += n  # type: ignore[assignment]
        if len(owners) == 1:
            self.counts.single[owners[0]] += n  # type: ignore[assignment]

    def _locate(self, model: nn.Module, _: object) -> None:
        """Note where the weights of a pass lie, those among them that are computed for it."""
        for name, w in model.named_parameters():
            if w.dim() > 1:
                self._put(name, w)

    def _put(self, name: str, w: Tensor) -> None:
        self.kept.append(w)  # or other tensors would come to lie there
        self.blocks.append((w.data_ptr(), w.data_ptr() + w.numel() * w.element_size(), name))
        self.blocks.sort()

    def _name(self, x: object) -> str:
        """Return the weight that a tensor is, or a view of; "" of any other."""
        if not isinstance(x, Tensor) or x.layout is not torch.strided:
            return ""
        place = x.data_ptr()
        i = bisect_right(self.blocks, (place, math.inf, "")) - 1
        return self.blocks[i][2] if i >= 0 and place < self.blocks[i][1] else ""


@contextmanager
def plain_operations() -> Iterator[None]:
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
