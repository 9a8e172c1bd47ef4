"""The server's means over a stream of updates, and sums of parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from fedsieve.types import InputError, Mask, Params, Sparse, Tree, Update

Weighting: TypeAlias = Literal["samples", "equal"]
"""How much a client counts in a mean: by its number of examples, or as much as any other."""


def mean(updates: Iterable[Update], weighting: Weighting = "samples") -> Params:
    """Return the average of the answers' trees, weighted by ``n``; zeros off a support count. Sums are in float64."""
    total, sums, dtypes = 0, dict[str, Tensor](), dict[str, torch.dtype]()
    for update in updates:
        weight = update.n if weighting == "samples" else 1
        for name, value in update.tree.items():
            assert isinstance(value, Tensor | Sparse)
            values = value.values if isinstance(value, Sparse) else value
            if name not in sums:
                sums[name], dtypes[name] = torch.zeros(value.shape, dtype=torch.float64), values.dtype
            if isinstance(value, Sparse):
                sums[name].view(-1).index_add_(0, value.index, values.double(), alpha=weight)
            else:
                sums[name].add_(values, alpha=weight)
        total += weight
    if not total:
        raise InputError("no client sent an update that the server could accept")
    return {name: value.div_(total).to(dtypes[name]) for name, value in sums.items()}


def mean_over_holders(models: Iterable[tuple[Params, Mask]], old: Params) -> Params:
    """Return the mean of every element over the clients that hold it, all alike; what nobody holds stays ``old``.

    Babakniya et al. 2022 (FLASH), Sec. 4: WFA, the aggregation of hetero-FLASH. A model's mask names what its client
    holds; tensors without one are held whole.
    """
    sums = {name: torch.zeros(v.shape, dtype=torch.float64) for name, v in old.items()}
    held = {name: torch.zeros(v.shape, dtype=torch.int32) for name, v in old.items()}
    clients = 0
    for params, mask in models:
        clients += 1
        for name, value in params.items():
            sums[name] += value * mask[name] if name in mask else value
            held[name] += mask.get(name, 1)
    if not clients:
        raise InputError("no client sent an update that the server could accept")
    mean = {name: (sums[name] / held[name].clamp(min=1)).to(v.dtype) for name, v in old.items()}
    return {name: torch.where(held[name] > 0, mean[name], v) for name, v in old.items()}


def dense_bytes(params: Params) -> float:
    """Return four bytes for each of the model's numbers, BatchNorm's statistics included."""
    return 4.0 * sum(v.numel() for v in params.values())


def added(params: Params, change: Mapping[str, Tensor]) -> Params:
    """Return ``params + change``."""
    return {name: value + change[name] for name, value in params.items()}


def tensors(tree: Tree) -> Params:
    """Return a received tree of plain tensors as parameters; raises InputError if it holds anything else."""
    params = {name: v.dense() if isinstance(v, Sparse) else v for name, v in tree.items()}
    wrong = [name for name, v in params.items() if not isinstance(v, Tensor)]
    if wrong:
        raise InputError(f"the message holds no tensor at {', '.join(wrong)}")
    return params  # type: ignore[return-value]
