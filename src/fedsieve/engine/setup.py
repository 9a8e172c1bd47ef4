"""From a run to its federation: the dataset is read and split, and data, model and method are checked to fit.

What does not fit is said before anything runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedsieve.client.cost import Cost
from fedsieve.client.training import DenseSteps, train_
from fedsieve.data import Dataset, load_dataset, root_from
from fedsieve.data.dataset import type_name
from fedsieve.data.partition import partition
from fedsieve.engine.experiment import NO_DATASET, Run, Task
from fedsieve.engine.federation import Federation
from fedsieve.engine.measures import check_measures
from fedsieve.engine.models import call, first_line
from fedsieve.engine.prepared import check_prepared
from fedsieve.engine.round import COLUMNS
from fedsieve.engine.targets import check_loss, check_targets
from fedsieve.server.robust import check_fit
from fedsieve.sparse.policy import Coverage, select_weights
from fedsieve.types import (
    SGD,
    AdamW,
    Examples,
    InputError,
    ServerState,
    apply_model,
    leaves,
    map_examples,
    rng,
)


def open_run(run: Run, data: Path | str | None = None, measure: tuple[str, ...] = ()) -> Federation:
    """Load a run's dataset (from the folder ``data``) and split it among the clients.

    ``measure`` names what is to be measured on the way (``engine.measures``). Raises InputError for what cannot be:
    missing data, empty shards, a model or method that does not fit.
    """
    check_measures(measure)
    return build_federation(run, read_dataset(run.task, data), measure)


def read_dataset(task: Task, data: Path | str | None = None) -> Dataset:
    """Return a task's dataset, from the folder ``data`` if it is one that is read. Raises InputError."""
    root = root_from(data) if isinstance(data, str) else data
    if isinstance(task.dataset, str):
        return load_dataset(task.dataset, root)
    dataset: object = task.dataset if isinstance(task.dataset, Dataset) else call("dataset", task.dataset)
    if not isinstance(dataset, Dataset):
        raise InputError(f"task.dataset {NO_DATASET.format(type_name(dataset))}")
    return dataset


def build_federation(run: Run, dataset: Dataset, measure: tuple[str, ...] = ()) -> Federation:
    """Split a dataset among the clients of a run. Raises InputError for what cannot be, as ``open_run`` does."""
    task, dataset = run.task, normalised(run.task, dataset.part(run.task.part))
    check_targets(run.task.loss, dataset)
    if task.adapters and isinstance(task.model, str) and not task.init:
        raise InputError(
            "task.adapters trains beside frozen weights, and those of a new model are noise: name trained ones, "
            "--init RUN (a run directory or .safetensors), or train all, -s task.adapters=none"
        )
    federation = Federation(run, dataset, tuple(partition(task.partition, dataset, task.clients, run.seed)), measure)
    suffixes = ("validation", "clients", "worst_tenth", "spread")
    others = {f"{name}_{suffix}" for name in federation.metrics for suffix in suffixes}
    if taken := sorted(federation.metrics.keys() & (others | {*COLUMNS, "loss", "epsilon"} - {"accuracy"})):
        raise InputError(f"task.metrics: {', '.join(taken)} is the name of another column of a round: rename it")
    if "clients" in measure and next(federation.own_tests(), None) is None:
        raise InputError("--measure clients needs examples that each client holds out: -s task.validation=0.1")
    check_model(federation)
    check_optimizer(federation)
    check_prepared(federation, run.method.prepare(federation.model()))
    state = run.method.init(federation.model(), rng(run.seed, "init"))
    check_method(federation, state)
    contexts = [run.context(run.first, tier) for tier in range(len(task.tiers))]
    check_fit(run.method, state, contexts, run.mean, run.bound, run.private)
    named = select_weights(run.method.policy, federation.model()) if hasattr(run.method, "activations") else ()
    coverage = Coverage.of(federation.model(), state.sparse, named)
    cost = Cost(run.method.prepare(federation.model()), examples=federation.few(), loss=task.loss)
    unknown = cost.other_ops.unknown
    return replace(federation, coverage=coverage, not_counted=unknown)


def normalised(task: Task, dataset: Dataset) -> Dataset:
    """Return the dataset with its inputs normalised as the task says. Raises InputError unless that fits them."""
    named = {"mean": task.input_mean, "std": task.input_std}
    changes: dict[str, Any] = {name: numbers for name, numbers in named.items() if numbers}
    if not changes:
        return dataset
    try:
        return replace(dataset, **{part: replace(getattr(dataset, part), **changes) for part in ("train", "test")})
    except InputError as error:
        raise InputError(str(error).replace("data: ", "task.input_")) from None


