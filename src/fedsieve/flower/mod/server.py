"""The grid: packs what a strategy sends, and opens what clients answer, each by itself."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from logging import getLogger
from typing import Any

from flwr.app import ArrayRecord, Message, RecordDict
from flwr.serverapp import Grid
from torch import Tensor

from fedsieve.flower.mod.admission import check_array, check_metrics, outliers
from fedsieve.flower.mod.client import check_secure, refusal
from fedsieve.flower.mod.compression import Values, check_values
from fedsieve.flower.mod.records import (
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
from fedsieve.types import InputError
from fedsieve.wire import WireError

log = getLogger("flwr")


class SparseGrid(Grid):
    """A grid around another: ``strategy.start(grid=SparseGrid(grid), ...)``; its clients use ``SparseMod``.

    ``values``: broadcasts as bf16, int8 or int4 in place of exact; clients then train from, and answer to, the rounded
    model. An answer that is damaged, not finite, or (``alike``) of another form than most of its exchange's becomes
    the error of that client alone: strategies count it as a failure. ``bytes_down`` and ``bytes_up`` count payloads.
    """

    def __init__(self, grid: Grid, values: Values = "f32", alike: bool = True):
        if isinstance(grid, SparseGrid):
            raise InputError("SparseGrid around a SparseGrid: once is enough")
        check_values(values)
        self.grid, self.values, self.alike = grid, values, alike
        self.bytes_down = self.bytes_up = 0
        self._sent: dict[str, tuple[Message, Broadcast]] = {}

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Pack messages, and push them."""
        sent = self._packed(messages)
        ids = self.grid.push_messages([message for message, _ in sent])
        self._remember(sent)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Pull answers, and open them."""
        return self._opened(self.grid.pull_messages(message_ids))

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Pack messages, send them, and open the answers, which must be alike."""
        sent = self._packed(messages)
        replies = self.grid.send_and_receive([message for message, _ in sent], timeout=timeout)
        self._remember(sent)
        opened = self._opened(replies)
        asked = {message.metadata.message_id: (message, broadcast) for message, broadcast in sent}
        for late in asked:
            self._sent.pop(late, None)
        bases = [base for _, broadcast in asked.values() for base in broadcast.bases.values()]
        for place in outliers(opened, bases) if self.alike else ():
            if found := asked.get(opened[place].metadata.reply_to_message_id):  # else of an earlier exchange
                opened[place] = _refused(found[0], "its records are not of the form that most clients' have")
        return opened

    def _packed(self, messages: Iterable[Message]) -> list[tuple[Message, Broadcast]]:
        """Return messages as they travel, with what was broadcast: a record that many are sent is packed once."""
        once: dict[int, tuple[ArrayRecord, ArrayRecord, Base, int]] = {}
        sent = list[tuple[Message, Broadcast]]()
        for message in messages:
            check_secure(message.content)
            bases = dict[str, Base]()

            def pack(name: str, record: ArrayRecord, bases: dict[str, Base] = bases) -> ArrayRecord:
                if id(record) not in once:
                    once[id(record)] = record, *self._broadcast(record)
                _, travels, bases[name], size = once[id(record)]
                self.bytes_down += size
                return travels

            own = copy.copy(message)
            own.content = map_arrays(message.content, pack)
            sent.append((own, Broadcast(bases)))
        return sent

    def _broadcast(self, record: ArrayRecord) -> tuple[ArrayRecord, Base, int]:
        if is_packed(record):
            raise InputError("a broadcast that is packed already: SparseGrid stands twice around the grid")
        arrays = to_tensors(record)
        travels, size = pack_record(arrays, NOTHING, values=self.values)
        return travels, Base.of(arrays if self.values == "f32" else unpack_record(travels, NOTHING)), size

    def _remember(self, sent: list[tuple[Message, Broadcast]]) -> None:
        """Keep what answers are opened with, and forget what nobody can answer any more."""
        now = max((message.metadata.created_at for message, _ in sent), default=0.0)
        for name, (message, _) in [*self._sent.items()]:
            if message.metadata.created_at + message.metadata.ttl < now:
                del self._sent[name]
        self._sent |= {message.metadata.message_id: (message, broadcast) for message, broadcast in sent}

    def _opened(self, replies: Iterable[Message]) -> list[Message]:
        opened = list[Message]()
        for reply in replies:
            asked = self._sent.pop(reply.metadata.reply_to_message_id, None)
            if asked is None:
                log.warning("SparseGrid: an answer from node %s to no message", reply.metadata.src_node_id)
            else:
                opened.append(reply if reply.has_error() else self._answer(reply, *asked))
        return opened

    def _answer(self, reply: Message, message: Message, broadcast: Broadcast) -> Message:
        """Return an answer opened, or the error that takes its place."""
        try:
            reply.content = self._records(reply.content, broadcast)
            if message.metadata.message_type.partition(".")[0] == "train":
                check_metrics(reply.content)
        except WireError as error:
            return _refused(message, str(error))
        except Exception as error:  # whatever it takes to read it: one client's answer never ends a round
            return _refused(message, f"it cannot be read ({type(error).__name__}: {error})")
        return reply

    def _records(self, answer: RecordDict, broadcast: Broadcast) -> RecordDict:
        """Return an answer's records opened, one after another while all of them stay within one budget."""
        budget = broadcast.allowed(answer)
        left = budget

        def opened(name: str, record: ArrayRecord) -> ArrayRecord:
            nonlocal left
            arrays = self._arrays(record, broadcast.base(name))
            left -= sum(v.nbytes if isinstance(v, Tensor) else len(v.data) for v in arrays.values())
            if left < 0:
                raise WireError(f"its records unfold to more than {budget} bytes in all")
            return to_record(arrays)

        return map_arrays(answer, opened)

    def _arrays(self, record: ArrayRecord, base: Base) -> dict[str, TensorOrArray]:
        """Return the arrays of an answer's record, in the order of the broadcast's."""
        self.bytes_up += record_bytes(record)
        arrays = unpack_record(record, base)
        for name, value in arrays.items():
            check_array(name, value, base)
        return {name: arrays[name] for name in (base.arrays if base.arrays.keys() == arrays.keys() else arrays)}

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


def _refused(message: Message, reason: str) -> Message:
    node = message.metadata.dst_node_id
    return refusal(message, f"SparseGrid: the answer of node {node} is refused: {reason}")
