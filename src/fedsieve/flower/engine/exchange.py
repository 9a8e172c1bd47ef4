"""Messages through a Flower grid and back: quorum, timeouts, and who was lost and why."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from flwr.app import Message, MessageType
from flwr.serverapp import Grid

from fedsieve.engine.engines import Engine, Exchange, Quorum, QuorumMissed
from fedsieve.engine.federation import Federation
from fedsieve.engine.rollback import Memory
from fedsieve.engine.round import Failure
from fedsieve.flower.engine.messages import error_line, get_bytes, to_content
from fedsieve.flower.engine.nodes import Nodes, SimulatedNodes


def grid_engine(grid: Grid, nodes: Nodes, quorum: Quorum, at_once: int = 0, pause: float = 0.05) -> Engine:
    """Carry letters over ``grid`` to ``nodes``, at most ``at_once`` under way (0: all), looking every ``pause`` s."""

    @contextmanager
    def engine(federation: Federation, memory: Memory) -> Iterator[Exchange]:
        def exchange(t: int, messages: Mapping[int, bytes]) -> Iterable[tuple[int, bytes | Failure]]:
            answers, needed = _Answers(messages), quorum.needed(len(messages))
            for _ in range(quorum.attempts):
                missing = [*answers.missing]
                wanting = needed - len(messages) + len(missing)
                found = nodes.find(missing, quorum.round_timeout, wanting)
                answers.lose(missing, "its SuperNode is not connected")
                if len(found) < wanting:  # who is there would train for nothing
                    continue
                deadline = time.monotonic() + quorum.round_timeout
                asked = _Attempt(grid, t, found, messages, nodes.about, _memory(nodes, memory), deadline)
                for client, answer in asked.answers(at_once, pause):
                    answers.put(client, answer)
                    yield from answers.ready()
                if len(messages) - len(answers.missing) >= needed:
                    break
            else:
                raise QuorumMissed(_too_few(t, len(messages), answers.lost, quorum))
            yield from answers.remaining()

        yield exchange

    return engine


def _memory(nodes: Nodes, memory: Memory) -> Memory | None:
    return memory if isinstance(nodes, SimulatedNodes) else None


def _too_few(t: int, asked: int, lost: Mapping[int, Failure], quorum: Quorum) -> str:
    first = min(lost)
    return (
        f"round {t}: {asked - len(lost)} of {asked} clients answered in {quorum.attempts} attempts, "
        f"{quorum.needed(asked)} are needed (client {first}: {lost[first].reason}): the model is as it was; mend the "
        "clients and go on with --resume, or lower min-clients"
    )


class _Answers:
    """A round's answers: given on in the clients' order, each as soon as it is its turn, and then held no longer."""

    def __init__(self, clients: Iterable[int]):
        self.due = deque(clients)
        self.missing = dict.fromkeys(self.due)
        self.early, self.lost = dict[int, bytes](), dict[int, Failure]()

    def lose(self, clients: Iterable[int], reason: str) -> None:
        """Note that clients have not answered, as far as is known."""
        self.lost |= dict.fromkeys(clients, Failure(reason))

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


class _Attempt:
    """One attempt at a round: messages under way, by the id that a reply names."""

    def __init__(
        self,
        grid: Grid,
        t: int,
        found: Mapping[int, int],
        payloads: Mapping[int, bytes],
        about: Mapping[str, str],
        memory: Memory | None,
        deadline: float,
    ):
        self.grid, self.t, self.found, self.payloads, self.deadline = grid, t, found, payloads, deadline
        self.about, self.memory = about, memory
        self.pending = dict[str, int]()

    def answers(self, at_once: int, pause: float) -> Iterator[tuple[int, bytes | Failure]]:
        """Yield every client's answer as it comes, or why there is none."""
        todo = deque(self.found)
        while todo or self.pending:
            while todo and not (at_once and len(self.pending) >= at_once):
                if lost := self._send(client := todo.popleft()):
                    yield client, lost
            over = time.monotonic() > self.deadline  # what came until then is pulled yet
            replies = [*self.grid.pull_messages([*self.pending])] if self.pending else []
            for reply in replies:
                if (client := self.pending.pop(reply.metadata.reply_to_message_id, -1)) >= 0:
                    yield client, self._taken(client, reply)
            if over:
                late = Failure("no answer within the round's time: raise round-timeout if it was at work")
                yield from ((client, late) for client in [*todo, *self.pending.values()])
                return
            if self.pending and not replies:
                time.sleep(pause)

    def _send(self, client: int) -> Failure | None:
        parts = {"letter": self.payloads[client]}
        if self.memory is not None:
            parts["memory"] = self.memory.get(client, b"")
        content = to_content(parts, {**self.about, "round": self.t, "client": client})
        left = max(self.deadline - time.monotonic(), 1.0)
        message = Message(content, self.found[client], MessageType.TRAIN, group_id=str(self.t), ttl=left)
        ids = [*self.grid.push_messages([message])]
        if not ids or not ids[0]:
            return Failure("Flower did not take the message to it")
        self.pending[ids[0]] = client
        return None

    def _taken(self, client: int, reply: Message) -> bytes | Failure:
        if reply.has_error():
            return Failure(error_line(reply.error))
        payload = get_bytes(reply.content, "letter")
        if payload is None:
            return Failure("its answer holds no letter")
        memory = get_bytes(reply.content, "memory")
        if self.memory is not None and memory:
            self.memory[client] = memory
        return payload
