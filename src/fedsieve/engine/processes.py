"""Worker processes, each with one resident model and one thread: the same bits as ``local``, on more cores."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.reduction import ForkingPickler

import torch
from torch import Tensor

from fedsieve.client.process import peak_memory_mb, warn_in_one_line
from fedsieve.data import Dataset
from fedsieve.engine.federation import Federation
from fedsieve.engine.loop import Engine, Exchange, Worker, kernels_for, run_client
from fedsieve.engine.rollback import Memory
from fedsieve.engine.serial import check_device
from fedsieve.kernels.dispatch import check_choice
from fedsieve.types import InputError

_worker: Worker | None = None


def pool(n: int, device: str = "cpu", kernels: str = "auto") -> Engine:
    """Train the clients in ``n`` processes, otherwise as ``local`` does. At most 2n answers wait to be aggregated."""
    check_device(device)
    check_choice(kernels)
    if n < 1:
        raise InputError(f"a pool needs at least 1 process, got {n}")

    @contextmanager
    def engine(federation: Federation, memory: Memory) -> Iterator[Exchange]:
        check_sendable(federation)
        kernels_for(federation, kernels, device)
        context = multiprocessing.get_context("spawn")
        executor = ProcessPoolExecutor(n, context, _start, (*_shared(federation), device, kernels))

        def exchange(t: int, messages: Mapping[int, bytes]) -> Iterable[tuple[int, bytes]]:
            waiting: deque[tuple[int, Future[tuple[bytes, bytes, float]]]] = deque()
            todo = iter(messages.items())
            while True:
                while len(waiting) < 2 * n and (pair := next(todo, None)):
                    client, message = pair
                    waiting.append((client, executor.submit(_answer, t, client, message, memory.get(client, b""))))
                if not waiting:
                    return
                client, future = waiting.popleft()
                reply, kept, peak = _result(future, t)
                peak_memory_mb(peak)
                if kept:
                    memory[client] = kept
                yield client, reply

        try:
            yield exchange
        finally:
            executor.shutdown(cancel_futures=True)

    return engine


def _shared(federation: Federation) -> tuple[Federation, Tensor, list[int]]:
    """Return the federation with its training examples in memory that all processes share, its shards as one tensor."""
    dataset, shards = federation.dataset, federation.shards
    train = replace(dataset.train, x=_share(dataset.train.x), y=_share(dataset.train.y))
    dataset, task = replace(dataset, train=train, test=train.subset(torch.arange(0)), group=None), federation.run.task
    if isinstance(task.dataset, Dataset):
        task = replace(task, dataset=task.dataset.empty())
    run = replace(federation.run, task=task)
    return replace(federation, run=run, dataset=dataset, shards=()), torch.cat(shards), [len(shard) for shard in shards]


def check_sendable(federation: Federation) -> None:
    """Raise InputError unless other processes can be sent the run."""
    try:
        ForkingPickler.dumps(federation.run)
    except Exception as error:  # whatever a lambda, a local class or a lock raises
        raise InputError(f"a pool cannot be sent this run ({error}): use functions and classes of a module") from None


def _share(x: Tensor) -> Tensor:
    try:
        x.share_memory_()  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        raise InputError(f"no room to share the data ({error}): enlarge /dev/shm, or use --engine local") from None
    return x


def _start(federation: Federation, shards: Tensor, sizes: list[int], device: str, kernels: str) -> None:
    global _worker
    threading.Thread(target=follow_parent, daemon=True).start()
    warn_in_one_line()
    torch.set_num_threads(1)
    _worker = Worker(replace(federation, shards=torch.split(shards, sizes)), device, kernels)


def follow_parent() -> None:
    """End this process when the server's ends, however it does."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _answer(t: int, client: int, message: bytes, memory: bytes) -> tuple[bytes, bytes, float]:
    assert _worker is not None
    return *run_client(_worker, t, client, message, memory), peak_memory_mb()


def _result(future: Future[tuple[bytes, bytes, float]], t: int) -> tuple[bytes, bytes, float]:
    try:
        return future.result()
    except BrokenProcessPool:
        raise InputError(
            f"a worker process could not start, or died in round {t} (killed, or out of memory?): "
            "go on with --resume, fewer processes, or --engine local"
        ) from None
