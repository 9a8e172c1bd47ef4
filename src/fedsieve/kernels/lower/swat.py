"""A SWAT layer in a training step: dense weights, of which the largest are indexed anew at every step.

Raihan & Aamodt 2020, as ``sparse.layers`` has it. The largest inputs are found when backward needs them: BatchNorm
keeps what they are computed from in any case, so that nothing more is saved.
"""

from __future__ import annotations

from ctypes import pointer

from fedsieve.kernels.abi import Candidates, KeepOp, TopOp, WideOp, address
from fedsieve.kernels.graph import ProductLayer
from fedsieve.kernels.lower.context import StepContext
from fedsieve.kernels.lower.product import Product
from fedsieve.kernels.lower.selection import Selection
from fedsieve.kernels.lower.weights import SwatWeights
from fedsieve.kernels.program import Buffer
from fedsieve.sparse.masks import topk_count

CACHE = 400_000
"""Bytes of a transposed gradient that stay in the second cache while a group of samples is multiplied."""


class SwatProduct(Product):
    """A product with the largest of a layer's weights, and their dense gradient and step."""

    def __init__(self, step: StepContext, layer: ProductLayer, own: SwatWeights):
        super().__init__(step, layer, own.index)
        self.own, index, (out, inner, k, _) = own, own.index, layer.shape
        self.top = TopOp(
            dense=address(own.dense), out=out, in_=inner, kernel=k, stride=layer.stride, padding=layer.padding,
            row=address(index.row), offset=address(index.offset), value=index.value, capacity=own.capacity,
            tally=address(own.tally),
        )  # fmt: skip
        if own.counts is not None:
            places = address(own.marks), address(own.candidates), address(own.counts)
            self.top.candidates = Candidates(*places, own.most)

    def forward(self, x: Buffer, out: Buffer) -> None:
        """Add the selection of the weights, and the forward product."""
        top, step = self.top, self.step
        top.channel, top.line, top.shift = x.channel, x.line, x.halo - self.layer.padding
        products = out.height * out.width * (1 + step.graph.needs_grad[self.layer.inputs[0]])
        step.selections.append(Selection(top, self.own.period, lambda _: self.own.k, lambda n: n * products))
        top.candidates.threshold = top.top_k.threshold
        step.arena.step(lambda: top)
        step.arena.step(lambda: self.gather(x, out), x, out)

    def backward(self, x: Buffer, g: Buffer) -> None:
        """Add the selection of the inputs, and the weights' gradient and step."""
        layer, step, own, scratch = self.layer, self.step, self.own, self.step.scratch
        halo, value = layer.reach, layer.output
        line, plane = value.width + 2 * halo, (value.width + 2 * halo) * (value.height + 2 * halo)
        group = max(1, min(step.batch, CACHE // (plane * own.lanes * 4)))
        group = group // 16 * 16 if group >= 16 else group
        groups, each = -(-step.batch // group), x.channels * x.height * x.width
        scratch.need(
            lists=each * step.batch,
            starts=x.channels * groups * layer.stride**2 + 1,
            blocks=own.blocks * step.batch * plane * own.lanes,
            sums=own.dense[0].numel(),
        )
        keep = KeepOp(groups=groups, group=group, stride=layer.stride, line=line, plane=plane, corner=halo * (line + 1))
        products = layer.multiply_adds / each
        selection = Selection(keep, own.period, lambda n: topk_count(own.density, n * each), lambda _: products)
        step.selections.append(selection)

        def select() -> KeepOp:
            keep.in_ = x
            keep.start, keep.position, keep.value = map(address, (scratch.start, scratch.position, scratch.value))
            return keep

        def wide(phase: int) -> WideOp:
            op = WideOp(grad=g, halo=halo, blocks=address(scratch.block), kernel=layer.kernel, phase=phase)
            op.padding, op.dense, op.velocity = layer.padding, address(own.dense), address(own.velocity)
            op.from_, op.candidates = pointer(keep), self.top.candidates
            step.wide.append(op)
            return op

        step.arena.step(select, x)
        step.arena.step(lambda: wide(0), g)
        step.arena.step(lambda: wide(1), g)

    def fill_back(self, g: Buffer) -> None:
        """Let the selection of the weights fill the index of the input's gradient, too."""
        top, index = self.top, self.index
        top.back_channel, top.back_line, top.back_halo = g.channel, g.line, g.halo
        top.back_row, top.back_offset, top.back_value = (
            address(index.back_row),
            address(index.back_offset),
            index.back_value,
        )
