"""SWAT's layers in the kernels: dense weights, of which the largest make the lists anew at every step.

Raihan & Aamodt 2020, as ``sparse.layers`` has it. The kept inputs are found when backward needs them: BatchNorm keeps
what they are computed from in any case, so that nothing more is saved.
"""

from __future__ import annotations

from ctypes import pointer
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedsieve.kernels.cuts import Cutting, huge, zeros
from fedsieve.kernels.graph import Product
from fedsieve.kernels.program import Keep, Noted, Top, Wide, at, native
from fedsieve.kernels.weights import Lists
from fedsieve.sparse.layers import SwatConv2d, SwatLinear
from fedsieve.sparse.topk import topk_count

if TYPE_CHECKING:
    from fedsieve.kernels.arena import Room
    from fedsieve.kernels.plan import Plan
    from fedsieve.kernels.weights import Weights

SLACK = 1.5
"""Room for entries beyond the exact cut: a threshold lets more pass, as weights grow."""
UNEVEN = 3
"""Room for the entries of a block of output channels, times an even share of all."""
CACHE = 400_000
"""Bytes of a transposed gradient that stay in the second cache while a group of samples is multiplied."""


class Dense(Lists):
    """A SWAT layer: ``dense`` holds its weights in blocks of ``fs_lanes()`` output channels."""

    def __init__(self, layer: Product, momentum: bool):
        super().__init__(layer)
        assert isinstance(layer.module, SwatConv2d | SwatLinear)
        self.density, self.period = layer.module.cut_weight.density, layer.module.cut_weight.period
        self.lanes = int(native().fs_lanes())
        out, inner, k, _ = self.shape
        self.blocks = -(-out // self.lanes)
        self.dense = self._blocks(inner * k * k)
        self.velocity = self._blocks(inner * k * k) if momentum else None
        self.k = topk_count(self.density, layer.module.weight.numel())
        self.capacity = min(layer.module.weight.numel(), int(SLACK * self.k) + 64)
        self.offset, self.back_offset = (torch.empty(self.capacity, dtype=torch.int32) for _ in range(2))
        self.values, self.back_values = torch.empty(self.capacity), torch.empty(self.capacity)
        self.value, self.back_value = at(self.values), at(self.back_values)
        self.tally = torch.empty(self.blocks * (self.lanes + layer.stride**2 * inner), dtype=torch.int32)
        self.top = Top(
            dense=at(self.dense), out=out, in_=inner, kernel=k, stride=layer.stride, padding=layer.padding,
            row=at(self.row), offset=at(self.offset), value=self.value, capacity=self.capacity, tally=at(self.tally),
        )  # fmt: skip
        if layer.stride == 1:
            self._note()

    def _blocks(self, each: int) -> Tensor:
        held = huge(self.blocks * each * self.lanes).view(torch.float32)
        return held.view(self.blocks, each, self.lanes).zero_()

    def _note(self) -> None:
        """Let those who write the weights note which reach the threshold: they write them in order, at stride 1."""
        room = UNEVEN * self.k // self.blocks + self.lanes * 9
        self.marks = torch.zeros(self.blocks, len(self.dense[0]), dtype=torch.int32)
        self.noted = zeros(self.blocks * (room + self.lanes))
        self.counts = torch.full((self.blocks,), -1, dtype=torch.int32)
        self.top.noted = Noted(marks=at(self.marks), value=at(self.noted), count=at(self.counts), room=room)

    def read(self, weights: Weights) -> None:
        """Take the module's weights."""
        out, inner, k, _ = self.shape
        padded = torch.zeros(self.blocks * self.lanes, inner * k * k)
        padded[:out] = self.layer.module.weight.reshape(out, -1)
        self.dense.copy_(padded.view(self.blocks, self.lanes, -1).transpose(1, 2))
        if self.top.noted.marks:
            self.counts.fill_(-1)

    def write(self, weights: Weights) -> None:
        """Give them back."""
        self.layer.module.weight.copy_(self.plain(self.dense))

    def momentum(self, _: Tensor) -> Tensor:
        """Return a copy of the velocity."""
        assert self.velocity is not None
        return self.velocity.clone()

    def move(self, _: Tensor, own: Tensor) -> None:
        """Take such a copy back."""
        assert self.velocity is not None
        self.velocity.copy_(own)

    def plain(self, blocked: Tensor) -> Tensor:
        """Return numbers in blocks as the module has them."""
        flat = blocked.transpose(1, 2).reshape(self.blocks * self.lanes, -1)[: self.shape[0]]
        return flat.view_as(self.layer.module.weight)

    def forward(self, plan: Plan, x: Room, out: Room) -> None:
        """Add the cut of the weights, and the forward product."""
        self.top.channel, self.top.line, self.top.shift = x.channel, x.line, x.halo - self.layer.padding
        forwards = out.height * out.width * (1 + plan.moving[self.layer.inputs[0]])
        plan.cut(Cutting(self.top, self.period, lambda _: self.k, lambda n: n * forwards))
        self.top.noted.threshold = self.top.cut.threshold
        plan.arena.step(lambda: self.top)
        plan.arena.step(lambda: self.gather(plan, x, out), x, out)

    def backward(self, plan: Plan, x: Room, g: Room) -> None:
        """Add the cut of the inputs, and the weights' gradient and step."""
        layer, value = self.layer, self.layer.output
        halo = plan.reach(layer)
        line, plane = value.width + 2 * halo, (value.width + 2 * halo) * (value.height + 2 * halo)
        group = max(1, min(plan.batch, CACHE // (plane * self.lanes * 4)))
        group = group // 16 * 16 if group >= 16 else group
        groups, kinds = -(-plan.batch // group), layer.stride**2
        scratch = plan.scratch
        scratch.need(
            lists=x.channels * x.height * x.width * plan.batch,
            starts=x.channels * groups * kinds + 1,
            blocks=self.blocks * plan.batch * plane * self.lanes,
            sums=self.dense[0].numel(),
        )
        keep = Keep(groups=groups, group=group, stride=layer.stride, line=line, plane=plane, corner=halo * (line + 1))
        each = x.channels * x.height * x.width
        plan.cut(
            Cutting(keep, self.period, lambda n: topk_count(self.density, n * each), lambda n: self.products / each)
        )

        def kept() -> Keep:
            keep.in_ = plan.arena.map(x)
            keep.start, keep.position, keep.value = at(scratch.start), at(scratch.position), at(scratch.value)
            return keep

        def wide(phase: int) -> Wide:
            op = Wide(grad=plan.arena.map(g), halo=halo, blocks=at(scratch.block), kernel=layer.kernel, phase=phase)
            op.padding, op.dense, op.velocity = layer.padding, at(self.dense), at(self.velocity)
            op.from_, op.noted = pointer(keep), self.top.noted
            plan.wide.append(op)
            return op

        plan.arena.step(kept, x)
        plan.arena.step(lambda: wide(0), g)
        plan.arena.step(lambda: wide(1), g)

    def input_gradient(self, plan: Plan, g: Room) -> None:
        """Let the cut of the weights fill the lists of the input's gradient, too."""
        top = self.top
        top.back_channel, top.back_line, top.back_halo = g.channel, g.line, g.halo
        top.back_row, top.back_offset, top.back_value = at(self.back_row), at(self.back_offset), self.back_value
