"""The server's loop: the same whatever engine carries the bytes to the clients (``engine.engines``) and back.

    broadcast -> encode -> [bytes] -> decode -> client -> encode -> [bytes] -> decode -> admit -> aggregate -> deploy

An engine carries the bytes; they are counted here, where they exist.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedsieve.client.captured import CudaGraphs
from fedsieve.client.evaluation import Evaluation
from fedsieve.client.process import keep_freed_memory, num_threads, to_device
from fedsieve.client.training import load_
from fedsieve.engine.cache import LACKS, LOST
from fedsieve.engine.engines import Engine, Exchange, devices_of
from fedsieve.engine.experiment import Run
from fedsieve.engine.federation import Federation
from fedsieve.engine.measures import measure_round, score, score_clients
from fedsieve.engine.messages import Messages, RoundMessages
from fedsieve.engine.quorum import QuorumMissed
from fedsieve.engine.remedies import remedies
from fedsieve.engine.rollback import Checkpoint, DivergenceError, Memory, Rollbacks, Snapshot, Snapshots
from fedsieve.engine.round import COLUMNS, NO_CLIENT, Failure, Round, RoundMetrics
from fedsieve.engine.setup import open_run
from fedsieve.kernels.dispatch import Inference
from fedsieve.server.robust import Plain, robust_updates
from fedsieve.sparse.masks import weight_density
from fedsieve.types import Data, InputError, Tree, Update, apply_model, flatten, map_examples, rng, tensors_of
from fedsieve.types.method import expected_of
from fedsieve.types.resources import Resources, using
from fedsieve.wire import Known, finite

READERS, SEVERAL = 1, 8
"""Threads that read answers, where more would hinder one another (docs/explanation/gpu.md), and that compute on the
model's tensors."""
FINITE_EXAMPLES = 8
"""The test examples that a round's model must answer with finite numbers."""


class MostlyDense(UserWarning):
    """A sparse method's policy does not reach a good part of the weights."""


def rounds(
    run: Run | Federation,
    engine: Engine,
    device: str = "cpu",
    start: Checkpoint | None = None,
    last: int = 0,
    *,
    data: Path | str | None = None,
    measure: tuple[str, ...] = (),
    kernels: str = "auto",
) -> Generator[Round]:
    """Run an experiment round by round, testing on ``device``; the caller logs, plots, saves, or stops.

    It goes from the beginning, or from the checkpoint ``start``, to round ``last`` (0: all). The beginning is round 1,
    or before it where the method warms up. A ``Run`` is opened, with ``data`` and ``measure`` as ``open_run`` has
    them, and warns (MostlyDense) where the method's policy leaves more than a tenth of all weights dense. On a CPU the
    ``kernels`` test the model where they are faster, unless they are ``dense``.
    """
    if isinstance(run, Federation):
        return _rounds(run, engine, device, start, last, kernels)
    federation = open_run(run, data, measure)
    warn_of_dense(federation)
    return _rounds(federation, engine, device, start, last, kernels)


def warn_of_dense(federation: Federation) -> None:
    """Warn the caller's caller (MostlyDense) if a sparse method leaves more than a tenth of all weights dense."""
    coverage = federation.coverage
    if coverage and coverage.sparse and coverage.share > 0.1:
        warnings.warn(federation.remarks[0], MostlyDense, stacklevel=3)


