"""The grid: packs what a strategy sends, opens what clients answer, each by itself, and lets through what is sound."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Hashable, Iterable
from logging import getLogger
from typing import Any, TypeAlias

import numpy as np
from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.serverapp import Grid
from torch import Tensor

from fedsieve.flower.mod.client import Values, check_secure, check_values, refusal
from fedsieve.flower.mod.records import (
    NOTHING,
    NUMPY,
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
from fedsieve.wire import WireError, finite

Form: TypeAlias = frozenset[tuple[str, frozenset[Hashable]]]
"""Of every record of arrays and metrics, the names with their shapes or lengths."""

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
        self._requests: dict[str, tuple[Message, Broadcast]] = {}

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Pack messages, and push them."""
        requests = self._pack(messages)
        ids = self.grid.push_messages([message for message, _ in requests])
        self._remember(requests)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Pull answers, and open them."""
        return self._open(self.grid.pull_messages(message_ids))

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Pack messages, send them, and open the answers, which must be alike."""
        requests = self._pack(messages)
        replies = self.grid.send_and_receive([message for message, _ in requests], timeout=timeout)
        self._remember(requests)
        answers = self._open(replies)
        messages_by_id = {message.metadata.message_id: message for message, _ in requests}
        for late in messages_by_id:
            self._requests.pop(late, None)
        bases = [base for _, broadcast in requests for base in broadcast.bases.values()]
        for place in outliers(answers, bases) if self.alike else ():
            message = messages_by_id.get(answers[place].metadata.reply_to_message_id)
            if message is not None:  # else the answer is of an earlier exchange
                answers[place] = _refused(message, "its records are not of the form that most clients' have")
        return answers

    def _pack(self, messages: Iterable[Message]) -> list[tuple[Message, Broadcast]]:
        """Return messages as they travel, with what was broadcast: a record that many are sent is packed once."""
        once: dict[int, tuple[ArrayRecord, ArrayRecord, Base, int]] = {}
        requests = list[tuple[Message, Broadcast]]()
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
            requests.append((own, Broadcast(bases)))
        return requests

    def _broadcast(self, record: ArrayRecord) -> tuple[ArrayRecord, Base, int]:
        if is_packed(record):
            raise InputError("a broadcast that is packed already: SparseGrid stands twice around the grid")
        arrays = to_tensors(record)
        travels, size = pack_record(arrays, NOTHING, values=self.values)
        return travels, Base.of(arrays if self.values == "f32" else unpack_record(travels, NOTHING)), size

    def _remember(self, requests: list[tuple[Message, Broadcast]]) -> None:
        """Keep what answers are opened with, and forget what nobody can answer any more."""
        now = max((message.metadata.created_at for message, _ in requests), default=0.0)
        for name, (message, _) in [*self._requests.items()]:
            if message.metadata.created_at + message.metadata.ttl < now:
                del self._requests[name]
        self._requests |= {message.metadata.message_id: (message, broadcast) for message, broadcast in requests}

    def _open(self, replies: Iterable[Message]) -> list[Message]:
        answers = list[Message]()
        for reply in replies:
            request = self._requests.pop(reply.metadata.reply_to_message_id, None)
            if request is None:
                log.warning("SparseGrid: an answer from node %s to no message", reply.metadata.src_node_id)
            else:
                answers.append(reply if reply.has_error() else self._answer(reply, *request))
        return answers

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

        def unpack(name: str, record: ArrayRecord) -> ArrayRecord:
            nonlocal left
            arrays = self._arrays(record, broadcast.base(name))
            left -= sum(v.nbytes if isinstance(v, Tensor) else len(v.data) for v in arrays.values())
            if left < 0:
                raise WireError(f"its records unfold to more than {budget} bytes in all")
            return to_record(arrays)

        return map_arrays(answer, unpack)

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


def check_array(name: str, value: TensorOrArray, base: Base) -> None:
    """Raise WireError for an array that a strategy could not compute with."""
    like = base.arrays.get(name)
    if isinstance(value, Array):
        if not isinstance(like, Array) or _head(value, like) != _head(like, like):
            raise WireError(f"{name!r} travels as it is, but the broadcast had no array like it")
    elif not finite(value) and (not isinstance(like, Tensor) or finite(like)):
        raise WireError(f"{name!r} is not finite")


def _head(array: Array, like: Array) -> tuple[Hashable, ...]:
    """Return what tells an array's form: its type, shape and size, and what stands before NumPy's numbers."""
    size = math.prod(like.shape) * np.dtype(like.dtype).itemsize if like.stype == NUMPY else 0
    before = array.data[: len(like.data) - size] if like.stype == NUMPY else b""
    return array.dtype, tuple(array.shape), array.stype, len(array.data), before


def check_metrics(content: RecordDict) -> None:
    """Raise WireError for a metric that is not finite: one of them may be the weight in a mean."""
    for record in content.metric_records.values():
        for name, value in record.items():
            if not all(math.isfinite(number) for number in (value if isinstance(value, list) else [value])):
                raise WireError(f"its metric {name!r} is not finite")


def outliers(replies: Iterable[Message], bases: Iterable[Base]) -> set[int]:
    """Return the places of answers of another form than most; of two as frequent, the broadcast's counts as usual."""
    forms = {place: _form(reply.content) for place, reply in enumerate(replies) if not reply.has_error()}
    if len({*forms.values()}) < 2:
        return set()
    count, likest = Counter(forms.values()), {_shapes(to_record(base.arrays)) for base in bases}
    usual = max(count, key=lambda form: (count[form], any(shapes in likest for _, shapes in form)))
    return {place for place, form in forms.items() if form != usual}


def _form(content: RecordDict) -> Form:
    arrays = {(n, _shapes(r)) for n, r in content.array_records.items()}
    lengths = {
        (n, frozenset((k, len(v) if isinstance(v, list) else None) for k, v in r.items()))
        for n, r in content.metric_records.items()
    }
    return frozenset(arrays | lengths)


def _shapes(record: ArrayRecord) -> frozenset[Hashable]:
    """Return the names of a record's arrays with their shapes; None for raw bytes, which may be of any length."""
    return frozenset(
        (name, None if array.dtype == "uint8" and len(array.shape) == 1 else tuple(array.shape))
        for name, array in record.items()
    )
