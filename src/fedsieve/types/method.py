"""What every method has: five functions to write, and defaults for everything else."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, Generic

import torch
from torch import nn

from fedsieve.types.contract import Expected, any_update
from fedsieve.types.data import Params, Tree
from fedsieve.types.device import Device, RoundContext, Update
from fedsieve.types.errors import InputError
from fedsieve.types.state import S


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
    def warm_up(self) -> int:
        """How many clients take part in a round 0, before round 1; 0: there is no such round."""
        return 0

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
    """Return what a method's clients send, as it says itself or as may be supposed."""
    return method.expected(state, context) or any_update(state.params)
