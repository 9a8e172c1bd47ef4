"""The server's loop and the client's function: the same in every engine.

    clients -> broadcast -> encode -> [bytes] -> answer -> [bytes] -> decode -> aggregate -> next state

An engine carries the bytes; they are counted here, where they exist.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from fedsieve.client.cost import Cost
from fedsieve.client.process import keep_freed_memory, num_threads, seeded
from fedsieve.client.saved_tensors import SavedTensors
from fedsieve.client.training import accuracy, load_
from fedsieve.engine.admission import Checks
from fedsieve.engine.aggregate import aggregated, check_finite
from fedsieve.engine.diagnostics import readable
from fedsieve.engine.experiment import Federation, Run
from fedsieve.engine.measures import EVERY, of_masks, of_pruned, positions
from fedsieve.engine.messages import Letters
from fedsieve.engine.metrics import Lost, Refused, Remark, Tally
from fedsieve.engine.rollback import Diverged, History, LeftOut, Memory, Point, Returns
from fedsieve.engine.setup import open_run
from fedsieve.kernels.dispatch import Kernels
from fedsieve.sparse.topk import weight_density
from fedsieve.types import Data, InputError, Mask, Params, Tree, Update, rng, unflatten
from fedsieve.types.contract import Norms
from fedsieve.wire import Body, decode, encode


class MostlyDense(UserWarning):
    """A sparse method's policy does not reach a good part of the weights."""


Exchange: TypeAlias = Callable[[int, Mapping[int, bytes]], "Iterable[tuple[int, bytes | Lost]]"]
"""Take round t's messages to their clients and bring the answers back, in the clients' order."""

Engine: TypeAlias = Callable[[Federation, Memory], AbstractContextManager[Exchange]]


@dataclass(frozen=True)
class Round:
    """What one round left behind. Bytes are summed over its clients; ``bytes_dense_*`` are the dense model's.

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
    refused: tuple[Refused, ...]
    warnings: tuple[Remark, ...]
    """What clients told of their training that does not count."""
    memory: Memory
    norms: tuple[Norms, ...] = ()
    """The norms that the next round's bound is taken from."""
    lengths: Mapping[int, Norms] = field(default_factory=dict)
    """By client, what the updates that were taken change of the model, where that is known."""
    returns: Returns = Returns()
    """How often the run has gone back, and what it leaves out for that."""
    measures: Mapping[str, Any] = field(default_factory=dict)
    """Further columns, where they were asked for."""
    positions: Mask = field(default_factory=dict)
    """Where each layer has its top weights, in the rounds that keep it."""

    @property
    def left_out(self) -> tuple[LeftOut, ...]:
        """The updates that were left out of this round when the run went back to it."""
        return self.returns.of(self.t)


@dataclass(frozen=True)
class Start:
    """Where to go on: the last finished round, its state's tensors (see ``types.flatten``), the clients' memories."""

    t: int
    tensors: Mapping[str, Tensor]
    memory: Memory
    norms: tuple[Norms, ...] = ()
    lengths: Mapping[int, Norms] = field(default_factory=dict)
    returns: Returns = Returns()
    earlier: tuple[Callable[[], Start], ...] = ()
    """What reads the rounds before, in their order, should the run have to go back."""

    def point(self, template: Any) -> Point:
        """Return the point that this is, for a state like ``template``. Raises InputError on a misfit."""
        return Point(self.t, unflatten(template, self.tensors), self.memory, self.norms, self.lengths)


def chosen(federation: Federation, choice: str, where: str = "cpu", model: nn.Module | None = None) -> Kernels:
    """Return the kernels that train the clients' ``model``, as chosen. Raises InputError where they must but cannot."""
    kernels = Kernels(model or federation.run.method.prepare(federation.model()), choice, where)
    if choice != "dense":
        kernels.check(tuple(federation.dataset.train.x.shape[1:]))
    return kernels


