"""The results of one round, and the checkpoint that a run is resumed from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fedsieve.engine.metrics import ClientWarning, Refusal
from fedsieve.engine.rollback import Exclusion, Memory, Rollbacks, Snapshot
from fedsieve.types import Mask, Params, unflatten
from fedsieve.types.contract import Norms


@dataclass(frozen=True)
class Round:
    """The results of one round. Bytes are summed over its clients; ``bytes_dense_*`` are the dense model's.

    Dense training knows no warm-up: in round 0 what it would cost is nothing.
    """

    t: int
    clients: tuple[int, ...]
    state: Any
    model: Params
    """The deployed model."""
    accuracy: float | None
    """On the test set; None in rounds without a test."""
    accuracy_validation: float | None
    """On what all clients hold out; None without a test, or where nothing is held out."""
    density: float
    """The share of non-zeros among the weights of two or more dimensions."""
    density_of_all: float
    """The share of non-zeros among all parameters, those that no policy reaches, biases and norms included."""
    metrics: Mapping[str, float]
    bytes_up: int
    bytes_down: int
    bytes_dense_up: int
    bytes_dense_down: int
    multiply_adds: float
    multiply_adds_dense: float
    kernels: Mapping[str, int]
    """How many clients trained by the kernels (``sparse``), and how many by PyTorch (``dense``)."""
    dense_because: str | None
    """Why a client's training was dense, where that was not asked for."""
    steps: int
    """The clients' training steps."""
    ms_per_step: float | None
    """Milliseconds a training step took a client, on average, with what goes before and after its steps."""
    seconds: float
    """Wall-clock of the round, its test set aside."""
    cpu_seconds: float
    """What of it this process computed: of a round of one process less than ``seconds`` if the machine was busy."""
    refused: tuple[Refusal, ...]
    warnings: tuple[ClientWarning, ...]
    """What clients report of their training that does not count."""
    memory: Memory
    norms: tuple[Norms, ...] = ()
    """The norms that the next round's bound is taken from."""
    lengths: Mapping[int, Norms] = field(default_factory=dict)
    """By client, what the admitted updates change of the model, where that is known."""
    rollbacks: Rollbacks = Rollbacks()
    """How often the run has gone back, and what it leaves out for that."""
    measures: Mapping[str, Any] = field(default_factory=dict)
    """Further columns, where they were asked for."""
    positions: Mask = field(default_factory=dict)
    """Where each layer has its top weights, in the rounds that keep it."""

    @property
    def left_out(self) -> tuple[Exclusion, ...]:
        """The updates that were left out of this round when the run went back to it."""
        return self.rollbacks.of(self.t)


@dataclass(frozen=True)
class Checkpoint:
    """Where to go on: the last finished round, its state's tensors (see ``types.flatten``), the clients' memories."""

    t: int
    tensors: Mapping[str, Tensor]
    memory: Memory
    norms: tuple[Norms, ...] = ()
    lengths: Mapping[int, Norms] = field(default_factory=dict)
    rollbacks: Rollbacks = Rollbacks()
    earlier: tuple[Callable[[], Checkpoint], ...] = ()
    """What reads the rounds before, in their order, should the run have to go back."""

    def snapshot(self, template: Any) -> Snapshot:
        """Return the snapshot that this is, of a state like ``template``. Raises InputError on a misfit."""
        return Snapshot(self.t, unflatten(template, self.tensors), self.memory, self.norms, self.lengths)
