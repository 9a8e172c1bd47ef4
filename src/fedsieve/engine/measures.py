"""What can be measured of a run beside its accuracy and bytes, on demand (``--measure``).

masks    the server's masks after every aggregation: their mismatch with the round before (Babakniya et al. 2022,
         eq. 1), the share of non-zeros in every layer (Qiu et al. 2022, Fig. 2), every 20 rounds the positions of
         the top 10 % of each layer (Fig. 3); and what a client's autograd keeps for backward
pruned   the accuracy of the model cut to the target density, where a method serves a union of masks
clients  the metrics of each client on its own test examples, or what it holds out: mean, worst tenth, spread
kernels  at the end of a run, a training step by the kernels beside the dense one: milliseconds, multiply-adds, memory
"""

from __future__ import annotations

import math
import multiprocessing
import statistics
import warnings
from collections.abc import Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from typing import Any

import torch

from fedsieve.client.evaluation import Evaluation
from fedsieve.client.process import peak_memory_mb, to_device
from fedsieve.client.training import load_
from fedsieve.engine.engines import check_sendable
from fedsieve.engine.federation import Federation
from fedsieve.engine.messages import Messages
from fedsieve.engine.rollback import Checkpoint
from fedsieve.engine.worker import Worker, kernels_for, run_client
from fedsieve.sparse.masks import mismatch, top
from fedsieve.types import InputError, Mask, Params, ServerState

MEASURES = ("masks", "pruned", "kernels", "clients")
EVERY, SHARE = 20, 0.1
"""How often positions are kept, and of what share of a layer (ZeroFL, Fig. 3)."""
STEPS, WARM = 12, 2
"""Steps of ``kernels`` at least, of which the first are not counted."""


def check_measures(names: tuple[str, ...]) -> None:
    """Raise InputError for a measure that there is not."""
    for name in names:
        if name not in MEASURES:
            raise InputError(f"unknown measure {name!r}; the measures are {', '.join(MEASURES)}")


def measure_round(
    federation: Federation, t: int, before: ServerState, after: ServerState, tests: Evaluation | None
) -> tuple[dict[str, Any], Mask]:
    """Return the columns of round t that were asked for, from the states before and after; and positions to be kept.

    The mismatch is that of the deployed models' masks, None where no round was before; the layers' non-zeros are those
    of the aggregate. The accuracy of the pruned model is missing without ``tests``, and of a method that serves no
    union. Positions are those of each sparse layer's top weights in the server's model, zeros never.
    """
    run, method = federation.run, federation.run.method
    columns, positions = dict[str, Any](), dict[str, torch.Tensor]()
    if "masks" in federation.measure:
        layers = {name: int(own.count_nonzero()) / own.numel() for name, own in after.support(after.params).items()}
        columns |= {"mismatch": None, "layers": layers}
        if layers and t > run.first:
            columns["mismatch"] = mismatch(*(state.support(method.deploy(state)) for state in (before, after)))
        if t > 0 and (t % EVERY == 0 or t in (1, run.rounds)):
            positions = {n: top(after.params[n], SHARE) & (after.params[n] != 0) for n in after.sparse}
    if "pruned" in federation.measure and tests and (pruned := method.pruned(after)) is not None:
        columns |= {f"{name}_pruned": value for name, value in tests.of(pruned).items()}
    return columns | (method.spent(t, run.per_round, run.task.clients) or {}), positions


class NoNumber(UserWarning):
    """A metric is NaN, or infinite."""


def score(
    metrics: Iterable[str], model: Params, tests: Evaluation | None, validation: Evaluation | None
) -> dict[str, float | None]:
    """Return the deployed model's metrics on the test set, and on what all clients hold out (``_validation``).

    None stands for what was not tested, and for NaN, of which it warns (NoNumber). Accuracy is always among them.
    """
    columns: dict[str, float | None] = {"accuracy": None, "accuracy_validation": None}
    for suffix, data in (("", tests), ("_validation", validation)):
        values: Mapping[str, float | None] = data.of(model) if data else dict.fromkeys(metrics)
        columns |= {f"{name}{suffix}": value for name, value in values.items()}
    if odd := [name for name, value in columns.items() if value is not None and not math.isfinite(value)]:
        warnings.warn(f"the metric {', '.join(odd)} is no finite number: rows have null for it", NoNumber, 2)
    return {name: finite_or_none(value) for name, value in columns.items()}


