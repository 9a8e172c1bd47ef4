"""Robust aggregation: bounds on what an update may change, and means that a few odd updates cannot move far.

A bound is held before anything is averaged (``server.admission``). A mean stands before the method's own: it passes the
updates on, clipped one by one, or one in place of all. So it fits every method whose clients send values at the same
positions, and refuses the others.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import median, median_low
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fedsieve.types import Expected, InputError, Method, RoundContext, Update
from fedsieve.types.contract import Norms
from fedsieve.types.errors import check_interval
from fedsieve.types.method import expected_of

FEW = 3
"""Of fewer updates one that lies may be the median."""
CHUNK = 2**20
"""Coordinates that are sorted at a time."""

Limits: TypeAlias = tuple[float, ...]
"""Bounds on ``Norms``, as many as there are: the first two, or all."""


@dataclass(frozen=True)
class Off:
    """No bound on an update's norm."""


@dataclass(frozen=True)
class Fixed:
    """An update is refused if its weights change by more than ``norm``, or its running statistics by ``statistics``."""

    norm: float = 10.0
    """The largest Euclidean norm of a change of weights."""
    statistics: float = 1000.0
    """The largest Euclidean norm of a change of BatchNorm's running statistics."""

    def __post_init__(self) -> None:
        check_positive("bound.norm", self.norm)
        check_positive("bound.statistics", self.statistics)


@dataclass(frozen=True)
class Multiple:
    """An update is refused if a norm of it is above ``times`` the running median, that of the last ones taken.

    The norms are two, of weights and of running statistics, and each has its median. The first round has none
    before it: its bound is ``times`` the median of its own norms, the largest left out as long as they are above it.
    """

    times: float = 3.0
    """How many times the median a norm may be."""
    window: int = 100
    """How many updates the median is taken over."""

    def __post_init__(self) -> None:
        _check_running(self.times, self.window)

    def limits(self, norms: list[Norms]) -> Limits:
        """Return the bounds after updates of these norms."""
        weights, others, *_ = zip(*norms, strict=True)
        return self.times * median(weights), self.times * median(others)

    def first(self, norms: list[Norms]) -> Limits:
        """Return the bounds of a first round, whose updates have these norms."""
        while True:
            limit = self._first([one[0] for one in norms])
            limits = limit, self._first([one[1] for one in norms if one[0] <= limit])
            short = [one for one in norms if within(one, limits)]
            if len(short) == len(norms):
                return limits
            norms = short

    def _first(self, norms: list[float]) -> float:
        rising = sorted(norms)
        limits = [self.times * median(rising[: k + 1]) for k in range(len(rising))]
        return next((limits[k] for k in reversed(range(len(rising))) if rising[k] <= limits[k]), math.inf)


@dataclass(frozen=True)
class Loose:
    """An update is refused if it changes the model ``times`` as much as is usual, and by more than the model itself.

    That is so much that no honest client does it. It is held of norm and largest element, of weights and of running
    statistics: usual is the running median of each, that of the last updates taken. Before there are ``FEW`` of them,
    the bound is ``times`` the model itself, and running statistics, whose scale is the data's, have none. Where most
    of a round's updates are longer than ever, training went there, and none of them lies: see ``widened``.
    """

    times: float = 100.0
    """How many times the median a norm may be."""
    window: int = 100
    """How many updates the median is taken over."""

    def __post_init__(self) -> None:
        _check_running(self.times, self.window)

    def limits(self, norms: list[Norms], model: Norms) -> Limits:
        """Return the bounds after updates of these norms, for a model of those; a model of zeros counts as 1."""
        own = [max(1.0, norm) for norm in model]
        if len(norms) < FEW:
            return self.times * own[0], math.inf, self.times * own[2], math.inf
        usual = map(median, zip(*norms, strict=True))
        return tuple(max(self.times * middle, least) for middle, least in zip(usual, own, strict=True))

    def widened(self, limits: Limits, norms: list[Norms]) -> Limits:
        """Return a round's bounds, at least ``times`` the median of all its updates, of an even number the lower one.

        So half of them may lie. One update alone widens nothing.
        """
        if len(norms) < 2:
            return limits
        usual = map(median_low, zip(*norms, strict=True))
        return tuple(max(limit, self.times * middle) for limit, middle in zip(limits, usual, strict=True))


Bound: TypeAlias = Off | Fixed | Multiple | Loose


@dataclass(frozen=True)
class Plain:
    """The method's own mean, weighted as the method weights."""


@dataclass(frozen=True)
class Clipped:
    """The method's own mean, weighted as ever, of updates shortened where they are longer than ``norm``.

    Running statistics are shortened by themselves, to ``statistics``.

    Sun et al. 2019, "Can You Really Backdoor Federated Learning?", Sec. 3: norm thresholding, ``d / max(1, |d| / M)``.
    """

    norm: float = 10.0
    """The Euclidean norm that a change of weights is shortened to."""
    statistics: float = 1000.0
    """The Euclidean norm that a change of BatchNorm's running statistics is shortened to."""

    def __post_init__(self) -> None:
        check_positive("mean.norm", self.norm)
        check_positive("mean.statistics", self.statistics)


