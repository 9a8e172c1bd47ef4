"""The nouns of the package: plain data, torch only.

A round is: ``Method.broadcast`` -> bytes -> ``Method.client`` -> bytes -> ``Method.aggregate``. Everything that
crosses an arrow is one of the types below.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, Protocol, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

Params: TypeAlias = dict[str, Tensor]
"""The floating state of a plain model, flat: weights, biases, and BatchNorm's running statistics."""

Mask: TypeAlias = dict[str, Tensor]
"""Boolean supports by parameter name; a missing name is dense."""


class InputError(ValueError):
    """A mistake of the user's: the message names it and the remedy, in one line."""


@dataclass(frozen=True)
class Sparse:
    """``values`` [nnz] at flat positions of a tensor of ``shape``.

    ``positions`` are these (int64 [nnz], strictly increasing) or a bit for each element of the tensor, the lowest first
    (uint8 [ceil(numel / 8)]): of many positions a 64th of the memory.
    """

    values: Tensor
    positions: Tensor
    shape: tuple[int, ...]

    @property
    def index(self) -> Tensor:
        """The positions, int64 [nnz]; worked out anew each time where they are kept as bits."""
        if self.positions.dtype != torch.uint8:
            return self.positions
        bits = (self.positions[:, None] >> torch.arange(8, dtype=torch.uint8)).bitwise_and_(1).view(torch.bool)
        return bits.view(-1)[: math.prod(self.shape)].nonzero().squeeze(1)

    @classmethod
    def of(cls, dense: Tensor, support: Tensor) -> Sparse:
        """Take the entries of ``dense`` where the boolean ``support``, shaped alike, is true; zeros there count."""
        index = support.reshape(-1).nonzero().squeeze(1)
        return cls(dense.reshape(-1)[index], index, tuple(dense.shape))

    def dense(self) -> Tensor:
        """Return the full tensor, zero off the support."""
        flat = torch.zeros(math.prod(self.shape), dtype=self.values.dtype, device=self.values.device)
        return flat.index_copy_(0, self.index, self.values).view(self.shape)


Tree: TypeAlias = Mapping[str, "Tensor | Sparse | float | Tree"]
"""What crosses the wire: names to tensors, sparse tensors, numbers, or further trees."""


def normalised(x: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Return raw inputs [b, ...] as ``(x - mean) / std`` in float32; uint8 stands for x / 255."""
    x = x.float().div_(255) if x.dtype == torch.uint8 else x.float()
    if mean == (0.0,) and std == (1.0,):
        return x
    channels = (-1,) + (1,) * (x.dim() - 2)
    return (x - x.new_tensor(mean).view(channels)) / x.new_tensor(std).view(channels)


@dataclass(frozen=True, eq=False)
class Data:
    """Labelled examples.

    ``x`` [n, ...] is float32, or uint8 that stands for x / 255; ``y`` [n] is int64. Arrays and lists become tensors. A
    batch comes out as ``(x - mean) / std`` in float32, ``mean`` and ``std`` holding one number, or one a channel
    (dimension 1 of ``x``).
    """

    x: Tensor
    y: Tensor
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        for name in ("x", "y"):
            object.__setattr__(self, name, _tensor(name, getattr(self, name)))
        if self.y.dim() != 1:
            raise InputError(
                f"data: y must hold one whole number for each example, it has the shape {list(self.y.shape)}: "
                "of a one-hot y give y.argmax(1)"
            )
        if self.x.dim() == 0 or len(self.x) != len(self.y):
            raise InputError(f"data: {len(self.x) if self.x.dim() else 'no'} examples but {len(self.y)} labels")
        for name in ("mean", "std"):
            given: Any = getattr(self, name)
            try:
                several = torch.as_tensor(given, dtype=torch.float64).reshape(-1)
                given = (given,) if isinstance(given, int | float) else tuple(several.tolist())
            except (TypeError, ValueError, RuntimeError):
                raise InputError(f"data: {name} must be a number, or one a channel, got {given!r}") from None
            object.__setattr__(self, name, given)
            if len(given) != 1 and (self.x.dim() < 2 or len(given) != self.x.shape[1]):
                raise InputError(f"data: {name} must hold one number, or one a channel, got {len(given)}")
            if name == "std" and not all(value > 0 for value in given):
                raise InputError(f"data: std must be above 0, got {given}")
            if not all(map(math.isfinite, given)):
                raise InputError(f"data: {name} must be finite, got {given}")

    def __len__(self) -> int:
        return len(self.y)

    def subset(self, index: Tensor) -> Data:
        """Return the examples at ``index`` (int64 [m]), copied."""
        return replace(self, x=self.x.index_select(0, index), y=self.y.index_select(0, index))

    def to(self, device: torch.device | str) -> Data:
        """Return the same examples on ``device``."""
        return replace(self, x=self.x.to(device), y=self.y.to(device))

    def batch(self, index: Tensor | slice, change: Callable[[Tensor], Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Return normalised inputs [b, ...] float32, raw ones passed through ``change``, and labels [b] int64."""
        x = self.x[index] if change is None else change(self.x[index])
        return normalised(x, self.mean, self.std), self.y[index]


def _tensor(name: str, given: Any) -> Tensor:
    """Return what a user gave as examples or labels as a tensor. Raises InputError."""
    try:
        tensor = given.detach() if isinstance(given, Tensor) else torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"data: {name} must be a tensor, an array or a list of numbers ({error})") from None
    odd = tensor.layout is not torch.strided or tensor.is_nested or tensor.is_quantized or tensor.is_complex()
    if odd or tensor.is_meta or hasattr(given, "filled"):  # a masked array
        raise InputError(f"data: {name} must hold plain real numbers, all of them, got {tensor.dtype}, {tensor.layout}")
    if isinstance(given, Tensor):
        return tensor
    return tensor.float() if tensor.dtype == torch.float64 else tensor


