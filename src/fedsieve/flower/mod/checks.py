"""What a strategy could not compute with in an answer, and which answers are of another form than most."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterable
from typing import TypeAlias

import numpy as np
from flwr.app import Array, ArrayRecord, Message, RecordDict
from torch import Tensor

from fedsieve.flower.mod.records import NUMPY, Base, TensorOrArray, to_record
from fedsieve.wire import WireError, finite

Form: TypeAlias = frozenset[tuple[str, frozenset[Hashable]]]
"""Of every record of arrays and metrics, the names with their shapes or lengths."""


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