@torch.no_grad()
def check_model(federation: Federation) -> None:
    """Raise InputError unless the model takes the dataset's examples, tells its classes apart, and can be trained."""
    dataset, model, named = federation.dataset, federation.model(), federation.run.task.model
    kind = type(named) if isinstance(named, nn.Module) else named
    what = named if isinstance(named, str) else getattr(kind, "__name__", "of yours")
    fits = f"model {what} does not fit {dataset.name}"
    if odd := [n for n, v in model.state_dict().items() if v.is_floating_point() and not bool(v.isfinite().all())]:
        raise InputError(
            f"{fits}: its {odd[0]} holds NaN or infinity, which no message does: give a weight other numbers, register "
            "a buffer with persistent=False"
        )
    x, y = dataset.train.batch(slice(0, 2))
    check_loss(federation, _output(model, x, f"{fits}: given examples"), y, fits)
    _output(model, dataset.test.batch(slice(0, 2))[0], f"{fits}: given test examples")
    if federation.run.task.augment != "none" and len(dataset.train.shape) != 3:
        shape = list(dataset.train.shape)
        raise InputError(f"task.augment=crop_flip needs images, but {dataset.name} has shape {shape}")
    if not any(w.requires_grad for w in model.parameters()):
        raise InputError(f"{fits}: it has no parameter to train")
    try:
        apply_model(model.train(), map_examples(lambda one: one[:1], x))
    except ValueError:
        _check_last_batches(federation)
    if not isinstance(named, str):
        _check_step(federation, model, x, y, fits)


def _output(model: nn.Module, x: Examples, where: str) -> object:
    """Return what a model makes of examples. Raises InputError if it fails."""
    try:
        return apply_model(model.eval(), x)
    except Exception as error:
        shapes = " and ".join(str(list(one.shape[1:])) for one in leaves(x))
        kinds = {str(one.dtype).removeprefix("torch.") for one in leaves(x) if not one.is_floating_point()}
        stay = f"; {', '.join(sorted(kinds))} inputs stay what they are: give x.float() for numbers" if kinds else ""
        raise InputError(f"{where} of shape {shapes} it fails ({first_line(error)}){stay}") from error


def _check_step(federation: Federation, model: nn.Module, x: Examples, y: Examples, fits: str) -> None:
    """Raise InputError unless a training step can be taken, and changes nothing that is not sent."""
    floats = {name for name, value in model.state_dict().items() if value.is_floating_point()}
    buffers = {n: v for n, v in model.named_buffers() if n not in floats and not n.endswith("num_batches_tracked")}
    before = {name: value.clone() for name, value in buffers.items()}
    trained = [w for w in model.parameters() if w.requires_grad]
    try:
        with torch.enable_grad(), torch.random.fork_rng(devices=[]):
            step: Any = federation.run.task.loss
            loss = step(apply_model(train_(model), x), y)
            torch.autograd.grad(loss, trained, allow_unused=True)
    except Exception as error:
        step_ = f"a training step on {len(leaves(x)[0])} examples"
        raise InputError(f"{fits}: {step_} fails ({first_line(error)})") from error
    now = dict(model.named_buffers())
    if odd := [name for name, value in before.items() if not torch.equal(now[name], value)]:
        what = f"training changes its buffer {odd[0]}, which is not sent"
        raise InputError(f"{fits}: {what}: make it float32, and persistent")


def check_optimizer(federation: Federation) -> None:
    """Raise InputError unless a step can be taken by an optimizer of the user's."""
    optimizer = federation.run.optimizer
    if optimizer is None or isinstance(optimizer, SGD | AdamW):
        return
    model = train_(federation.model())
    device = federation.device(1, 0, model, "cpu", {})
    try:
        with torch.random.fork_rng(devices=[]):
            DenseSteps(device, {}).step(*federation.dataset.train.batch(slice(0, 2)))
    except InputError:
        raise
    except Exception as error:
        what = f"optimizer: a step of {type_name(optimizer)}"
        raise InputError(f"{what} without a closure, on the gradients alone, fails ({first_line(error)})") from error


def check_method(federation: Federation, state: Any) -> None:
    """Raise InputError unless a method gives the state, the model and the number that are asked of it."""
    method = federation.run.method
    if not isinstance(state, ServerState) or not isinstance(state.params, Mapping):
        raise InputError(f"{method.name}: init must return a fedsieve.ServerState with params, got {type_name(state)}")
    if not isinstance(model := method.deploy(state), Mapping):
        raise InputError(f"{method.name}: deploy must return the model's parameters by name, got {type_name(model)}")
    size: object = method.paper_bytes(federation.model())
    if size is not None and not isinstance(size, int | float):
        raise InputError(f"{method.name}: paper_bytes must return a number, or None, got {size!r}")


def _check_last_batches(federation: Federation) -> None:
    """Raise InputError if a client's last batch holds one example, which this model's BatchNorm cannot train on."""
    run = federation.run
    sizes = {len(shard) - int(run.task.validation * len(shard)) for shard in federation.shards}
    if all(size % run.batch != 1 for size in sizes):
        return
    works = next((b for b in range(run.batch + 1, max(sizes) + 2) if all(size % b != 1 for size in sizes)), None)
    remedy = f"-s batch={works} leaves none" if works else "use fewer clients, so that all have more"
    raise InputError(f"BatchNorm cannot train on the one example that batches of {run.batch} leave a client: {remedy}")
