"""From a model's layers to the operations of a training step, and the memory that they need.

What a step needs is known before it runs. What BatchNorm and ReLU gave is computed again for backward, not kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedsieve.kernels.abi import (
    ActivationOp,
    CopyOp,
    LossOp,
    MapPointer,
    NormBackwardOp,
    NormOp,
    PackOp,
    PoolOp,
    address,
    group_norm_memory,
)
from fedsieve.kernels.fallback import Fallback
from fedsieve.kernels.gradients import Gradients
from fedsieve.kernels.graph import (
    ActivationLayer,
    ConcatenationLayer,
    FallbackLayer,
    FlattenLayer,
    Graph,
    Layer,
    NormLayer,
    PoolLayer,
    ProductLayer,
    Value,
)
from fedsieve.kernels.library import get_num_threads
from fedsieve.kernels.loss import TorchLoss, token_ignored
from fedsieve.kernels.products import MaskedProduct, SwatProduct
from fedsieve.kernels.program import Buffer, Program, Step, trim_memory
from fedsieve.kernels.token_ops import TokenLossOp
from fedsieve.kernels.token_steps import TokenSteps
from fedsieve.kernels.tokens import ElementProductLayer, LayerNormLayer
from fedsieve.kernels.updates import UpdateRule, Updates
from fedsieve.kernels.weights import MaskedWeights, Weights
from fedsieve.types import Examples


class TrainingStep(Gradients):
    """The forward and backward passes of a graph, and an optimizer's step, as a program."""

    def __init__(
        self,
        graph: Graph,
        weights: Weights,
        batch: int,
        packed: bool,
        low_memory: bool,
        loss: Callable[[Any, Any], Tensor],
        rule: UpdateRule,
        norms: Sequence[Tensor],
    ):
        """Make it; ``norms`` are the vectors that weight decay does not reach."""
        super().__init__(graph, weights, batch, packed, low_memory)
        self._recomputed: set[Value] = set()
        self.group_norms = {
            layer: group_norm_memory(layer.module.num_groups, layer.output.channels, self.blocks, packed)
            for layer in graph.layers
            if isinstance(layer, NormLayer) and isinstance(layer.module, nn.GroupNorm)
        }
        self.token_steps = TokenSteps(self)
        self.fallbacks = {layer: Fallback(self, layer) for layer in graph.layers if isinstance(layer, FallbackLayer)}
        self.products = {
            layer: MaskedProduct(self, layer, own) if isinstance(own, MaskedWeights) else SwatProduct(self, layer, own)
            for layer, own in weights.layers.items()
        }
        self.loss_value = torch.zeros(())
        self.loss = self._loss_of(loss)
        self._lower()
        if low_memory:
            trim_memory()
        self.scratch.allocate()
        self.program = self.arena.settle()
        self.fit_widths(self.program)
        self.updates = Updates(weights, rule, norms)
        takes = [take for own in self.products.values() if isinstance(own, MaskedProduct) for take in own.takes]
        self.program.steps += [*self.updates.ops, *takes]
        self.start = Program([*takes])
        """What must run after the weights were read: the copies of the entries for the input gradients."""

    def run(self, step: int, x: Sequence[Tensor], y: Examples) -> Tensor:
        """Do the step of that number on samples, a tensor [n, ...] for each input, and targets; return their loss."""
        self.begin(step, len(x[0]), get_num_threads())
        self.updates.begin()
        self.token_steps.begin(x)
        if isinstance(self.loss, TorchLoss):
            self.loss.target = y
        else:
            assert isinstance(y, Tensor)
            self.loss.label = y.data_ptr()
        self.program.run()
        return self.loss_value.clone()

    def set_optimizer(self, lr: float, momentum: float, weight_decay: float, mu: float = 0) -> None:
        """Set what the optimizer does in the training that begins."""
        self.updates.set(lr, momentum, weight_decay, mu)
        for op in self.wide:
            op.rate, op.momentum, op.decay = lr, momentum, weight_decay

    def _loss_of(self, loss: Callable[[Any, Any], Tensor]) -> LossOp | TokenLossOp | TorchLoss:
        """Return the native cross-entropy, of samples or of tokens, or what lets PyTorch compute the loss."""
        graph, output, value = self.graph, self.graph.token_output, self.loss_value
        if output is None and loss is F.cross_entropy and graph.model_output is None:
            return self.sized_(LossOp(loss=address(value)))
        ignored = token_ignored(loss, graph)
        if ignored is None:
            return TorchLoss(self, loss, value)
        each = torch.zeros(-(-self.batch * graph.output.width // 32) * 32)
        self.token_steps.memory.append(each)
        op = TokenLossOp(loss=address(value), each=address(each), ignored=ignored)
        return self.counted(op, graph.output.width)

    def _lower(self) -> None:
        graph = self.graph
        if graph.unused:
            self.arena.step(lambda: self._no_gradients)
        if graph.input.plain is None:
            first = self.activations[graph.input] = self.buffer(graph.input, graph.halo(graph.input))
            self.arena.step(lambda: self._pack(first), first)
        for layer in graph.layers:
            out = self.activations[layer.output] = self.buffer(layer.output, graph.halo(layer.output))
            self._forward(layer, out)
        outputs = [self.activations[value] for value in graph.outputs]
        grads = [self.buffer(value, self.gradient_halo(value)) for value in graph.outputs]
        self.gradients |= dict(zip(graph.outputs, grads, strict=True))
        self.arena.step(lambda: self._loss(outputs, grads), *outputs, *grads)
        for layer in reversed(graph.layers):
            gradient = self.gradients.pop(layer.output, None)
            if gradient is not None and graph.needs_grad[layer.output]:
                self._backward(layer, gradient)

    def _no_gradients(self) -> None:
        """Clear those of unused parameters, to which the last step may have added something."""
        for parameter in self.graph.unused.values():
            self.weights.view(parameter, self.weights.grad).zero_()

    def _pack(self, first: Buffer) -> PackOp:
        op = self.sized_(PackOp(map=first, unpack=0))
        self.token_steps.inputs.append((op, "plain", self.graph.input))
        return op

    def _loss(self, outputs: list[Buffer], grads: list[Buffer]) -> Step:
        if isinstance(self.loss, TorchLoss):
            return self.loss.lower(outputs, grads)
        (self.loss.logits,), (self.loss.grad,) = outputs, grads
        return self.loss

    def _forward(self, layer: Layer, out: Buffer, again: bool = False) -> None:
        """Add a layer's forward; ``again``: as it was, for backward."""
        ins = [self.activations[value] for value in layer.inputs]
        if isinstance(layer, ProductLayer):
            self.products[layer].forward(ins[0], out)
        elif isinstance(layer, NormLayer):
            self.arena.step(lambda: self.sized_(self._norm(layer, ins, out, 1 + again), layer.output), *ins, out)
        elif isinstance(layer, PoolLayer):
            self.arena.step(lambda: PoolOp(in_=ins[0], out=out, **vars(layer.window)), ins[0], out)
        elif isinstance(layer, FlattenLayer):
            self.arena.step(lambda: CopyOp(ins[0], out, CopyOp.FLATTEN), ins[0], out)
        elif isinstance(layer, ActivationLayer):
            self.arena.step(lambda: ActivationOp.of(layer.function, ins[0], out), ins[0], out)
        elif isinstance(layer, ConcatenationLayer):
            for x, first in zip(ins, layer.starts, strict=True):
                self.arena.step(lambda x=x, first=first: CopyOp(x, out.part(first, x.channels), CopyOp.COPY), x, out)  # type: ignore[misc]
        elif isinstance(layer, FallbackLayer):
            self.arena.step(lambda: self.fallbacks[layer].forward(ins, out), *ins, out)
        elif again and isinstance(layer, LayerNormLayer):
            self.token_steps.normalize(layer, ins[0], out)
        else:
            self.token_steps.forward(layer, ins, out)

    def _backward(self, layer: Layer, g: Buffer) -> None:
        if isinstance(layer, ProductLayer):
            self._product_backward(layer, g)
        elif isinstance(layer, NormLayer):
            self._norm_backward(layer, g)
        elif isinstance(layer, PoolLayer):
            self._pool_backward(layer, g)
        elif isinstance(layer, FlattenLayer):
            self.deliver(layer.inputs[0], lambda to: CopyOp(g, to, CopyOp.UNFLATTEN), g)
        elif isinstance(layer, ConcatenationLayer):
            self._concatenation_backward(layer, g)
        elif isinstance(layer, ActivationLayer):
            self.recompute(layer.inputs[0])
            x = self.activations[layer.inputs[0]]
            self.change(layer.inputs[0], g, lambda to: ActivationOp.of(layer.function, x, to, g), x)
        elif isinstance(layer, FallbackLayer):
            needed = [value for value in layer.inputs if self.graph.needs_grad[value]]
            fresh = [self.buffer(value) for value in needed]
            self.arena.step(lambda: self.fallbacks[layer].backward(g, fresh), g, *fresh)
            for value, buffer in zip(needed, fresh, strict=True):
                self.deliver(value, lambda to, b=buffer: CopyOp(b, to, CopyOp.COPY), buffer)  # type: ignore[misc]
        else:
            self.token_steps.backward(layer, g)

    def _product_backward(self, layer: ProductLayer, g: Buffer) -> None:
        x, out = layer.inputs[0], self.activations[layer.output]

        def bias_backward() -> NormBackwardOp:
            """Return what a bias and a ReLU behind a product do to the gradient, in place."""
            op = NormBackwardOp(of=NormOp(y=out, out=out, training=1, relu=int(layer.relu)), grad=g, grad_y=g)
            op.grad_beta = self.weights.bias_address(layer, self.weights.grad)
            return self.sized_(op, layer.output)

        if layer.relu or (layer.module.bias is not None and layer.module.bias.requires_grad):
            self.arena.step(bias_backward, out, g)
        if layer.trained:
            self.recompute(x)
            self.products[layer].backward(self.activations[x], g)
        if self.graph.needs_grad[x]:
            self.products[layer].input_gradient(g, *self.gradient(x))

    def _concatenation_backward(self, layer: ConcatenationLayer, g: Buffer) -> None:
        for value, first in zip(layer.inputs, layer.starts, strict=True):
            if self.graph.needs_grad[value]:
                self._part_backward(g, first, *self.gradient(value))

    def _part_backward(self, g: Buffer, first: int, into: Buffer, more: bool) -> None:
        mode = CopyOp.ADD if more else CopyOp.COPY
        self.arena.step(lambda: CopyOp(g.part(first, into.channels), into, mode), g, into)

    def _pool_backward(self, layer: PoolLayer, g: Buffer) -> None:
        x = layer.inputs[0]
        if not layer.window.average:
            self.recompute(x)
        into, more = self.gradient(x)
        values = (into, g) if layer.window.average else (self.activations[x], self.activations[layer.output])

        def make() -> PoolOp:
            op = PoolOp(*values, g, into, **vars(layer.window))
            op.backward, op.accumulate = 1, int(more)
            return op

        self.arena.step(make, *values, g, into)

    def _norm(self, layer: NormLayer, ins: list[Buffer], out: Buffer, training: int) -> NormOp:
        op, module = NormOp(ins[0], out, *map(MapPointer, ins[1:]), training=training), layer.module
        op.relu = int(layer.relu)
        if isinstance(module, nn.GroupNorm):
            op.set_group_norm(module, *self.group_norms[layer])
            op.gamma, op.beta = self.weights.address(module.weight), self.weights.address(module.bias)
        elif module is not None:
            stats = self.weights.stats[layer]
            op.mean, op.invstd, op.running_mean, op.running_var = (address(row) for row in stats)
            op.gamma, op.beta = self.weights.address(module.weight), self.weights.address(module.bias)
            op.momentum, op.eps = module.momentum or 0, module.eps
        return op

    def _norm_backward(self, layer: NormLayer, g: Buffer) -> None:
        y, out, weights = layer.inputs[0], self.activations[layer.output], self.weights
        if layer.module is not None:
            self._recompute_first(y)
        ins = [self.activations[v] for v in layer.inputs]

        def make(to: Buffer) -> NormBackwardOp:
            op = NormBackwardOp(of=self._norm(layer, ins, out, 1), grad=g, grad_y=to)
            if layer.module is not None:
                op.grad_gamma = weights.address(layer.module.weight, weights.grad)
                op.grad_beta = weights.address(layer.module.bias, weights.grad)
            return self.sized_(op, layer.output)

        used = [ins[0]] if layer.module is not None else []
        used += [out] if layer.relu and (len(ins) == 2 or layer.module is None) else []
        if len(ins) == 1:
            return self.change(y, g, make, *used)
        self.deliver(y, make, g, *used)
        self.hand_on(layer.inputs[1], g)

    def recompute(self, value: Value) -> None:
        """Compute a value again that forward did not keep: BatchNorm, sum and ReLU of what is kept."""
        maker = self.graph.maker(value)
        if self.low_memory and value.tokens and maker:
            self._recompute_tokens(maker, value)
        normed = isinstance(maker, NormLayer) and maker.module is not None and len(maker.inputs) <= 1 + self.low_memory
        if not normed or value in self._recomputed:
            return
        assert maker is not None
        self._recompute_first(maker.inputs[0])
        borrowed = {other for other in maker.inputs[1:] if other not in self._recomputed}
        for other in borrowed:
            self.recompute(other)
        self.activations[value] = self.buffer(value, self.graph.halo(value))
        self._forward(maker, self.activations[value], again=True)
        self._recomputed = (self._recomputed - borrowed) | {value}

    def _recompute_tokens(self, maker: Layer, value: Value) -> None:
        """Compute again what LayerNorm, activations, and products that only activations read gave."""
        own = self.products.get(maker) if isinstance(maker, ProductLayer) else None
        only = all(isinstance(user, ActivationLayer | ElementProductLayer) for user in self.graph.users(value))
        wide = isinstance(own, MaskedProduct) and only and value is not self.graph.output
        if value in self._recomputed or not (wide or isinstance(maker, LayerNormLayer | ActivationLayer)):
            return
        self.recompute(maker.inputs[0])
        x, out = self.activations[maker.inputs[0]], self.buffer(value)
        self.activations[value] = out
        self._recomputed.add(value)
        if isinstance(own, MaskedProduct):
            self.arena.step(lambda: own.gather(x, out), x, out)
        else:
            self._forward(maker, out, again=True)

    def _recompute_first(self, value: Value) -> None:
        """With low memory, compute the first layer's product again for its BatchNorm: it is large, and little work."""
        maker, model_input = self.graph.maker(value), self.graph.input
        own = self.products[maker] if isinstance(maker, ProductLayer) else None
        if not self.low_memory or not isinstance(own, MaskedProduct) or value in self._recomputed:
            return
        if own.layer.inputs[0] is model_input:
            x, out = self.activations[model_input], self.buffer(value, self.graph.halo(value))
            self.activations[value], self._recomputed = out, self._recomputed | {value}
            self.arena.step(lambda: own.gather(x, out), x, out)
