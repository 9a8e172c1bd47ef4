"""What a cell will cost on this machine, estimated before it starts: from a few steps and one message.

A client of one batch and one of some more are sent a message, train, and answer; what they take gives the seconds of a
client and of an example. Aggregation, and a test of a few examples, are timed too. Seconds are those of one core: a
process that has a core to itself takes as long. Estimates are kept in ``OUT/costs.json``, by processor and version.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch

from fedsieve.client.evaluation import accuracy
from fedsieve.client.process import num_threads
from fedsieve.client.training import load_
from fedsieve.data import Dataset
from fedsieve.data.storage import read_json, write_json
from fedsieve.engine import Run
from fedsieve.engine.federation import Federation
from fedsieve.engine.loop import aggregate
from fedsieve.engine.round import RoundMetrics
from fedsieve.engine.setup import build_federation
from fedsieve.engine.worker import Worker, kernels_for, run_client
from fedsieve.kernels.dispatch import CHOICES
from fedsieve.runs.provenance import cpu
from fedsieve.runs.record import number
from fedsieve.server.robust import Off
from fedsieve.types import InputError, ServerState, rng

T = TypeVar("T")

LEAST, MOST, TESTED, FEW_TESTED = 3, 16, 256, 48
"""Batches of the larger client, at least and at most; examples that are tested, and of a slow model."""
ENOUGH = 1.5
"""Seconds for which the larger client trains, if so many batches take as long."""
SLOW = 1.0
"""Seconds of a client of one batch from which nothing is repeated."""
MOST_LR = 0.01
"""The learning rate at most: steps on the same few examples must not diverge, and take as long at any."""
REPEATS = 3
"""Trainings of a client, of which the first is not counted."""
LONGEST = 1e5
"""Seconds beyond which what is kept is no measurement."""
START = 6.0
"""Seconds of a process until its first round: imports, data, model."""


@dataclass(frozen=True)
class RunCost:
    """Seconds on one core: of a client and an example, with all epochs, in the warm-up and after it; of the server."""

    kernels: str
    """Which the clients trained with."""
    client: float
    example: float
    warm_up_client: float
    warm_up_example: float
    round: float
    """The server's, of a round: the broadcast and the deployed model."""
    update: float
    """The server's, of one update: decoded, admitted and aggregated."""
    test_example: float

    def seconds_of_round(self, run: Run, examples: int) -> float:
        """Return what a round takes whose clients have so many examples each; no test."""
        return self.round + run.per_round * (self.client + self.update + examples * self.example)

    def seconds(self, run: Run, examples: int, tests: int, first: int = 0) -> float:
        """Return what a run takes after round ``first``: ``examples`` of a client, ``tests`` examples of a test."""
        warm_up = sum(run.method.warm_ups) * (self.warm_up_client + self.update + examples * self.warm_up_example)
        left = run.rounds - first
        test = -(-left // run.evaluate_every) * tests * self.test_example
        return START + (warm_up if not first else 0) + left * self.seconds_of_round(run, examples) + test


NOT_ESTIMATED = RunCost("auto", 0, 0, 0, 0, 0, 0, 0)
"""Of a run on a GPU: what it takes is seen from its first rounds."""
SECONDS = [field.name for field in fields(RunCost) if field.name != "kernels"]


def cost_key(run: Run, kernels: str) -> str:
    """Return what tells runs of different cost apart: partition, upload and number of rounds do not."""
    task, method = run.task, run.method
    densities = getattr(method, "densities", None)
    density = ",".join(map(str, densities)) if isinstance(densities, tuple) else run.target_density
    network = f"{task.model} on {task.dataset}, {'' if task.augment == 'none' else f'{task.augment}, '}"
    own = f", --kernels {kernels}" if kernels else ""
    return f"{method.name} at density {density}, {network}batch {run.batch}, epochs {run.epochs}{own}"


def estimate_cost(out: Path, run: Run, dataset: Dataset, kernels: str, show: Callable[[str], None]) -> RunCost:
    """Return the cost that is kept in ``out``, or measure and keep it, which ``show`` is told of.

    Without ``kernels`` it is that of the run's own: sparse for a method that says it is, where the kernels know its
    model, else auto, which goes by the share of multiply-adds and takes PyTorch for small networks, where it is slower.
    """
    path, key = out / "costs.json", cost_key(run, kernels)
    here = {"cpu": cpu(), "version": version("fedsieve"), "torch": torch.__version__}
    content = read_json(path, "remove it") or {}
    known = content.get(key)
    if isinstance(known, dict) and all(known.get(name) == value for name, value in here.items()):
        seconds = {name: number(known.get(name)) for name in SECONDS}
        plausible = all(value is not None and 0 <= value < LONGEST for value in seconds.values())
        if plausible and known.get("kernels") in CHOICES:
            return RunCost(known["kernels"], **seconds)  # type: ignore[arg-type]
    show(f"timing a few steps of {key}")
    federation = build_federation(run, dataset)
    cost = measure_cost(federation, kernels or own_kernels(federation))
    out.mkdir(parents=True, exist_ok=True)
    write_json(path, {**(read_json(path, "remove it") or {}), key: asdict(cost) | here})
    return cost


def own_kernels(federation: Federation) -> str:
    """Return which kernels a run is best trained with."""
    if federation.run.target_density in (None, 1):
        return "auto"
    try:
        kernels_for(federation, "sparse")
    except InputError:
        return "auto"
    return "sparse"


def examples_of(run: Run, dataset: Dataset) -> int:
    """Return the mean training examples of a client, what is held out aside."""
    return round((1 - run.task.validation) * len(dataset.train) / run.task.clients)


def measure_cost(federation: Federation, kernels: str) -> RunCost:
    """Time a few steps, one message each way and a small test, on one thread. Raises InputError as the run would."""
    with num_threads(1):
        return _Measurement(federation, kernels).cost()


class _Measurement:
    """The round, by hand, of a federation in which client 0 has one batch, and client 1 more."""

    def __init__(self, federation: Federation, kernels: str):
        run = federation.run
        self.kernels = kernels
        task, lr = replace(run.task, validation=0.0), min(run.lr, run.lr_end, MOST_LR)
        self.run, self.method = replace(run, task=task, lr=lr, lr_end=lr, bound=Off()), run.method
        self.federation = replace(federation, run=self.run, measure=())
        self._resize(LEAST)
        self.worker = Worker(self.federation, "cpu", kernels)
        self.state = self.method.init(self.federation.model(), rng(run.seed, "init"))

    def _resize(self, more: int) -> None:
        """Give client 0 one batch, and client 1 so many."""
        most = len(self.federation.dataset.train)
        sizes = [min(batches * self.run.batch, most) for batches in (1, more)]
        self.federation = replace(self.federation, shards=tuple(map(torch.arange, sizes)))
        if hasattr(self, "worker"):
            self.worker.federation = self.federation

    def cost(self) -> RunCost:
        """Return what the parts of a round take, the device classes' weighed by their shares."""
        warm_up = max((self._parts(t, 0, 2) for t in range(self.run.first, 1)), default=(0.0, 0.0, 0.0, 0.0))
        tiers = self.run.task.tiers
        parts = [self._parts(1, tier, LEAST) for tier in range(len(tiers))]
        client, example, server, update = (_weighed(values, tiers) for values in zip(*parts, strict=True))
        return RunCost(self.kernels, client, example, *warm_up[:2], server, update, self._test())

    def _parts(self, t: int, tier: int, least: int) -> tuple[float, float, float, float]:
        """Return the seconds of a client, of an example, of the server's round and of an update.

        The larger client has as many batches as take ENOUGH, ``least`` at least. The first training builds a trainer,
        and is not counted. The state goes on.
        """
        down, few, up, _ = self._round(t, tier, (0, 0))
        slow, repeats = few > SLOW, REPEATS if t > 0 else 2  # a warm-up has many epochs
        self._resize(2 if slow else max(least, min(MOST, int(ENOUGH / max(few, 1e-3)))))
        sizes = [len(shard) for shard in self.federation.shards]
        if not slow:
            down, few, up, _ = self._round(t, tier, (0,) * repeats)
        _, more, _, self.state = self._round(t, tier, (1,) * (1 if slow else repeats))
        example = max(0.0, (more - few) / max(sizes[1] - sizes[0], 1))
        return max(few - example * sizes[0], 0.0), example, down, up

    def _round(self, t: int, tier: int, clients: tuple[int, ...]) -> tuple[float, float, float, ServerState]:
        """Return the seconds of the broadcast, of the last trainings, of an update on the server; and the next state.

        The first of several trainings is not counted, of the others the median is.
        """
        tiers, context = dict.fromkeys(clients, tier), self.run.context(t, tier)
        messages, down = _timed(partial(self._broadcast, t, tiers, tier, context))
        replies, each = dict[int, bytes](), list[float]()
        for client in clients:
            (replies[client], _), seconds = _timed(partial(run_client, self.worker, t, client, messages[client]))
            each.append(seconds)
        metrics, admission = RoundMetrics(), self.federation.admission()
        admit = partial(admission.admit, t, self.state, tiers)
        updates = metrics.collect(replies.items(), messages.decode_reply, admit)
        state, up = _timed(partial(aggregate, self.federation, t, self.state, updates, metrics))
        _, deploying = _timed(partial(self.method.deploy, state))
        return down + deploying, statistics.median(each[1:] or each), up / len(replies), state

    def _broadcast(self, t: int, tiers: dict[int, int], tier: int, context: Any) -> Any:
        return self.worker.messages.broadcast(t, tiers, {tier: self.method.broadcast(self.state, context)})

    def _test(self) -> float:
        model = load_(self.federation.model(), self.method.deploy(self.state))
        test = self.federation.dataset.test
        few, some = (test.subset(torch.arange(min(n, len(test)))) for n in (FEW_TESTED, TESTED))
        _, seconds = _timed(partial(accuracy, model, few))
        if seconds > SLOW / 4:
            some = few
        return statistics.median(_timed(partial(accuracy, model, some))[1] for _ in range(2)) / len(some)


def _timed(work: Callable[[], T]) -> tuple[T, float]:
    """Return what a function gives, and the processor seconds that it took: others on the machine do not count."""
    began = time.process_time()
    return work(), time.process_time() - began


def _weighed(values: tuple[float, ...], shares: tuple[float, ...]) -> float:
    return sum(value * share for value, share in zip(values, shares, strict=True))
