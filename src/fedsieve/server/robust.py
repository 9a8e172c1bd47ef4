"""Robust aggregation: means that a few odd updates cannot move far.

A mean stands before the method's own: it passes the updates on, clipped one by one, or one in place of all. So it fits
every method whose clients send values at the same positions, and refuses the others.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fedsieve.server.admission import Bound, Loose, Off, check_positive, within
from fedsieve.types import Expected, InputError, Method, RoundContext, Update
from fedsieve.types.method import expected_of

CHUNK = 2**20
"""Coordinates that are sorted at a time."""


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
        if not 0 <= self.share < 0.5:
            raise InputError(f"mean.share must lie in [0, 0.5), got {self.share}")


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
    what = "mean" if not isinstance(mean, Plain) else "bound"
    chosen = type(mean if what == "mean" else bound).__name__.lower()
    if method.expected(state, contexts[0]) is None:
        raise InputError(
            f"{what}={chosen} needs to know what {method.name}'s clients send: give it a function expected "
            f"(docs/how-to/method.md)"
        )
    if private:
        raise InputError(
            f"{what}={chosen} cannot be private: {method.name} accounts for the plain sum of all answers, "
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
            f"mean={chosen} needs clients that send values at the same positions, but of {method.name} {why}: "
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
    yield Update(tree, sum(update.n for update in every))


def _inner(values: list[Any], drop: int) -> Any:
    """Return the mean of each coordinate without its ``drop`` largest and smallest, summed in float64."""
    like = values[0]
    if not isinstance(like, Tensor):
        return like
    columns = zip(*(v.reshape(-1).split(CHUNK) for v in values), strict=True)
    parts = [_kept_mean(torch.stack(rows), drop) for rows in columns]
    return torch.cat(parts).view(like.shape).to(like.dtype) if like.numel() else like


def _kept_mean(rows: Tensor, drop: int) -> Tensor:
    return rows.sort(dim=0).values[drop : len(rows) - drop].double().mean(0)
