"""What a method is: five functions to write, defaults for everything else, and what they take and give.

A client's side of a round is a ``Device`` and its ``Update``; the server's is a state, a frozen dataclass of tensors,
which a checkpoint holds by name.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedsieve.types.contract import Entry, Expected, Part
from fedsieve.types.data import Data, Examples, Mask, Params, Tree
from fedsieve.types.errors import InputError


@dataclass(frozen=True)
class ServerState:
    """What a server keeps from round to round; a method that keeps more subclasses it (``kw_only=True``).

    Fields are tensors and dictionaries of tensors; what else they hold must follow from ``Method.init``.
    """

    params: Params
    """The global model."""
    moments: dict[str, Params] = field(default_factory=dict)
    """The server optimizer's moments, by name."""
    sparse: tuple[str, ...] = ()
    """The names of the weights that the method makes sparse."""

    def support(self, params: Params) -> Mask:
        """Return the masks of a model of this state (``params``): where its sparse weights are not zero."""
        return {name: params[name] != 0 for name in self.sparse}


S = TypeVar("S", bound=ServerState)

LATER = {"later": True}
"""The metadata of a field of a run, task or method that was not always there: left out of run.json where it is the
default, so that older runs go on."""


@dataclass(frozen=True)
class RoundContext:
    """Which round a server's function is called in, of how many, and for whom."""

    round: int = 1
    """t; 0, or less, in a warm-up."""
    rounds: int = 1
    """T, the rounds of the run."""
    clients: int = 1
    """The clients of the federation, of which a round samples some."""
    tier: int = 0
    """The device class that is sent to, or that an answer is expected of; 0 where all of them are aggregated."""


class Augment(Protocol):
    """A random change of raw inputs [b, ...] that leaves their shape and type: numbers are drawn, then applied."""

    def draw(self, b: int, generator: torch.Generator) -> Tensor:
        """Return what chance says of each of ``b`` inputs, int64 [b, numbers], on the CPU."""

    def __call__(self, x: Tensor, draws: Tensor) -> Tensor:
        """Return the inputs changed as ``draws`` say, which lie where ``x`` does."""


class Steps(Protocol):
    """The steps of one client's training, whatever computes them."""

    def epoch(self, order: Tensor, draws: Tensor | None) -> Iterator[Tensor]:
        """Train on the client's examples in the ``order`` (int64 [n], on the CPU), and yield the loss of each batch.

        ``draws`` (int64 [n, numbers], by place in the order) are those of the augmentation, None where there is none.
        """

    def put_(self, mask: Mask) -> None:
        """Go on from the model's weights, on another mask."""

    def write_(self) -> None:
        """Give the model its weights."""


@dataclass(frozen=True)
class Correction:
    """What a method adds to the gradients of every step: ``shift + mu (w - w_0)``, w_0 the weights that it starts from.

    With ``mu`` it is FedProx's proximal term, with ``shift`` SCAFFOLD's control variates.
    """

    shift: Params = field(default_factory=dict)
    """By parameter, shaped alike; a name that is missing is 0."""
    mu: float = 0.0

    @property
    def kind(self) -> tuple[float, bool]:
        """What steps of one kind of training have in common."""
        return self.mu, bool(self.shift)


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
    """t, of the run's ``rounds`` T; 0, or less, in a warm-up."""
    rounds: int = 1
    augment: Augment | None = None
    """What is done to a batch's raw inputs before they are normalised, by chance from ``rng``; None: nothing."""
    memory: dict[str, Tensor] = field(default_factory=dict)
    """State of this client alone (NST's masks); kept by the engine, and in the checkpoints."""
    steps: Callable[[Device, Mask], Steps] | None = None
    """What begins a training on a mask: PyTorch, dense, where it is None."""
    norm_weight_decay: bool = True
    """Whether weight decay reaches the parameters of norms (``sparse.policy.norm_parameters``)."""
    loss: Callable[[Any, Any], Tensor] = F.cross_entropy
    """What is minimised: a function of the model's output for a batch, and its targets, to a tensor of one number."""
    optimizer: Any = None
    """What steps along the gradients (``client.optimizers``), anew in every round; None: SGD."""
    clip_norm: float = 0.0
    """The Euclidean norm that the gradients of a step are scaled down to, all together; 0: they are not."""
    correction: Correction | None = None
    """What a method adds to the gradients of this training; None: nothing."""

    def batches(self, order: Tensor, draws: Tensor | None) -> Iterator[tuple[Examples, Examples]]:
        """Yield the examples of an epoch batch by batch, as the model takes them, with their targets."""
        where = self.data.device
        several = torch.split(order.to(where), self.batch)
        if not self.augment or draws is None:
            yield from map(self.data.batch, several)
            return
        for index, own in zip(several, torch.split(draws.to(where), self.batch), strict=True):
            yield self.data.batch(index, partial(self.augment, draws=own))


@dataclass(frozen=True)
class Update:
    """A client's answer: the method's own tree, the number of training examples, and numbers worth averaging."""

    tree: Tree
    n: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    clients: int = 1
    """How many clients' answers it stands for: a robust mean's only one, for all."""