def _rounds(
    federation: Federation, engine: Engine, device: str, start: Checkpoint | None, last: int, kernels: str
) -> Generator[Round]:
    keep_freed_memory()
    run, method, plain = federation.run, federation.run.method, federation.model()
    state = method.init(plain, rng(run.seed, "init"))
    messages, names = Messages(federation), dict(plain.named_parameters()).keys()
    dense_up, dense_down = (_dense_bytes(tree) for tree in (messages.without_frozen(state.params), state.params))
    snapshots, memory = _snapshots(Snapshot(run.first - 1, state, {}), start), Memory()
    admission = federation.admission(columns={*COLUMNS, *federation.metrics})
    admission.remedies = partial(remedies, federation)
    snapshot: Snapshot | None = snapshots.newest()
    device = devices_of(device)[0]
    plain, graphs = plain.to(device), None if device == "cpu" else CudaGraphs(torch.device(device))
    test_of = partial(Evaluation, plain, metrics=federation.metrics, inference=Inference(plain, kernels))
    tests, data = test_of(to_device(federation.test(), device), graphs), federation.validation()
    validation = test_of(to_device(data, device), graphs) if data else None
    with engine(federation, memory) as exchange, _readers(device) as readers:
        admission.threads, server = readers
        last_known: Mapping[int, Known] = {}
        last = min(last or run.rounds, run.rounds)
        while True:
            if snapshot:
                t, state, admission.norms = snapshot.t, snapshot.state, [*snapshot.norms]
                memory.clear()
                memory.update(snapshot.memory)
                has = {**snapshot.has}
            if (t := t + 1) > last:
                return
            began, cpu_began = time.perf_counter(), time.process_time()
            metrics = RoundMetrics(dense_up, messages.frozen)
            left_out = {one.client for one in snapshots.rollbacks.of(t)}
            clients = [client for client in run.sample(t) if client not in left_out]
            tiers = run.tiers(t, clients)
            trees = {tier: method.broadcast(state, run.context(t, tier)) for tier in sorted(set(tiers.values()))}
            broadcast, before = messages.broadcast(t, tiers, trees, has), state
            replies = exchanged(exchange, t, broadcast)
            if admission.threads:
                admission.threads.submit(broadcast.read_ahead, last_known)
                last_known = broadcast.known
            try:
                with num_threads(1), using(server):
                    admit = partial(admission.admit, t, state, tiers)
                    updates = metrics.collect(replies, broadcast.decode_reply, admit)
                    state = aggregate(federation, t, state, updates, metrics)
                    model = method.deploy(state)
                seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu_began
                check_finite(federation, t, state, load_(plain, model), tests.data)
            except DivergenceError as error:
                if not (snapshot := snapshots.back(t, metrics.lengths)):
                    why = f"{error}; {snapshots.rollbacks}" if snapshots.rollbacks.count else str(error)
                    raise DivergenceError(why) from None
                continue
            snapshot = None
            has |= {client: broadcast.digests(client) for client in sorted(metrics.admitted)}
            norms, lengths = tuple(admission.norms), metrics.lengths
            snapshots.add(Snapshot(t, state, dict(memory), norms, lengths, dict(has)))
            tested = t % run.evaluate_every == 0 or t == last
            measures, positions = measure_round(federation, t, before, state, tests if tested else None)
            scores = score(federation.metrics, model, tests if tested else None, validation if tested else None)
            if "clients" in federation.measure and tested:
                scores |= score_clients(federation, model, tests)
            yield Round(
                t=t,
                clients=tuple(clients),
                state=state,
                model=model,
                accuracy=scores.pop("accuracy"),
                accuracy_validation=scores.pop("accuracy_validation"),
                scores=scores,
                density=weight_density(model),
                density_of_policy=weight_density(model, {*state.sparse}) if state.sparse else None,
                density_of_all=weight_density(model, names),
                metrics=metrics.metrics,
                bytes_up=metrics.bytes_up,
                bytes_down=broadcast.size,
                bytes_dense_up=dense_up * len(clients) * (t > 0),
                bytes_dense_down=dense_down * len(clients) * (t > 0),
                multiply_adds=metrics.real,
                multiply_adds_dense=metrics.dense * (t > 0),
                kernels=dict(sorted(metrics.kernels.items(), reverse=True)),
                dense_because=metrics.why,
                steps=metrics.steps,
                ms_per_step=1000 * metrics.seconds / metrics.steps if metrics.steps else None,
                seconds=seconds,
                cpu_seconds=cpu_seconds,
                refused=tuple(sorted(metrics.refused, key=lambda refusal: refusal.client)),
                warnings=tuple(metrics.warnings),
                memory=dict(memory),
                has=dict(has),
                csr_bytes_up=metrics.csr_bytes_up,
                norms=tuple(admission.norms),
                lengths=metrics.lengths,
                rollbacks=snapshots.rollbacks,
                measures=measures,
                positions=positions,
            )


