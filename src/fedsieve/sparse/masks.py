"""Masks: the largest magnitudes, or drawn from a seed; and what of a model they leave. ``regrowth`` has learnt ones.

``top(x, q)`` is the support of exactly ``ceil(q * numel)`` largest magnitudes, ties to the lowest position. It orders
magnitudes by their bits, so that it is total (a NaN counts as largest) and the same on every machine.

Babakniya et al. 2022 (FLASH), eq. 1 (mismatch), eq. 2 (re-calibration). A mask that is random, given
its seed and how many weights each layer keeps, need not travel: both sides draw it, and only values are sent.

Where a function takes a ``unit``, weights are kept, drawn, pruned and counted in units of so many output channels
(``sparse.units``), by their norms: of ``n`` units ``topk_count(d, n)`` are kept, so that of a last group of fewer
channels the density of weights may differ from ``d``.
"""

from __future__ import annotations

import hashlib
import math
import threading
import warnings
from collections.abc import Collection, Mapping
from functools import lru_cache
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from fedsieve.sparse import selection
from fedsieve.sparse.policy import scale_densities
from fedsieve.sparse.units import in_units, spread, unit_count, unit_keys, units_of
from fedsieve.types import InputError, Mask, Params, Sparse, true_positions
from fedsieve.types.resources import each, resources

InitialMask: TypeAlias = Literal["magnitude", "random"]
"""Of each layer a model's largest weights, or random ones."""
ExcessRule: TypeAlias = Literal["redistribute", "clip"]
"""What becomes of a layer's density beyond 1: the other layers get it, or nobody."""
LARGE = 1 << 16
"""A GPU finds the top weights of tensors of so many elements faster than a CPU, the way there and back included."""
_ELSEWHERE = threading.Lock()
"""Of a process's threads one sends a tensor to a GPU at a time: they share the way, and compile its kernels once."""
MaskDraw: TypeAlias = Literal["exact", "bernoulli"]
"""How many weights of a layer a random mask keeps: its share, rounded up, or as many as a coin says for each weight."""


class EmptyLayer(UserWarning):
    """A global cut left a layer without a single weight."""


def topk_count(q: float, numel: int) -> int:
    """Return ceil(q * numel), immune to the last bits of sums like 1 - .95 + .2."""
    return math.ceil(round(q * numel, 6))


def top(x: Tensor, q: float) -> Tensor:
    """Return the boolean support, shaped like ``x``, of its ``topk_count(q, numel)`` largest magnitudes.

    It lies where ``x`` does; a GPU that there is for that (``types.resources``) finds it.
    """
    k, where = topk_count(q, x.numel()), resources().device
    if where == "cpu" or x.is_cuda or x.numel() < LARGE:
        return selection.support(x, k)
    with _ELSEWHERE:
        return selection.support(x.to(where), k).cpu()


def top_units(x: Tensor, q: float, unit: int = 1) -> Tensor:
    """Return the boolean support, shaped like ``x``, of the ``topk_count(q, units)`` units of the largest norms."""
    if unit == 1:
        return top(x, q)
    return spread(selection.largest(unit_keys(x, unit), topk_count(q, unit_count(x.shape, unit))), x.shape, unit)


def global_top(params: Params, names: tuple[str, ...], q: float, unit: int = 1) -> Mask:
    """Return one cut over all named tensors together; warn (EmptyLayer) of a tensor that it empties."""
    if unit == 1:
        cut = top(torch.cat([params[name].reshape(-1) for name in names]), q)
    else:
        keys = torch.cat([unit_keys(params[name], unit) for name in names])
        cut = selection.largest(keys, topk_count(q, len(keys)))
    parts = torch.split(cut, [unit_count(params[name].shape, unit) for name in names])
    for name, part in zip(names, parts, strict=True):
        if not part.any():
            warnings.warn(f"the global cut at density {q:.4g} empties {name}", EmptyLayer, stacklevel=2)
    return {name: spread(part, params[name].shape, unit) for name, part in zip(names, parts, strict=True)}


