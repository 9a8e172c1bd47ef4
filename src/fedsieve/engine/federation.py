"""A run with its data at hand: its model and dataset, as a user names or gives them, and who holds what."""

from __future__ import annotations

import copy
import hashlib
import json
import secrets
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from functools import cached_property, lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedsieve.client.losses import CrossEntropy, metrics_of
from fedsieve.client.metrics import Accumulator, Metric
from fedsieve.client.models import INITIALISATIONS, MODELS
from fedsieve.client.operations import SIZES
from fedsieve.client.training import crop_flip
from fedsieve.client.vector_models import VECTOR_MODELS
from fedsieve.data import Dataset
from fedsieve.data.mapped import chunks
from fedsieve.data.partition import Indices, hold_out
from fedsieve.data.partitioner import FlowerPartitioner
from fedsieve.engine.cache import Cache
from fedsieve.engine.experiment import Run
from fedsieve.engine.initial import InitialWeights, hash_tensors
from fedsieve.engine.models import resolve_model
from fedsieve.server.admission import Admission
from fedsieve.server.robust import Loose, Off
from fedsieve.sparse.policy import Coverage, frozen_names
from fedsieve.types import Data, Device, Examples, InputError, rng
from fedsieve.types.method import expected_of


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
    cache: Cache = field(default_factory=Cache, repr=False, compare=False)
    """What the clients of this process have of the last broadcasts."""

    @property
    def remarks(self) -> list[str]:
        """What a person should know before the run: what no policy reaches, what is frozen, what is not counted."""
        lines = self.coverage.lines(self.run.method.policy) if self.coverage else []
        if isinstance(init := self.run.task.init, InitialWeights):
            lines = [*lines, *init.remark(self._drawn_model())]
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
            saved_tensors="masks" in self.measure,
            columns=columns,
        )

    def model(self) -> nn.Module:
        """Return the plain model, as the run starts from it: the same in every process. Raises InputError."""
        task, model = self.run.task, self._drawn_model()
        model = task.init.load_(model, task.init_partial) if isinstance(task.init, InitialWeights) else model
        return task.adapters.attach_(model, rng(self.run.seed, "adapters")) if task.adapters else model

    def _drawn_model(self) -> nn.Module:
        """Return the plain model, freshly initialised."""
        run, dataset = self.run, self.dataset
        if isinstance(run.task.model, str):
            if not dataset.train.shape:
                what = "inputs of one tensor [n, channels, ...]"
                raise InputError(f"model {run.task.model} needs {what}: give {dataset.name} a model of your own")
            kind = run.task.model, run.task.initialisation, dataset.train.shape[0], max(1, len(dataset.classes))
            return copy.deepcopy(_built_in(*kind, run.seed))
        with _chance_of(run.seed):
            model = resolve_model(run.task.model)
        return _initialised(model, run.task.initialisation, run.seed)

    def few(self) -> tuple[Examples, Examples] | None:
        """Return some examples, as model and loss take them, to count what a step multiplies; None of a model of
        convolutions and linear layers alone, as the built-in ones are that are so named."""
        model = self.run.task.model
        if (isinstance(model, str) and model in MODELS.keys() - {"vit_tiny"}) or not len(self.dataset.train):
            return None
        index = torch.arange(max(SIZES)) % len(self.dataset.train)
        return self.dataset.train.batch(index)

    @property
    def metrics(self) -> dict[str, Metric]:
        """What tells how good a model is, by name, the first above all."""
        return metrics_of(self.run.task.loss, self.run.task.metrics)

    def test(self) -> Data:
        """Return the test examples that the task uses."""
        return first_examples(self.dataset.test, self.run.task.test_limit)

    def validation(self) -> Data | None:
        """Return the examples that all clients hold out, together; None if there are none, or others own them."""
        if self.own is not None or not self.run.task.validation:
            return None
        index = torch.cat([torch.zeros(0, dtype=torch.int64), *self.held_out()])
        return self.dataset.train.subset(index) if len(index) else None

    def own_tests(self) -> Iterator[Data]:
        """Yield each client's own test examples, where the dataset says whose they are and clients are its groups.

        Elsewhere: what each client holds out. Clients without any are left out.
        """
        dataset = self.dataset
        if dataset.group is None or dataset.test_group is None or self.run.task.partition != "group":
            yield from map(dataset.train.subset, self.held_out())
            return
        for shard in self.shards:
            index = (dataset.test_group == dataset.group[shard[0]]).nonzero().squeeze(1)
            if len(index):
                yield dataset.test.subset(index)

    def held_out(self) -> Iterator[Tensor]:
        """Yield what each client holds out, int64 indices into the training set, of those that hold out anything."""
        for client in range(len(self.shards)):
            if len(index := self._split(client)[1]):
                yield index

    @cached_property
    def _ignores(self) -> bool:
        """Whether some labels are those that cross-entropy ignores."""
        y = self.dataset.train.y
        return isinstance(y, Tensor) and any(bool((rows == CrossEntropy.ignore_index).any()) for rows in chunks(y))

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
            norm_weight_decay=run.norm_weight_decay,
            loss=F.cross_entropy if run.task.loss == CrossEntropy() and not self._ignores else run.task.loss,
            optimizer=run.optimizer,
            clip_norm=run.clip_norm,
            round=t,
            rounds=run.rounds,
            rng=rng(run.seed, "client", t, client),
            augment=crop_flip if run.task.augment == "crop_flip" else None,
            memory=memory,
        )


