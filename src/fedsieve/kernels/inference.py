"""Inference that computes with the non-zero weights alone.

A forward pass is a program made of a model's layers, whose maps hold sixteen samples side by side, or one sample alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fedsieve.kernels import library
from fedsieve.kernels.abi import (
    WORDS,
    ActivationOp,
    ConvolutionOp,
    CopyOp,
    GatherOp,
    LinearOp,
    MapPointer,
    NormOp,
    Operation,
    PackOp,
    PoolOp,
    Unfold,
    WindowOp,
    address,
    group_norm_memory,
)
from fedsieve.kernels.checks import Unsupported
from fedsieve.kernels.fusion import fuse_batchnorm
from fedsieve.kernels.graph import (
    ActivationLayer,
    ConcatenationLayer,
    FusedProduct,
    Graph,
    Layer,
    NormLayer,
    PoolLayer,
    Value,
)
from fedsieve.kernels.index import SparseIndex
from fedsieve.kernels.inputs import Inputs, split_examples
from fedsieve.kernels.program import Arena, Buffer, run_each
from fedsieve.kernels.single import COPY, inside_mask, line_buffer, place_of, window_op
from fedsieve.kernels.token_inference import TokenPredictor
from fedsieve.kernels.trace import read_graph
from fedsieve.types import Examples, InputError, apply_model, leaves, logits_of

STORAGES = {"fp32": 16, "bf16": 32}
"""How many samples lie side by side: a block, see ``native/abi.h``."""
ALONE = 12
"""As many samples are faster one by one than side by side in a block."""
SHARED = 8e6
"""As many multiply-adds of a pass are worth more than one thread."""
SMALL = 16
"""Positions of a map whose every tap is laid out on its own, where a sample is alone: whole cache lines to read."""


class Predictor:
    """Computes a model's logits in eval mode: a weight that is zero costs nothing. The model is copied, as it is now.

    ``batch`` samples at most run at once; ``storage="bf16"`` keeps the maps of more than sixteen in bfloat16. A model
    that the kernels do not know runs as it is, and ``reason`` says why, from the first call on.
    """

    def __init__(self, model: nn.Module, batch: int, storage: str = "fp32"):
        if batch < 1:
            raise InputError(f"batch must be at least 1, got {batch}")
        if storage not in STORAGES:
            raise InputError(f"storage must be one of {', '.join(STORAGES)}, got {storage!r}")
        self.model, self.batch, self.block = copy.deepcopy(model).eval(), batch, STORAGES[storage]
        self.reason: str | None = library.unavailable_reason()
        self._inputs: Inputs | None = None
        self._tokens: TokenPredictor | None = None

    def __call__(self, x: Examples) -> Tensor:
        """Return what the model makes of samples [n, ...], of any number. Raises InputError if they do not fit."""
        kinds = {torch.float32, torch.int64} | (set() if isinstance(x, Tensor) else {torch.bool})
        for one in leaves(x):
            if one.dim() < 1 + isinstance(x, Tensor) or one.dtype not in kinds or one.device.type != "cpu":
                kind = f"{list(one.shape)} of {one.dtype} on {one.device}"
                raise InputError(f"samples must be [n, ...] of torch.float32 on cpu, got {kind}")
        with torch.inference_mode(False), torch.no_grad():
            if (inputs := Inputs.of(x)) != self._inputs:
                self._prepare(inputs, x)
            if self.reason is not None:
                return torch.cat([logits_of(apply_model(self.model, part)) for part in split_examples(x, self.batch)])
            return self._tokens(x) if self._tokens else self._logits(leaves(x)[0].contiguous())

    def _prepare(self, inputs: Inputs, x: Examples) -> None:
        """Make what computes samples, by these as the first."""
        samples, shapes = min(len(leaves(x)[0]), self.batch), ", ".join(str([*shape]) for shape in inputs.shapes)
        args, kwargs = inputs.arguments([one[:1] for one in leaves(x)]) if samples else inputs.zeros(1)
        try:
            self.model(*args, **kwargs)
        except RuntimeError as error:
            raise InputError(f"the model takes no samples of shape {shapes}: {str(error).splitlines()[0]}") from None
        self.reason, self._passes = library.unavailable_reason(), dict[int, list[ForwardPass]]()
        self._inputs, self._tokens = inputs, None
        if self.reason is not None:
            return
        try:
            graph = read_graph(self.model, inputs, training=False)
            if graph.token_output is not None:
                self._tokens = TokenPredictor(graph, self.batch, self.block == STORAGES["bf16"])
                self._tokens.prepare(max(samples, 1))
                return
            self._graph = fuse_batchnorm(graph)
            if self._graph.fallbacks:
                raise Unsupported(f"the kernels do not know {', '.join(self._graph.fallbacks)}")
            self._team(_sizes(max(samples, 1), self.block)[0], 1)
        except Unsupported as error:
            self.reason = str(error)

    def _logits(self, x: Tensor) -> Tensor:
        out = torch.empty(len(x), self._graph.output.channels)
        for start in range(0, len(x), self.batch):
            end = min(start + self.batch, len(x))
            first, sizes = start, _sizes(end - start, self.block)
            while sizes:
                group = _group(sizes, library.get_num_threads())
                next_ = min(first + sum(group), end)
                self._run(x[first:next_], out[first:next_], group)
                first, sizes = next_, sizes[len(group) :]
        return out

    def _run(self, x: Tensor, out: Tensor, group: list[int]) -> None:
        """Compute the logits of samples by passes of one size, a thread each; a large one alone has all threads."""
        passes = self._team(group[0], len(group))
        for i, one in enumerate(passes):
            one.set_samples(x[i * group[0] :], out[i * group[0] :])
        if len(passes) == 1 and passes[0].multiply_adds >= SHARED:
            passes[0].program.run()
        else:
            run_each([one.program for one in passes])

    def _team(self, size: int, count: int) -> list[ForwardPass]:
        """Return as many forward passes of one size."""
        team = self._passes.setdefault(size, [])
        while len(team) < count:
            packed = size == STORAGES["bf16"]
            team.append(SinglePass(self._graph, 1) if size == 1 else ForwardPass(self._graph, size, packed))
        return team[:count]


def _sizes(samples: int, block: int) -> list[int]:
    """Return how many samples each forward pass is for. It does not depend on the threads, so that no bit does."""
    sizes: list[int] = []
    while samples > 0:
        sizes.append(1 if samples <= ALONE else 16 if samples <= 16 else block)
        samples -= sizes[-1]
    return sizes


def _group(sizes: list[int], threads: int) -> list[int]:
    """Return the first passes, of one size, that run at once: one, by all threads, where that uses more of them."""
    group = [size for size in sizes[:threads] if size == sizes[0]]
    return group if 2 * len(group) > threads else group[:1]


class ForwardPass:
    """A forward pass of up to ``samples`` samples: the program that computes their logits, from and to where they are.

    Sixteen samples lie side by side, or thirty-two if ``packed``: the lanes are samples.
    """

    alone = False

    def __init__(self, graph: Graph, samples: int, packed: bool = False):
        value, output = graph.input, graph.output
        self.graph, self.samples, self.arena = graph, samples, Arena(packed)
        first = self.buffer(value)
        self.arena.step(lambda: self.copy(value, first, 0), first)
        buffers = {value: first}
        for layer in graph.layers:
            out = self.buffer(layer.output)
            self._lower(layer, [buffers[value] for value in layer.inputs], out)
            buffers[layer.output] = out
        self.arena.step(lambda: self.copy(output, buffers[output], 1), buffers[output])
        self.program = self.arena.settle()
        self.begin, self.end = self.program.steps[0], self.program.steps[-1]
        products = [layer for layer in graph.layers if isinstance(layer, FusedProduct)]
        self.multiply_adds = samples * sum(len(p.values) * p.output.height * p.output.width for p in products)

    def _lower(self, layer: Layer, ins: list[Buffer], out: Buffer) -> None:
        if isinstance(layer, FusedProduct):
            self.product(layer, ins, out)
        elif isinstance(layer, NormLayer):
            self.arena.step(lambda: _norm(layer, ins, out, self.alone), *ins, out)
        elif isinstance(layer, ActivationLayer):
            self.arena.step(lambda: ActivationOp.of(layer.function, ins[0], out), *ins, out)
        elif isinstance(layer, ConcatenationLayer):
            for x, value, first in zip(ins, layer.inputs, layer.starts, strict=True):
                self.arena.step(lambda x=x, v=value, n=first: self.place(v, x, layer.output, out, n), x, out)  # type: ignore[misc]
        elif isinstance(layer, PoolLayer):
            self.arena.step(lambda: self.pool(layer, ins[0], out), *ins, out)
        else:
            self.arena.step(lambda: self.flatten(layer.inputs[0], ins[0], out), *ins, out)

    def set_samples(self, x: Tensor, logits: Tensor) -> None:
        """Set which samples the next run is of, the first of ``x``, contiguous, and where it writes their logits."""
        assert isinstance(self.begin, PackOp)
        assert isinstance(self.end, PackOp)
        self.begin.plain, self.end.plain = x.data_ptr(), logits.data_ptr()
        self.begin.samples = self.end.samples = min(len(x), self.samples)

    def buffer(self, value: Value) -> Buffer:
        """Return a new buffer, with the halo that the value's readers need."""
        blocks = -(-self.samples // (32 if self.arena.packed else 16))
        return Buffer(value.channels, blocks, value.height, value.width, self.graph.halo(value))

    def product(self, layer: FusedProduct, ins: list[Buffer], out: Buffer) -> None:
        """Add a product: each tap of the kernel is a shift by whole blocks."""
        x = ins[0]

        def fill(index: SparseIndex) -> None:
            mask = torch.zeros(layer.shape, dtype=torch.bool)
            mask.view(-1)[layer.positions] = True
            index.fill_values(layer.values, layer.positions, mask, x, self.arena.packed)

        index = _index(layer, ("block", x.channel, x.line, x.halo), layer.stride, fill)
        self.arena.step(lambda: _gather(layer, index, ins, out), *ins, out)

    def pool(self, layer: PoolLayer, x: Buffer, out: Buffer) -> Operation:
        """Return a pool."""
        return PoolOp(in_=x, out=out, **vars(layer.window))

    def flatten(self, value: Value, x: Buffer, out: Buffer) -> Operation:
        """Return the change from maps to features."""
        return CopyOp(x, out, CopyOp.FLATTEN)

    def place(self, value: Value, x: Buffer, of: Value, out: Buffer, first: int) -> Operation:
        """Return the copy of a value into another's channels from ``first`` on."""
        return CopyOp(x, out.part(first, x.channels), CopyOp.COPY)

    def copy(self, value: Value, x: Buffer, out: int) -> Operation:
        """Return the copy of samples into a buffer, or out of it, which ``set_samples`` completes."""
        return PackOp(x, unpack=out)


class SinglePass(ForwardPass):
    """One sample alone: the lanes are positions, and features are positions of one channel."""

    alone = True

    def set_samples(self, x: Tensor, logits: Tensor) -> None:
        """Set which sample the next run is of, and where it writes its logits."""
        assert isinstance(self.begin, WindowOp)
        assert isinstance(self.end, WindowOp)
        self.begin.in_, self.end.out = x.data_ptr(), logits.data_ptr()

    def buffer(self, value: Value) -> Buffer:
        """Return a new buffer."""
        return line_buffer(1, value.channels) if value.flat else line_buffer(value.channels, value.height * value.width)

    def product(self, layer: FusedProduct, ins: list[Buffer], out: Buffer) -> None:
        """Add a product: a convolution's input is unfolded first, for each tap to lie at one distance."""
        if layer.output.flat:
            index = _index(layer, ("single",), 1, lambda index: index.fill_taps(layer.values, layer.positions, 1, [0]))
            vectors = address(index.row), address(index.offset), index.value, address(layer.bias)

            def linear() -> LinearOp:
                places = [x.data for x in ins]
                return LinearOp(places[0], out.data, *vectors, *places[1:], rows=index.outer, relu=int(layer.relu))

            self.arena.step(linear, *ins, out)
            return
        k, s, height, width = layer.kernel, layer.stride, layer.output.height, layer.output.width
        every = height * width <= SMALL
        lines, rows = (k, height) if every else (min(k, s), height + (k - 1) // s)
        at_ = [(i, 0) if every else (i % s, i // s) for i in range(k)]
        taps = [((j * lines + line) * rows + down) * width for line, down in at_ for j in range(k)]
        wide = line_buffer(1, k * lines * rows * width + WORDS)  # a last vector may reach beyond
        wide = ins[0] if (k, s, layer.padding) == (1, 1, 0) else wide
        key = "single", wide.channel, *taps
        index = _index(layer, key, 1, lambda i: i.fill_taps(layer.values, layer.positions, wide.channel, taps))

        def convolution() -> ConvolutionOp:
            gather, x = _gather(layer, index, ins, out), layer.inputs[0]
            gather.in_.width = wide.width
            mask = None if wide is ins[0] else inside_mask(layer, lines, rows, width)
            places = ins[0].data, address(mask), ins[0].channel, wide.channel
            sizes = x.channels, x.height, x.width, lines, rows, width
            op = ConvolutionOp(Unfold(*places, *sizes, k, s, layer.padding), gather)
            op.mask = mask  # kept alive
            return op

        self.arena.slack = max(self.arena.slack, (layer.padding + 1) * (layer.inputs[0].width + 1) + 4 * WORDS)
        self.arena.step(convolution, *ins, out)

    def pool(self, layer: PoolLayer, x: Buffer, out: Buffer) -> Operation:
        """Return a pool."""
        value = layer.inputs[0]
        return window_op(layer.window, value, layer.output, place_of(value, x), place_of(layer.output, out))

    def flatten(self, value: Value, x: Buffer, out: Buffer) -> Operation:
        """Return the change from maps to features."""
        return window_op(COPY, value, value, place_of(value, x), (out.data, value.height * value.width))

    def place(self, value: Value, x: Buffer, of: Value, out: Buffer, first: int) -> Operation:
        """Return the copy of a value into another's channels from ``first`` on."""
        start, channel = place_of(of, out)
        return window_op(COPY, value, value, place_of(value, x), ((start or 0) + 4 * first * channel, channel))

    def copy(self, value: Value, x: Buffer, out: int) -> Operation:
        """Return the copy of a sample into a buffer, or out of it, which ``set_samples`` completes."""
        places = [(None, value.height * value.width), place_of(value, x)]
        return window_op(COPY, value, value, places[out], places[1 - out])


def _index(
    layer: FusedProduct, key: tuple[object, ...], stride: int, fill: Callable[[SparseIndex], None]
) -> SparseIndex:
    """Return the index of a product for a layout, which passes of the same size share."""
    if key not in layer.indices:
        layer.indices[key] = SparseIndex(*layer.shape[:3], stride, layer.padding, len(layer.values), layer.groups)
        fill(layer.indices[key])
    index: SparseIndex = layer.indices[key]
    return index


def _gather(layer: FusedProduct, index: SparseIndex, ins: list[Buffer], out: Buffer) -> GatherOp:
    op = index.gather(ins[0], out)
    op.bias, op.relu = address(layer.bias), int(layer.relu)
    if len(ins) == 2:
        op.add = MapPointer(ins[1])
    return op


def _norm(layer: NormLayer, ins: list[Buffer], out: Buffer, alone: bool) -> NormOp:
    """Return a GroupNorm, or a BatchNorm by running statistics, a sum, a ReLU, that no product stands before."""
    op = NormOp(ins[0], out, *map(MapPointer, ins[1:]), relu=int(layer.relu))
    if isinstance(norm := layer.module, nn.GroupNorm):
        op.memory = group_norm_memory(norm.num_groups, out.channels, out.blocks, bool(out.packed))  # kept alive
        op.set_group_norm(norm, *op.memory)
        op.gamma, op.beta, op.positions = (
            address(norm.weight),
            address(norm.bias),
            int(alone) * layer.output.height * layer.output.width,
        )
    elif norm is not None:
        op.statistics = torch.empty(2, len(norm.weight))  # kept alive
        vectors = norm.weight, norm.bias, *layer.running, *op.statistics
        op.gamma, op.beta, op.running_mean, op.running_var, op.mean, op.invstd = map(address, vectors)
        op.eps = norm.eps
    return op