@contextmanager
def _readers(device: str) -> Iterator[tuple[ThreadPoolExecutor | None, Resources]]:
    """Yield threads that read answers while others train, and what else the server computes with.

    There are threads where clients train on a GPU: cores are then free.
    """
    if device == "cpu":
        yield None, Resources()
        return
    start = partial(ThreadPoolExecutor, initializer=torch.set_num_threads, initargs=(1,))
    with start(READERS, "reader") as readers, start(SEVERAL, "server") as several:
        yield readers, Resources(several, device)


def exchanged(exchange: Exchange, t: int, broadcast: RoundMessages) -> Any:
    """Return what an engine brings; a client that lacks what its message leaves out is sent the whole meanwhile."""
    replies = exchange(t, broadcast)

    def complete() -> Iterator[Any]:
        for pair in replies:
            client, reply = pair if isinstance(pair, tuple) and len(pair) == 2 else (NO_CLIENT, None)
            if reply not in (LACKS, LOST) or client not in broadcast:
                yield pair
                continue
            try:
                yield from exchange(t, broadcast.whole(client, counts=reply == LOST))
            except QuorumMissed as error:
                yield client, Failure(str(error))

    return complete() if isinstance(replies, Iterable) else replies


def aggregate(federation: Federation, t: int, state: Any, updates: Iterable[Update], metrics: RoundMetrics) -> Any:
    """Return the next state, of the admitted updates. Raises DivergenceError, saying why, if there is none."""
    run = federation.run
    if not isinstance(run.mean, Plain):
        updates = robust_updates(run.mean, updates, expected_of(run.method, state, run.context(t)))
    try:
        return run.method.aggregate(state, updates, run.context(t))
    except InputError:
        if metrics.weight or not metrics.complete:
            raise
    if not metrics.refused:
        raise InputError(f"round {t}: the engine brought no answer")
    first = metrics.refused[0]
    who = f"client {first.client}: {first.reason}" if first.client != NO_CLIENT else first.reason
    bound = {"Fixed": "bound.norm", "Multiple": "bound.times", "Loose": "bound.times"}.get(type(run.bound).__name__)
    looser = f"; if the bound is too tight, raise {bound}" if bound else ""
    help_ = "" if (cure := remedies(federation)) in who else f"; if training diverged, {cure}{looser}"
    raise DivergenceError(f"round {t}: no client's update could be taken ({who}){help_}")


@torch.no_grad()
def check_finite(federation: Federation, t: int, state: Any, model: nn.Module, test: Data) -> None:
    """Raise DivergenceError unless all numbers of a state are finite, and its model's logits of some test examples."""
    floats = (v for v in flatten(state).values() if v.is_floating_point())
    where = next((w.device for w in model.parameters()), torch.device("cpu"))
    x = map_examples(lambda one: one.to(where), test.batch(slice(0, FINITE_EXAMPLES))[0])
    with num_threads(1):
        answers = (v for v in tensors_of(apply_model(model.eval(), x)) if v.is_floating_point())
        if not all(map(finite, floats)) or not all(map(finite, answers)):
            raise DivergenceError(
                f"round {t}: the model after it, or what it answers, is not finite: {remedies(federation)}"
            )


def _snapshots(beginning: Snapshot, start: Checkpoint | None) -> Snapshots:
    """Return the snapshots that a run may go back to, the newest of which is where it goes on."""
    if not start:
        return Snapshots([lambda: beginning], Rollbacks())
    template, now = beginning.state, start.snapshot(beginning.state)
    earlier = [partial(_read_snapshot, read, template) for read in start.earlier]
    return Snapshots([lambda: beginning, *earlier, lambda: now], start.rollbacks)


def _read_snapshot(read: Callable[[], Checkpoint], template: Any) -> Snapshot:
    return read().snapshot(template)


def _dense_bytes(tree: Tree) -> int:
    """Return what dense federated averaging would send one way for one client: its plain numbers, unpacked."""
    return sum(value.numel() * value.element_size() for value in tree.values() if isinstance(value, Tensor))