def keep_topk(params: Params, densities: Mapping[str, float], unit: int = 1) -> Params:
    """Return ``params`` with every named tensor reduced to its own top share; the others as they are."""

    def reduced(name: str) -> Tensor:
        v = params[name]
        return v * top_units(v, densities[name], unit) if name in densities else v

    return dict(zip(params, each(reduced, params), strict=True))


def to_sparse(params: Params, support: Mask) -> dict[str, Tensor | Sparse]:
    """Return the parameters as they travel where the receiver does not know the support: values and positions."""
    return {name: Sparse.of(v, support[name]) if name in support else v for name, v in params.items()}


def supports(tree: Mapping[str, object], names: tuple[str, ...]) -> Mask:
    """Return where a message has values of the named tensors. Raises InputError if one of them is not sparse."""
    mask = {name: value.support for name in names if isinstance(value := tree.get(name), Sparse)}
    if missing := [name for name in names if name not in mask]:
        raise InputError(f"the message holds no mask of {missing[0]}")
    return mask


def misplaced(mask: Mapping[str, Tensor], tree: Mapping[str, object]) -> str | None:
    """Return which tensor of a message has values elsewhere than on its mask, or None: a rule of ``Expected``."""
    wrong = [name for name, own in supports(tree, tuple(mask)).items() if not torch.equal(own, mask[name])]
    return f"{wrong[0]} is not on the server's mask" if wrong else None


def wrong_units(unit: int, names: tuple[str, ...], most: int, tree: Mapping[str, object]) -> str | None:
    """Return what is wrong with a message's masks in units, ``most`` in all, or None: a rule of ``Expected``."""
    mask = supports(tree, names)
    if wrong := [name for name, own in mask.items() if not in_units(own, unit)]:
        return f"{wrong[0]} is not on a mask in units of {unit} output channels"
    total = sum(int(units_of(own, unit).sum()) for own in mask.values())
    return f"{total} units of {unit} output channels, where {most} are allowed" if total > most else None


def drop_zeros(params: Params, names: tuple[str, ...]) -> dict[str, Tensor | Sparse]:
    """Return the parameters with the zeros of the named tensors left out."""
    return to_sparse(params, {name: params[name] != 0 for name in names})


def weight_density(params: Params, names: Collection[str] | None = None) -> float:
    """Return the share of non-zeros among all weights (tensors of two or more dimensions), or those of ``names``."""
    weights = [v for name, v in params.items() if (v.dim() >= 2 if names is None else name in names)]
    total = sum(v.numel() for v in weights)
    return sum(int(v.count_nonzero()) for v in weights) / total if total else 1.0


def recalibrate(
    sensed: Mapping[str, float], sizes: Mapping[str, int], d: float, excess: ExcessRule
) -> dict[str, float]:
    """Return sensed layer densities scaled to the total density ``d`` (eq. 2), none above 1."""
    if excess == "redistribute":
        return scale_densities(sensed, sizes, d)
    r_f = d * sum(sizes.values()) / sum(sensed[name] * size for name, size in sizes.items())
    return {name: min(1.0, r_f * value) for name, value in sensed.items()}


def random_masks(seed: int, counts: Tensor, like: Mapping[str, Tensor], unit: int = 1) -> Mask:
    """Return random masks, shaped like the tensors ``like``, of exactly ``counts`` [layers] units; read only.

    Unit i of a layer has as its score the i-th 64-bit output of Philox-4x64-10 under the key
    ``sha256("fedsieve/mask/SEED/NAME")[:16]`` (little-endian); the lowest scores are kept, ties to the lowest position.
    So every machine draws the same, and a smaller count gives a subset.
    """
    return _drawn(seed, tuple(counts.tolist()), tuple((name, tuple(v.shape)) for name, v in like.items()), unit)


