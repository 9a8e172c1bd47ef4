"""What a server computes of its clients' updates: means over a stream of them, and steps towards the mean.

Steps are FedAvg's (McMahan et al. 2017) and FedAdam's (Reddi et al. 2021, Algorithm 2), of a whole model or of one that
lives on random masks drawn from a seed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import repeat
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from fedsieve.sparse.masks import apply_mask, gather_values, largest_on, random_masks, scatter_values, supports
from fedsieve.types import InputError, Mask, Params, ServerState, Sparse, Tree, Update
from fedsieve.types.contract import is_statistic
from fedsieve.types.resources import each

Weighting: TypeAlias = Literal["samples", "equal"]
"""How much a client counts in a mean: by its number of examples, or as much as any other."""


def mean(updates: Iterable[Update], weighting: Weighting = "samples") -> Params:
    """Return the average of the answers' trees, weighted by ``n``; zeros off a support count. Sums are in float64.

    Every tensor is summed in the clients' order, beside the others (``types.resources``).
    """
    total, sums = 0, dict[str, _Sum]()
    for update in updates:
        weight = update.n if weighting == "samples" else 1
        for name in update.tree:
            sums.setdefault(name, _Sum())
        each(partial(_add, sums, weight), update.tree.items())
        total += weight
    if not total:
        raise InputError("no client sent an update that the server could accept")
    return dict(zip(sums, each(partial(_Sum.mean, weight=total), sums.values()), strict=True))


class _Sum:
    """A weighted sum of tensors of one shape, sparse ones among them."""

    def add(self, value: Tensor | Sparse, weight: int) -> None:
        """Add ``weight`` times a tensor."""
        values = value.values if isinstance(value, Sparse) else value
        if not hasattr(self, "total"):
            self.total, self.dtype = torch.zeros(value.shape, dtype=torch.float64), values.dtype
        if isinstance(value, Sparse):
            self.total.view(-1).index_add_(0, value.index, values.double(), alpha=weight)
        else:
            self.total.add_(values, alpha=weight)

    def mean(self, weight: int) -> Tensor:
        """Return the sum divided by ``weight``, of the first tensor's type; the sum is gone."""
        return self.total.div_(weight).to(self.dtype)


def _add(sums: Mapping[str, _Sum], weight: int, item: tuple[str, Any]) -> None:
    name, value = item
    assert isinstance(value, Tensor | Sparse)
    sums[name].add(value, weight)


def mean_over_holders(models: Iterable[tuple[Params, Mask]], old: Params, weights: Iterable[int] = repeat(1)) -> Params:
    """Return the mean of every element over the clients that hold it; what nobody holds stays ``old``.

    Babakniya et al. 2022 (FLASH), Sec. 4: WFA, the aggregation of hetero-FLASH. A model's mask names what its client
    holds; tensors without one are held whole. Clients count all alike, or by their ``weights``, which are read one
    after each model.
    """
    sums = {name: torch.zeros(v.shape, dtype=torch.float64) for name, v in old.items()}
    holders = {name: torch.zeros(v.shape, dtype=torch.int64) for name, v in old.items()}
    clients = 0
    for (params, mask), weight in zip(models, weights, strict=False):
        clients += 1
        for name, value in params.items():
            sums[name].add_(value * mask[name] if name in mask else value, alpha=weight)
            holders[name] += weight * mask[name] if name in mask else weight
    if not clients:
        raise InputError("no client sent an update that the server could accept")
    mean = {name: (sums[name] / holders[name].clamp(min=1)).to(v.dtype) for name, v in old.items()}
    return {name: torch.where(holders[name] > 0, mean[name], v) for name, v in old.items()}


def observed(updates: Iterable[Update], observe: Callable[[Update], None]) -> Iterator[Update]:
    """Pass a stream of updates on, each after ``observe`` has seen it."""
    for update in updates:
        observe(update)
        yield update


def join_(union: Mask, update: Update) -> None:
    """Add to a union of masks, in place, where an update has values."""
    for name, own in union.items():
        value = update.tree.get(name)
        if isinstance(value, Sparse):
            own.view(-1)[value.index] = True


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


@dataclass(frozen=True)
class Average:
    """FedAvg's step: the mean is the new model."""

    def init(self, params: Params) -> dict[str, Params]:
        """Return no moments."""
        return {}

    def step(self, old: Params, target: Params, moments: dict[str, Params]) -> tuple[Params, dict[str, Params]]:
        """Return the mean model ``target`` itself."""
        return target, moments


