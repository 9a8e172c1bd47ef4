"""The engines that carry the bytes to clients (``worker.run_client``) and back.

``local`` trains the clients one after another in this process, ``pool`` in several, each with one resident model and
one thread: the same bits, on more cores.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from multiprocessing.reduction import ForkingPickler
from typing import TypeAlias

import torch
from torch import Tensor

from fedsieve.client.process import exact, peak_memory_mb, warn_in_one_line
from fedsieve.data import Dataset
from fedsieve.engine.federation import Federation
from fedsieve.engine.rollback import Memory
from fedsieve.engine.round import Failure
from fedsieve.engine.worker import Worker, kernels_for, run_client
from fedsieve.kernels.dispatch import check_choice
from fedsieve.types import InputError

Exchange: TypeAlias = Callable[[int, Mapping[int, bytes]], "Iterable[tuple[int, bytes | Failure]]"]
"""Carry round t's messages to their clients and bring the replies back, in the clients' order."""

Engine: TypeAlias = Callable[[Federation, Memory], AbstractContextManager[Exchange]]


def local(device: str = "cpu", kernels: str = "auto") -> Engine:
    """Train all clients in this process, on ``device``, by the sparse ``kernels``: auto, sparse or dense (not)."""
    check_device(device)
    check_choice(kernels)

    @contextmanager
    def engine(federation: Federation, memory: Memory) -> Iterator[Exchange]:
        worker = Worker(federation, device, kernels)

        def exchange(t: int, messages: Mapping[int, bytes]) -> Iterable[tuple[int, bytes]]:
            for client, message in messages.items():
                reply, remembered = run_client(worker, t, client, message, memory.get(client, b""))
                if remembered:
                    memory[client] = remembered
                yield client, reply

        with exact(device):
            yield exchange

    return engine


def watched(engine: Engine, answer: Callable[[int, int, int], None]) -> Engine:
    """Return an engine that calls ``answer`` with the round, the answers so far and the round's clients, at each."""

    @contextmanager
    def watched_engine(federation: Federation, memory: Memory) -> Iterator[Exchange]:
        with engine(federation, memory) as exchange:

            def count(
                t: int, clients: int, replies: Iterable[tuple[int, bytes | Failure]]
            ) -> Iterator[tuple[int, bytes | Failure]]:
                for answers, pair in enumerate(replies, start=1):
                    yield pair
                    answer(t, answers, clients)

            yield lambda t, messages: count(t, len(messages), exchange(t, messages))

    return watched_engine


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

        def begin(t: int, client: int, message: bytes) -> Callable[[], tuple[bytes, bytes]]:
            return partial(_result, executor.submit(_answer, t, client, message, memory.get(client, b"")), t)

        def exchange(t: int, messages: Mapping[int, bytes]) -> Iterable[tuple[int, bytes]]:
            return in_order(t, messages, memory, begin, 2 * n)

        try:
            yield exchange
        finally:
            executor.shutdown(cancel_futures=True)

    return engine


def in_order(
    t: int,
    messages: Mapping[int, bytes],
    memory: Memory,
    begin: Callable[[int, int, bytes], Callable[[], tuple[bytes, bytes]]],
    most: int,
) -> Iterator[tuple[int, bytes]]:
    """Return the clients' replies in their order, and keep what they remember; ``most`` are at work, or wait.

    They are at work at once, before anybody asks for a reply: what the server computes first does not hold them up.
    ``begin`` sends a client its message, and returns what waits for its reply and memory.
    """
    waiting: deque[tuple[int, Callable[[], tuple[bytes, bytes]]]] = deque()
    todo = iter(messages.items())

    def begin_some() -> None:
        while len(waiting) < most and (pair := next(todo, None)):
            waiting.append((pair[0], begin(t, *pair)))

    def replies() -> Iterator[tuple[int, bytes]]:
        while waiting:
            client, answer = waiting.popleft()
            reply, remembered = answer()
            if remembered:
                memory[client] = remembered
            yield client, reply
            begin_some()

    begin_some()
    return replies()


def _shared(federation: Federation) -> tuple[Federation, Tensor, list[int]]:
    """Return the federation with its training examples in memory that all processes share, its shards as one tensor."""
    dataset, shards = federation.dataset, federation.shards
    train = dataset.train.map(_share)
    none, task = train.subset(torch.arange(0)), federation.run.task
    dataset = replace(dataset, train=train, test=none, group=None, columns={}, test_group=None)
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
    exact(device).__enter__()  # as long as the process lives
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


def _result(future: Future[tuple[bytes, bytes, float]], t: int) -> tuple[bytes, bytes]:
    try:
        reply, remembered, peak = future.result()
        peak_memory_mb(peak)
        return reply, remembered
    except BrokenProcessPool:
        raise InputError(
            f"a worker process could not start, or died in round {t} (killed, or out of memory?): "
            "go on with --resume, fewer processes, or --engine local"
        ) from None


def check_device(device: str) -> None:
    """Raise InputError unless ``device`` is there to compute on, and is one."""
    if len(devices_of(device)) > 1:
        raise InputError(f"several GPUs ({device}) are for --engine local and cohort:N")


def devices_of(device: str) -> list[str]:
    """Return the devices that a name means: ``cuda:0,1`` is two. Raises InputError unless all are there."""
    if device == "cpu":
        return ["cpu"]
    kind, _, numbers = device.partition(":")
    several = [number.strip() for number in numbers.split(",")] if numbers else []
    if kind != "cuda" or device.endswith(":") or not all(number.isdecimal() for number in several):
        raise InputError(f"unknown device {device!r}; the devices are cpu, cuda, cuda:N and, of several, cuda:0,1")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count or max(map(int, several), default=0) >= count:
        raise InputError(f"device {device!r} is not there: PyTorch sees {count} CUDA devices; use cpu")
    if len({*map(int, several)}) < len(several):
        raise InputError(f"device {device!r} names one twice: name each once")
    return [f"cuda:{int(number)}" for number in several] or ["cuda"]