@lru_cache(maxsize=6)
def _drawn(seed: int, counts: tuple[int, ...], shapes: tuple[tuple[str, tuple[int, ...]], ...], unit: int) -> Mask:
    if len(counts) != len(shapes) or any(
        not 0 <= k <= unit_count(shape, unit) for k, (_, shape) in zip(counts, shapes, strict=False)
    ):
        raise InputError(f"{len(counts)} counts {counts} do not fit the {len(shapes)} layers of the mask")
    return {name: _lowest(seed, name, k, shape, unit) for k, (name, shape) in zip(counts, shapes, strict=True)}


def _scores(seed: int, name: str, numel: int) -> npt.NDArray[np.uint64]:
    key = int.from_bytes(hashlib.sha256(f"fedsieve/mask/{seed}/{name}".encode()).digest()[:16], "little")
    return np.random.Philox(key=key).random_raw(numel)


def _lowest(seed: int, name: str, k: int, shape: tuple[int, ...], unit: int) -> Tensor:
    scores = _scores(seed, name, unit_count(shape, unit))
    if k == 0:
        return torch.zeros(shape, dtype=torch.bool)
    last = np.partition(scores, k - 1)[k - 1]
    mask = scores < last
    mask[np.flatnonzero(scores == last)[: k - int(mask.sum())]] = True
    return spread(torch.from_numpy(mask), shape, unit)


def layer_counts(densities: Mapping[str, float], like: Mapping[str, Tensor], unit: int = 1) -> Tensor:
    """Return int64 [layers], the ceil(d * n) of its n units that each layer keeps: never none."""
    return torch.tensor([max(1, topk_count(d, unit_count(like[name].shape, unit))) for name, d in densities.items()])


def draw_counts(
    draw: MaskDraw, seed: int, densities: Mapping[str, float], like: Mapping[str, Tensor], unit: int = 1
) -> Tensor:
    """Return int64 [layers], how many units of each layer the mask of ``random_masks`` is to keep: never none.

    By ``bernoulli`` these are the units whose score is below d * 2^64: ``random_masks``, which keeps the lowest
    scores, then keeps every unit with probability d, whatever becomes of the others.
    """
    if draw == "exact":
        return layer_counts(densities, like, unit)
    limits = {name: np.uint64(max(int(min(d, 1.0) * 2**64) - 1, 0)) for name, d in densities.items()}
    lower = (_scores(seed, name, unit_count(like[name].shape, unit)) <= limit for name, limit in limits.items())
    return torch.tensor([max(1, int(np.count_nonzero(own))) for own in lower])


def largest_on(params: Params, mask: Mask, counts: Tensor, unit: int = 1) -> Mask:
    """Return what of a mask keeps, in each layer, ``counts`` [layers] units of the largest magnitudes."""
    result = dict[str, Tensor]()
    for (name, own), k in zip(mask.items(), counts.tolist(), strict=True):
        units = units_of(own, unit)
        keys = unit_keys(params[name], unit).masked_fill(~units, -1)
        result[name] = spread(selection.largest(keys, min(k, int(units.count_nonzero()))), own.shape, unit)
    return result


def initial_mask(
    kind: InitialMask, params: Params, names: Collection[str], counts: Tensor, rng: torch.Generator, unit: int = 1
) -> Mask:
    """Return a mask that keeps of each of the named layers ``counts`` [layers] units: the largest, or random ones."""
    if kind == "random":
        seed = int(torch.randint(2**62, (), generator=rng))
        return dict(random_masks(seed, counts, {name: params[name] for name in names}, unit))
    every = {name: torch.ones_like(params[name], dtype=torch.bool) for name in names}
    return largest_on(params, every, counts, unit)


def mismatch(a: Mask, b: Mask) -> float:
    """Return the Jaccard distance of two masks, summed over layers first (eq. 1)."""
    both = sum(int((a[name] & b[name]).count_nonzero()) for name in a)
    either = sum(int((a[name] | b[name]).count_nonzero()) for name in a)
    return 1 - both / either if either else 0.0