@dataclass(frozen=True)
class Adam:
    """FedAdam's step along ``target - old``; BatchNorm's running statistics take the plain mean."""

    eta: float = 0.01
    """The server's learning rate."""
    b1: float = 0.9
    """The decay of the first moment."""
    b2: float = 0.99
    """The decay of the second moment."""
    tau: float = 1e-3
    """What is added to the root of the second moment: the degree of adaptivity."""

    def __post_init__(self) -> None:
        if not (0 < self.eta <= 1e6 and 0 < self.tau <= 1e6) or not (0 <= self.b1 < 1 and 0 <= self.b2 < 1):
            raise InputError(f"FedAdam needs eta > 0, tau > 0 and b1, b2 in [0, 1), got {self}")

    def init(self, params: Params) -> dict[str, Params]:
        """Return first and second moments of zero."""
        learned = {name: v for name, v in params.items() if not is_statistic(name)}
        return {moment: {name: torch.zeros_like(v) for name, v in learned.items()} for moment in ("m", "v")}

    def step(self, old: Params, target: Params, moments: dict[str, Params]) -> tuple[Params, dict[str, Params]]:
        """Return the model and the moments after one step (Reddi et al. 2021, Algorithm 2)."""
        new, m, v = dict(target), dict[str, Tensor](), dict[str, Tensor]()
        for name, before in moments["m"].items():
            d = target[name] - old[name]
            m[name] = self.b1 * before + (1 - self.b1) * d
            v[name] = self.b2 * moments["v"][name] + (1 - self.b2) * d * d
            new[name] = old[name] + self.eta * m[name] / (v[name].sqrt() + self.tau)
        return new, {"m": m, "v": v}


ServerOptimizer = Average | Adam


@dataclass(frozen=True, kw_only=True)
class LearnedMaskState(ServerState):
    """Server state of a model on a mask that clients learn."""

    mask: Mask
    counts: Tensor
    """int64 [layers]: how many units of each layer a mask keeps, or keeps at first."""
    unit: int = 1
    """How many output channels share the mask's pattern (``sparse.units``)."""

    def support(self, params: Params) -> Mask:
        """Return the mask, whatever the weights on it are."""
        return self.mask

    def step(self, updates: Iterable[Update]) -> LearnedMaskState:
        """Return the state of every weight's mean over those who hold it, by their examples, on a new mask.

        An update holds weights at its positions. Of a layer the mask keeps the ``counts`` largest that anybody holds.
        """
        union, weights = {name: torch.zeros_like(own) for name, own in self.mask.items()}, list[int]()

        def observe(update: Update) -> None:
            join_(union, update)
            weights.append(update.n)

        models = ((tensors(one.tree), supports(one.tree, self.sparse)) for one in observed(updates, observe))
        average = mean_over_holders(models, self.params, weights)
        mask = largest_on(average, union, self.counts, self.unit)
        return replace(self, params=apply_mask(average, mask), mask=mask)


@dataclass(frozen=True, kw_only=True)
class MaskedState(ServerState):
    """Server state of a model that lives on drawn masks, one a device class, the first holding all others."""

    seed: Tensor
    """int64 []: what the masks are drawn from."""
    counts: Tensor
    """int64 [tiers, layers]: how many units each layer keeps."""
    stage: Tensor
    """int64 []: 1 before FLASH's sensitivities are known, 2 from then on."""
    unit: int = 1
    """How many output channels share the masks' patterns (``sparse.units``)."""

    @property
    def mask(self) -> Mask:
        """The mask of the server's model."""
        return self.mask_of(0)

    def support(self, params: Params) -> Mask:
        """Return the mask of the server's model, whatever the weights on it are."""
        return self.mask

    def mask_of(self, tier: int) -> Mask:
        """Return the mask of a device class."""
        like = {name: self.params[name] for name in self.sparse}
        return random_masks(int(self.seed), self.counts[tier], like, self.unit)

    def values(self, tier: int) -> Params:
        """Return the model's values on the mask of a device class."""
        return gather_values(self.params, self.mask_of(tier))

    def message(self, tier: int) -> dict[str, Tree]:
        """Return what the clients of a device class are sent: the values on their mask, and what they draw it from.

        That is seed and counts: some hundred bytes, whatever the model's size.
        """
        return {"mask": {"seed": self.seed, "counts": self.counts[tier]}, "params": self.values(tier)}

    def step(self, updates: Iterable[Update], server: ServerOptimizer, weighting: Weighting) -> MaskedState:
        """Return the state after the server's step towards the mean of the clients' values, on the mask."""
        target = scatter_values(mean(updates, weighting), self.mask)
        params, moments = server.step(self.params, target, self.moments)
        return replace(self, params=apply_mask(params, self.mask), moments=moments)
