"""The engines that must give the same bits, and one that is a pool without its processes."""

import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

from fedsieve.engine import local, pool
from fedsieve.engine.engines import Engine, Exchange
from fedsieve.engine.federation import Federation
from fedsieve.engine.rollback import Memory
from fedsieve.engine.worker import Worker, run_client
from fedsieve.flower.engine import inline


def pickled(kernels: str = "auto") -> Engine:
    """Clients in turn at two new workers, whose federation has been pickled as for a process of its own."""

    @contextmanager
    def engine(federation: Federation, memory: Memory) -> Iterator[Exchange]:
        parcel = pickle.dumps(federation)
        workers = [Worker(pickle.loads(parcel), kernels=kernels) for _ in range(2)]

        def exchange(t: int, messages: Mapping[int, bytes]) -> Iterable[tuple[int, bytes]]:
            for turn, (client, message) in enumerate(messages.items()):
                reply, kept = run_client(workers[turn % 2], t, client, message, memory.get(client, b""))
                if kept:
                    memory[client] = kept
                yield client, reply

        yield exchange

    return engine


ENGINES: dict[str, Callable[[], Engine]] = {
    "local": local,
    "pickled": pickled,
    "flower:inline": inline,
    "pool:2": lambda: pool(2),
}
"""All engines that a run may have; ``tests/engine/test_conformance.py`` says what each must do."""
