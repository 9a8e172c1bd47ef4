"""The grid: packs what a strategy sends, opens what clients answer, each by itself, and lets through what is sound."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from logging import getLogger
from typing import Any, TypeAlias

from flwr.app import ArrayRecord, Message, RecordDict
from flwr.serverapp import Grid
from torch import Tensor

from fedsieve.engine.cache import CacheEntry
from fedsieve.flower.mod.checks import check_array, check_metrics, outliers
from fedsieve.flower.mod.client import Values, check_secure, check_values, refusal
from fedsieve.flower.mod.frozen import FROZEN, FrozenArrays, arrays_of, is_lost
from fedsieve.flower.mod.records import (
    KEPT,
    NOTHING,
    Base,
    Broadcast,
    TensorOrArray,
    is_packed,
    map_arrays,
    pack_record,
    record_bytes,
    to_record,
    to_tensors,
    unpack_record,
)
from fedsieve.flower.private import set_reply_to
from fedsieve.types import InputError, Sparse
from fedsieve.wire import WireError

OpenedRecord: TypeAlias = tuple[Mapping[str, TensorOrArray], frozenset[str]]
"""The arrays of an answer's record, and the names of those that the client says it has kept."""

log = getLogger("flwr")


@dataclass(eq=False)
class _Packed:
    """A record that is broadcast, packed once for all nodes that have the same of what is frozen of it, or nothing."""

    record: ArrayRecord
    arrays: Mapping[str, TensorOrArray]
    values: Values
    base: Base
    entry: CacheEntry | None
    """What is to be kept of it."""
    travels: dict[bytes, tuple[ArrayRecord, int]] = field(default_factory=dict)

    def message(self, kept: CacheEntry | None) -> tuple[ArrayRecord, int]:
        """Return the record that travels, without the frozen arrays to who has ``kept`` them, and its arrays' bytes."""
        if (digest := kept.digests[0] if kept else b"") not in self.travels:
            frozen = arrays_of(self.entry) if self.entry else {}
            arrays: dict[str, TensorOrArray | Sparse | float] = {**self.arrays}
            known, marks = NOTHING.known, {*frozen}
            if kept:
                known, marks, arrays = kept.known(FROZEN), {*()}, arrays | dict.fromkeys(frozen, KEPT)
            self.travels[digest] = pack_record(arrays, Base(known=known), values=self.values, frozen=marks)
        return self.travels[digest]


@dataclass(frozen=True, eq=False)
class _Request:
    """A message as the app sent it, its records, and the names of those that were sent without frozen arrays."""

    message: Message
    packed: Mapping[str, _Packed]
    rest: frozenset[str]

    @property
    def broadcast(self) -> Broadcast:
        """What was broadcast."""
        return Broadcast({name: one.base for name, one in self.packed.items()})

    @property
    def training(self) -> bool:
        """Whether it asks to train."""
        return self.message.metadata.message_type.partition(".")[0] == "train"


