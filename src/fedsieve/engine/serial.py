"""The default engine: one process, one resident model, clients one after another."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch

from fedsieve.engine.federation import Federation
from fedsieve.engine.loop import Engine, Exchange, Worker, run_client
from fedsieve.engine.rollback import Memory
from fedsieve.kernels.dispatch import check_choice
from fedsieve.types import InputError


def local(device: str = "cpu", kernels: str = "auto") -> Engine:
    """Train all clients in this process, on ``device``, by the sparse ``kernels``: auto, sparse or dense (not)."""
    check_device(device)
    check_choice(kernels)

    @contextmanager
    def engine(federation: Federation, memory: Memory) -> Iterator[Exchange]:
        worker = Worker(federation, device, kernels)

        def exchange(t: int, messages: Mapping[int, bytes]) -> Iterable[tuple[int, bytes]]:
            for client, message in messages.items():
                reply, kept = run_client(worker, t, client, message, memory.get(client, b""))
                if kept:
                    memory[client] = kept
                yield client, reply

        yield exchange

    return engine


def check_device(device: str) -> None:
    """Raise InputError unless ``device`` is there to compute on."""
    if device == "cpu":
        return
    try:
        known = torch.device(device).type == "cuda"
    except RuntimeError:
        known = False
    if not known:
        raise InputError(f"unknown device {device!r}; the devices are cpu, cuda and cuda:N")
    if not torch.cuda.is_available() or (torch.device(device).index or 0) >= torch.cuda.device_count():
        seen = torch.cuda.device_count()
        raise InputError(f"device {device!r} is not there: PyTorch sees {seen} CUDA devices; use cpu")