def gather_values(params: Params, mask: Mask) -> Params:
    """Return the parameters with every tensor on a mask reduced to its values there, [nnz], by position."""
    return {
        name: v.reshape(-1).index_select(0, true_positions(mask[name])) if name in mask else v
        for name, v in params.items()
    }


def scatter_values(tree: object, mask: Mask) -> Params:
    """Return the parameters whose ``gather_values`` a tree holds. Raises InputError if they do not fit the mask."""
    if not isinstance(tree, Mapping):
        raise InputError("the message holds no parameters")
    params = dict[str, Tensor]()
    for name, v in tree.items():
        own = mask.get(name)
        index = None if own is None else true_positions(own)
        if not isinstance(v, Tensor) or (index is not None and v.shape != index.shape):
            raise InputError(f"the message does not fit the mask at {name}")
        params[name] = v if own is None or index is None else Sparse(v, index, tuple(own.shape)).dense()
    return params


def apply_mask(params: Params, mask: Mask) -> Params:
    """Return the parameters, zero off the mask."""
    return {name: v * mask[name] if name in mask else v for name, v in params.items()}


def masks_from_spec(order: object, model: nn.Module, names: tuple[str, ...], unit: int = 1) -> Mask:
    """Return the mask that the server's ``MaskedState.message`` asks a client to draw. Raises InputError."""
    seed, counts = (order.get("seed"), order.get("counts")) if isinstance(order, Mapping) else (None, None)
    if not isinstance(seed, Tensor) or not isinstance(counts, Tensor) or seed.numel() != 1 or counts.dim() != 1:
        raise InputError("the message holds no order for a mask")
    return random_masks(int(seed), counts, {name: model.get_parameter(name) for name in names}, unit)


def masked_bytes(model: nn.Module, names: tuple[str, ...], d: float) -> float:
    """Return four bytes for each parameter, of which the named tensors keep the share ``d`` (FLASH, Table 3)."""
    return 4.0 * sum(v.numel() * (d if name in names else 1.0) for name, v in model.named_parameters())


def pack_bits(mask: Mask) -> dict[str, Tensor]:
    """Return every mask as its bits, uint8 [ceil(numel / 8)], the lowest position in the highest bit."""
    return {name: torch.from_numpy(np.packbits(own.reshape(-1).numpy())) for name, own in mask.items()}


def unpack_bits(bits: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> Mask:
    """Return the masks that ``pack_bits`` packed, shaped like the tensors ``like``."""
    flat = {name: np.unpackbits(bits[name].numpy(), count=v.numel()).astype(bool) for name, v in like.items()}
    return {name: torch.from_numpy(own).view(like[name].shape) for name, own in flat.items()}


def unpack_subset(bits: object, mask: Mask, unit: int = 1) -> Mask:
    """Return what of a mask a message keeps: bits of units, as of ``pack_bits``. Raises InputError on a misfit."""
    units = {name: units_of(own, unit) for name, own in mask.items()}
    sizes = {name: int(own.count_nonzero()) for name, own in units.items()}
    if not isinstance(bits, Mapping) or bits.keys() != mask.keys():
        raise InputError("the message holds no part of its mask")
    for name, n in sizes.items():
        own = bits[name]
        if not isinstance(own, Tensor) or own.dtype != torch.uint8 or own.shape != (-(-n // 8),):
            raise InputError(f"the message does not fit the mask at {name}")
    bits_of_mask = unpack_bits(bits, {name: torch.empty(n, device="meta") for name, n in sizes.items()})
    kept = {name: torch.zeros_like(own).masked_scatter_(own, bits_of_mask[name]) for name, own in units.items()}
    return {name: spread(own, mask[name].shape, unit) for name, own in kept.items()}
