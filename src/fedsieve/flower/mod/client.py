"""The mod: opens what the server sends, and packs what the client answers: all, or the top of each weight tensor.

Seide et al. 2014, "1-bit stochastic gradient descent" (error feedback); Stich et al. 2018, "Sparsified SGD with
Memory", Algorithm 1 (top-k with it).
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from logging import getLogger
from typing import ClassVar, Literal, TypeAlias, get_args

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, RecordDict
from flwr.clientapp.mod import LocalDpMod, adaptiveclipping_mod, fixedclipping_mod
from torch import Tensor

from fedsieve.engine.cache import CacheEntry, CacheMiss
from fedsieve.flower.mod.frozen import FROZEN, KeptArrays, arrays_of, lost, make_entry, unmoved
from fedsieve.flower.mod.records import (
    ADDED,
    ITSELF,
    KEY,
    MOVED,
    NOTHING,
    Base,
    Broadcast,
    TensorOrArray,
    is_packed,
    map_arrays,
    pack_record,
    to_record,
    to_tensors,
    unpack_record,
)
from fedsieve.flower.private import ErrorCode
from fedsieve.sparse.masks import top
from fedsieve.types import InputError, Sparse
from fedsieve.types.errors import check_interval
from fedsieve.wire import WireError, base_of, finite, rounded

Criterion: TypeAlias = Literal["update", "weights"]
Values: TypeAlias = Literal["f32", "bf16", "int8", "int4"]

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


@dataclass(frozen=True)
class Compression:
    """How a client's arrays are cut and rounded: see ``SparseMod``."""

    top: float | None = None
    of: Criterion = "update"
    values: Values = "f32"
    feedback: bool = False

    def __post_init__(self) -> None:
        if self.top is not None:
            check_interval("top", self.top, "(0, 1]")
        if self.of not in get_args(Criterion):
            raise InputError(f"of must be update or weights, got {self.of!r}")
        check_values(self.values)
        if self.of == "weights" and self.top is None:
            raise InputError("of='weights' says what top cuts: give top as well, the share that stays")
        if self.feedback and (self.exact or self.of == "weights"):
            raise InputError("feedback sends later what a cut update or a rounded value left out: set top or values")

    @property
    def exact(self) -> bool:
        """Whether everything is sent, to the bit."""
        return self.top is None and self.values == "f32"

    def compress(
        self, now: Mapping[str, TensorOrArray], base: Base, memory: Mapping[str, Tensor]
    ) -> tuple[dict[str, TensorOrArray | Sparse], int, dict[str, Tensor]]:
        """Return what to send of a record's arrays, what that stands for, and the residuals for the next time."""
        if self.exact:
            return {**now}, ITSELF, {}
        if self.of == "weights":
            return {name: self._cut(v) for name, v in now.items()}, ITSELF, {}
        payload, residuals = dict[str, TensorOrArray | Sparse](), dict[str, Tensor]()
        for name, value in now.items():
            like = base.like(name, value) if isinstance(value, Tensor) else None
            if like is None or not isinstance(value, Tensor):
                payload[name] = value
                continue
            change = value - like
            if (before := memory.get(name)) is not None and before.shape == value.shape:
                change += before
                value = like + change
            support = self._support(change)
            numbers = value if self.values == "f32" else change
            payload[name] = numbers if support is None else Sparse.of(numbers, support)
            if self.feedback and value.dim() > 1:
                residual = change - self._server_view(change, value - like, support)
                residuals |= {name: residual} if finite(residual) else {}
        return payload, MOVED if self.values == "f32" else ADDED, residuals

    def _cut(self, value: TensorOrArray) -> TensorOrArray | Sparse:
        """Return a weight tensor's top values; any other array as it is."""
        if isinstance(value, Tensor) and value.dim() > 1 and value.is_floating_point():
            return Sparse.of(value, top(value, self.top or 1.0))
        return value

    def _support(self, change: Tensor) -> Tensor | None:
        """Return where a tensor's change is sent; None: everywhere."""
        if self.top is None or change.dim() < 2:
            return None
        support = top(change, self.top)
        return None if bool(support.all()) else support

    def _server_view(self, change: Tensor, exact: Tensor, support: Tensor | None) -> Tensor:
        """Return what the server sees of a weight tensor's change; ``exact`` is what it sees of values sent whole."""
        if self.values == "f32":
            return exact if support is None else exact * support
        if support is None:
            return rounded(change, self.values)
        view = torch.zeros_like(change)
        view[support] = rounded(change[support], self.values)
        return view


@dataclass(frozen=True)
class _Opened:
    """A message that was opened: its bytes, what was broadcast, the records for the app, and what is to be kept."""

    data: Mapping[str, bytes] = field(default_factory=dict)
    broadcast: Broadcast = field(default_factory=Broadcast)
    contents: Mapping[str, ArrayRecord] = field(default_factory=dict)
    entries: Mapping[str, CacheEntry] = field(default_factory=dict)