class Worker:
    """A process's share of the clients: one resident model, the multiply-adds it has done, and the federation."""

    def __init__(self, federation: Federation, where: str = "cpu", kernels: str = "auto"):
        keep_freed_memory()
        self.federation, self.where = federation, where
        self.cuda = [torch.device(where)] if where != "cpu" else []
        self.method = federation.run.method
        self.model = self.method.prepare(federation.model()).to(where)
        examples = None if (x := federation.few()) is None else x.to(where)
        self.cost = Cost(self.model, chosen(federation, kernels, where, self.model), examples)
        self.saved = SavedTensors(self.model) if "masks" in federation.measure else None
        self.letters = Letters(federation)
        self._message: Body | None = None
        self._down, self.known = dict[str, Any](), self.letters.plain

    def read(self, t: int, client: int, letter: bytes) -> Tree:
        """Return what a letter says, to be read only: clients that are sent the same bytes share it."""
        message = self.letters.message(t, client, letter, self._message)
        if message is not self._message:
            self._message, self._down = message, dict(self.letters.read(message))
            self.known = self.letters.based(self._down)
        return self._down


def answer(worker: Worker, t: int, client: int, letter: bytes, memory: bytes = b"") -> tuple[bytes, bytes]:
    """Be a client for one round: decode, train, encode. Returns the answer and what the client remembers."""
    worker.cost.restart()
    if worker.saved:
        worker.saved.restart()
    kept = {name: v for name, v in decode(memory).items() if isinstance(v, Tensor)} if memory else {}
    with num_threads(1), seeded(rng(worker.federation.run.seed, "noise", t, client).initial_seed(), worker.cuda):
        device = worker.federation.device(t, client, worker.model, worker.where, kept)
        device.steps = worker.cost.begin
        down = worker.read(t, client, letter)
        update = worker.method.client(down, device)
    if not isinstance(update, Update) or not isinstance(update.tree, Mapping):
        raise InputError(f"{worker.method.name}: client must return an Update of a tree by names")
    diagnostics = readable({"metrics": update.metrics, **worker.cost.report()})
    diagnostics["metrics"] |= _saved(worker)
    sent = worker.letters.compensate(worker.letters.trained(update.tree), device.memory)
    told: Tree = {"tree": sent, "n": float(update.n), **diagnostics}
    reply = worker.letters.up(t, client, told, worker.known)
    return reply, encode(device.memory) if device.memory else b""


def _saved(worker: Worker) -> dict[str, float]:
    """Return what was kept for backward, if it is measured: by autograd, or as a whole by the kernels."""
    if not worker.saved:
        return {}
    return {"saved_bytes": float(worker.cost.sparse.bytes)} if worker.cost.sparse else worker.saved.metrics()


def run(
    run: Run, engine: Engine, data: Path | str | None = None, device: str = "cpu", measure: tuple[str, ...] = ()
) -> Iterator[Round]:
    """Run an experiment round by round, testing on ``device``; the caller logs, plots, saves, or stops.

    Warns (MostlyDense) where the method's policy leaves more than a tenth of all weights dense.
    """
    federation = open_run(run, data, measure)
    coverage = federation.coverage
    if coverage and coverage.sparse and coverage.share > 0.1:
        warnings.warn(federation.remarks[0], MostlyDense, stacklevel=2)
    return rounds(federation, engine, device)


