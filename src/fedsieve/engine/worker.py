"""The client's side of a round: a resident model that clients train with one after another, and what they reply."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fedsieve.client.captured import Capture
from fedsieve.client.cost import Cost, SavedTensors
from fedsieve.client.process import keep_freed_memory, num_threads, seeded
from fedsieve.client.training import DenseSteps, Precision
from fedsieve.engine.cache import LACKS, CacheMiss
from fedsieve.engine.federation import Federation
from fedsieve.engine.messages import Inbox, Messages
from fedsieve.kernels.dispatch import Kernels
from fedsieve.server.admission import Diagnostics, read_diagnostics
from fedsieve.types import InputError, Sparse, Tree, Update, map_examples, rng
from fedsieve.types.resources import Resources, using
from fedsieve.wire import Known, decode, encode


def kernels_for(federation: Federation, choice: str, where: str = "cpu", model: nn.Module | None = None) -> Kernels:
    """Return the kernels that train ``model``, by ``choice``. Raises InputError if they must, but cannot."""
    kernels = Kernels(model or federation.run.method.prepare(federation.model()), choice, where)
    if choice != "dense":
        kernels.check(federation.dataset.train, federation.run.optimizer)
    return kernels


@dataclass(frozen=True)
class Reply:
    """What a client sends once it has trained, not yet encoded. It needs its worker no more."""

    messages: Messages
    t: int
    client: int
    update: Update
    diagnostics: Diagnostics
    memory: dict[str, Tensor]
    """What the client keeps to itself."""
    known: Known
    """What both sides know of it."""

    def encode(self) -> tuple[bytes, bytes]:
        """Return the reply, rounded with error feedback in the client's memory, and that memory for the next round."""
        tree = self.messages.compensate(self.messages.without_frozen(self.update.tree), self.memory)
        message: Tree = {"tree": tree, "n": float(self.update.n), **self.diagnostics}
        reply = self.messages.encode_reply(self.t, self.client, message, self.known)
        return reply, encode(self.memory) if self.memory else b""


class Worker:
    """One resident model and who trains with it: the cost of the last training, and the federation."""

    def __init__(
        self, federation: Federation, where: str = "cpu", kernels: str = "auto", precision: Precision = "fp32"
    ):
        keep_freed_memory()
        self.federation, self.where = federation, where
        self.cuda = [torch.device(where)] if where != "cpu" else []
        self.capture: Capture | None = None
        """What its steps are captured with, of a worker of a cohort."""
        self.stream: torch.cuda.Stream | None = None
        self.alone: AbstractContextManager[Any] = nullcontext()
        """What a worker holds while it trains that must not draw by chance beside others."""
        self.method = federation.run.method
        self.model = self.method.prepare(federation.model()).to(where)
        examples: Any = federation.few()
        if examples:
            examples = tuple(map_examples(lambda one: one.to(where), part) for part in examples)
        loss = federation.run.task.loss
        self.cost = Cost(self.model, kernels_for(federation, kernels, where, self.model), examples, loss)
        self.cost.dense_steps, self.precision = partial(DenseSteps, precision=precision), precision
        self.saved = SavedTensors(self.model) if "masks" in federation.measure else None
        self.messages = Messages(federation)
        self.inbox = Inbox(self.messages)
        """What decodes broadcasts, if need be for several workers."""
        self.known = self.messages.plain

    @contextmanager
    def seeded(self, seed: int) -> Iterator[None]:
        """Seed for the block what PyTorch's operations draw from, dropout above all."""
        if self.capture and self.capture.graphs:
            self.capture.seed = seed
            yield
            return
        with self.alone, seeded(seed, self.cuda):
            yield

    def decode(self, t: int, client: int, message: bytes) -> Tree:
        """Return a message's tree, to be read only: clients that are sent the same bytes share it."""
        tree, self.known = self.inbox.open(t, client, message)
        return tree

    def reply(self, t: int, client: int, update: Update, memory: dict[str, Tensor]) -> Reply:
        """Return what a client that has just trained sends: its update, in memory of its own, and its diagnostics."""
        if not isinstance(update, Update) or not isinstance(update.tree, Mapping):
            raise InputError(f"{self.method.name}: client must return an Update of a tree by names")
        diagnostics = read_diagnostics({"metrics": update.metrics, **self.cost.report()})
        numbers = diagnostics["metrics"].values()
        if (not numbers or any(map(math.isnan, numbers))) and (step := self.cost.nonfinite_step()):
            diagnostics["notes"] |= {"nonfinite_step": float(step), "bf16": float(self.precision == "bf16")}
        if self.saved:
            sparse = self.cost.sparse
            diagnostics["metrics"] |= {"saved_bytes": float(sparse.bytes)} if sparse else self.saved.metrics()
        own = detach_from(self.model, {"tree": update.tree, "memory": memory})
        update = replace(update, tree=own["tree"])
        return Reply(self.messages, t, client, update, diagnostics, own["memory"], self.known)


def detach_from(model: nn.Module, tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return a tree on the CPU that stays what it is while ``model`` trains on: what shares its memory is copied."""
    modules = (value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor))
    shared = {v.untyped_storage().data_ptr() for v in (*model.parameters(), *model.buffers(), *modules)}

    def own(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: own(one) for name, one in value.items()}
        if isinstance(value, Sparse):
            return replace(value, values=own(value.values), positions=own(value.positions))
        if not isinstance(value, Tensor):
            return value
        value = value.detach().cpu()
        return value.clone() if value.untyped_storage().data_ptr() in shared else value

    return {name: own(value) for name, value in tree.items()}


def train_client(worker: Worker, t: int, client: int, message: bytes, memory: bytes = b"") -> Reply:
    """Be a client for one round up to the end of its training: decode, train. The worker is then free for another.

    Raises CacheMiss for a message that leaves out what this process does not have.
    """
    tree = worker.decode(t, client, message)
    worker.cost.restart()
    if worker.saved:
        worker.saved.restart()
    tensors = {name: v for name, v in decode(memory).items() if isinstance(v, Tensor)} if memory else {}
    beside = using(Resources(device=worker.where))
    with num_threads(1), beside, worker.seeded(rng(worker.federation.run.seed, "noise", t, client).initial_seed()):
        device = worker.federation.device(t, client, worker.model, worker.where, tensors)
        device.steps = worker.cost.begin
        update = worker.method.client(tree, device)
    return worker.reply(t, client, update, device.memory)


def run_client(worker: Worker, t: int, client: int, message: bytes, memory: bytes = b"") -> tuple[bytes, bytes]:
    """Be a client for one round: decode, train, encode. Return its reply, and its memory for the next round.

    A message that leaves out what this process does not have is answered with ``LACKS``.
    """
    try:
        return train_client(worker, t, client, message, memory).encode()
    except CacheMiss:
        return LACKS, memory
