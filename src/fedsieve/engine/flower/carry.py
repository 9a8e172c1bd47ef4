"""Letters through a Flower grid and back: quorum, timeouts, and who was lost and why."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from flwr.app import Message, MessageType
from flwr.serverapp import Grid

from fedsieve.engine.flower.messages import packed, part_of, reason
from fedsieve.engine.flower.nodes import Anywhere, Nodes
from fedsieve.engine.loop import Engine, Exchange, Memory
from fedsieve.engine.patience import Patience
from fedsieve.engine.tally import Lost
from fedsieve.engine.task import Federation
from fedsieve.types import InputError


def carried(grid: Grid, nodes: Nodes, patience: Patience, at_once: int = 0, pause: float = 0.05) -> Engine:
    """Carry letters over ``grid`` to ``nodes``, at most ``at_once`` under way (0: all), looking every ``pause`` s."""

    @contextmanager
    def engine(federation: Federation, memory: Memory) -> Iterator[Exchange]:
        def exchange(t: int, messages: Mapping[int, bytes]) -> Iterable[tuple[int, bytes | Lost]]:
            answers, quorum = dict[int, bytes | Lost](), patience.quorum(len(messages))
            for _ in range(patience.attempts):
                lost = [client for client in messages if not isinstance(answers.get(client), bytes)]
                wanting = quorum - len(messages) + len(lost)
                found = nodes.find(lost, patience.round_timeout, wanting)
                answers |= {client: Lost("its SuperNode is not connected") for client in lost}
                if len(found) < wanting:  # who is there would train for nothing
                    continue
                deadline = time.monotonic() + patience.round_timeout
                asked = _Asked(grid, t, found, messages, nodes.about, _memory(nodes, memory), deadline)
                answers |= asked.answers(at_once, pause)
                if sum(isinstance(one, bytes) for one in answers.values()) >= quorum:
                    break
            else:
                raise InputError(_too_few(t, answers, quorum, patience))
            yield from ((client, answers[client]) for client in messages)

        yield exchange

    return engine


def _memory(nodes: Nodes, memory: Memory) -> Memory | None:
    return memory if isinstance(nodes, Anywhere) else None


def _too_few(t: int, answers: Mapping[int, bytes | Lost], quorum: int, patience: Patience) -> str:
    lost = {client: one.reason for client, one in answers.items() if isinstance(one, Lost)}
    first = min(lost)
    return (
        f"round {t}: {len(answers) - len(lost)} of {len(answers)} clients answered in {patience.attempts} attempts, "
        f"{quorum} are needed (client {first}: {lost[first]}): the model is as it was; mend the clients and go on with "
        "--resume, or lower min-clients"
    )


class _Asked:
    """One attempt at a round: messages under way, by the id that a reply names."""

    def __init__(
        self,
        grid: Grid,
        t: int,
        found: Mapping[int, int],
        letters: Mapping[int, bytes],
        about: Mapping[str, str],
        memory: Memory | None,
        deadline: float,
    ):
        self.grid, self.t, self.found, self.letters, self.deadline = grid, t, found, letters, deadline
        self.about, self.memory = about, memory
        self.under_way = dict[str, int]()

    def answers(self, at_once: int, pause: float) -> dict[int, bytes | Lost]:
        """Return every client's answer, or why there is none."""
        told, todo = dict[int, bytes | Lost](), [*self.found]
        while todo or self.under_way:
            while todo and not (at_once and len(self.under_way) >= at_once):
                client = todo.pop(0)
                told |= self._send(client)
            replies = [*self.grid.pull_messages([*self.under_way])] if self.under_way else []
            for reply in replies:
                if (client := self.under_way.pop(reply.metadata.reply_to_message_id, -1)) >= 0:
                    told[client] = self._taken(client, reply)
            if time.monotonic() > self.deadline:
                late = Lost("no answer within the round's time: raise round-timeout if it was at work")
                return told | dict.fromkeys([*todo, *self.under_way.values()], late)
            if self.under_way and not replies:
                time.sleep(pause)
        return told

    def _send(self, client: int) -> dict[int, bytes | Lost]:
        parts = {"letter": self.letters[client]}
        if self.memory is not None:
            parts["memory"] = self.memory.get(client, b"")
        content = packed(parts, {**self.about, "round": self.t, "client": client})
        left = max(self.deadline - time.monotonic(), 1.0)
        message = Message(content, self.found[client], MessageType.TRAIN, group_id=str(self.t), ttl=left)
        ids = [*self.grid.push_messages([message])]
        if not ids or not ids[0]:
            return {client: Lost("Flower did not take the message to it")}
        self.under_way[ids[0]] = client
        return {}

    def _taken(self, client: int, reply: Message) -> bytes | Lost:
        if reply.has_error():
            return Lost(reason(reply.error))
        letter = part_of(reply.content, "letter")
        if letter is None:
            return Lost("its answer holds no letter")
        kept = part_of(reply.content, "memory")
        if self.memory is not None and kept:
            self.memory[client] = kept
        return letter
