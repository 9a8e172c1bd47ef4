"""A grid in this process: the path of every Flower run without Ray or a network, for tests and debuggers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from fedsieve.client.process import exact
from fedsieve.engine.engines import Engine, Exchange, check_device
from fedsieve.engine.federation import Federation
from fedsieve.engine.quorum import Quorum
from fedsieve.engine.rollback import Memory
from fedsieve.engine.worker import Worker
from fedsieve.flower.engine.client import make_client_app
from fedsieve.flower.engine.exchange import SimulatedNodes, grid_engine
from fedsieve.flower.private import FlowerRun, give_identity
from fedsieve.kernels.dispatch import check_choice


def inline(device: str = "cpu", kernels: str = "auto", quorum: Quorum | None = None) -> Engine:
    """Train all clients in this process, through Flower's messages."""
    check_device(device)
    check_choice(kernels)

    @contextmanager
    def engine(federation: Federation, memory: Memory) -> Iterator[Exchange]:
        worker = Worker(federation, device, kernels)
        grid = InlineGrid(make_client_app(lambda node: worker))
        make = grid_engine(grid, SimulatedNodes(grid), quorum or Quorum(), pause=0)
        with exact(device), make(federation, memory) as exchange:
            yield exchange

    return engine


class InlineGrid(Grid):
    """``nodes`` nodes whose messages are answered when they are pulled, one after another, in this thread."""

    def __init__(self, app: ClientApp, nodes: int = 1):
        give_identity()
        self.app, self.number = app, 0
        self.contexts = {node: Context(1, node, {}, RecordDict(), {}) for node in range(2, 2 + nodes)}
        self.waiting = dict[str, Message]()

    def set_run(self, run: FlowerRun) -> None:
        """Do nothing: there is one run."""

    @property
    def run(self) -> FlowerRun:
        """There is none of Flower's."""
        raise NotImplementedError

    def create_message(self, *_: object, **__: object) -> Message:
        """Refuse: Flower has deprecated it."""
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        """Return the nodes."""
        return [*self.contexts]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Take messages, to be answered when they are pulled."""
        ids = []
        for message in messages:
            self.number += 1
            message.metadata.__dict__["_message_id"] = f"message {self.number}"
            self.waiting[message.metadata.message_id] = message
            ids.append(message.metadata.message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Answer the first of the messages."""
        for id_ in message_ids:
            if message := self.waiting.pop(id_, None):
                try:
                    return [self.app(message, self.contexts[message.metadata.dst_node_id])]
                except Exception as error:
                    return [Message(Error(2, f"{type(error).__name__}: {error}"), reply_to=message)]
        return []

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Answer all messages."""
        return [reply for id_ in self.push_messages(messages) for reply in self.pull_messages([id_])]