class Method(ABC, Generic[S]):
    """One paper's algorithm: subclasses are frozen dataclasses whose fields are the hyper-parameters.

    A method writes ``init``, ``broadcast``, ``client`` and ``aggregate``, mostly ``expected`` too; it overrides of the
    rest what it needs, by a function, a property, or a field with a default.
    """

    def __new__(cls, *_: Any, **__: Any) -> Method[S]:
        """Raise InputError unless the class has all functions that a method must write."""
        if missing := ", ".join(sorted(cls.__abstractmethods__)):
            raise InputError(f"{cls.__name__} is no whole method, it lacks {missing}: docs/how-to/method.md")
        return super().__new__(cls)

    @abstractmethod
    def init(self, model: nn.Module, rng: torch.Generator) -> S:
        """Return the server's state before round 1, from a freshly initialised plain model."""

    @abstractmethod
    def broadcast(self, state: S, context: RoundContext) -> Tree:
        """Return what the clients of the device class ``context.tier`` are sent this round."""

    @abstractmethod
    def client(self, down: Tree, device: Device) -> Update:
        """Train on a device from what it was sent."""

    @abstractmethod
    def aggregate(self, state: S, updates: Iterable[Update], context: RoundContext) -> S:
        """Fold the answers, a stream read once, into the next state."""

    def check_run(self, run: Any) -> None:
        """Raise InputError for a run (``engine.Run``), while it is made, whose settings the method cannot go by."""

    def prepare(self, model: nn.Module) -> nn.Module:
        """Return the module that clients train (once a process): the plain model, or one of the same names."""
        return model

    def expected(self, state: S, context: RoundContext) -> Expected | None:
        """Return what the clients of a device class send, by which the server checks every answer; None: unsaid."""
        return None

    def deploy(self, state: S) -> Params:
        """Return the plain model that is evaluated and shipped: the global model."""
        return state.params

    def pruned(self, state: S) -> Params | None:
        """Return the deployed model cut to the target density, if a method serves a denser one; None: it does not."""
        return None

    def paper_bytes(self, model: nn.Module) -> float | None:
        """Return what the paper's own formula says that one upload weighs, in bytes; None where it prints none."""
        return None

    def spent(self, t: int, per_round: int, clients: int) -> dict[str, float] | None:
        """Return the column with the epsilon of all rounds to t; None: the method is not private."""
        return None

    @property
    def name(self) -> str:
        """What tables and figures call the method: the class, in lower case."""
        return type(self).__name__.lower()

    @property
    def policy(self) -> str:
        """The name of the layer policy (``fedsieve.sparse.policy``); empty: the method has none."""
        return ""

    @property
    def target_density(self) -> float | None:
        """The share of non-zeros that the method aims at in the layers of its policy; None: it declares none.

        1 is dense; of several device classes it is the largest.
        """
        return None

    @property
    def warm_up(self) -> int | tuple[int, ...]:
        """How many clients take part in a round 0, before round 1; 0: there is no such round.

        Of several rounds before round 1 it is each one's number: (8, 4) are eight in round -1, four in round 0.
        """
        return 0

    @property
    def warm_ups(self) -> tuple[int, ...]:
        """How many clients take part in each round before round 1, of which round 0 is the last."""
        number = self.warm_up
        return number if isinstance(number, tuple) else (number,) * (number > 0)

    @property
    def tiers(self) -> int | None:
        """How many device classes the method serves; None: it treats all alike."""
        return None

    @property
    def copies(self) -> float:
        """How many times the model's size a message may come to."""
        return 1.0

    @property
    def uses_rounds(self) -> bool | None:
        """Whether clients go by the number of rounds of the run; None: a reader of its code is to tell."""
        return None


def expected_of(method: Method[S], state: S, context: RoundContext) -> Expected:
    """Return what a method's clients send: as it says itself, or else parameters, whole or in part, and any metric."""
    any_part: dict[str, Entry] = {name: Part(v, v.numel(), or_whole=True) for name, v in state.params.items()}
    return method.expected(state, context) or Expected(any_part, metrics=None)


def flatten(state: Any, prefix: str = "") -> dict[str, Tensor]:
    """Return the tensors of a state (dataclasses and dictionaries of tensors), named by their path."""
    if isinstance(state, Tensor):
        return {prefix: state}
    flat: dict[str, Tensor] = {}
    for name, value in _children(state):
        flat |= flatten(value, f"{prefix}/{name}" if prefix else name)
    return flat


def clone_shared(tensors: Mapping[str, Tensor]) -> Params:
    """Return the tensors contiguous, copied where two share memory, which safetensors refuses."""
    result, storages = dict[str, Tensor](), set[int]()
    for name, value in tensors.items():
        value = value.contiguous()
        storage = value.untyped_storage().data_ptr()
        result[name] = value.clone() if storage in storages else value
        storages.add(storage)
    return result


def unflatten(template: S, tensors: Mapping[str, Tensor]) -> S:
    """Return ``template`` with its tensors replaced by those that ``flatten`` named.

    Raises InputError unless names, shapes and dtypes are exactly the template's.
    """
    forms = {name: (tuple(v.shape), v.dtype) for name, v in flatten(template).items()}
    if forms != {name: (tuple(v.shape), v.dtype) for name, v in tensors.items()}:
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


def rng(seed: int, role: str, t: int = 0, client: int = 0) -> torch.Generator:
    """Return a CPU generator for one purpose: independent of every other purpose, round, client, and of order."""
    digest = hashlib.sha256(f"fedsieve/{seed}/{role}/{t}/{client}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
