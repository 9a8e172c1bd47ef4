"""The mod: opens what the server sends, and packs what the client answers."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from logging import getLogger
from typing import ClassVar

from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, RecordDict
from flwr.clientapp.mod import LocalDpMod, adaptiveclipping_mod, fixedclipping_mod
from torch import Tensor

from fedsieve.flower.mod.compression import Compression, Criterion, Values
from fedsieve.flower.mod.records import (
    NOTHING,
    Base,
    Broadcast,
    map_arrays,
    pack_record,
    to_record,
    to_tensors,
    unpack_record,
)
from fedsieve.flower.private import ErrorCode
from fedsieve.types import InputError
from fedsieve.wire import WireError

SECURE = "secaggplus_configs"
"""The record by which SecAgg+ talks to its mod."""
CLIPPING = "clipping_norm"
"""The entry by which a strategy asks for fixedclipping_mod or adaptiveclipping_mod."""
READERS = {
    fixedclipping_mod.__code__: "fixedclipping_mod",
    adaptiveclipping_mod.__code__: "adaptiveclipping_mod",
    LocalDpMod.__call__.__code__: "LocalDpMod",
}
"""Mods that compute with arrays, which outside SparseMod are packed."""

log = getLogger("flwr")


class SparseMod:
    """The first of a ClientApp's mods: ``ClientApp(mods=[SparseMod()])``; its server's grid is a ``SparseGrid``.

    By itself it is exact: the server gets every answer to the bit. Answers to ``train`` may be cut and rounded:

    ``top``: the share of each weight tensor (floating, two dimensions or more) that is sent, its largest magnitudes.
    ``of``: magnitudes of what; ``update``: of the change since the broadcast, and where nothing is sent the server
    takes the broadcast's value; ``weights``: of the weights, and where nothing is sent it takes 0.
    ``values``: the numbers sent as bf16, int8 or int4: changes, or with ``of="weights"`` the weights themselves.
    ``feedback``: what an update's cut and rounding left out is kept in the client's ``Context.state``, and added to
    its next update.

    A message that cannot be opened is answered with an error, which the log names too.
    """

    _last: ClassVar[tuple[dict[str, bytes], Broadcast, dict[str, ArrayRecord]]] = ({}, Broadcast(), {})
    """The broadcast that this process opened last: a simulation sends it to many nodes, and loads the app for each."""

    def __init__(
        self, top: float | None = None, of: Criterion = "update", values: Values = "f32", feedback: bool = False
    ):
        self.compression = Compression(top, of, values, feedback)

    def __call__(self, message: Message, context: Context, call_next: Callable[[Message, Context], Message]) -> Message:
        """Open a message, call what is inside, and pack the answer."""
        try:
            check_secure(message.content)
            self._check_order(message)
            broadcast, opened = self._opened(message)
        except (InputError, WireError) as error:
            return refusal(message, f"SparseMod: {error}")
        reply = call_next(opened, context)
        if not reply.has_error():
            trained = message.metadata.message_type.partition(".")[0] == "train"
            compression = self.compression if trained else Compression()
            reply.content = map_arrays(
                reply.content, lambda n, record: _answer(n, record, broadcast, compression, context)
            )
        return reply

    def _opened(self, message: Message) -> tuple[Broadcast, Message]:
        """Return what was broadcast, and the message that the app is to see: clients of a process open it once."""
        found = {name: v for name, v in message.content.items() if isinstance(v, ArrayRecord)}
        told = {f"{name}/{key}": array.data for name, record in found.items() for key, array in record.items()}
        if told != SparseMod._last[0]:
            arrays = {name: unpack_record(record, NOTHING) for name, record in found.items()}
            bases = {name: Base.of(own) for name, own in arrays.items()}
            SparseMod._last = told, Broadcast(bases), {name: to_record(own) for name, own in arrays.items()}
        _, broadcast, records = SparseMod._last
        opened = copy.copy(message)
        opened.content = map_arrays(message.content, lambda n, _: ArrayRecord(dict(records[n].items())))
        return broadcast, opened

    def _check_order(self, message: Message) -> None:
        """Raise InputError where another mod and this one would spoil each other."""
        if reader := _outside():
            raise InputError(f"{reader} stands before it and would compute with packed arrays: put SparseMod first")
        clipped = any(CLIPPING in r for r in message.content.values() if isinstance(r, ConfigRecord))
        longer = self.compression.of == "weights" or self.compression.feedback or self.compression.values != "f32"
        if clipped and longer:
            raise InputError(
                "the strategy clips on the clients, and of='weights', feedback and rounded values come after the clip "
                "and may make an update longer than it: use top of the update alone, or clip on the server"
            )


def check_secure(content: RecordDict) -> None:
    """Raise InputError for SecAgg+, whose masked numbers nothing packs, and whose sums need vectors of one length."""
    if SECURE in content:
        raise InputError(
            "SecAgg+ adds masked vectors of one length, but here each client chooses its own positions, and masked "
            "numbers cannot be packed: leave SparseMod and SparseGrid out, or share one frozen mask "
            "(docs/how-to/flower.md)"
        )


def refusal(message: Message, reason: str) -> Message:
    """Return the answer that says why a message could not be taken, and log it."""
    log.error("%s", reason)
    return Message(Error(ErrorCode.MOD_FAILED_PRECONDITION, reason), reply_to=message)


def _answer(
    name: str, record: ArrayRecord, broadcast: Broadcast, compression: Compression, context: Context
) -> ArrayRecord:
    """Return an answer's record as it travels, and keep what was left out of it."""
    base, state = broadcast.base(name), f"fedsieve {name}"
    kept = context.state[state] if compression.feedback and state in context.state else ArrayRecord()
    left = {n: v for n, v in to_tensors(kept).items() if isinstance(v, Tensor)} if isinstance(kept, ArrayRecord) else {}
    sent, means, left = compression.compress(to_tensors(record), base, left)
    if compression.feedback:
        context.state[state] = to_record(left)
    return pack_record(sent, base, means, compression.values)[0]


def _outside() -> str | None:
    """Return the name of a mod that is running around this one and computes with arrays."""
    frame = sys._getframe()
    while frame.f_back:
        frame = frame.f_back
        if name := READERS.get(frame.f_code):
            return name
    return None
