"""Clients of the package, run beside the reference: what chance decided in their training is written down for it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from fedsieve.client import training
from fedsieve.sparse.regrowth import GrowthShare
from fedsieve.types import Data, Device, Mask, Method, Params, Tree, Update
from fedsieve.wire import decode, encode
from oracles import reference as ref
from oracles import reference_sparse as sparse
from oracles.side_by_side import (
    BATCH,
    LR,
    ROUNDS,
    chance,
    dataset,
    fresh,
)

NAMES = tuple(f"{layer}.weight" for layer in ref.LAYERS)
INNER = ("conv2.weight", "fc1.weight")
"""The policy of the masked methods here: not every layer, so that the others are seen to stay dense."""
PATTERN = "conv2,fc1"


@dataclass(frozen=True)
class Watched(Data):
    """Training examples that note the order in which they are used."""

    order: list[np.ndarray] = field(default_factory=list)

    def batch(self, index: Any, change: Any = None) -> tuple[torch.Tensor, torch.Tensor]:
        self.order.append(index.numpy().copy())
        return super().batch(index, change)


def numpy_masks(given: Mask) -> dict[str, sparse.Support]:
    return {name: own.numpy().copy() for name, own in given.items()}


@dataclass
class MaskUpdate:
    """One mask update of the package: what it started from, and what it drew."""

    before: dict[str, sparse.Support]
    p: float
    after: dict[str, sparse.Support]


@dataclass
class Seen:
    """What chance decided in one client's training: the batches, the first mask, and every update of it."""

    batches: list[np.ndarray] = field(default_factory=list)
    updates: list[MaskUpdate] = field(default_factory=list)

    def answer(self, client: int, t: int, weight_decay: float = 0.0) -> ref.Answer:
        """Return the reference's orders for the same client."""
        data = dataset()[client]
        x, y = data.x.numpy().astype(np.float64), data.y.numpy()
        return ref.Answer(x, y, self.batches, ref.learning_rate(max(t, 0), ROUNDS, *LR), weight_decay)


class Watch:
    """Runs clients of the package and writes down what chance decided."""

    def __init__(self, method: Method[Any], patch: pytest.MonkeyPatch, weight_decay: float = 0.0, epochs: int = 1):
        self.method, self.weight_decay, self.epochs = method, weight_decay, epochs
        self.resident, self.memory = method.prepare(fresh()), dict[int, dict[str, torch.Tensor]]()
        self.seen: dict[tuple[int, int], Seen] = {}
        self._updates: list[MaskUpdate] = []
        original = training.prune_regrow

        def prune_regrow(
            weights: Params, mask: Mask, p: float, share: GrowthShare, g: torch.Generator, unit: int
        ) -> Any:
            before = numpy_masks(mask)
            left, after = original(weights, mask, p, share, g, unit)
            self._updates.append(MaskUpdate(before, p, numpy_masks(after)))
            return left, after

        patch.setattr(training, "prune_regrow", prune_regrow)

    def client(self, down: Tree, client: int, t: int) -> Update:
        """Return a client's update in round t = 0 .. (-1: the warm-up)."""
        data, self._updates = dataset()[client], []
        watched = Watched(data.x, data.y)
        device = Device(
            model=self.resident,
            data=watched,
            validation=data.subset(torch.arange(0)),
            lr=ref.learning_rate(max(t, 0), ROUNDS, *LR),
            epochs=self.epochs,
            batch=BATCH,
            momentum=0.0,
            weight_decay=self.weight_decay,
            rng=chance(t + 1, client),
            round=t + 1,
            rounds=ROUNDS,
            memory=self.memory.setdefault(client, {}),
        )
        update = self.method.client(decode(encode(down)), device)
        self.seen[t, client] = Seen(watched.order, self._updates)
        return replace(update, tree=decode(encode(update.tree)))


def replay(seen: Seen, by: str, done: list[bool], unit: int = 1) -> sparse.Regrow:
    """Return the package's own choice of positions, after checking its numbers against the exact division."""
    updates = iter(seen.updates)

    def regrow(weights: ref.State, left: dict[str, sparse.Support], counts: sparse.Counts) -> dict[str, sparse.Support]:
        after = next(updates).after
        share = sparse.shares(weights, left, by)
        before, then = sparse.units(left, unit), sparse.units(after, unit)
        room = {name: int((~kept).sum()) for name, kept in before.items()}
        exact = sparse.regrowth(sum(counts.values()), share, room)
        grown = {name: int(then[name].sum() - kept.sum()) for name, kept in before.items()}
        assert sum(grown.values()) == sum(counts.values())
        for name, kept in left.items():
            assert not (kept & ~after[name]).any(), f"{name}: another weight was pruned"
            assert abs(grown[name] - exact[name]) < 1, name
        done.append(True)
        return after

    return regrow


def uniform_counts(state: ref.State, d: str, unit: int = 1) -> sparse.Counts:
    sizes = {name: math.ceil(len(state[name]) / unit) * state[name][0].size for name in INNER}
    return {name: math.ceil(Fraction(d) * size) for name, size in sizes.items()}


def counts(given: sparse.Masks, unit: int = 1) -> sparse.Counts:
    return {name: int(own.sum()) for name, own in sparse.units(given, unit).items()}
