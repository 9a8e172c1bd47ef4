"""One experiment, complete: what is trained (Task), and how (Run)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from fedsieve.client.lora import LoRA
from fedsieve.client.losses import CrossEntropy, Loss
from fedsieve.client.models import MODELS
from fedsieve.client.vector_models import VECTOR_MODELS
from fedsieve.data import Dataset
from fedsieve.data.dataset import parse_part, type_name
from fedsieve.data.partition import Indices, Partition
from fedsieve.data.partitioner import FlowerPartitioner, is_partitioner
from fedsieve.engine.fields import (
    check_fields,
    check_method_type,
    check_milestones,
    check_numbers,
    check_shares,
    check_task_metrics,
    lr_factor,
)
from fedsieve.engine.initial import InitialWeights, initial_weights
from fedsieve.server.robust import Bound, Loose, Mean, Plain
from fedsieve.types import LATER, InputError, Method, RoundContext, rng
from fedsieve.types.errors import check_interval
from fedsieve.types.optimizers import SGD, AdamW, Optimizer

NO_DATASET = (
    "must be a name, a fedsieve.Dataset(name, Data(x, y), Data(x, y), classes), or a function that gives one: {}"
)


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
    """``iid``, ``lda:ALPHA`` (equal shards), ``dirichlet:ALPHA`` (unequal), ``shards:K`` (of few classes),
    ``quantity:ALPHA`` (unequal amounts alone), ``group`` (by writer or speaker), ``group:COLUMN``; or the indices of
    every client's training examples, a function of dataset, number of clients and seed that returns them, or a
    partitioner of flwr-datasets."""
    validation: float = 0.0
    """The share of every client's examples that is held out."""
    test_limit: int = 0
    """How many test examples are used at most; 0: all."""
    tiers: tuple[float, ...] = (1.0,)
    """The shares of the clients that belong to each device class, in the order of their numbers."""
    tier_by: Literal["client", "round"] = field(default="client", metadata=LATER)
    """Whether a client has its device class for good, or a class at random in every round (FLASH's public code)."""
    augment: Literal["none", "crop_flip"] = "none"
    """What training does to its inputs: nothing, or random crops and mirror images (of images, 32x32 and the like)."""
    initialisation: Literal["model", "truncated_normal", "xavier_uniform"] = "model"
    """The weights that the model comes with, or drawn anew: from a truncated normal (``models.truncated_normal_``), or
    from Xavier's uniform distribution with a gain of .5 (``models.xavier_uniform_``)."""
    init: str | Path | nn.Module | Mapping[str, Any] | InitialWeights = field(default="", metadata=LATER)
    """The weights that the run starts from: a .safetensors or .fsv file, a folder with ``model.safetensors`` (a run
    directory, one of Hugging Face), a module, a ``state_dict``; empty: none, they are drawn."""
    init_partial: bool = field(default=False, metadata=LATER)
    """Whether ``init`` gives what of it fits the model by name and shape; else all must, nothing may be missing."""
    input_mean: tuple[float, ...] = field(default=(), metadata=LATER)
    """What is taken off the inputs, one number or one a channel; empty: the dataset's own."""
    input_std: tuple[float, ...] = field(default=(), metadata=LATER)
    """What they are then divided by, one number or one a channel; empty: the dataset's own."""
    loss: Loss = field(default=CrossEntropy(), metadata=LATER)
    """What is minimised: ``crossentropy`` (classes, segmentation), ``nexttoken`` (language), ``binarycrossentropy``
    (several labels), ``regression``; or a function of the model's output and the targets to a tensor of one number."""
    metrics: Mapping[str, Any] = field(default_factory=dict, metadata=LATER)
    """What tells how good a model is, by name, the first above all: functions of output and targets to values that are
    averaged over all examples, a ``Metric``, or what ``torchmetrics`` has; empty: the loss's own."""
    adapters: LoRA | None = field(default=None, metadata=LATER)
    """``lora``: low-rank adapters are trained beside linear layers, the model is frozen; None: the model itself."""
    part: str = field(default="", metadata=LATER)
    """The training examples that are used: ``1/2``, every second one or group's, ``2/2``, the others; empty: all."""

    def __post_init__(self) -> None:
        if isinstance(self.model, str) and self.model not in MODELS | VECTOR_MODELS:
            raise InputError(f"unknown model {self.model!r}; the models are {', '.join(MODELS | VECTOR_MODELS)}")
        if not isinstance(self.model, str) and not callable(self.model):
            kind = type_name(self.model)
            raise InputError(f"task.model must be a name, a module, or a function that gives one: {kind}")
        if not isinstance(self.dataset, str | Dataset) and not callable(self.dataset):
            raise InputError(f"task.dataset {NO_DATASET.format(type_name(self.dataset))}")
        if is_partitioner(self.partition):
            object.__setattr__(self, "partition", FlowerPartitioner.of(self.partition))
        if not isinstance(self.partition, str | Indices | FlowerPartitioner) and not callable(self.partition):
            object.__setattr__(self, "partition", Indices.of(self.partition))
        check_fields("task", self)
        parse_part(self.part)
        object.__setattr__(self, "init", initial_weights(self.init, self.init_partial, self.initialisation))
        object.__setattr__(self, "metrics", check_task_metrics(self.loss, self.metrics))
        object.__setattr__(self, "input_mean", check_numbers("task.input_mean", self.input_mean))
        object.__setattr__(self, "input_std", check_numbers("task.input_std", self.input_std, positive=True))
        object.__setattr__(self, "tiers", shares := check_shares("task.tiers", self.tiers))
        if self.clients < 1:
            raise InputError(f"task.clients must be at least 1, got {self.clients}")
        check_interval("task.validation", self.validation, "[0, 1)")
        if self.test_limit < 0:
            raise InputError(f"task.test_limit must be 0 (all) or more, got {self.test_limit}")
        edges = self.edges(self.clients)
        if len(set(edges)) < len(shares) or edges[0] == 0:
            raise InputError(f"task.tiers {shares} leave a tier without a client among {self.clients}")

    def tier(self, client: int) -> int:
        """Return the device class of a client: a group that never changes."""
        return next(i for i, edge in enumerate(self.edges(self.clients)) if client < edge)

    def edges(self, clients: int) -> list[int]:
        """Return where each tier ends among so many clients: the first client after it."""
        return [round(sum(self.tiers[: i + 1]) * clients) for i in range(len(self.tiers))]


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
    """Where the learning rate's decay starts: 0 if rounds count from 0 (ZeroFL), 1 if from 1 (FLASH, SparseFedPP), -1
    if the first two have ``lr`` (FLASH's public code)."""
    lr_rounds: int = field(default=0, metadata=LATER)
    """The rounds that the learning rate's decay is stretched over; 0: T. FLASH's public code has 1000, whatever T."""
    lr_milestones: tuple[int, ...] = field(default=(), metadata=LATER)
    """The rounds after which the learning rate falls, in steps of one ratio, the last to ``lr_end``: PyTorch's
    MultiStepLR; empty: it falls in every round."""
    lr_schedule: Literal["exponential", "cosine", "linear"] | Callable[[float], float] = field(
        default="exponential", metadata=LATER
    )
    """How the learning rate falls from ``lr`` to ``lr_end`` over the rounds; or a function of their share that is past,
    in [0, 1], to what ``lr`` is multiplied with."""
    lr_warmup: int = field(default=0, metadata=LATER)
    """The first rounds, in which the learning rate rises to ``lr`` in equal steps, before it falls over the others."""
    optimizer: Optimizer = field(default=SGD(), metadata=LATER)
    """What steps along the gradients on the clients, anew in every round: ``sgd``, ``adamw``; or a function that makes
    a PyTorch optimizer of groups of parameters and ``lr`` (by PyTorch, not by the kernels)."""
    clip_norm: float = field(default=0.0, metadata=LATER)
    """The Euclidean norm that the gradients of a step are scaled down to, all together; 0: they are not."""
    momentum: float = 0.0
    """SGD's momentum on the clients, anew in every round."""
    weight_decay: float = 0.0
    """The optimizer's weight decay on the clients."""
    norm_weight_decay: bool = field(default=True, metadata=LATER)
    """Whether weight decay reaches the weights and biases of BatchNorm and other norms."""
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
        if not isinstance(self.task, Task):
            raise InputError("Run(method, task, ...) needs a Task")
        if isinstance(self.method, type):
            raise InputError(f"Run(method, task, ...) needs {type_name(self.method)}(), not {type_name(self.method)}")
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
        if self.lr_offset not in (-1, 0, 1):
            raise InputError(f"lr_offset must be -1, 0 or 1, got {self.lr_offset}")
        if self.lr_rounds < 0:
            raise InputError(f"lr_rounds must be 0 (all rounds) or more, got {self.lr_rounds}")
        object.__setattr__(self, "lr_milestones", check_milestones("lr_milestones", self.lr_milestones))
        if self.lr_milestones and self.lr_rounds:
            raise InputError("lr_milestones and lr_rounds are two ways for the learning rate to fall: leave one out")
        self._check_optimizer()
        check_interval("momentum", self.momentum, "[0, 1)")
        if not 0 <= self.weight_decay <= 1e6:
            raise InputError(f"weight_decay must be 0 or more, at most 1e6, got {self.weight_decay}")
        check_method_type(self.method)
        self.method.check_run(self)
        density: object = self.target_density
        if density is not None and not (isinstance(density, int | float) and density is not True and 0 < density <= 1):
            raise InputError(f"{self.method.name}: target_density must be a number in (0, 1], or None, got {density!r}")
        self._check_clients()

    def _check_optimizer(self) -> None:
        """Raise InputError unless optimizer, schedule and clipping are among those that there are, and fit."""
        if isinstance(self.optimizer, type) and self.optimizer in (SGD, AdamW):
            object.__setattr__(self, "optimizer", self.optimizer())
        if not isinstance(self.optimizer, SGD | AdamW) and not callable(self.optimizer):
            optimizer: Any = self.optimizer
            got = repr(optimizer) if isinstance(optimizer, str | int) else f"a finished {type_name(optimizer)}"
            raise InputError(f"optimizer must be SGD(), AdamW(), or a function that makes one, got {got}")
        if self.momentum and not isinstance(self.optimizer, SGD):
            raise InputError(f"momentum is SGD's, of {type_name(self.optimizer)} leave it out, got {self.momentum}")
        if isinstance(self.optimizer, SGD) and self.optimizer.nesterov and not self.momentum:
            raise InputError("optimizer.nesterov needs momentum: -s momentum=0.9")
        if self.lr_schedule not in ("exponential", "cosine", "linear") and not callable(self.lr_schedule):
            raise InputError(f"lr_schedule must be exponential, cosine, linear or a function, got {self.lr_schedule!r}")
        if self.lr_schedule != "exponential" and self.lr_milestones:
            raise InputError("lr_milestones are a schedule of their own: leave lr_schedule out")
        if callable(self.lr_schedule):
            for past in (0.0, 0.5, 1.0):
                lr_factor(self.lr_schedule, past)
        if not 0 <= self.lr_warmup < self.rounds:
            raise InputError(f"lr_warmup must be from 0 to {self.rounds - 1}, rounds less 1, got {self.lr_warmup}")
        if not 0 <= self.clip_norm < math.inf:
            raise InputError(f"clip_norm must be 0 (off) or more, got {self.clip_norm}")

    def _check_clients(self) -> None:
        """Raise InputError unless the clients are as many, and of as many classes, as the method needs."""
        tiers, served = len(self.task.tiers), self.method.tiers
        if served not in (None, tiers):
            raise InputError(
                f"{self.method.name} serves {served} device classes but task.tiers names {tiers}: give "
                f"each its share of the clients, such as task.tiers={','.join([f'{1 / served:.3g}'] * served)}"
            )
        if (most := max(self.method.warm_ups, default=0)) > (first := self._first_class()):
            there = "are of the first tier" if first < self.task.clients else "are there"
            fewer = "lower method.c_d or raise task.clients"
            raise InputError(f"{self.method.name} warms up on {most} clients but only {first} {there}: {fewer}")
        if served and 0 in self._per_tier():
            tier = self._per_tier().index(0)
            raise InputError(
                f"per_round {self.per_round} gives tier {tier + 1} (a share of {self.task.tiers[tier]}) no client "
                f"in any round: raise per_round, or change task.tiers"
            )

    def _first_class(self) -> int:
        """Return how many clients may warm up: all, or the first device class where the method serves several."""
        groups = self.method.tiers and self.task.tier_by == "client"
        return self.task.edges(self.task.clients)[0] if groups else self.task.clients

    def _per_tier(self) -> list[int]:
        """Return how many clients of each tier take part in a round."""
        edges = self.task.edges(self.per_round)
        return [end - start for start, end in pairwise([0, *edges])]

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
        """The first round: 1, or 0 or less where the method warms up."""
        return 1 - len(self.method.warm_ups)

    @property
    def most_clients(self) -> int:
        """The clients of the largest round."""
        return max((self.per_round, *self.method.warm_ups))

    def lr_at(self, t: int) -> float:
        """Return the learning rate of round t = 1 ... T: lr (lr_end/lr)^((t - 1 + lr_offset) / (lr_rounds or T)).

        A warm-up, round 0 or before, has ``lr``; no round has less than ``lr_end``. With milestones the exponent is the
        share of them that is past. Other schedules have the same share, of the rounds after ``lr_warmup``.
        """
        if 0 < t <= self.lr_warmup:
            return self.lr * t / (self.lr_warmup + 1)
        past = max(t - 1 + self.lr_offset - self.lr_warmup, 0) / ((self.lr_rounds or self.rounds) - self.lr_warmup)
        if self.lr_milestones:
            past = sum(t - 1 + self.lr_offset >= step for step in self.lr_milestones) / len(self.lr_milestones)
        past = min(past, 1.0)
        if callable(self.lr_schedule):
            return lr_factor(self.lr_schedule, past) * self.lr
        if self.lr_schedule != "exponential":
            share = (1 + math.cos(math.pi * past)) / 2 if self.lr_schedule == "cosine" else 1 - past
            return self.lr_end + (self.lr - self.lr_end) * share
        return self.lr * math.exp(past * math.log(self.lr_end / self.lr))

    def sample(self, t: int) -> list[int]:
        """Return the clients of round t, ascending: from every tier its share of ``per_round``.

        Before round 1 all are of the first tier, if the method serves several. Tiers of a round are drawn from all.
        """
        if t < 1:
            order = torch.randperm(self._first_class(), generator=rng(self.seed, "sample", t))
            return sorted(order[: self.method.warm_ups[t - 1]].tolist())
        if self.task.tier_by == "round":
            return sorted(self._order(t))
        clients, first = list[int](), 0
        edges = self.task.edges(self.task.clients)
        for tier, (edge, count) in enumerate(zip(edges, self._per_tier(), strict=True), start=1):
            order = torch.randperm(edge - first, generator=rng(self.seed, "sample", t, tier))
            clients += [first + i for i in order[:count].tolist()]
            first = edge
        return sorted(clients)

    def tiers(self, t: int, clients: Iterable[int]) -> dict[int, int]:
        """Return the device classes of some clients of round t."""
        if self.task.tier_by == "client":
            return {client: self.task.tier(client) for client in clients}
        order, edges = self._order(t) if t > 0 else [], self.task.edges(self.per_round)
        classes = {
            client: next(i for i, edge in enumerate(edges) if place < edge) for place, client in enumerate(order)
        }
        return {client: classes.get(client, 0) for client in clients}

    def _order(self, t: int) -> list[int]:
        """Return the clients of round t whose tiers are of the round alone, those of the first tier first."""
        order: list[int] = torch.randperm(self.task.clients, generator=rng(self.seed, "sample", t)).tolist()
        return order[: self.per_round]