@contextmanager
def _chance_of(seed: int) -> Iterator[None]:
    """Let a new model's weights be drawn as the run's seed says."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(rng(seed, "model").initial_seed())
        yield


def _initialised(model: nn.Module, how: str, seed: int) -> nn.Module:
    """Return the model, its weights drawn anew where an initialisation is named."""
    if initialise_ := INITIALISATIONS.get(how):
        initialise_(model, rng(seed, "initialisation"))
    return model


@lru_cache(maxsize=2)
def _built_in(name: str, initialisation: str, channels: int, classes: int, seed: int) -> nn.Module:
    """Return a built-in model, to be copied: to draw ResNet-18's weights takes seconds."""
    with _chance_of(seed):
        model = (MODELS | VECTOR_MODELS)[name](channels, classes)
    return _initialised(model, initialisation, seed)


def first_examples(test: Data, limit: int) -> Data:
    """Return the test examples: all, or the first ``limit`` of a fixed shuffle."""
    if not limit or limit >= len(test):
        return test
    return test.subset(torch.randperm(len(test), generator=rng(0, "test"))[:limit])


def described(thing: Any) -> Any:
    """Return a run as plain JSON: dataclasses by their fields (a method's kind first), functions by their names.

    A model, a dataset or indices that were given as they are come with a hash of what they hold.

    A field that came later (``types.LATER``) is described where it is not the default.
    """
    if isinstance(thing, Dataset):
        return f"{thing.name} {thing.digest}"
    if isinstance(thing, InitialWeights):
        return f"weights {thing.digest}"
    if isinstance(thing, Indices):
        return f"indices {thing.digest}"
    if isinstance(thing, FlowerPartitioner):
        return str(thing)
    if is_dataclass(thing) and not isinstance(thing, type):
        relevant = [f for f in fields(thing) if not f.metadata.get("later") or getattr(thing, f.name) != _default(f)]
        return {"kind": type(thing).__name__} | {f.name: described(getattr(thing, f.name)) for f in relevant}
    if isinstance(thing, partial):
        return {"partial": described(thing.func), "args": described(thing.args), **described(thing.keywords)}
    if isinstance(thing, nn.Module):
        return f"{type(thing).__module__}:{type(thing).__qualname__} {_digest(thing)}"
    if isinstance(thing, Tensor):
        return f"tensor {list(thing.shape)} {hashlib.sha256(repr(thing.tolist()).encode()).hexdigest()}"
    if callable(thing) or isinstance(thing, Accumulator):
        return f"{thing.__module__}:{getattr(thing, '__qualname__', type(thing).__qualname__)}"
    if isinstance(thing, Mapping):
        return {str(name): described(part) for name, part in thing.items()}
    if isinstance(thing, tuple | list):
        return [described(part) for part in thing]
    return thing


def _default(field_: Field[Any]) -> Any:
    """Return what a field is where nothing is given."""
    return field_.default if field_.default_factory is MISSING else field_.default_factory()


def _digest(model: nn.Module) -> str:
    """Return a hash of a model that was given as it is: its layers, and all that they hold.

    Of a loss or metric, which has no parameters, and no text that tells them, also its settings.
    """
    digest = hashlib.sha256(repr(model).encode())
    if not any(True for _ in model.parameters()):
        public = {n: v for n, v in sorted(vars(model).items()) if n[0] != "_" and isinstance(v, int | float | str)}
        digest.update(repr(public).encode())
    hash_tensors(digest, model.state_dict().items())
    return digest.hexdigest()


def fingerprint(federation: Federation) -> str:
    """Return a hash of what the run computes: its settings, and who holds which examples where both sides know it."""
    text = json.dumps(described(federation.run), sort_keys=True, default=lambda thing: type(thing).__qualname__)
    holders = digest_of(federation.shards) if federation.own is None else ""
    return hashlib.sha256(f"{text}{holders}".encode()).hexdigest()


def digest_of(shards: Iterable[Tensor]) -> str:
    """Return a hash of which examples every client holds."""
    digest = hashlib.sha256()
    for shard in shards:
        digest.update(f"{len(shard)} ".encode() + shard.numpy().tobytes())
    return digest.hexdigest()
