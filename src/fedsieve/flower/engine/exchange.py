"""Messages through a Flower grid and back: what they hold, which node is which client, quorum, timeouts, who was lost.

A message holds FedSieve's, in a simulation the client's memory, and an order of plain numbers. A simulation's nodes are
all alike; a SuperNode is the client that its partition-id names.
"""

from __future__ import annotations

import re
import sys
import time
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from fedsieve.engine.engines import Engine, Exchange
from fedsieve.engine.federation import Federation
from fedsieve.engine.quorum import Quorum, QuorumMissed
from fedsieve.engine.rollback import Memory
from fedsieve.engine.round import Failure
from fedsieve.server.admission import one_line

STYPE = "fedsieve.bytes"
"""Our own serialization type: whatever of Flower's would open an Array refuses this one."""
PAUSE = 0.5
MEETING = 300.0
"""Seconds that a new SuperNode has to say who it is: it starts a process and reads its data for that."""
AGAIN = 30.0
"""Seconds after which one that could not say it is asked again while it is waited for."""


def to_content(parts: Mapping[str, bytes], config: Mapping[str, int | str] | None = None) -> RecordDict:
    """Return the content of a message: bytes by name, and numbers or text beside them."""
    arrays = ArrayRecord({name: Array("uint8", (len(part),), STYPE, part) for name, part in parts.items()})
    return RecordDict({"bytes": arrays, "order": ConfigRecord({**(config or {})})})


def get_bytes(content: RecordDict, name: str) -> bytes | None:
    """Return the bytes of a name; None if there are none."""
    record = content.get("bytes")
    array = record.get(name) if isinstance(record, ArrayRecord) else None
    return array.data if array is not None and array.stype == STYPE and isinstance(array.data, bytes) else None


def get_config(content: RecordDict) -> dict[str, int | str]:
    """Return the numbers and texts beside the bytes."""
    record = content.get("order")
    return {n: v for n, v in record.items() if isinstance(v, int | str)} if isinstance(record, ConfigRecord) else {}


def error_line(error: Error) -> str:
    """Return why there is no answer, in one line: the last that a traceback has, or what a simulation wraps."""
    match = re.fullmatch(r"<class '[\w.]*?(\w+)'>:<'(.*)'>", error.reason or "", re.S)
    text = f"{match[1]}: {match[2]}" if match and "\n" not in match[2].strip() else error.reason or ""
    lines = [line.strip() for line in text.splitlines() if line.strip(" '>\"\t")]
    return lines[-1] if lines else f"Flower's error {error.code}"


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
        self.queries = dict[str, int]()
        self.met, self.failed = set[int](), dict[int, float]()
        self.lines = set[str]()
        self.complete = False

    def find(self, clients: Collection[int], seconds: float, enough: int) -> Mapping[int, int]:
        """Return the nodes of the clients that are connected."""
        began = time.monotonic()
        self._forget_failed(before=began)
        while True:
            self._forget_failed(before=time.monotonic() - AGAIN)
            self._meet()
            nodes = {client: node for node, client in self.clients.items()}
            present = {client: nodes[client] for client in clients if client in nodes}
            waited, patience = time.monotonic() - began, 0.0 if self.complete else MEETING
            if len(present) == len(clients) or waited > seconds or (len(present) >= enough and waited >= patience):
                self.complete = self.complete or len(present) >= enough
                return present
            self._say(f"waiting for the SuperNodes of clients {', '.join(map(str, sorted({*clients} - {*present})))}")
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
        content: Any = to_content({}, self.about)
        for new in sorted(here - self.met):
            query = Message(content, new, MessageType.QUERY, ttl=MEETING)
            self.queries |= {id_: new for id_ in self.grid.push_messages([query]) if id_}
        self.met = here
        while self.queries and (replies := [*self.grid.pull_messages([*self.queries])]):
            for reply in replies:
                node = self.queries.pop(reply.metadata.reply_to_message_id, None)
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
        if line not in self.lines:
            self.lines.add(line)
            print(f"fedsieve: {line}", file=sys.stderr, flush=True)  # noqa: T201