def finite_or_none(value: float | None) -> float | None:
    """Return a number, or None where it is NaN or infinite."""
    return value if value is not None and math.isfinite(value) else None


def score_clients(federation: Federation, model: Params, tests: Evaluation) -> dict[str, float | None]:
    """Return, of each metric on each client's own test examples: the clients' mean, their worst tenth, their spread.

    The worst tenth is the mean of the tenth of the clients, one at least, that are served worst; the spread is the
    standard deviation. Clients without such examples, or without a number, do not count.
    """
    load_(tests.model, model)
    each: dict[str, list[float]] = {name: [] for name in federation.metrics}
    for own in federation.own_tests():
        data = to_device(own, str(tests.where))
        of_client = Evaluation(tests.model, data, metrics=federation.metrics, inference=tests.inference)
        for name, value in of_client.metrics().items():
            each[name] += [value] if math.isfinite(value) else []
    columns = dict[str, float | None]()
    for name, values in each.items():
        values.sort(reverse=not federation.metrics[name].higher_is_better)
        worst = values[: max(1, len(values) // 10)]
        columns[f"{name}_clients"] = statistics.fmean(values) if values else None
        columns[f"{name}_worst_tenth"] = statistics.fmean(worst) if values else None
        columns[f"{name}_spread"] = statistics.pstdev(values) if values else None
    return columns


def measure_kernels(federation: Federation, state: Any, start: Checkpoint) -> dict[str, dict[str, Any]]:
    """Return what a step costs each way on this machine's CPU; or why one of them cannot be, in ``because``.

    Each trains a client of the last round for some steps, in a process of its own: its memory is that of nothing else,
    and neither the run nor any of its chance is touched.
    """
    client = federation.run.sample(start.t)[0]
    tier = federation.run.tiers(start.t, [client])[client]
    tree = federation.run.method.broadcast(state, federation.run.context(start.t, tier))
    small, memory = _small(federation, client), start.memory.get(client, b"")
    message = Messages(small).broadcast(start.t, {client: 0}, {0: tree})[client]
    return {way: _of_one(way, small, start.t, client, message, memory) for way in ("sparse", "dense")}


def _small(federation: Federation, client: int) -> Federation:
    """Return a federation of which one client has a few examples, for at least ``STEPS`` steps, and nobody else any."""
    run, shard = federation.run, federation.shards[client][: STEPS * federation.run.batch]
    if len(shard) % run.batch == 1 < len(shard):  # BatchNorm may need two
        shard = shard[:-1]
    epochs = -(-STEPS * run.batch // len(shard))
    train = federation.dataset.train.subset(shard)
    dataset = replace(
        federation.dataset, train=train, test=train.subset(torch.arange(0)), group=None, columns={}, test_group=None
    )
    shards = tuple(torch.arange(len(shard) if k == client else 0) for k in range(run.task.clients))
    run = replace(run, task=replace(run.task, validation=0.0), epochs=epochs)
    return replace(federation, run=run, dataset=dataset, shards=shards, measure=())


def _of_one(way: str, federation: Federation, t: int, client: int, message: bytes, memory: bytes) -> dict[str, Any]:
    try:
        kernels_for(federation, way)
        check_sendable(federation)
    except InputError as error:
        return {"because": str(error)}
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as executor:
        return executor.submit(_step, way, federation, t, client, message, memory).result()


def _step(way: str, federation: Federation, t: int, client: int, message: bytes, memory: bytes) -> dict[str, Any]:
    torch.set_num_threads(1)
    worker = Worker(federation, "cpu", way)
    run_client(worker, t, client, message, memory)
    cost = worker.cost
    return {
        "ms_per_step": 1000 * statistics.median(cost.times[WARM:]),
        "multiply_adds_per_step": cost.products.real / cost.steps,
        "peak_memory_mb": peak_memory_mb(),
    }
