"""What the papers count of an upload: compressed sparse rows (CSR), int32 position and float32 value of every number.

ZeroFL stores every tensor, dense ones too, as a 1 x n matrix of that form, with about 130 bytes of names, shapes and
lengths (its Table 1); SparseFedPP says "CSR" of its 145x and prints no formula.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from fedsieve.types import Sparse

ENTRY, TENSOR = 8, 130
"""Bytes of a number with its position, and of what stands beside a tensor."""


def csr_bytes(tree: Mapping[str, Any], dense: int | None = None) -> int:
    """Return what a tree that is sent takes as CSR, in bytes, by how many numbers its tensors hold.

    ``dense`` is the whole model's size in bytes, as plain float32: a tree that holds all of it needs no positions, and
    takes just that, as in the papers' tables.
    """
    counts = [*_counts(tree)]
    return dense if dense is not None and 4 * sum(counts) >= dense else sum(ENTRY * n + TENSOR for n in counts)


def _counts(tree: Mapping[str, Any]) -> Iterator[int]:
    for value in tree.values():
        if isinstance(value, Mapping):
            yield from _counts(value)
        elif isinstance(value, Sparse):
            yield len(value.values)
        elif isinstance(value, Tensor):
            yield value.numel()
