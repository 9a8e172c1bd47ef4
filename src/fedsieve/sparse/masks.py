"""Masks: drawn from a seed, learnt by prune and regrow, trained on, and left out of the messages.

Babakniya et al. 2022 (FLASH), Sec. 2 (DNR), eq. 1 (mismatch), eq. 2 (re-calibration). A mask that is random, given
its seed and how many weights each layer keeps, need not travel: both sides draw it, and only values are sent.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn

from fedsieve.sparse.topk import topk_count
from fedsieve.types import InputError, Mask, Params


def random_masks(seed: int, counts: Tensor, like: Mapping[str, Tensor]) -> Mask:
    """Return random masks, shaped like the tensors ``like``, of exactly ``counts`` [layers] weights; read only.

    Position i of a layer has as its score the i-th 64-bit output of Philox-4x64-10 under the key
    ``sha256("fedsieve/mask/SEED/NAME")[:16]`` (little-endian); the lowest scores are kept, ties to the lowest position.
    So every machine draws the same, and a smaller count gives a subset.
    """
    return _drawn(seed, tuple(counts.tolist()), tuple((name, tuple(v.shape)) for name, v in like.items()))


@lru_cache(maxsize=6)
def _drawn(seed: int, counts: tuple[int, ...], shapes: tuple[tuple[str, tuple[int, ...]], ...]) -> Mask:
    if len(counts) != len(shapes) or any(
        not 0 <= k <= math.prod(shape) for k, (_, shape) in zip(counts, shapes, strict=False)
    ):
        raise InputError(f"{len(counts)} counts {counts} do not fit the {len(shapes)} layers of the mask")
    return {name: _lowest(seed, name, k, shape) for k, (name, shape) in zip(counts, shapes, strict=True)}


def _lowest(seed: int, name: str, k: int, shape: tuple[int, ...]) -> Tensor:
    key = int.from_bytes(hashlib.sha256(f"fedsieve/mask/{seed}/{name}".encode()).digest()[:16], "little")
    scores = np.random.Philox(key=key).random_raw(math.prod(shape))
    if k == 0:
        return torch.zeros(shape, dtype=torch.bool)
    last = np.partition(scores, k - 1)[k - 1]
    kept = scores < last
    kept[np.flatnonzero(scores == last)[: k - int(kept.sum())]] = True
    return torch.from_numpy(kept).view(shape)


def layer_counts(densities: Mapping[str, float], like: Mapping[str, Tensor]) -> Tensor:
    """Return int64 [layers], the ceil(d * numel) weights that each layer keeps: never none."""
    return torch.tensor([max(1, topk_count(d, like[name].numel())) for name, d in densities.items()])


def mismatch(a: Mask, b: Mask) -> float:
    """Return the Jaccard distance of two masks, summed over layers first (eq. 1)."""
    both = sum(int((a[name] & b[name]).sum()) for name in a)
    either = sum(int((a[name] | b[name]).sum()) for name in a)
    return 1 - both / either if either else 0.0


def gather_values(params: Params, mask: Mask) -> Params:
    """Return the parameters with every tensor on a mask reduced to its values there, [nnz], by position."""
    return {name: v[mask[name]] if name in mask else v for name, v in params.items()}


def scatter_values(tree: object, mask: Mask) -> Params:
    """Return the parameters whose ``gather_values`` a tree holds. Raises InputError if they do not fit the mask."""
    if not isinstance(tree, Mapping):
        raise InputError("the message holds no parameters")
    params = dict[str, Tensor]()
    for name, v in tree.items():
        own = mask.get(name)
        if not isinstance(v, Tensor) or (own is not None and v.shape != (int(own.sum()),)):
            raise InputError(f"the message does not fit the mask at {name}")
        params[name] = v if own is None else torch.zeros(own.shape, dtype=v.dtype).masked_scatter_(own, v)
    return params


def apply_mask(params: Params, mask: Mask) -> Params:
    """Return the parameters, zero off the mask."""
    return {name: v * mask[name] if name in mask else v for name, v in params.items()}


def masks_from_spec(order: object, model: nn.Module, names: tuple[str, ...]) -> Mask:
    """Return the mask that the server's ``MaskedState.mask_spec`` asks a client to draw. Raises InputError."""
    seed, counts = (order.get("seed"), order.get("counts")) if isinstance(order, Mapping) else (None, None)
    if not isinstance(seed, Tensor) or not isinstance(counts, Tensor) or seed.numel() != 1 or counts.dim() != 1:
        raise InputError("the message holds no order for a mask")
    return random_masks(int(seed), counts, {name: model.get_parameter(name) for name in names})


def masked_bytes(model: nn.Module, names: tuple[str, ...], d: float) -> float:
    """Return four bytes for each parameter, of which the named tensors keep the share ``d`` (FLASH, Table 3)."""
    return 4.0 * sum(v.numel() * (d if name in names else 1.0) for name, v in model.named_parameters())


def pack_bits(mask: Mask) -> dict[str, Tensor]:
    """Return every mask as its bits, uint8 [ceil(numel / 8)], the lowest position in the highest bit."""
    return {name: torch.from_numpy(np.packbits(own.reshape(-1).numpy())) for name, own in mask.items()}


def unpack_bits(bits: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> Mask:
    """Return the masks that ``pack_bits`` packed, shaped like the tensors ``like``."""
    found = {name: np.unpackbits(bits[name].numpy(), count=v.numel()).astype(bool) for name, v in like.items()}
    return {name: torch.from_numpy(own).view(like[name].shape) for name, own in found.items()}
