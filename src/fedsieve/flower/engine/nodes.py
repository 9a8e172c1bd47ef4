"""Who is where: the nodes of a simulation are all alike; a SuperNode is the client that its partition-id names."""

from __future__ import annotations

import sys
import time
from collections.abc import Collection, Mapping
from typing import Protocol

from flwr.app import Message, MessageType
from flwr.serverapp import Grid

from fedsieve.engine.federation import Federation
from fedsieve.flower.engine.messages import error_line, get_config, to_content
from fedsieve.server.diagnostics import one_line

PAUSE = 0.5
MEETING = 300.0
"""Seconds that a new SuperNode has to say who it is: it starts a process and reads its data for that."""
AGAIN = 30.0
"""Seconds after which one that could not say it is asked again while it is waited for."""


class Nodes(Protocol):
    """Where clients are."""

    @property
    def about(self) -> Mapping[str, str]:
        """What every node is told of the run."""

    def find(self, clients: Collection[int], seconds: float, enough: int) -> Mapping[int, int]:
        """Return the node of every client that is there; wait for ``enough``, but not longer than ``seconds``."""


class SimulatedNodes:
    """A simulation's nodes: any of them can be any client, so that their number need not be the clients'."""

    def __init__(self, grid: Grid, about: Mapping[str, str] | None = None):
        self.grid, self.about = grid, {} if about is None else about

    def find(self, clients: Collection[int], seconds: float, enough: int) -> Mapping[int, int]:
        """Deal the clients out to the nodes."""
        deadline = time.monotonic() + seconds
        while not (nodes := sorted(self.grid.get_node_ids())) and time.monotonic() < deadline:
            time.sleep(0.05)
        return {client: nodes[i % len(nodes)] for i, client in enumerate(clients)} if nodes else {}


class SuperNodes:
    """A deployment's SuperNodes. Each is asked who it is, and told ``about`` the run, until it has said so.

    The first round waits for all of its clients, once there are enough no longer than ``MEETING``. Later ones wait only
    for as many as make a round: Flower takes a node off its list when it stops to give signs of life, and nobody is to
    wait for it again until it is back.
    """

    def __init__(self, grid: Grid, federation: Federation, about: Mapping[str, str]):
        self.grid, self.federation, self.about = grid, federation, about
        self.clients = dict[int, int]()
        self.asked = dict[str, int]()
        self.met, self.failed = set[int](), dict[int, float]()
        self.said = set[str]()
        self.complete = False

    def find(self, clients: Collection[int], seconds: float, enough: int) -> Mapping[int, int]:
        """Return the nodes of the clients that are connected."""
        began = time.monotonic()
        self._forget_failed(before=began)
        while True:
            self._forget_failed(before=time.monotonic() - AGAIN)
            self._meet()
            nodes = {client: node for node, client in self.clients.items()}
            found = {client: nodes[client] for client in clients if client in nodes}
            waited, patience = time.monotonic() - began, 0.0 if self.complete else MEETING
            if len(found) == len(clients) or waited > seconds or (len(found) >= enough and waited >= patience):
                self.complete = self.complete or len(found) >= enough
                return found
            self._say(f"waiting for the SuperNodes of clients {', '.join(map(str, sorted({*clients} - {*found})))}")
            time.sleep(PAUSE)

    def _forget_failed(self, before: float) -> None:
        """Let those be asked again who could not say who they are when they were asked before a time."""
        again = {node for node, when in self.failed.items() if when <= before}
        self.met -= again
        self.failed = {node: when for node, when in self.failed.items() if node not in again}

    def _meet(self) -> None:
        """Ask the new nodes who they are, hear those that have said it, and forget those that have gone."""
        here = set(self.grid.get_node_ids())
        self.clients = {node: client for node, client in self.clients.items() if node in here}
        content, new = to_content({}, self.about), sorted(here - self.met)
        self.asked |= {id_: node for node in new for id_ in self.grid.push_messages([_query(content, node)]) if id_}
        self.met = here
        while self.asked and (replies := [*self.grid.pull_messages([*self.asked])]):
            for reply in replies:
                node = self.asked.pop(reply.metadata.reply_to_message_id, None)
                if node in here and (why := self._refused(node, reply)):
                    self.failed[node] = time.monotonic()
                    self._say(f"SuperNode {node} takes no part: {one_line(why)}")

    def _refused(self, node: int, reply: Message) -> str:
        """Register a node, or return why not."""
        if reply.has_error():
            return error_line(reply.error)
        config, clients = get_config(reply.content), self.federation.run.task.clients
        client, examples = config.get("client"), config.get("examples")
        if not isinstance(client, int) or not isinstance(examples, int) or not 0 <= client < clients or examples < 0:
            return f"its partition-id must be from 0 to {clients - 1}, it says {client}"
        if client in self.clients.values():
            return f"another one has partition-id {client} already"
        self.clients[node] = client
        if self.federation.own is not None:
            self.federation.own[client] = examples
        return ""

    def _say(self, line: str) -> None:
        """Print a line, once."""
        if line not in self.said:
            self.said.add(line)
            print(f"fedsieve: {line}", file=sys.stderr, flush=True)  # noqa: T201


def _query(content: object, node: int) -> Message:
    return Message(content, node, MessageType.QUERY, ttl=MEETING)  # type: ignore[call-overload,no-any-return]