def grid_engine(grid: Grid, nodes: Nodes, quorum: Quorum, at_once: int = 0, pause: float = 0.05) -> Engine:
    """Carry messages over ``grid`` to ``nodes``, at most ``at_once`` under way (0: all), looking every ``pause`` s."""

    @contextmanager
    def engine(federation: Federation, memory: Memory) -> Iterator[Exchange]:
        def exchange(t: int, messages: Mapping[int, bytes]) -> Iterable[tuple[int, bytes | Failure]]:
            answers, needed = _Answers(messages), quorum.needed(len(messages))
            client_memory = memory if isinstance(nodes, SimulatedNodes) else None
            for _ in range(quorum.attempts):
                missing = [*answers.missing]
                wanting = needed - len(messages) + len(missing)
                places = nodes.find(missing, quorum.round_timeout, wanting)
                answers.lost |= dict.fromkeys(missing, Failure("its SuperNode is not connected"))
                if len(places) < wanting:  # who is there would train for nothing
                    continue
                deadline = time.monotonic() + quorum.round_timeout
                attempt = _Attempt(grid, t, places, messages, nodes.about, client_memory, deadline)
                for client, answer in attempt.answers(at_once, pause):
                    answers.put(client, answer)
                    yield from answers.ready()
                if len(messages) - len(answers.missing) >= needed:
                    break
            else:
                raise QuorumMissed(_too_few(t, len(messages), answers.lost, quorum))
            yield from answers.remaining()

        yield exchange

    return engine


def _too_few(t: int, clients: int, lost: Mapping[int, Failure], quorum: Quorum) -> str:
    first = min(lost)
    return (
        f"round {t}: {clients - len(lost)} of {clients} clients answered in {quorum.attempts} attempts, "
        f"{quorum.needed(clients)} are needed (client {first}: {lost[first].reason}): the model is as it was; mend the "
        "clients and go on with --resume, or lower min-clients"
    )


class _Answers:
    """A round's answers: given on in the clients' order, each as soon as it is its turn, and then held no longer."""

    def __init__(self, clients: Iterable[int]):
        self.due = deque(clients)
        self.missing = dict.fromkeys(self.due)
        self.early, self.lost = dict[int, bytes](), dict[int, Failure]()

    def put(self, client: int, answer: bytes | Failure) -> None:
        """Take an answer, or why there is none."""
        if isinstance(answer, Failure):
            self.lost[client] = answer
            return
        del self.missing[client]
        self.lost.pop(client, None)
        self.early[client] = answer

    def ready(self) -> Iterator[tuple[int, bytes]]:
        """Give on the answers before which all others have come."""
        while self.due and self.due[0] in self.early:
            yield (client := self.due.popleft()), self.early.pop(client)

    def remaining(self) -> Iterator[tuple[int, bytes | Failure]]:
        """Give on what there is; nobody waits for the others any more."""
        for client in self.due:
            yield client, self.early.pop(client) if client in self.early else self.lost[client]


@dataclass
class _Attempt:
    """One attempt at a round: messages under way, by the id that a reply names."""

    grid: Grid
    t: int
    nodes: Mapping[int, int]
    payloads: Mapping[int, bytes]
    about: Mapping[str, str]
    memory: Memory | None
    deadline: float
    pending: dict[str, int] = field(default_factory=dict)

    def answers(self, at_once: int, pause: float) -> Iterator[tuple[int, bytes | Failure]]:
        """Yield every client's answer as it comes, or why there is none."""
        todo = deque(self.nodes)
        while todo or self.pending:
            while todo and not (at_once and len(self.pending) >= at_once):
                if failure := self._send(client := todo.popleft()):
                    yield client, failure
            over = time.monotonic() > self.deadline  # what came until then is pulled yet
            replies = [*self.grid.pull_messages([*self.pending])] if self.pending else []
            for reply in replies:
                if (client := self.pending.pop(reply.metadata.reply_to_message_id, -1)) >= 0:
                    yield client, self._payload(client, reply)
            if over:
                late = Failure("no answer within the round's time: raise round-timeout if it was at work")
                yield from ((client, late) for client in [*todo, *self.pending.values()])
                return
            if self.pending and not replies:
                time.sleep(pause)

    def _send(self, client: int) -> Failure | None:
        parts = {"message": self.payloads[client]}
        if self.memory is not None:
            parts["memory"] = self.memory.get(client, b"")
        content = to_content(parts, {**self.about, "round": self.t, "client": client})
        left = max(self.deadline - time.monotonic(), 1.0)
        message = Message(content, self.nodes[client], MessageType.TRAIN, group_id=str(self.t), ttl=left)
        ids = [*self.grid.push_messages([message])]
        if not ids or not ids[0]:
            return Failure("Flower did not take the message to it")
        self.pending[ids[0]] = client
        return None

    def _payload(self, client: int, reply: Message) -> bytes | Failure:
        if reply.has_error():
            return Failure(error_line(reply.error))
        payload = get_bytes(reply.content, "message")
        if payload is None:
            return Failure("its answer has no payload")
        memory = get_bytes(reply.content, "memory")
        if self.memory is not None and memory:
            self.memory[client] = memory
        return payload
