"""What computes on a model's tensors beside the thread at work: more threads, and a GPU. They change no bit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Resources:
    """What there is."""

    threads: Executor | None = None
    """Each takes a tensor at a time, and computes with one thread."""
    device: str = "cpu"
    """Where the largest elements of large tensors are found: exact selections are the same everywhere."""


ALONE = Resources()
_RESOURCES: ContextVar[Resources] = ContextVar("resources")


def resources() -> Resources:
    """Return what this thread may use."""
    return _RESOURCES.get(ALONE)


@contextmanager
def using(resources: Resources) -> Iterator[None]:
    """Let this thread use resources inside the block."""
    token = _RESOURCES.set(resources)
    try:
        yield
    finally:
        _RESOURCES.reset(token)


def each(function: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """Return a function's results for all items, in their order, computed by the threads that there are."""
    own = resources()
    if own.threads is None:
        return [*map(function, items)]
    return [*own.threads.map(partial(_beside, Resources(device=own.device), function), items)]


def _beside(own: Resources, function: Callable[[T], R], item: T) -> R:
    with using(own):
        return function(item)