@dataclass(frozen=True)
class Median:
    """The coordinate-wise median, of an even number the mean of the middle two; every client counts alike.

    Yin et al. 2018, "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates", Definition 1.
    """


@dataclass(frozen=True)
class Trimmed:
    """The coordinate-wise mean without the ``share`` largest and the ``share`` smallest; every client counts alike.

    Yin et al. 2018, "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates", Definition 2. Of m
    values ``ceil(share * m)`` go on either side, but never all.
    """

    share: float = 0.1
    """The share of the clients that is left out at either end."""

    def __post_init__(self) -> None:
        check_interval("mean.share", self.share, "[0, 0.5)")


Mean: TypeAlias = Plain | Clipped | Median | Trimmed


def robust_updates(mean: Mean, updates: Iterable[Update], expected: Expected) -> Iterable[Update]:
    """Return what the method's own mean is to be taken of: for median and trimmed mean, one update for all.

    The updates stream through, but for median and trimmed mean, which hold all of a round's.
    """
    if isinstance(mean, Plain):
        return updates
    if isinstance(mean, Clipped):
        return (_clipped(update, (mean.norm, mean.statistics), expected) for update in updates)
    return _one(mean, updates)


def check_fit(
    method: Method[Any], state: Any, contexts: Sequence[RoundContext], mean: Mean, bound: Bound, private: bool
) -> None:
    """Raise InputError unless a method's clients send what the bound and the mean can judge."""
    if isinstance(mean, Plain) and isinstance(bound, Off | Loose):
        return
    what, kind = ("bound", type(bound)) if isinstance(mean, Plain) else ("mean", type(mean))
    name = kind.__name__.lower()
    if method.expected(state, contexts[0]) is None:
        raise InputError(
            f"{what}={name} needs to know what {method.name}'s clients send: give it a function expected "
            f"(docs/how-to/method.md)"
        )
    if private:
        raise InputError(
            f"{what}={name} cannot be private: {method.name} accounts for the plain sum of all answers, "
            f"and each alone has only a share of the noise: use mean=plain and bound=loose, which leaves them alone"
        )
    if isinstance(mean, Plain):
        return
    every = [expected_of(method, state, context) for context in contexts]
    own = every[0].client_chosen()
    if own or (method.tiers or 1) > 1 or len({_layout(one) for one in every}) > 1:
        why = (
            f"every client chooses its own positions ({own[0]}, ...)"
            if own
            else "device classes hold different weights"
        )
        raise InputError(
            f"mean={name} needs clients that send values at the same positions, but of {method.name} {why}: "
            f"use mean=plain, with bound=multiple if need be"
        )


def _layout(expected: Expected) -> tuple[tuple[str, tuple[int, ...]], ...]:
    return tuple((name, tuple(getattr(entry, "base", torch.empty(())).shape)) for name, entry in expected.tree.items())


def _clipped(update: Update, most: tuple[float, float], expected: Expected) -> Update:
    norms = expected.norms(update.tree)
    if norms is None or within(norms, most):
        return update
    factors = (most[0] / max(norms[0], most[0]), most[1] / max(norms[1], most[1]))
    return replace(update, tree=expected.scale_changes(update.tree, factors))


def _one(mean: Median | Trimmed, updates: Iterable[Update]) -> Iterator[Update]:
    """Yield one update that stands for all, of all their examples; none for none."""
    if not (every := [*updates]):
        return
    m = len(every)
    drop = (m - 1) // 2 if isinstance(mean, Median) else min(math.ceil(round(mean.share * m, 6)), (m - 1) // 2)
    first = every[0]
    tree = {name: _inner([u.tree[name] for u in every], drop) for name in first.tree}
    yield Update(tree, sum(update.n for update in every), clients=m)


def _inner(values: list[Any], drop: int) -> Any:
    """Return the mean of each coordinate without its ``drop`` largest and smallest, summed in float64."""
    like = values[0]
    if not isinstance(like, Tensor):
        return like
    columns = zip(*(v.reshape(-1).split(CHUNK) for v in values), strict=True)
    inner = slice(drop, len(values) - drop)
    parts = [torch.stack(rows).sort(dim=0).values[inner].double().mean(0) for rows in columns]
    return torch.cat(parts).view(like.shape).to(like.dtype) if like.numel() else like


def within(norms: Norms, limits: Limits) -> bool:
    """Tell whether no norm is above its bound."""
    return all(norm <= limit for norm, limit in zip(norms, limits, strict=False))


def _check_running(times: float, window: int) -> None:
    check_interval("bound.times", times, "[1, 1e6]")
    if window < 1:
        raise InputError(f"bound.window must be at least 1, got {window}")


def check_positive(what: str, norm: float) -> None:
    """Raise InputError unless a bound on a norm is positive and finite."""
    if not 0 < norm <= 1e18:
        raise InputError(f"{what} must be positive and at most 1e18, got {norm}")
