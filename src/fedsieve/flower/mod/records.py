"""What travels in place of an ArrayRecord: one Array that holds a FedSieve message, beside arrays that fit into none.

The message is a tree: ``means``, a number that says what its tensors stand for; ``arrays``, the tensors by name, in
order, where a number stands for an array that travels as it is (0) or that the receiver has kept (1); and, if any is to
be kept, ``frozen``, a boolean for each array.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any, TypeAlias

import numpy.typing as npt
import torch
from flwr.app import Array, ArrayRecord, RecordDict
from numpy.lib import format
from torch import Tensor

from fedsieve.types import Sparse
from fedsieve.wire import Known, Manifest, WireError, decode, encode
from fedsieve.wire.known import allowed

KEY, OTHER = "fedsieve", "+"
"""The name of the Array with the message, and what is put before the names of the others."""
STYPE = "fedsieve/2"
"""The serialization type of the Array with the message: Flower's own is numpy.ndarray."""
KEPT = 1.0
"""What stands for an array that the receiver has kept of an earlier message."""
ITSELF, MOVED, ADDED = range(3)
"""What tensors stand for: themselves, sparse ones 0 elsewhere; sparse ones the base elsewhere; changes of the base."""
THIN = 8
"""How many times what a message may unfold to its sparse tensors may be, once zeros stand between their values."""
NUMPY = "numpy.ndarray"
PACKED = ("float32", "float64", "float16", "int64", "int32", "uint8", "bool")

TensorOrArray: TypeAlias = Tensor | Array
"""An array as a tensor or, where a message cannot hold it, as it is."""


@dataclass(frozen=True)
class Base:
    """The arrays of a record that both sides hold, and what a message against them need not say."""

    arrays: Mapping[str, TensorOrArray] = field(default_factory=dict)
    known: Known = field(default_factory=lambda: Known(finite=False))

    @classmethod
    def of(cls, arrays: Mapping[str, TensorOrArray]) -> Base:
        """Return the base that a broadcast's record is to its answers."""
        tensors = {name: v for name, v in arrays.items() if isinstance(v, Tensor)}
        floats = {name: v for name, v in tensors.items() if v.dtype == torch.float32}
        return cls(arrays, Known(Manifest.of(tensors), floats, finite=False, unfolds=1))

    def like(self, name: str, value: Tensor | Sparse) -> Tensor | None:
        """Return the base's float32 tensor of that name, if ``value`` can be told as a change of it."""
        own, numbers = self.arrays.get(name), value.values if isinstance(value, Sparse) else value
        if isinstance(own, Tensor) and own.dtype == numbers.dtype == torch.float32 and own.shape == tuple(value.shape):
            return own
        return None


NOTHING = Base()
"""The base of a broadcast, and of an answer to a broadcast without arrays."""


@dataclass(frozen=True)
class Broadcast:
    """The records of arrays that a client was sent, each the base of the record of that name in its answer."""

    bases: Mapping[str, Base] = field(default_factory=dict)

    def base(self, name: str) -> Base:
        """Return the base of an answer's record: its namesake, or the only one."""
        only = next(iter(self.bases.values())) if len(self.bases) == 1 else NOTHING
        return self.bases.get(name, only)

    def allowed(self, answer: RecordDict) -> int:
        """Return how many bytes the arrays of a whole answer may unfold to: a base justifies its copies once."""
        sizes = Counter[str]()
        for name, record in answer.array_records.items():
            sizes[name if name in self.bases or len(self.bases) != 1 else next(iter(self.bases))] += record_bytes(
                record
            )
        return sum(allowed(self.base(name).known, size) for name, size in sizes.items())


def to_tensors(record: ArrayRecord) -> dict[str, TensorOrArray]:
    """Return a record's arrays."""
    return {
        name: torch.from_numpy(array.numpy()).contiguous() if array.stype == NUMPY and array.dtype in PACKED else array
        for name, array in record.items()
    }


def record_bytes(record: ArrayRecord) -> int:
    """Return the bytes of a record's arrays."""
    return sum(len(array.data) for array in record.values())


def to_record(arrays: Mapping[str, TensorOrArray]) -> ArrayRecord:
    """Return the record of arrays."""
    return ArrayRecord({name: v if isinstance(v, Array) else _array(v.numpy()) for name, v in arrays.items()})