class Augment(Protocol):
    """A random change of raw inputs [b, ...] that leaves their shape and type."""

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Return the changed inputs."""


class Steps(Protocol):
    """The steps of one client's training, whatever computes them."""

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        """Train on a batch, and return its loss."""

    def put_(self, mask: Mask) -> None:
        """Go on from the model's weights, on another mask."""

    def write_(self) -> None:
        """Give the model its weights."""


@dataclass
class Device:
    """What a client owns while it trains: one round's orders, its data, and what it remembers between rounds."""

    model: nn.Module
    """The resident model, already through ``Method.prepare``; its weights are whatever the last client left."""
    data: Data
    """The client's training examples."""
    validation: Data
    """The examples held out from training."""
    lr: float
    epochs: int
    batch: int
    momentum: float
    weight_decay: float
    rng: torch.Generator
    """On the CPU, seeded by (run, round, client): the only source of chance a client may use."""
    round: int = 1
    """t, of the run's ``rounds`` T; 0 in a warm-up."""
    rounds: int = 1
    augment: Augment | None = None
    """What is done to a batch's raw inputs before they are normalised, by chance from ``rng``; None: nothing."""
    memory: dict[str, Tensor] = field(default_factory=dict)
    """State of this client alone (NST's masks); kept by the engine, and in the checkpoints."""
    steps: Callable[[Device, Mask], Steps] | None = None
    """What begins a training on a mask: PyTorch, dense, where it is None."""


@dataclass(frozen=True)
class Update:
    """A client's answer: the method's own tree, the number of training examples, and numbers worth averaging."""

    tree: Tree
    n: int
    metrics: Mapping[str, float] = field(default_factory=dict)


class HasParams(Protocol):
    """A method's server state: its own frozen dataclass, with the global model in ``params``."""

    @property
    def params(self) -> Params:
        """The global model."""


S = TypeVar("S", bound=HasParams)


class Method(Protocol[S]):
    """One paper's algorithm: a frozen dataclass whose fields are the hyper-parameters.

    It may also have ``target_density`` (the share of non-zeros that it aims at in the layers of its policy, of several
    device classes the largest; 1: dense), ``warm_up`` (the clients of a round 0), ``tiers`` (how many device classes it
    serves), ``expected(state, tier)`` (an ``expected.Expected``: what its clients send), and
    ``spent(t, per_round, clients)`` (the column with the epsilon of all rounds to t).
    """

    @property
    def name(self) -> str:
        """What tables and figures call the method."""

    def prepare(self, model: nn.Module) -> nn.Module:
        """Return the module that clients train (once a process). Parameter names stay those of the plain model."""

    def init(self, model: nn.Module, rng: torch.Generator) -> S:
        """Return the server's state before round 1, from a freshly initialised plain model."""

    def broadcast(self, state: S, tier: int) -> Tree:
        """Return what the clients of a device class are sent this round."""

    def client(self, down: Tree, device: Device) -> Update:
        """Train on a device from what it was sent."""

    def aggregate(self, state: S, updates: Iterable[Update]) -> S:
        """Fold the answers, a stream read once, into the next state."""

    def deploy(self, state: S) -> Params:
        """Return the plain model that is evaluated and shipped."""

    def paper_bytes(self, model: nn.Module) -> float | None:
        """Return what the paper's own formula says that one upload weighs, in bytes; None where it prints none."""


def rng(seed: int, role: str, t: int = 0, client: int = 0) -> torch.Generator:
    """Return a CPU generator for one purpose: independent of every other purpose, round, client, and of order."""
    digest = hashlib.sha256(f"fedsieve/{seed}/{role}/{t}/{client}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))


def flatten(state: Any, prefix: str = "") -> dict[str, Tensor]:
    """Return the tensors of a state (dataclasses and dictionaries of tensors), named by their path."""
    if isinstance(state, Tensor):
        return {prefix: state}
    flat: dict[str, Tensor] = {}
    for name, value in _children(state):
        flat |= flatten(value, f"{prefix}/{name}" if prefix else name)
    return flat


def apart(tensors: Mapping[str, Tensor]) -> Params:
    """Return the tensors contiguous, copied where two share memory, which safetensors refuses."""
    result, seen = dict[str, Tensor](), set[int]()
    for name, value in tensors.items():
        value = value.contiguous()
        place = value.untyped_storage().data_ptr()
        result[name] = value.clone() if place in seen else value
        seen.add(place)
    return result


def unflatten(template: S, tensors: Mapping[str, Tensor]) -> S:
    """Return ``template`` with its tensors replaced by those that ``flatten`` named.

    Raises InputError unless names, shapes and dtypes are exactly the template's.
    """
    wanted = {name: (tuple(v.shape), v.dtype) for name, v in flatten(template).items()}
    if wanted != {name: (tuple(v.shape), v.dtype) for name, v in tensors.items()}:
        raise InputError("a checkpoint of another model or method: its tensors do not fit this run")
    restored: S = _fill(template, tensors, "")
    return restored


def _children(node: Any) -> list[tuple[str, Any]]:
    if is_dataclass(node):
        return [(f.name, getattr(node, f.name)) for f in fields(node)]
    return list(node.items()) if isinstance(node, Mapping) else []


def _fill(node: Any, tensors: Mapping[str, Tensor], path: str) -> Any:
    if isinstance(node, Tensor):
        return tensors[path]
    children = {name: _fill(value, tensors, f"{path}/{name}" if path else name) for name, value in _children(node)}
    if isinstance(node, Mapping):
        return children
    return replace(node, **children) if is_dataclass(node) and not isinstance(node, type) else node
