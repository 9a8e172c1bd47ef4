"""One experiment, complete: what is trained (Task), how (Run), and both with their data at hand (Federation)."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fedsieve.client.flops import SIZES
from fedsieve.client.models import MODELS, truncated_normal_
from fedsieve.client.training import crop_flip
from fedsieve.data import Dataset
from fedsieve.data.dataset import type_name
from fedsieve.data.partition import Indices, Partition, hold_out
from fedsieve.engine.user_inputs import NO_DATASET, check_fields, check_method_type, parse_tiers, resolve_model
from fedsieve.server.admission import Admission, Bound, Loose, Off
from fedsieve.server.robust import Mean, Plain
from fedsieve.sparse.policy import Coverage, frozen_names
from fedsieve.types import Data, Device, InputError, Method, RoundContext, rng
from fedsieve.types.method import expected_of

LATER = {"later": True}
"""Fields that runs did not always have: left out of run.json where they are the default, so that older ones go on."""


@dataclass(frozen=True)
class Task:
    """A model, a dataset, and who holds what of it."""

    model: str | nn.Module | Callable[[], nn.Module]
    """A name (``fedsieve list``), a module (copied, weights included), or a function that returns one."""
    dataset: str | Dataset | Callable[[], Dataset]
    """A name (``fedsieve list``), a ``Dataset``, or a function that returns one."""
    clients: int
    """N, the clients of the federation."""
    partition: Partition = "iid"
    """``iid``, ``lda:ALPHA`` (equal shards) or ``group`` (by writer or speaker); or the indices of every client's
    training examples, or a function of dataset, number of clients and seed that returns them."""
    validation: float = 0.0
    """The share of every client's examples that is held out."""
    test_limit: int = 0
    """How many test examples are used at most; 0: all."""
    tiers: tuple[float, ...] = (1.0,)
    """The shares of the clients that belong to each device class, in the order of their numbers."""
    augment: Literal["none", "crop_flip"] = "none"
    """What training does to its inputs: nothing, or random crops and mirror images (of images, 32x32 and the like)."""
    initialisation: Literal["model", "truncated_normal"] = "model"
    """The weights that the model comes with, or drawn anew from a truncated normal (``models.truncated_normal_``)."""

    def __post_init__(self) -> None:
        if isinstance(self.model, str) and self.model not in MODELS:
            raise InputError(f"unknown model {self.model!r}; the models are {', '.join(MODELS)}")
        if not isinstance(self.model, str) and not callable(self.model):
            raise InputError(
                f"task.model must be a name, a module, or a function that gives one: {type_name(self.model)}"
            )
        if not isinstance(self.dataset, str | Dataset) and not callable(self.dataset):
            raise InputError(f"task.dataset {NO_DATASET.format(type_name(self.dataset))}")
        if not isinstance(self.partition, str | Indices) and not callable(self.partition):
            object.__setattr__(self, "partition", Indices.of(self.partition))
        check_fields("task", self)
        object.__setattr__(self, "tiers", parse_tiers(self.tiers))
        if self.clients < 1:
            raise InputError(f"task.clients must be at least 1, got {self.clients}")
        if not 0 <= self.validation < 1:
            raise InputError(f"task.validation must lie in [0, 1), got {self.validation}")
        if self.test_limit < 0:
            raise InputError(f"task.test_limit must be 0 (all) or more, got {self.test_limit}")
        if not self.tiers or not all(share > 0 for share in self.tiers) or abs(sum(self.tiers) - 1) > 1e-9:
            raise InputError(f"task.tiers must be positive shares that add up to 1, got {self.tiers}")
        if len(set(self.edges())) < len(self.tiers) or self.edges()[0] == 0:
            raise InputError(f"task.tiers {self.tiers} leave a tier without a client among {self.clients}")

    def tier(self, client: int) -> int:
        """Return the device class of a client: a group that never changes."""
        return next(i for i, edge in enumerate(self.edges()) if client < edge)

    def edges(self) -> list[int]:
        """Return the first client after each tier."""
        return [round(sum(self.tiers[: i + 1]) * self.clients) for i in range(len(self.tiers))]