def pack_record(
    arrays: Mapping[str, TensorOrArray | Sparse | float],
    base: Base,
    means: int = ITSELF,
    values: str = "f32",
    frozen: Collection[str] = (),
) -> tuple[ArrayRecord, int]:
    """Return the record that travels, and the bytes of its arrays; ``frozen`` are the names of those to be kept."""
    others = {f"{OTHER}{name}": v for name, v in arrays.items() if isinstance(v, Array)}
    tensors = {name: 0.0 if isinstance(v, Array) else v for name, v in arrays.items()}
    marks = {"frozen": torch.tensor([name in frozen for name in arrays])} if frozen else {}
    data = encode({"means": float(means), "arrays": tensors, **marks}, base.known, values)
    message = Array(dtype="uint8", shape=(len(data),), stype=STYPE, data=data)
    return ArrayRecord({KEY: message, **others}), len(data) + sum(len(v.data) for v in others.values())


def is_packed(record: ArrayRecord) -> bool:
    """Tell whether a record is one that travels."""
    return KEY in record and record[KEY].stype == STYPE


def unpack_record(
    record: ArrayRecord, base: Base, kept: Mapping[str, Tensor] | None = None
) -> tuple[dict[str, TensorOrArray], frozenset[str]]:
    """Return the arrays of a record from ``pack_record``, and the names of those that are to be kept.

    ``kept``: what it leaves some out of, which are to be kept on. Raises WireError for any other record.
    """
    kept = kept or {}
    if not is_packed(record):
        raise WireError("its arrays are not FedSieve's: the other side uses no SparseMod or SparseGrid")
    message = decode(record[KEY].data, base.known)
    means, arrays, marks = message.get("means"), message.get("arrays"), message.get("frozen")
    two = message.keys() - {"frozen"} == {"means", "arrays"}
    if not two or means not in (ITSELF, MOVED, ADDED) or not isinstance(arrays, Mapping):
        raise WireError("a FedSieve message, but none of arrays")
    frozen = _marked(arrays, marks) if "frozen" in message else frozenset()
    others = {name.removeprefix(OTHER): v for name, v in record.items() if name != KEY}
    numbers = {name: v for name, v in arrays.items() if isinstance(v, float)}
    if [*others] != [name for name, v in numbers.items() if v != KEPT] or len(others) + 1 != len(record):
        raise WireError("the arrays that travel as they are differ from those that the message names")
    if not (left := numbers.keys() - others.keys()) <= kept.keys():
        raise WireError("the arrays that it leaves out are others than those that its head names")
    assert isinstance(means, float)
    sparse = [v for v in arrays.values() if isinstance(v, Sparse)]
    size = sum(math.prod(v.shape) * v.values.element_size() for v in sparse)
    if size > THIN * allowed(base.known, len(record[KEY].data)):
        raise WireError(f"its sparse tensors would come to {size} bytes")
    there: dict[str, TensorOrArray] = {**others, **kept}
    whole = {n: there[n] if n in numbers else _whole(n, v, base, int(means)) for n, v in arrays.items()}
    return whole, frozen | left


def _marked(arrays: Mapping[str, object], marks: object) -> frozenset[str]:
    """Return the names of the arrays that are marked. Raises WireError."""
    if not isinstance(marks, Tensor) or marks.dtype != torch.bool or marks.shape != (len(arrays),):
        raise WireError("what it says of frozen arrays is no mark for each")
    return frozenset(name for name, marked in zip(arrays, marks.tolist(), strict=True) if marked)


def map_arrays(content: RecordDict, change: Callable[[str, ArrayRecord], ArrayRecord]) -> RecordDict:
    """Return the same records in the same order, those of arrays changed."""
    return RecordDict({n: change(n, v) if isinstance(v, ArrayRecord) else v for n, v in content.items()})


def _array(value: npt.NDArray[Any]) -> Array:
    """Return ``Array(value)``, byte for byte, with one copy of the numbers in place of several."""
    head = BytesIO()
    format.write_array_header_1_0(head, format.header_data_from_array_1_0(value))
    data = b"".join((head.getvalue(), value.data))
    return Array(dtype=str(value.dtype), shape=value.shape, stype=NUMPY, data=data)


def _whole(name: str, value: object, base: Base, means: int) -> Tensor:
    """Return the tensor that an entry of a message stands for."""
    if not isinstance(value, Tensor | Sparse):
        raise WireError(f"{name!r} is a tree where an array is due")
    like = base.like(name, value) if means != ITSELF else None
    if isinstance(value, Tensor):
        return value if means != ADDED or like is None else like + value
    if means == ITSELF:
        return value.dense()
    if like is None:
        raise WireError(f"a part of {name!r}, of which no base is known")
    whole = like.reshape(-1).clone()
    whole[value.index] = value.values if means == MOVED else whole[value.index] + value.values
    return whole.view(value.shape)
