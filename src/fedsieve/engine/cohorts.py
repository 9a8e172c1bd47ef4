"""The engine for a GPU: it trains several clients at once, each by a thread with a model and a stream of its own.

A client's steps are captured as CUDA graphs (``client.captured``), so that a thread sends them to the device and waits
once, at the end of the training. Then the model is the next client's, while other threads encode the reply. A client's
bits do not depend on who trains beside it. On a CPU one client trains at a time, by the same code without graphs.
"""

from __future__ import annotations

import gc
import queue
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from itertools import zip_longest
from typing import Any, cast, get_args

import torch
from torch import nn

from fedsieve.client.captured import Capture, CudaGraphs
from fedsieve.client.process import exact, to_device
from fedsieve.client.training import Precision
from fedsieve.engine.engines import Engine, Exchange, devices_of, in_order, local
from fedsieve.engine.federation import Federation
from fedsieve.engine.rollback import Memory
from fedsieve.engine.worker import Worker, train_client
from fedsieve.kernels.dispatch import check_choice
from fedsieve.sparse.effective import reset_thresholds_
from fedsieve.types import InputError

ROOM = 0.85
"""The share of a GPU's free memory that clients may take: the rest is for tests, and for what libraries allocate."""
FULL = 5
"""So many clients of a large model at once keep a GPU busy (docs/explanation/gpu.md): more would only end together,
with nobody left to train while they are encoded."""
LARGE = 1 << 20
"""Parameters of a large model: the steps of a smaller one are launches, its messages soon encoded."""
ENCODERS = 2
"""Threads that encode replies: dense ones nearly twice as fast as one thread; sparse ones no faster, nor do more."""
STREAMS = 32
"""Clients at once at most: PyTorch has so many streams on a GPU, and hands them out again from the first."""


class EagerSteps(UserWarning):
    """A model's steps cannot be captured: they run one operation after another, and one client at a time."""


def cohort(n: int = 0, device: str = "cpu", kernels: str = "auto", precision: str = "fp32") -> Engine:
    """Train ``n`` clients at once on each device, or if it is 0 as many as ``clients_at_once`` says; one on a CPU.

    At most 2n clients of each device train, are encoded, or wait for their reply to be read.
    ``device`` may name several GPUs (``cuda:0,1``). Products are computed in ``precision``, by PyTorch.
    """
    devices = devices_of(device)
    check_choice(kernels)
    kind = check_precision(precision, device, kernels)
    if n < 0:
        raise InputError(f"a cohort needs at least 1 client, got {n}")

    @contextmanager
    def engine(federation: Federation, memory: Memory) -> Iterator[Exchange]:
        with exact(device, kind):
            round_ = federation.run.most_clients
            several = min(n, round_) or (
                1 if device == "cpu" else clients_at_once(federation.model(), round_, len(devices))
            )
            make = partial(_worker, kernels=kernels, precision=kind)
            each = [[*_workers(federation, where, several, n > 0, make)] for where in devices]
            workers = [worker for row in zip_longest(*each) for worker in row if worker]  # the devices by turns
            if len(federation.run.task.tiers) == 1:  # all are sent the same
                for worker in workers:
                    worker.inbox = workers[0].inbox
            for where in devices if device != "cpu" else ():
                torch.cuda.synchronize(where)  # what was made on the default stream is there for all others
            free: queue.SimpleQueue[Worker] = queue.SimpleQueue()
            for worker in workers:
                free.put(worker)
            threads, encoders, ahead = (
                ThreadPoolExecutor(many, name, torch.set_num_threads, (1,))
                for many, name in ((len(workers), "client"), (ENCODERS, "encoder"), (1, "ahead"))
            )
            for worker in workers if device != "cpu" else ():
                worker.inbox.ahead = ahead

            def train(t: int, client: int, message: bytes, remembered: bytes) -> Future[tuple[bytes, bytes]]:
                worker = free.get()
                try:
                    with _stream_of(worker):
                        reply = train_client(worker, t, client, message, remembered)
                finally:
                    free.put(worker)
                return encoders.submit(reply.encode)

            def begin(t: int, client: int, message: bytes) -> Callable[[], tuple[bytes, bytes]]:
                future = threads.submit(train, t, client, message, memory.get(client, b""))
                return partial(_result, future, t, len(workers))

            def exchange(t: int, messages: Mapping[int, bytes]) -> Iterable[tuple[int, bytes]]:
                return in_order(t, messages, memory, begin, 2 * len(workers))

            try:
                yield exchange
            finally:
                for executor in (threads, encoders, ahead):
                    executor.shutdown(cancel_futures=True)

    return engine


def in_process(device: str = "cpu", kernels: str = "auto", precision: str = "fp32") -> Engine:
    """Return the engine that suits a device: ``local`` on a CPU, a cohort on a GPU, or for another precision."""
    if device == "cpu" and precision == "fp32":
        return local(device, kernels)
    return cohort(0, device, kernels, precision)


