"""Exact top-k: the k largest magnitudes of a tensor, ties to the lowest position, on a CPU and on a GPU.

Magnitudes are ordered by their bits, so that the order is total (a NaN counts as largest) and the same on every
machine; positions are those of the contiguous order, whatever the memory format. On a GPU nothing waits for the host,
and a CUDA graph can capture it: k may be a tensor beside ``x``. There Triton's kernels count (float32, float16,
bfloat16, and int32 keys of at most 2^30 elements); where Triton is not installed, and in float64, PyTorch sorts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from types import ModuleType
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedsieve.types import true_positions

BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integers by their bytes."""
MANY, APART = 1 << 16, 61
"""Of so many keys every 61st, a prime, is looked at first."""
Select: TypeAlias = Callable[[Tensor, int | Tensor, torch.dtype], tuple[Tensor, Tensor]]
"""What returns the k largest of a tensor in a dtype, or as bool their mask, and the smallest that is kept."""


def cut(x: Tensor, k: int | Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Return ``x`` with all but its k largest magnitudes zeroed, and the smallest magnitude that is kept.

    ``x``: floating point; what is contiguous or channels_last comes back in its memory format. ``k``: an integer, or a
    0-d tensor of int64 beside ``x``; from numel on all is kept, at 0 nothing. The magnitude is 0-d, of the dtype of
    ``x``; it is NaN, which ``x.abs() >= threshold`` nowhere reaches, if nothing is kept. Neither has a gradient.
    ``dtype``: what the values are rounded to afterwards, that of ``x`` by default.
    """
    x, dtype = x.detach(), dtype or x.dtype
    if select := _kernels(x, dtype):
        return select(x, k, dtype)
    support, kth = _select(magnitude_keys(x), k)
    return x.clone().masked_fill_(~support.view(x.shape), 0).to(dtype), kth.view(x.dtype)


def cuts(
    tensors: Sequence[Tensor], k: Sequence[int] | Tensor, dtype: torch.dtype | None = None
) -> Callable[[], tuple[list[Tensor], Tensor]]:
    """Return what cuts all tensors at each call: their values, and the smallest magnitudes that are kept [tensors].

    ``tensors``: of one dtype and device, they stay where they are in memory while their values change, as a model's
    weights do. ``k``, ``dtype``: as for ``cut``, a k for each; int64 [tensors] on the device is read anew at each call.
    On a GPU it takes as many launches as one tensor does (Triton), and what a call returns is overwritten by the next.
    Make it before a graph is captured: its lists are copied to the device.
    """
    out_dtype = dtype or tensors[0].dtype
    if all(_kernels(x, out_dtype) for x in tensors) and (kernels := _triton()) is not None:
        batch: Callable[[], tuple[list[Tensor], Tensor]] = kernels.Batch(tensors, k, out_dtype)
        return batch

    def cut_each() -> tuple[list[Tensor], Tensor]:
        values, thresholds = zip(*(cut(x, own, dtype) for x, own in zip(tensors, k, strict=True)), strict=True)
        return list(values), torch.stack(thresholds)

    return cut_each


def support(x: Tensor, k: int | Tensor) -> Tensor:
    """Return the boolean support, shaped like ``x``, of its k largest magnitudes; ``k`` as for ``cut``."""
    x = x.detach()
    if select := _kernels(x, torch.bool):
        return select(x, k, torch.bool)[0]
    return _select(magnitude_keys(x), k)[0].view(x.shape)


def largest(keys: Tensor, k: int | Tensor) -> Tensor:
    """Return the support [n] of the k largest of integers [n], ties to the lowest position; ``k`` as for ``cut``."""
    if select := _kernels(keys, torch.bool):
        return select(keys, k, torch.bool)[0]
    return _select(keys, k)[0]


def magnitude_keys(x: Tensor) -> Tensor:
    """Return integers [numel] that order like |x|: the bits without the sign, in the width of ``x``."""
    kind = BITS[x.element_size()]
    return x.detach().reshape(-1).view(kind) & torch.iinfo(kind).max


@cache
def _triton() -> ModuleType | None:
    try:
        from fedsieve.sparse import selection_launch
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "triton":
            raise
        return None
    return selection_launch


def _kernels(x: Tensor, dtype: torch.dtype) -> Select | None:
    """Return what selects by counting, if it can select from ``x`` and write a dtype."""
    kernels = _triton() if x.is_cuda else None
    if kernels is None or x.dtype not in kernels.DIGITS or not 0 < x.numel() <= kernels.LARGEST:
        return None
    if dtype not in (x.dtype, torch.bool) and (x.dtype, dtype) != (torch.float32, torch.bfloat16):
        return None
    select: Select = kernels.select
    return select


def _select(keys: Tensor, k: int | Tensor) -> tuple[Tensor, Tensor]:
    """Return the support [n] of the k largest keys [n], and the k-th of them; the highest of all integers for k = 0."""
    if len(keys) == 0:
        return keys.bool(), keys.new_full((), torch.iinfo(keys.dtype).max)
    return sort_select(keys, k) if keys.is_cuda else _partition(keys, min(max(int(k), 0), len(keys)))


def _partition(keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Select on a CPU."""
    if k == 0:
        return torch.zeros_like(keys, dtype=torch.bool), keys.new_full((), torch.iinfo(keys.dtype).max)
    if k == len(keys):
        return torch.ones_like(keys, dtype=torch.bool), keys.min()
    kth = torch.tensor(_kth(keys.numpy(), len(keys) - k), dtype=keys.dtype)
    support = keys >= kth
    if surplus := int(support.count_nonzero()) - k:
        support[true_positions(keys == kth)[-surplus:]] = False
    return support, kth


def _kth(keys: npt.NDArray[Any], rank: int) -> int:
    """Return the number that stands at a rank, from 0 on, among sorted keys.

    Of many keys a sample tells between which two it stands, as a rule; only what lies there is then ordered.
    """
    if len(keys) >= MANY:
        sample = np.sort(keys[::APART])
        place, spread = rank * len(sample) // len(keys), 4 * math.isqrt(len(sample))
        low, high = sample[max(place - spread, 0)], sample[min(place + spread, len(sample) - 1)]
        below = int(np.count_nonzero(keys < low))
        near = keys[(keys >= low) & (keys <= high)]
        if below <= rank < below + len(near):
            keys, rank = near, rank - below
    return int(np.partition(keys, rank)[rank])


def sort_select(keys: Tensor, k: int | Tensor) -> tuple[Tensor, Tensor]:
    """Select by a sort, without a look from the host: keys [n], n > 0."""
    if not isinstance(k, Tensor):
        k = torch.full((), k, dtype=torch.int64, device=keys.device)
    k = k.clamp(0, len(keys))
    place = (len(keys) - k).clamp(max=len(keys) - 1)
    kth = keys.sort().values.gather(0, place.view(1)).squeeze(0)
    kth = torch.where(k > 0, kth, torch.iinfo(keys.dtype).max)
    ties = keys == kth
    above = keys > kth
    return above | (ties & (ties.cumsum(0) <= k - above.sum())), kth
