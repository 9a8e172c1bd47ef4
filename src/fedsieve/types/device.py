"""A client's side of a round: what it owns while it trains, and what it answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from fedsieve.types.data import Data, Mask, Tree


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


@dataclass(frozen=True)
class RoundContext:
    """Which round a server's function is called in, of how many, and for whom."""

    round: int = 1
    """t; 0 in a warm-up."""
    rounds: int = 1
    """T, the rounds of the run."""
    clients: int = 1
    """The clients of the federation, of which a round samples some."""
    tier: int = 0
    """The device class that is sent to, or that an answer is expected of; 0 where all of them are aggregated."""


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