@dataclass(frozen=True)
class Run:
    """One experiment: complete, comparable, printable."""

    method: Method[Any]
    """What is sent, trained and averaged: one of ``fedsieve.methods``, or one of your own."""
    task: Task
    """What is trained, on whose data."""
    rounds: int
    """T, which the learning rate's decay is stretched over."""
    per_round: int
    """K, the clients sampled each round without replacement, from every tier in proportion."""
    epochs: int = 1
    """E, the local epochs."""
    batch: int = 16
    """The examples of a local step."""
    lr: float = 0.1
    """The learning rate of the first round."""
    lr_end: float = 0.01
    """What the learning rate falls to, exponentially; where it is ``lr``, it is constant."""
    lr_offset: int = 0
    """Where the learning rate's decay starts: 0 if rounds count from 0 (ZeroFL), 1 if from 1 (FLASH, SparseFedPP)."""
    momentum: float = 0.0
    """SGD's momentum on the clients, anew in every round."""
    weight_decay: float = 0.0
    """SGD's weight decay on the clients."""
    evaluate_every: int = 1
    """Rounds from one test to the next; the last round is always tested."""
    seed: int = 0
    """All chance comes from it: initial weights, partition, sampling, order of examples, masks."""
    bound: Bound = field(default=Loose(), metadata=LATER)
    """Above what norm an update is refused: loose (what no honest client sends), off, fixed (``bound.norm``), or a
    multiple of the running median."""
    mean: Mean = field(default=Plain(), metadata=LATER)
    """What the method's own mean is taken of: plain or clipped updates, or their median or trimmed mean."""
    values: Literal["f32", "bf16", "int8", "int4"] = field(default="f32", metadata=LATER)
    """What clients round the float32 values that they send to; they add what was lost to what they send next."""

    def __post_init__(self) -> None:
        if not isinstance(self.task, Task) or isinstance(self.method, type):
            wrong = (
                "a Task"
                if not isinstance(self.task, Task)
                else f"{type_name(self.method)}(), not {type_name(self.method)}"
            )
            raise InputError(f"Run(method, task, ...) needs {wrong}")
        check_fields("", self)
        for name in ("rounds", "per_round", "epochs", "batch", "evaluate_every"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.per_round > self.task.clients:
            raise InputError(
                f"per_round is {self.per_round} but there are only {self.task.clients} clients: "
                f"lower per_round or raise task.clients"
            )
        if self.batch >= 2**31:
            raise InputError(f"batch must be below 2^31, got {self.batch}")
        if not (0 < self.lr <= 1e6 and 0 < self.lr_end <= 1e6):
            raise InputError(f"lr and lr_end must be positive and at most 1e6, got {self.lr} and {self.lr_end}")
        if self.lr_offset not in (0, 1):
            raise InputError(f"lr_offset must be 0 or 1, got {self.lr_offset}")
        if not 0 <= self.momentum < 1:
            raise InputError(f"momentum must lie in [0, 1), got {self.momentum}")
        if not 0 <= self.weight_decay <= 1e6:
            raise InputError(f"weight_decay must be 0 or more, at most 1e6, got {self.weight_decay}")
        self._check_method()

    def _check_method(self) -> None:
        """Raise InputError unless the clients are as many, and of as many classes, as the method needs."""
        check_method_type(self.method)
        density: object = self.target_density
        if density is not None and not (isinstance(density, int | float) and density is not True and 0 < density <= 1):
            raise InputError(f"{self.method.name}: target_density must be a number in (0, 1], or None, got {density!r}")
        tiers, served = len(self.task.tiers), self.method.tiers
        if served not in (None, tiers):
            raise InputError(
                f"{self.method.name} serves {served} device classes but task.tiers names {tiers}: give "
                f"each its share of the clients, such as task.tiers={','.join([f'{1 / served:.3g}'] * served)}"
            )
        if self.warm_up > self._first_class():
            raise InputError(
                f"{self.method.name} warms up on {self.warm_up} clients but only {self._first_class()} "
                f"{'are of the first tier' if served else 'are there'}: lower method.c_d or raise task.clients"
            )
        for tier, chosen in enumerate(self._chosen()):
            if served and not chosen:
                raise InputError(
                    f"per_round {self.per_round} gives tier {tier + 1} (a share of {self.task.tiers[tier]}) no client "
                    f"in any round: raise per_round, or change task.tiers"
                )

    def _first_class(self) -> int:
        """Return how many clients may warm up: all, or the first device class where the method serves several."""
        return self.task.edges()[0] if self.method.tiers else self.task.clients

    def _chosen(self) -> list[int]:
        """Return how many clients of each tier take part in a round."""
        ends = [round(self.per_round * sum(self.task.tiers[: i + 1])) for i in range(len(self.task.tiers))]
        return [end - start for start, end in zip([0, *ends], ends, strict=False)]

    @property
    def warm_up(self) -> int:
        """The clients of round 0, which some methods need before round 1 (FLASH's c_d); 0: there is no such round."""
        return self.method.warm_up

    @property
    def target_density(self) -> float | None:
        """The share of non-zeros that the method says it aims at in its policy's layers; None: it says nothing."""
        density = self.method.target_density
        return round(density, 12) if isinstance(density, float) else density

    @property
    def private(self) -> bool:
        """Whether the method accounts for the privacy that its rounds spend."""
        return self.method.spent(0, self.per_round, self.task.clients) is not None

    def context(self, t: int, tier: int = 0) -> RoundContext:
        """Return what the method's server functions are told of round t."""
        return RoundContext(t, self.rounds, self.task.clients, tier)

    @property
    def first(self) -> int:
        """The first round: 1, or 0 where the method warms up."""
        return 0 if self.warm_up else 1

    def lr_at(self, t: int) -> float:
        """Return the learning rate of round t = 1 ... T: lr (lr_end/lr)^((t - 1 + lr_offset) / T).

        A warm-up, round 0, has ``lr``.
        """
        return self.lr * math.exp(max(t - 1 + self.lr_offset, 0) / self.rounds * math.log(self.lr_end / self.lr))

    def sample(self, t: int) -> list[int]:
        """Return the clients of round t, ascending: from every tier its share of ``per_round``.

        A warm-up, round 0, takes all its clients from the first tier, if the method serves several.
        """
        if t == 0:
            order = torch.randperm(self._first_class(), generator=rng(self.seed, "sample", 0))
            return sorted(order[: self.warm_up].tolist())
        chosen: list[int] = []
        first = 0
        for tier, (edge, wanted) in enumerate(zip(self.task.edges(), self._chosen(), strict=True), start=1):
            order = torch.randperm(edge - first, generator=rng(self.seed, "sample", t, tier))
            chosen += [first + i for i in order[:wanted].tolist()]
            first = edge
        return sorted(chosen)


@dataclass(frozen=True)
class Federation:
    """A run with its data at hand: what a process needs to be server or client. Everything in it can be pickled."""

    run: Run
    dataset: Dataset
    shards: tuple[Tensor, ...]
    measure: tuple[str, ...] = ()
    """What is measured on the way (``fedsieve.engine.measures``); no part of the run itself."""
    key: bytes = field(default_factory=lambda: secrets.token_bytes(32), repr=False, compare=False)
    """What this process and those it starts seal their messages with."""
    name: str = field(default_factory=lambda: secrets.token_hex(16), compare=False)
    """What tells this run from every other one, also of the same settings: messages are bound to it, no result is."""
    coverage: Coverage | None = field(default=None, compare=False)
    """What of the model the method makes sparse."""
    not_counted: tuple[str, ...] = field(default=(), compare=False)
    """The parts of the model whose multiply-adds no round counts."""
    own: dict[int, int] | None = field(default=None, compare=False)
    """How many examples each client has said to have, where they are its own and nobody else sees them."""

    @property
    def remarks(self) -> list[str]:
        """What a person should know before the run: what no policy reaches, what is frozen, what is not counted."""
        lines = self.coverage.lines(self.run.method.policy) if self.coverage else []
        return [*lines, f"multiply-adds not counted: {', '.join(self.not_counted)}"] if self.not_counted else lines

    def examples(self, client: int) -> int:
        """Return how many examples a client has, training and validation."""
        return len(self.shards[client]) if self.own is None else self.own.get(client, 0)

    def admission(self, columns: Collection[str] = ()) -> Admission:
        """Return the admission of the run's answers; no metric may have the name of one of ``columns``."""
        run = self.run
        alone = run.task.clients == 1 and isinstance(run.bound, Loose)  # nobody to guard from it
        return Admission(
            lambda state, t, tier: expected_of(run.method, state, run.context(t, tier)),
            Off() if alone else run.bound,
            self.examples,
            frozen_names(self.model()),
            private=run.private,
            saved="masks" in self.measure,
            columns=columns,
        )

    def model(self) -> nn.Module:
        """Return the plain model, freshly initialised: the same in every process."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(rng(self.run.seed, "model").initial_seed())
            if isinstance(self.run.task.model, str):
                x = self.dataset.train.x
                model = MODELS[self.run.task.model](x.shape[1], len(self.dataset.classes))
            else:
                model = resolve_model(self.run.task.model)
        if self.run.task.initialisation == "truncated_normal":
            truncated_normal_(model, rng(self.run.seed, "initialisation"))
        return model

    def few(self) -> Tensor | None:
        """Return some examples, as the model takes them, to count what it multiplies; None of a built-in model."""
        known = isinstance(self.run.task.model, str)
        return None if known or not len(self.dataset.train) else self.dataset.train.batch(slice(0, max(SIZES)))[0]

    def test(self) -> Data:
        """Return the test examples that the task uses."""
        return first_examples(self.dataset.test, self.run.task.test_limit)

    def validation(self) -> Data | None:
        """Return the examples that all clients hold out, together; None if there are none, or others own them."""
        if self.own is not None or not self.run.task.validation:
            return None
        split = (self._split(client)[1] for client in range(len(self.shards)))
        index = torch.cat([*split])
        return self.dataset.train.subset(index) if len(index) else None

    def _split(self, client: int) -> tuple[Tensor, Tensor]:
        """Return a client's examples, int64 indices into the training set: to train on, and held out."""
        return hold_out(self.shards[client], self.run.task.validation, self.run.seed, client)

    def device(self, t: int, client: int, model: nn.Module, where: str, memory: dict[str, Tensor]) -> Device:
        """Return what a client owns in round t."""
        run = self.run
        training, validation = self._split(client)
        return Device(
            model=model,
            data=self.dataset.train.subset(training).to(where),
            validation=self.dataset.train.subset(validation).to(where),
            lr=run.lr_at(t),
            epochs=run.epochs,
            batch=run.batch,
            momentum=run.momentum,
            weight_decay=run.weight_decay,
            round=t,
            rounds=run.rounds,
            rng=rng(run.seed, "client", t, client),
            augment=crop_flip if run.task.augment == "crop_flip" else None,
            memory=memory,
        )


def first_examples(test: Data, limit: int) -> Data:
    """Return the test examples: all, or the first ``limit`` of a fixed shuffle."""
    if not limit or limit >= len(test):
        return test
    return test.subset(torch.randperm(len(test), generator=rng(0, "test"))[:limit])