class SparseMod:
    """The first of a ClientApp's mods: ``ClientApp(mods=[SparseMod()])``; its server's grid is a ``SparseGrid``.

    By itself it is exact: the server gets every answer to the bit. Answers to ``train`` may be cut and rounded:

    ``top``: the share of each weight tensor (floating, two dimensions or more) that is sent, its largest magnitudes.
    ``of``: magnitudes of what; ``update``: of the change since the broadcast, and where nothing is sent the server
    takes the broadcast's value; ``weights``: of the weights, and where nothing is sent it takes 0.
    ``values``: the numbers sent as bf16, int8 or int4: changes, or with ``of="weights"`` the weights themselves.
    ``feedback``: what an update's cut and rounding left out is kept in the client's ``Context.state``, and added to
    its next update.

    What the app returns as it came (float32 arrays) the client keeps, in its ``Context.state``; it is not sent again.

    A message that cannot be opened is answered with an error, which the log names too.
    """

    _kept: ClassVar[KeptArrays] = KeptArrays()
    _last: ClassVar[_Opened] = _Opened()
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
            opened, plain = self._open(message, context)
        except CacheMiss:
            return Message(lost(), reply_to=message)
        except (InputError, WireError) as error:
            return refusal(message, f"SparseMod: {error}")
        reply = call_next(plain, context)
        if not reply.has_error():
            training = message.metadata.message_type.partition(".")[0] == "train"
            reply.content = map_arrays(
                reply.content, lambda n, record: self._answer(n, record, opened, training, context)
            )
        return reply

    def _open(self, message: Message, context: Context) -> tuple[_Opened, Message]:
        """Return a message opened, and the one that the app is to see: clients of a process open it once."""
        records = message.content.array_records
        data = {f"{name}/{key}": array.data for name, record in records.items() for key, array in record.items()}
        if data != SparseMod._last.data:
            both = {name: self._unpack(name, record, context) for name, record in records.items()}
            bases = {name: Base.of(own) for name, (own, _) in both.items()}
            entries = {name: entry for name, (_, entry) in both.items() if entry}
            contents = {name: to_record(own) for name, (own, _) in both.items()}
            SparseMod._last = _Opened(data, Broadcast(bases), contents, entries)
        opened, plain = SparseMod._last, copy.copy(message)
        for name, entry in opened.entries.items():
            self._kept.keep(name, entry, context)
        plain.content = map_arrays(message.content, lambda n, _: ArrayRecord(dict(opened.contents[n].items())))
        return opened, plain

    def _unpack(
        self, name: str, record: ArrayRecord, context: Context
    ) -> tuple[dict[str, TensorOrArray], CacheEntry | None]:
        """Return the arrays of a broadcast's record, and what of them is to be kept. Raises WireError."""
        base, kept = NOTHING, dict[str, Tensor]()
        if digest := base_of(record[KEY].data) if is_packed(record) else b"":
            entry = self._kept.find(name, digest, context)
            base, kept = Base(known=entry.known(FROZEN)), dict(arrays_of(entry))
        arrays, frozen = unpack_record(record, base, kept)
        return arrays, make_entry(arrays, frozen) if frozen else None

    def _answer(self, name: str, record: ArrayRecord, opened: _Opened, training: bool, context: Context) -> ArrayRecord:
        """Return an answer's record as it travels, and keep what was left out of it, and what has not moved.

        Where the server does not know yet what is frozen, the first answer to training says it.
        """
        compression = self.compression if training else Compression()
        base, state, arrays = opened.broadcast.base(name), f"fedsieve {name}", to_tensors(record)
        asked = training and name in opened.broadcast.bases and name not in opened.entries
        frozen = unmoved(arrays, base.arrays) if asked else frozenset()
        if frozen:
            self._kept.keep(name, make_entry(base.arrays, frozen), context)
        record_before = context.state.get(state) if compression.feedback else None
        memory = to_tensors(record_before) if isinstance(record_before, ArrayRecord) else {}
        residuals = {name: v for name, v in memory.items() if isinstance(v, Tensor)}
        payload, means, residuals = compression.compress(arrays, base, residuals)
        if compression.feedback:
            context.state[state] = to_record(residuals)
        return pack_record(payload, base, means, compression.values, frozen)[0]

    def _check_order(self, message: Message) -> None:
        """Raise InputError where another mod and this one would spoil each other."""
        if reader := _outside():
            raise InputError(f"{reader} stands before it and would compute with packed arrays: put SparseMod first")
        clips = any(CLIPPING in r for r in message.content.values() if isinstance(r, ConfigRecord))
        longer = self.compression.of == "weights" or self.compression.feedback or self.compression.values != "f32"
        if clips and longer:
            raise InputError(
                "the strategy clips on the clients, and of='weights', feedback and rounded values come after the clip "
                "and may make an update longer than it: use top of the update alone, or clip on the server"
            )


def check_values(values: str) -> None:
    """Raise InputError unless values can be rounded so."""
    if values not in get_args(Values):
        raise InputError(f"values must be f32, bf16, int8 or int4, got {values!r}")


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


def _outside() -> str | None:
    """Return the name of a mod that is running around this one and computes with arrays."""
    frame = sys._getframe()
    while frame.f_back:
        frame = frame.f_back
        if name := READERS.get(frame.f_code):
            return name
    return None