def check_precision(precision: str, device: str, kernels: str) -> Precision:
    """Return a precision. Raises InputError unless products can be computed in it where they are."""
    if precision not in get_args(Precision):
        raise InputError(f"unknown precision {precision!r}; they are fp32, tf32 and bf16")
    if precision == "tf32" and device == "cpu":
        raise InputError("--precision tf32 is of GPUs: use fp32 or bf16, or --device cuda")
    if precision != "fp32" and device == "cpu" and kernels != "dense":
        raise InputError(f"the kernels compute in float32: --precision {precision} needs --kernels dense on a CPU")
    return cast(Precision, precision)


def clients_at_once(model: nn.Module, clients: int, devices: int = 1) -> int:
    """Return how many of a round's ``clients`` train at once on each of some GPUs: all; of a large model a part.

    The parts are alike, of about ``FULL`` clients each: while one trains, the one before it is encoded.
    """
    clients = -(-clients // devices)
    parts = round(clients / FULL) if sum(w.numel() for w in model.parameters()) >= LARGE else 1
    return -(-clients // max(parts, 1))


def _workers(
    federation: Federation, where: str, n: int, exactly: bool, make: Callable[..., Worker]
) -> Iterator[Worker]:
    """Yield a device's workers: ``n``, or those there is room for. Raises InputError if ``exactly`` n do not fit."""
    if where == "cpu":
        alone = threading.Lock()
        for _ in range(n):
            yield make(federation, where, None, alone)
        return
    gc.collect()  # what another run has left holds its memory in circles
    torch.cuda.empty_cache()  # as a capture does: or what it gives back would be taken off a client's
    train = to_device(federation.dataset.train, where)
    federation = replace(federation, dataset=replace(federation.dataset, train=train))
    before, room = torch.cuda.memory_reserved(where), torch.cuda.mem_get_info(where)[0] * ROOM
    first = make(federation, where, CudaGraphs(torch.device(where)), threading.Lock())
    torch.cuda.synchronize(where)  # what was made on the default stream is there for the worker's
    why = _try(first, federation)
    torch.cuda.synchronize(where)
    most = min(STREAMS, largest_cohort(room, torch.cuda.memory_reserved(where) - before))
    if exactly and n > most:
        raise InputError(f"{n} clients at once do not fit on {where}: {most} do (--engine cohort:{most})")
    if why:
        line = f"the model's steps cannot be captured: they run eagerly, and one client at a time ({why})"
        warnings.warn(line, EagerSteps, 2)
        n = 1
    yield first
    for _ in range(min(n, most) - 1):
        yield make(federation, where, CudaGraphs(torch.device(where)), first.alone)


def largest_cohort(room: float, each: float) -> int:
    """Return how many clients fit into ``room`` bytes, if each takes ``each``: at least 1."""
    return max(1, int(room // max(each, 1)))


def _worker(
    federation: Federation, where: str, graphs: CudaGraphs | None, alone: Any, *, kernels: str, precision: Precision
) -> Worker:
    worker = Worker(federation, where, kernels, precision)
    capture = Capture(worker.model, worker.cost.products, precision, graphs)
    run = federation.run
    capture.examples = max(map(len, federation.shards), default=0)
    capture.steps = run.epochs * -(-capture.examples // run.batch)
    capture.watches = worker.saved is not None
    worker.capture, worker.alone, worker.cost.dense_steps = capture, alone, capture.begin
    return worker


def _try(worker: Worker, federation: Federation) -> str:
    """Capture a step of a worker's; return why that cannot be, "" where it can."""
    assert worker.capture
    client = max(range(len(federation.shards)), key=lambda k: len(federation.shards[k]))
    with _stream_of(worker):
        device = federation.device(1, client, worker.model, worker.where, {})
        order = torch.arange(min(device.batch, len(device.data)))
        draws = device.augment.draw(len(order), device.rng) if device.augment else None
        watches, worker.capture.watches = worker.capture.watches, False  # or no step would be captured
        reset_thresholds_(worker.model)
        try:
            steps = worker.capture.begin(device, {})
            [*steps.epoch(order, draws)]
            steps.write_()
        except torch.OutOfMemoryError:
            raise InputError(f"a single client's training does not fit the memory of {worker.where}") from None
        except RuntimeError as error:
            worker.capture.graphs = None
            cause = error.__context__ or error  # a capture that was cut off says only that it was
            return str(cause).partition("\n")[0]
        finally:
            worker.capture.watches = watches
    return ""


def _stream_of(worker: Worker) -> Any:
    """Return the context in which a worker computes: a stream of its own, on a GPU."""
    if worker.where == "cpu":
        return nullcontext()
    if worker.stream is None:
        worker.stream = torch.cuda.Stream(worker.where)  # type: ignore[no-untyped-call]
    return torch.cuda.stream(worker.stream)


def _result(future: Future[Future[tuple[bytes, bytes]]], t: int, clients: int) -> tuple[bytes, bytes]:
    try:
        return future.result().result()
    except torch.OutOfMemoryError:
        fewer = f"--engine cohort:{clients // 2}" if clients > 1 else "a smaller batch"
        raise InputError(f"round {t}: the GPU's memory is full: go on with --resume and {fewer}") from None