def rounds(
    federation: Federation, engine: Engine, device: str = "cpu", start: Start | None = None, last: int = 0
) -> Generator[Round]:
    """Run an opened experiment, from the beginning or from where ``start`` says, to round ``last`` (0: all).

    The beginning is round 1, or round 0 where the method needs a warm-up.
    """
    run, method, plain = federation.run, federation.run.method, federation.model()
    state = method.init(plain, rng(run.seed, "init"))
    letters, names = Letters(federation), dict(plain.named_parameters()).keys()
    dense_up, dense_down = (_dense_bytes(tree) for tree in (letters.trained(state.params), state.params))
    history, memory = _history(Point(run.first - 1, state, {}), start), Memory()
    checks = Checks(federation, (), {"round", "left_out", *(f.name for f in fields(Round))})
    point: Point | None = history.points[-1]()
    plain, test = plain.to(device), federation.test().to(device)
    held_out = None if (validation := federation.validation()) is None else validation.to(device)
    with engine(federation, memory) as exchange:
        last = min(last or run.rounds, run.rounds)
        while True:
            if point:
                t, state, checks.norms = point.t, point.state, [*point.norms]
                memory.clear()
                memory.update(point.memory)
            if (t := t + 1) > last:
                return
            began, computed, tally = time.perf_counter(), time.process_time(), Tally()
            away = {one.client for one in history.returns.of(t)}
            clients = [client for client in run.sample(t) if client not in away]
            tiers = {client: run.task.tier(client) for client in clients}
            sent = {tier: method.broadcast(state, run.context(t, tier)) for tier in sorted(set(tiers.values()))}
            outgoing, told = letters.round(t, tiers, sent)
            answers = exchange(t, outgoing)
            before = state
            try:
                with num_threads(1):
                    passed = partial(checks.passed, t, state, tiers)
                    state = aggregated(run, t, state, tally.read(answers, told, passed), tally)
                    model = method.deploy(state)
                seconds, computed = time.perf_counter() - began, time.process_time() - computed
                check_finite(run, t, state, load_(plain, model), test)
            except Diverged as error:
                if not (point := history.back(t, tally.lengths)):
                    raise Diverged(f"{error}; {history.returns}" if history.returns.count else str(error)) from None
                continue
            point = None
            history.add(Point(t, state, dict(memory), tuple(checks.norms), tally.lengths))
            tested = t % run.evaluate_every == 0 or t == last
            yield Round(
                t=t,
                clients=tuple(clients),
                state=state,
                model=model,
                accuracy=accuracy(load_(plain, model), test) if tested else None,
                accuracy_validation=accuracy(load_(plain, model), held_out) if tested and held_out else None,
                density=weight_density(model),
                density_of_all=weight_density(model, names),
                metrics=tally.metrics,
                bytes_up=tally.bytes_up,
                bytes_down=outgoing.size,
                bytes_dense_up=dense_up * len(clients) * (t > 0),
                bytes_dense_down=dense_down * len(clients) * (t > 0),
                multiply_adds=tally.real,
                multiply_adds_dense=tally.dense * (t > 0),
                kernels=dict(sorted(tally.kernels.items(), reverse=True)),
                dense_because=tally.why,
                steps=tally.steps,
                ms_per_step=1000 * tally.seconds / tally.steps if tally.steps else None,
                seconds=seconds,
                cpu_seconds=computed,
                refused=tuple(sorted(tally.refused, key=lambda refusal: refusal.client)),
                warnings=tuple(tally.warnings),
                memory=dict(memory),
                norms=tuple(checks.norms),
                lengths=tally.lengths,
                returns=history.returns,
                **_measured(federation, t, before, state, plain, test if tested else None),
            )


def _measured(
    federation: Federation, t: int, before: Any, state: Any, plain: nn.Module, test: Data | None
) -> dict[str, Any]:
    """Return what of a round was asked to be measured."""
    run, columns, kept = federation.run, dict[str, Any](), dict[str, Tensor]()
    if "masks" in federation.measure:
        columns |= of_masks(run.method, before if t > run.first else None, state)
        kept = positions(state) if t and (t % EVERY == 0 or t in (1, run.rounds)) else {}
    if "pruned" in federation.measure and test:
        columns |= of_pruned(run.method, state, plain, test)
    columns |= run.method.spent(t, run.per_round, run.task.clients) or {}
    return {"measures": columns, "positions": kept}


def _history(beginning: Point, start: Start | None) -> History:
    """Return the points that a run may go back to, the newest of which is where it goes on."""
    points: list[Callable[[], Point]] = [lambda: beginning]
    if not start:
        return History(points, Returns())
    points += [partial(_read, one, beginning.state) for one in start.earlier]
    now = start.point(beginning.state)
    return History([*points, lambda: now], start.returns)


def _read(start: Callable[[], Start], template: Any) -> Point:
    return start().point(template)


def _dense_bytes(tree: Tree) -> int:
    """Return what dense federated averaging would send one way for one client: its plain numbers, unpacked."""
    return sum(value.numel() * value.element_size() for value in tree.values() if isinstance(value, Tensor))
