"""Who is where: the nodes of a simulation are all alike; a SuperNode is the client that its partition-id names."""

from __future__ import annotations

import sys
import time
from collections.abc import Collection, Mapping
from typing import Protocol

from flwr.app import Message, MessageType
from flwr.serverapp import Grid

from fedsieve.engine.check import plain
from fedsieve.engine.flower.messages import order_of, packed, reason
from fedsieve.engine.task import Federation

PAUSE = 0.5
MEETING = 300.0
"""Seconds that a new SuperNode has to say who it is: it starts a process and reads its data for that."""


class Nodes(Protocol):
    """Where clients are."""

    def find(self, clients: Collection[int], deadline: float, enough: int) -> Mapping[int, int]:
        """Return the node of every client that is there; wait until ``deadline`` (monotonic) while too few are."""


class Anywhere:
    """A simulation's nodes: any of them can be any client, so that their number need not be the clients'."""

    def __init__(self, grid: Grid):
        self.grid = grid

    def find(self, clients: Collection[int], deadline: float, enough: int) -> Mapping[int, int]:
        """Deal the clients out to the nodes."""
        while not (nodes := sorted(self.grid.get_node_ids())) and time.monotonic() < deadline:
            time.sleep(0.05)
        return {client: nodes[i % len(nodes)] for i, client in enumerate(clients)} if nodes else {}


class Registered:
    """A deployment's SuperNodes. Each is asked once who it is, and told ``about`` the run.

    The first round waits for all of its clients. Later ones wait only for as many as make a round: Flower takes a node
    off its list when it stops to give signs of life, and nobody is to wait for it again until it is back.
    """

    def __init__(self, grid: Grid, federation: Federation, about: Mapping[str, str]):
        self.grid, self.federation, self.about = grid, federation, about
        self.clients = dict[int, int]()
        self.met = set[int]()
        self.complete = False

    def find(self, clients: Collection[int], deadline: float, enough: int) -> Mapping[int, int]:
        """Return the nodes of the clients that are connected."""
        while True:
            self._meet()
            nodes = {client: node for node, client in self.clients.items()}
            found = {client: nodes[client] for client in clients if client in nodes}
            whole = len(found) == len(clients)
            if whole or time.monotonic() > deadline or (self.complete and len(found) >= enough):
                self.complete = True
                return found
            time.sleep(PAUSE)

    def _meet(self) -> None:
        """Ask the new nodes who they are; forget those that have gone."""
        here = set(self.grid.get_node_ids())
        self.clients = {node: client for node, client in self.clients.items() if node in here}
        new, self.met = sorted(here - self.met), here
        content = packed({}, self.about)
        sent = {id_: node for node in new for id_ in self.grid.push_messages([_query(content, node)]) if id_}
        end = time.monotonic() + MEETING
        while sent and time.monotonic() < end:
            for reply in self.grid.pull_messages([*sent]):
                if node := sent.pop(reply.metadata.reply_to_message_id, 0):
                    self._register(node, reply)
            time.sleep(PAUSE)
        for node in sent.values():
            _say(node, "it has not said who it is")

    def _register(self, node: int, reply: Message) -> None:
        told = {} if reply.has_error() else order_of(reply.content)
        client, examples, clients = told.get("client"), told.get("examples"), self.federation.run.task.clients
        if reply.has_error():
            _say(node, reason(reply.error))
        elif not isinstance(client, int) or not isinstance(examples, int) or not 0 <= client < clients or examples < 0:
            _say(node, f"its partition-id must be from 0 to {clients - 1}, it says {client}")
        elif client in self.clients.values():
            _say(node, f"another one has partition-id {client} already")
        else:
            self.clients[node] = client
            if self.federation.own is not None:
                self.federation.own[client] = examples


def _query(content: object, node: int) -> Message:
    return Message(content, node, MessageType.QUERY, ttl=MEETING)  # type: ignore[call-overload,no-any-return]


def _say(node: int, why: str) -> None:
    print(f"fedsieve: SuperNode {node} takes no part: {plain(why)}", file=sys.stderr, flush=True)  # noqa: T201
