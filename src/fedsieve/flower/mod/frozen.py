"""Arrays that training leaves as they are: a node is sent them once, and later messages name them by their digest.

Nobody says which these are. An answer to ``train`` names the float32 arrays that the app returned as they came, and its
client keeps them; from then on the server says which are to be kept, and leaves them out for nodes that have them. One
that any training, or the strategy, has moved is no longer among them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, RecordDict
from torch import Tensor

from fedsieve.engine.cache import Cache, CacheEntry, CacheMiss, Parts, same
from fedsieve.flower.mod.records import KEY, NOTHING, STYPE, Base, TensorOrArray
from fedsieve.flower.private import in_simulation
from fedsieve.wire import WireError

FROZEN: Parts = True, False
"""The parts of an entry that a message leaves out: there are no masks."""
CLOSE = 1e-5
"""By how much of itself every number of a frozen array may be off in a later broadcast."""


def make_entry(arrays: Mapping[str, TensorOrArray], names: Collection[str]) -> CacheEntry:
    """Return what is kept of a record's arrays."""
    return CacheEntry.of({"arrays": arrays}, frozenset(names), NOTHING.known)  # type: ignore[dict-item]


def arrays_of(entry: CacheEntry) -> Mapping[str, Tensor]:
    """Return the arrays of an entry."""
    arrays: Mapping[str, Tensor] = entry.weights.get("arrays", {})  # type: ignore[assignment]
    return arrays


def unmoved(now: Mapping[str, TensorOrArray], base: Mapping[str, TensorOrArray]) -> frozenset[str]:
    """Return the names of the float32 arrays that are as they were."""
    return frozenset(
        name
        for name, value in now.items()
        if isinstance(value, Tensor)
        and value.dtype == torch.float32
        and isinstance(before := base.get(name), Tensor)
        and before.dtype == value.dtype
        and torch.equal(value, before)
    )


@dataclass
class _Record:
    """What is known of a record that is broadcast again and again."""

    entry: CacheEntry | None = None
    """What clients are to keep of it."""
    sources: dict[str, TensorOrArray] = field(default_factory=dict)
    """The arrays of the entry as they were before a broadcast rounded them."""
    moved: set[str] = field(default_factory=set)
    """The arrays that some training has moved."""


class FrozenArrays:
    """The server's side: what is known to be frozen, of every record, and what each node has of it."""

    def __init__(self) -> None:
        self._records = defaultdict[str, _Record](_Record)
        self._has: dict[tuple[int, str], CacheEntry] = {}

    def entry(self, name: str, base: Base) -> CacheEntry | None:
        """Return what is to be kept of a broadcast's record, all that still counts as frozen; None: nothing.

        A strategy's mean of equal numbers is off by roundings: what it has moved by less than CLOSE is as it was.
        """
        record = self._records[name]
        if record.entry:
            close = {n for n, v in arrays_of(record.entry).items() if _close(base.arrays.get(n), v)}
            self._move(record, arrays_of(record.entry).keys() - close)
        return record.entry

    def sources(self, name: str) -> Mapping[str, TensorOrArray]:
        """Return a record's frozen arrays as a broadcast first had them."""
        return self._records[name].sources

    def kept(self, node: int, name: str, entry: CacheEntry) -> CacheEntry | None:
        """Return what a node has kept of a record, if all that it is to keep is there."""
        wanted = arrays_of(entry)
        if (has := self._has.get((node, name))) is None or has is entry:
            return has
        there = {n: v for n, v in arrays_of(has).items() if n in wanted}
        return has if same(there, wanted) else None

    def note(self, node: int, name: str, entry: CacheEntry) -> None:
        """Note what a node has kept."""
        self._has[node, name] = entry

    def forget(self, node: int, name: str) -> None:
        """Note that a node has lost what it had."""
        self._has.pop((node, name), None)

    def trained(self, name: str, arrays: Mapping[str, TensorOrArray], base: Base) -> frozenset[str]:
        """Take from an answer to ``train`` what of the broadcast it has moved, and return what it has not."""
        same = unmoved(arrays, base.arrays)
        self._records[name].moved |= arrays.keys() - same
        self._move(self._records[name], arrays.keys() - same)
        return same

    def learn(
        self, node: int, name: str, arrays: Mapping[str, TensorOrArray], base: Base, kept: Collection[str]
    ) -> None:
        """Take from a node's first answer which of the ``arrays`` broadcast it has kept."""
        record = self._records[name]
        entry = make_entry(base.arrays, kept)
        self.note(node, name, entry.shared_with(record.entry) if record.entry else entry)
        old = arrays_of(record.entry) if record.entry else {}
        if more := {n: v for n, v in base.arrays.items() if n in kept and n not in old and n not in record.moved}:
            record.sources |= {n: arrays[n] for n in more}
            record.entry = make_entry({**old, **more}, {*old, *more})

    def _move(self, record: _Record, names: Collection[str]) -> None:
        """Count arrays no longer among the frozen ones."""
        record.moved |= {*names}
        record.sources = {n: v for n, v in record.sources.items() if n not in names}
        if record.entry and len(record.sources) < len(old := arrays_of(record.entry)):
            record.entry = make_entry(old, record.sources) if record.sources else None


def _close(now: TensorOrArray | None, before: Tensor) -> bool:
    """Tell whether an array is what it was, but for roundings."""
    if not isinstance(now, Tensor) or now.shape != before.shape or now.dtype != before.dtype:
        return False
    return torch.allclose(now, before, rtol=CLOSE, atol=0)


class KeptArrays:
    """A client's side: what this process has kept of the last records, and what the node's ``Context.state`` has."""

    def __init__(self) -> None:
        self._caches = defaultdict[str, Cache](Cache)

    def find(self, name: str, digest: bytes, context: Context) -> CacheEntry:
        """Return what a message with this digest in its head leaves out. Raises CacheMiss."""
        cache = self._caches[name]
        with suppress(CacheMiss):
            return cache.find(digest)[0]
        state = context.state.get(_state(name))
        if isinstance(state, ArrayRecord) and KEY in state:
            with suppress(WireError, KeyError):
                cache.put(CacheEntry.from_bytes(state[KEY].data, NOTHING.known))
        return cache.find(digest)[0]

    def keep(self, name: str, entry: CacheEntry, context: Context) -> CacheEntry:
        """Keep what a node is to have of a record, and return it; a simulation's nodes share what their process has."""
        entry = self._caches[name].put(entry)
        if not in_simulation():
            digest, state = entry.digests[0].hex(), context.state.get(_state(name))
            if not (isinstance(state, ArrayRecord) and digest in state):
                data = entry.to_bytes()
                mark = Array(dtype="uint8", shape=(0,), stype=STYPE, data=b"")
                kept = Array(dtype="uint8", shape=(len(data),), stype=STYPE, data=data)
                context.state[_state(name)] = ArrayRecord({KEY: kept, digest: mark})
        return entry


def _state(name: str) -> str:
    return f"fedsieve frozen {name}"


def lost() -> RecordDict:
    """Return the answer of a client that no longer has what a message leaves out."""
    return RecordDict({KEY: ConfigRecord({"lost": True})})


def is_lost(content: RecordDict) -> bool:
    """Tell whether an answer says that its client has lost what the message left out."""
    record = content.get(KEY)
    return len(content) == 1 and isinstance(record, ConfigRecord) and record.get("lost") is True