class SparseGrid(Grid):
    """A grid around another: ``strategy.start(grid=SparseGrid(grid), ...)``; its clients use ``SparseMod``.

    ``values``: broadcasts as bf16, int8 or int4 in place of exact; clients then train from, and answer to, the rounded
    model. An answer that is damaged, not finite, or (``alike``) of another form than most of its exchange's becomes
    the error of that client alone: strategies count it as a failure. ``bytes_down`` and ``bytes_up`` count payloads.

    float32 arrays that training leaves as they are (a frozen backbone) are sent to a node once, and again, at once,
    where it says that it has lost them.
    """

    def __init__(self, grid: Grid, values: Values = "f32", alike: bool = True):
        if isinstance(grid, SparseGrid):
            raise InputError("SparseGrid around a SparseGrid: once is enough")
        check_values(values)
        self.grid, self.values, self.alike = grid, values, alike
        self.bytes_down = self.bytes_up = 0
        self._requests: dict[str, _Request] = {}
        self._frozen = FrozenArrays()
        self._again: dict[str, str] = {}
        """Of messages to nodes that had lost what they left out, the message that took its place."""

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Pack messages, and push them."""
        return self._push(self._pack(messages))

    def _push(self, requests: list[tuple[Message, _Request]]) -> Iterable[str]:
        ids = self.grid.push_messages([message for message, _ in requests])
        self._remember(requests)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Pull answers, and open them."""
        first = {self._again.get(name, name): name for name in message_ids}
        replies = list[Message]()
        for reply in self.grid.pull_messages([*first]):
            if self._lost(reply):
                self._push(again := self._whole([reply]))
                self._again[first[reply.metadata.reply_to_message_id]] = again[0][0].metadata.message_id
            else:
                replies.append(reply)
        answers = self._open(replies)
        for answer in answers:
            own = answer.metadata.reply_to_message_id
            set_reply_to(answer, first.get(own, own))
            self._again.pop(first.get(own, own), None)
        return answers

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Pack messages, send them, and open the answers, which must be alike."""
        began, requests = time.monotonic(), self._pack(messages)
        replies = [*self.grid.send_and_receive([message for message, _ in requests], timeout=timeout)]
        self._remember(requests)
        if lost := [reply for reply in replies if self._lost(reply)]:
            replies, again = [reply for reply in replies if not self._lost(reply)], self._whole(lost)
            left = None if timeout is None else max(timeout - (time.monotonic() - began), 0.0)
            replies += self.grid.send_and_receive([message for message, _ in again], timeout=left)
            self._remember(again)
            requests += again
        answers = self._open(replies)
        messages_by_id = {message.metadata.message_id: message for message, _ in requests}
        for late in messages_by_id:
            self._requests.pop(late, None)
        bases = [base for _, request in requests for base in request.broadcast.bases.values()]
        for place in outliers(answers, bases) if self.alike else ():
            message = messages_by_id.get(answers[place].metadata.reply_to_message_id)
            if message is not None:  # else the answer is of an earlier exchange
                answers[place] = _refused(message, "its records are not of the form that most clients' have")
        return answers

    def _pack(self, messages: Iterable[Message]) -> list[tuple[Message, _Request]]:
        """Return messages as they travel, with what they are: a record that many are sent is packed once."""
        once: dict[tuple[str, int], _Packed] = {}
        requests = list[tuple[Message, _Request]]()
        for message in messages:
            check_secure(message.content)
            node, packed = message.metadata.dst_node_id, dict[str, _Packed]()
            for name, record in message.content.array_records.items():
                if (name, id(record)) not in once:
                    once[name, id(record)] = self._broadcast(name, record)
                packed[name] = once[name, id(record)]
            kept = {n: self._frozen.kept(node, n, one.entry) if one.entry else None for n, one in packed.items()}
            rest = frozenset(name for name, entry in kept.items() if entry)
            travels = {name: own.message(kept[name]) for name, own in packed.items()}
            self.bytes_down += sum(size for _, size in travels.values())
            own = copy.copy(message)
            own.content = map_arrays(message.content, partial(_of_name, travels))
            requests.append((own, _Request(message, packed, rest)))
        return requests

    def _broadcast(self, name: str, record: ArrayRecord) -> _Packed:
        if is_packed(record):
            raise InputError("a broadcast that is packed already: SparseGrid stands twice around the grid")
        arrays = to_tensors(record)
        seen = arrays
        if self.values != "f32":
            seen, _ = unpack_record(pack_record(arrays, NOTHING, values=self.values)[0], NOTHING)
        entry = self._frozen.entry(name, Base(seen))
        arrays |= self._frozen.sources(name)
        base = Base.of({**seen, **(arrays_of(entry) if entry else {})})
        return _Packed(record, arrays, self.values, base, entry)

    def _lost(self, reply: Message) -> bool:
        """Tell whether an answer says, of a message that left something out, that its client no longer has that."""
        request = self._requests.get(reply.metadata.reply_to_message_id)
        return bool(request and request.rest and not reply.has_error() and is_lost(reply.content))

    def _whole(self, replies: Iterable[Message]) -> list[tuple[Message, _Request]]:
        """Return the messages that these answers say to have lost the frozen arrays of, new and whole."""
        messages = list[Message]()
        for reply in replies:
            request = self._requests.pop(reply.metadata.reply_to_message_id)
            about = request.message.metadata
            for name in request.rest:
                self._frozen.forget(about.dst_node_id, name)
            log.info("SparseGrid: node %s has lost its frozen arrays, and is sent them again", about.dst_node_id)
            messages.append(
                Message(
                    request.message.content,
                    about.dst_node_id,
                    about.message_type,
                    ttl=about.ttl,
                    group_id=about.group_id,
                    dst_task_id=about.dst_task_id,
                )
            )
        return self._pack(messages)

    def _remember(self, requests: list[tuple[Message, _Request]]) -> None:
        """Keep what answers are opened with, and forget what nobody can answer any more."""
        now = max((message.metadata.created_at for message, _ in requests), default=0.0)
        for name, request in [*self._requests.items()]:
            if request.message.metadata.created_at + request.message.metadata.ttl < now:
                del self._requests[name]
        self._requests |= {message.metadata.message_id: request for message, request in requests}

    def _open(self, replies: Iterable[Message]) -> list[Message]:
        answers = list[Message]()
        for reply in replies:
            request = self._requests.pop(reply.metadata.reply_to_message_id, None)
            if request is None:
                log.warning("SparseGrid: an answer from node %s to no message", reply.metadata.src_node_id)
            else:
                answers.append(reply if reply.has_error() else self._answer(reply, request))
        return answers

    def _answer(self, reply: Message, request: _Request) -> Message:
        """Return an answer opened, or the error that takes its place."""
        message = request.message
        try:
            content, opened = self._records(reply.content, request)
            if request.training:
                check_metrics(content)
        except WireError as error:
            return _refused(message, str(error))
        except Exception as error:  # whatever it takes to read it: one client's answer never ends a round
            return _refused(message, f"it cannot be read ({type(error).__name__}: {error})")
        self._learn(request, opened)
        reply.content = content
        return reply

    def _learn(self, request: _Request, opened: Mapping[str, OpenedRecord]) -> None:
        """Note what a node has kept of a broadcast, by its answer's arrays, and by what it says itself."""
        node = request.message.metadata.dst_node_id
        for name, one in request.packed.items():
            if one.entry:
                self._frozen.note(node, name, one.entry)
            if request.training and name in opened:
                (arrays, kept), base = opened[name], one.base
                unmoved = self._frozen.trained(name, arrays, base)
                if kept and not one.entry and kept <= unmoved:
                    self._frozen.learn(node, name, one.arrays, base, kept)

    def _records(self, answer: RecordDict, request: _Request) -> tuple[RecordDict, dict[str, OpenedRecord]]:
        """Return an answer's records opened, one after another while all of them stay within one budget.

        Also their arrays by the records' names, with what the client says it keeps.
        """
        broadcast, opened = request.broadcast, dict[str, OpenedRecord]()
        budget = broadcast.allowed(answer)
        left = budget

        def unpack(name: str, record: ArrayRecord) -> ArrayRecord:
            nonlocal left
            base = broadcast.base(name)
            arrays, frozen = self._arrays(record, base)
            opened[name] = arrays, frozen
            left -= sum(v.nbytes if isinstance(v, Tensor) else len(v.data) for v in arrays.values())
            if left < 0:
                raise WireError(f"its records unfold to more than {budget} bytes in all")
            return to_record(arrays)

        return map_arrays(answer, unpack), opened

    def _arrays(self, record: ArrayRecord, base: Base) -> tuple[dict[str, TensorOrArray], frozenset[str]]:
        """Return the arrays of an answer's record, in the broadcast's order, and what the client says it has kept."""
        self.bytes_up += record_bytes(record)
        arrays, frozen = unpack_record(record, base)
        for name, value in arrays.items():
            check_array(name, value, base)
        names = base.arrays if base.arrays.keys() == arrays.keys() else arrays
        return {name: arrays[name] for name in names}, frozen

    def set_run(self, run: Any) -> None:
        """Set the run of the grid inside."""
        self.grid.set_run(run)

    @property
    def run(self) -> Any:
        """The run of the grid inside."""
        return self.grid.run

    def create_message(self, *args: Any, **more: Any) -> Message:
        """Return a new message, as the grid inside does."""
        return self.grid.create_message(*args, **more)

    def get_node_ids(self) -> Iterable[int]:
        """Return the nodes of the grid inside."""
        return self.grid.get_node_ids()

    def get_nodes(self) -> Iterable[Any]:
        """Return the nodes of the grid inside, with what it knows of them."""
        return self.grid.get_nodes()


def _of_name(travels: Mapping[str, tuple[ArrayRecord, int]], name: str, _: ArrayRecord) -> ArrayRecord:
    return travels[name][0]


def _refused(message: Message, reason: str) -> Message:
    node = message.metadata.dst_node_id
    return refusal(message, f"SparseGrid: the answer of node {node} is refused: {reason}")
