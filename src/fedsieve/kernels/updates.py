"""The optimizer's step on all trained numbers, as operations; before it, what is done to their gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from fedsieve.kernels.abi import AdamOp, AdjustOp, ClipOp, Operation, SgdOp, address
from fedsieve.kernels.weights import SwatWeights, Weights
from fedsieve.types import Correction
from fedsieve.types.optimizers import SGD, AdamW


@dataclass(frozen=True)
class UpdateRule:
    """What the steps of trainings have in common that one trainer is made for."""

    optimizer: SGD | AdamW = SGD()
    momentum: bool = False
    """Whether SGD has momentum."""
    clip_norm: float = 0.0
    """The norm that gradients are cut to; 0: they are not."""
    proximal: bool = False
    """Whether a part of the way from the start of the training is added to gradients."""
    shifted: bool = False
    """Whether a vector is added to gradients."""

    @classmethod
    def of(
        cls, optimizer: SGD | AdamW | None, momentum: float, clip_norm: float, correction: Correction | None
    ) -> UpdateRule:
        """Return the rule of a training's settings."""
        sgd = not isinstance(optimizer, AdamW)
        kind = (bool(correction.mu), bool(correction.shift)) if correction else (False, False)
        return cls(optimizer or SGD(), bool(momentum) and sgd, clip_norm, *kind)

    @property
    def moments(self) -> int:
        """How many numbers the optimizer keeps of each weight."""
        return 2 if isinstance(self.optimizer, AdamW) else int(self.momentum)

    @property
    def changes(self) -> bool:
        """Whether gradients are changed before the step."""
        return bool(self.clip_norm or self.proximal or self.shifted)

    @property
    def apart(self) -> bool:
        """Whether SWAT's layers cannot take their steps along with their gradients."""
        return self.changes or self.optimizer != SGD()


class Updates:
    """A step on all vectors, powerpropagation's layers with their powers, and on SWAT's layers if it is taken apart.

    ``norms`` are the vectors that weight decay does not reach.
    """

    def __init__(self, weights: Weights, rule: UpdateRule, norms: Sequence[Tensor]):
        self.weights, self.rule, self.norms = weights, rule, norms
        self.done, self.lr = 0, 0.0
        """The steps of the training so far, which Adam counts."""
        self.steps, self.norm_steps = list[SgdOp | AdamOp](), list[SgdOp | AdamOp]()
        self.changes, self.clips = list[AdjustOp](), list[ClipOp]()
        parts = [*self._parts()]
        sums = [-(-part.count // AdjustOp.PART) for part in parts]
        self.sums = torch.zeros(sum(sums) if rule.clip_norm else 0, dtype=torch.float64)
        for storage in weights.storages:
            storage.start = torch.zeros_like(storage.trained) if rule.proximal else None
            storage.shift = torch.zeros_like(storage.trained) if rule.shifted else None
        for i, part in enumerate(parts):
            (self.norm_steps if part.norm else self.steps).append(self._step(part))
            if rule.changes:
                self.changes.append(self._change(part, sum(sums[:i])))
            if rule.clip_norm:
                own = address(part.of.grad, part.start), part.count
                self.clips.append(ClipOp(*own, address(self.sums), len(self.sums), rule.clip_norm))

    @property
    def ops(self) -> list[Operation]:
        """All operations, in order."""
        return [*self.changes, *self.clips, *self.steps, *self.norm_steps]

    def set(self, lr: float, momentum: float, weight_decay: float, mu: float) -> None:
        """Begin a training with these numbers."""
        self.done, self.lr = 0, lr
        for op in (*self.steps, *self.norm_steps):
            if isinstance(op, SgdOp):
                op.rate, op.momentum, op.decay = lr, momentum, weight_decay
            elif isinstance(self.rule.optimizer, AdamW) and self.rule.optimizer.decoupled:
                op.keep = 1 - lr * weight_decay
            else:
                op.decay = weight_decay
        for op in self.norm_steps:
            op.decay = 0
            if isinstance(op, AdamOp):
                op.keep = 1
        for change in self.changes:
            change.mu = mu

    def begin(self) -> None:
        """Set what changes from step to step."""
        self.done += 1
        optimizer = self.rule.optimizer
        if isinstance(optimizer, AdamW):
            rate = self.lr / (1 - optimizer.beta1**self.done)
            root = (1 - optimizer.beta2**self.done) ** -0.5
            for op in (*self.steps, *self.norm_steps):
                op.rate, op.root = rate, root

    def _parts(self) -> Iterator[_Part]:
        """Yield what has a step of its own: norms, powers, entries and small vectors, SWAT's layers."""
        weights = self.weights
        powers = [own for own in weights.masked if own.power != 1]
        ends = {end for own in powers for end in (own.start, own.start + own.count)}
        starts = {weights.small[id(vector)]: vector.numel() for vector in self.norms}
        ends |= starts.keys() ^ {start + count for start, count in starts.items()}  # where none follows another
        ends |= {end for start, count in weights.frozen for end in (start, start + count)}
        for start, end in pairwise(sorted({0, weights.sparse, weights.w.numel()} | ends)):
            power = next((own.power for own in powers if own.start <= start < own.start + own.count), 1.0)
            if not any(first <= start < first + count for first, count in weights.frozen):
                yield _Part(weights, start, end - start, power, any(s <= start < s + n for s, n in starts.items()))
        for storage in weights.storages:
            if storage is not weights and self.rule.apart:
                yield _Part(storage, 0, storage.trained.numel())

    def _step(self, part: _Part) -> SgdOp | AdamOp:
        rule, weights = self.rule, self.weights
        w, grad, *moments = (address(x, part.start) for x in (part.of.trained, part.of.grad, *part.of.moments))
        optimizer = rule.optimizer
        if isinstance(optimizer, AdamW):
            op: SgdOp | AdamOp = AdamOp(w, *moments, grad, part.count)
            op.fresh_mean, op.fresh_square, op.eps = 1 - optimizer.beta1, 1 - optimizer.beta2, optimizer.eps
            op.keep = 1
        else:
            op = SgdOp(w, moments[0] if moments else None, grad, part.count, nesterov=int(optimizer.nesterov))
        op.power, op.chained = part.power, int(rule.changes)
        if part.of is weights and part.start < weights.sparse and weights.effective is not weights.w:
            op.value = address(weights.effective, part.start)
        return op

    def _change(self, part: _Part, first: int) -> AdjustOp:
        """Return what is done to a gradient; the sums of its squares stand from the ``first`` on."""
        places = (address(x, part.start) for x in (part.of.grad, part.of.trained, part.of.start, part.of.shift))
        sums = address(self.sums, first) if self.rule.clip_norm else None
        return AdjustOp(*places, part.count, part.power, 0, sums)


@dataclass
class _Part:
    """Numbers that have a step of their own: ``count`` of a storage's, from ``start`` on."""

    of: Weights | SwatWeights
    start: int
    count: int
    power: float = 1.0
    norm: bool = False
