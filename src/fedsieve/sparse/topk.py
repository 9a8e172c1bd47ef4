"""Which weights stay: exact top-k, layer policies, layer budgets, densities.

``top(x, q)`` is the support of exactly ``ceil(q * numel)`` largest magnitudes, ties to the lowest position. It orders
magnitudes by their bits, so that it is total (a NaN counts as largest) and the same on every machine.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from fedsieve.types import Mask, Params, Sparse


class EmptyLayer(UserWarning):
    """A global cut left a layer without a single weight."""


def topk_count(q: float, numel: int) -> int:
    """Return ceil(q * numel), immune to the last bits of sums like 1 - .95 + .2."""
    return math.ceil(round(q * numel, 6))


def top(x: Tensor, q: float) -> Tensor:
    """Return the boolean support, shaped like ``x``, of its ``topk_count(q, numel)`` largest magnitudes."""
    return _largest(_magnitudes(x), topk_count(q, x.numel())).view(x.shape)


def top_within(x: Tensor, mask: Tensor, k: int) -> Tensor:
    """Return the support of the ``k`` largest magnitudes among the positions of a boolean ``mask``."""
    keys = _magnitudes(x).masked_fill(~mask.reshape(-1), -1)
    return _largest(keys, k).view(x.shape)


def global_top(params: Params, names: tuple[str, ...], q: float) -> Mask:
    """Return one cut over all named tensors together; warn (EmptyLayer) of a tensor that it empties."""
    keys = torch.cat([_magnitudes(params[name]) for name in names])
    parts = torch.split(_largest(keys, topk_count(q, len(keys))), [params[name].numel() for name in names])
    for name, part in zip(names, parts, strict=True):
        if not part.any():
            warnings.warn(f"the global cut at density {q:.4g} empties {name}", EmptyLayer, stacklevel=2)
    return {name: part.view(params[name].shape) for name, part in zip(names, parts, strict=True)}


def keep_topk(params: Params, densities: Mapping[str, float]) -> Params:
    """Return ``params`` with every named tensor reduced to its own top share; the others as they are."""
    return {name: v * top(v, densities[name]) if name in densities else v for name, v in params.items()}


def to_sparse(params: Params, support: Mask) -> dict[str, Tensor | Sparse]:
    """Return the parameters as they travel where the receiver does not know the support: values and positions."""
    return {name: Sparse.of(v, support[name]) if name in support else v for name, v in params.items()}


def drop_zeros(params: Params, names: tuple[str, ...]) -> dict[str, Tensor | Sparse]:
    """Return the parameters with the zeros of the named tensors left out."""
    return to_sparse(params, {name: params[name] != 0 for name in names})


def weight_density(params: Params, names: Collection[str] | None = None) -> float:
    """Return the share of non-zeros among all weights (tensors of two or more dimensions), or those of ``names``."""
    weights = [v for name, v in params.items() if (v.dim() >= 2 if names is None else name in names)]
    total = sum(v.numel() for v in weights)
    return sum(int(v.count_nonzero()) for v in weights) / total if total else 1.0


def _magnitudes(x: Tensor) -> Tensor:
    """Return integers, flat, that order like |x|."""
    flat = x.detach().reshape(-1)
    if flat.dtype == torch.float64:
        return flat.view(torch.int64) & 0x7FFFFFFFFFFFFFFF
    return flat.float().view(torch.int32) & 0x7FFFFFFF


def _largest(keys: Tensor, k: int) -> Tensor:
    if k >= len(keys):
        return torch.ones_like(keys, dtype=torch.bool)
    if k == 0:
        return torch.zeros_like(keys, dtype=torch.bool)
    kth = _ascending(keys, len(keys) - k)
    support = keys >= kth
    if surplus := int(support.sum()) - k:
        support[(keys == kth).nonzero().squeeze(1)[-surplus:]] = False
    return support


def _ascending(keys: Tensor, place: int) -> Tensor:
    """Return the number at a place of the sorted keys; a GPU sorts them, since its kthvalue uses one block alone."""
    return keys.sort().values[place] if keys.is_cuda else keys.kthvalue(place + 1).values
