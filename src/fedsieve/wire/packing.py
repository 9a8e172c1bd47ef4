"""Long streams are packed beside one another, by as many threads as PyTorch computes with."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import Self, TypeAlias

from fedsieve.wire.known import Array

Stream: TypeAlias = Callable[[], bytes]
"""Return a packed stream, when it is there."""

LONG = 1 << 16
"""Shorter streams are packed at once: to hand them over would take as long."""


@cache
def _workers(threads: int) -> ThreadPoolExecutor:
    """Return this process's packers: the same threads every time, as each keeps memory that it has used."""
    return ThreadPoolExecutor(threads)


os.register_at_fork(after_in_child=_workers.cache_clear)


class Packing:
    """Packs streams while the next tensor is read, never more tensors behind than there are threads.

    The bytes do not depend on the threads. With one of them all is packed at once.
    """

    def __init__(self, threads: int):
        self.threads = threads
        self.under_way = deque[Future[bytes]]()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for future in self.under_way:
            future.cancel()

    def begun(self, pack: Callable[[Array], bytes], numbers: Array) -> Stream:
        """Begin to pack numbers."""
        if self.threads < 2 or len(numbers) < LONG:
            found = pack(numbers)
            return lambda: found
        while len(self.under_way) >= self.threads:
            self.under_way.popleft().result()
        self.under_way.append(future := _workers(self.threads).submit(pack, numbers))
        return future.result
