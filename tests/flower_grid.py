"""A grid that calls a ClientApp in this process: messages cross it as bytes, as they would a network."""

import random
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Message as MessageProto
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.task_identity import TaskIdentity


class InProcessGrid(Grid):
    """``answer`` stands between a client's reply and the server: tests lie there."""

    def __init__(self, app: ClientApp, nodes: int, config: dict[str, Any] | None = None):
        TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 1
        self.app, self.bytes_down, self.bytes_up = app, 0, 0
        self.answer: Callable[[Message], Message | None] = lambda reply: reply
        self.contexts = {
            node: Context(1, node, {"partition-id": node - 2, "num-partitions": nodes}, RecordDict(), config or {})
            for node in range(2, nodes + 2)
        }
        self.replies: dict[str, Message] = {}
        self.errors: list[str] = []

    def set_run(self, run: object) -> None: ...

    @property
    def run(self) -> Any:
        return SimpleNamespace(run_id=1)

    def create_message(self, *args: Any, **more: Any) -> Message:
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        return self.contexts

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        return [self.deliver(message) for message in messages]

    def deliver(self, message: Message) -> str:
        name = message.metadata.__dict__["_message_id"] = f"message {len(self.replies)}"
        down = message_to_proto(message).SerializeToString()
        got = message_from_proto(MessageProto.FromString(down))
        try:
            reply = self.app(got, self.contexts[message.metadata.dst_node_id])
        except Exception as error:
            reply = Message(Error(2, repr(error)), reply_to=got)
        answered = self.answer(reply)
        if answered is not None:
            up = message_to_proto(answered).SerializeToString()
            self.replies[name] = message_from_proto(MessageProto.FromString(up))
            self.bytes_down, self.bytes_up = self.bytes_down + len(down), self.bytes_up + len(up)
        return name

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        return [self.replies[name] for name in message_ids if name in self.replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        return self.pull_messages(self.push_messages(messages))


def served(app: ServerApp, grid: Grid, config: dict[str, Any]) -> None:
    """Run a ServerApp; the nodes that it samples are the same every time."""
    random.seed(0)
    app(grid, Context(1, 1, {}, RecordDict(), config))
