"""Which trainings the kernels take: by a rule, never by a clock, so that every engine chooses, and computes, the same.

``dense`` is PyTorch, ``sparse`` the kernels whatever it costs, ``auto`` the kernels where they are faster.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedsieve.kernels import library
from fedsieve.kernels.checks import Unsupported
from fedsieve.kernels.estimate import count_work, density, kernel_seconds, padded, pytorch_seconds, shared
from fedsieve.kernels.graph import Graph, ProductLayer
from fedsieve.kernels.inference import Predictor
from fedsieve.kernels.inputs import Inputs, split_examples
from fedsieve.kernels.loss import OTHERS, of_graph
from fedsieve.kernels.token_inference import TokenPredictor
from fedsieve.kernels.tokens import EmbeddingLayer
from fedsieve.kernels.trace import read_graph
from fedsieve.kernels.trainer import Trainer
from fedsieve.kernels.updates import UpdateRule
from fedsieve.sparse.effective import effective_weights
from fedsieve.sparse.layers import PowerConv2d, PowerLinear, SwatConv2d, SwatLinear
from fedsieve.types import Data, Device, Examples, InputError, Mask, apply_model, leaves, logits_of
from fedsieve.types.optimizers import SGD, AdamW

CHOICES = ("auto", "sparse", "dense")
WORTH = 0.45
"""A ``Predictor`` is faster where it multiplies less than this share of what PyTorch does."""
ANY_TARGETS = partial(F.cross_entropy)
"""Cross-entropy by PyTorch: of logits with any targets that it takes."""
LASTING = 1e9
"""Multiply-adds of a dense test that outlast the making of a ``Predictor``."""
LITTLE = 4e6
"""Multiply-adds of a sample up to which a ``Predictor`` is faster than PyTorch at any density: calls count there."""
FEW = 16
"""Samples whose outputs are compared."""


def check_choice(choice: str) -> None:
    """Raise InputError for a choice that there is not."""
    if choice not in CHOICES:
        raise InputError(f"unknown kernels {choice!r}; they are {', '.join(CHOICES)}")


class Kernels:
    """What a worker trains its resident model with: keeps the last trainer, for clients alike."""

    def __init__(self, model: nn.Module, choice: str, where: str = "cpu"):
        check_choice(choice)
        self.model, self.choice, self.where = model, choice, where
        self._graphs: dict[tuple[tuple[int, ...] | Inputs, torch.dtype], Graph | str] = {}
        self._last: tuple[_Purpose, Trainer] | None = None

    def check(self, data: Data, optimizer: Any = None) -> None:
        """Read the model for such examples; raise InputError if the kernels must, but cannot train it."""
        self._allowed(_not_known(data, optimizer) or self.graph(*_inputs(data)))

    def _allowed(self, graph: Graph | str) -> Graph | str:
        if isinstance(graph, str) and self.choice == "sparse":
            raise InputError(f"--kernels sparse cannot be: {graph}; choose auto or dense")
        return graph

    def graph(self, shape: tuple[int, ...] | Inputs, dtype: torch.dtype = torch.float32) -> Graph | str:
        """Return the model as the kernels read it for such inputs, or why they cannot."""
        if self.where != "cpu":
            return f"the kernels compute on CPUs, not on {self.where}"
        if why := library.unavailable_reason():
            return f"there are no native kernels: {why}"
        if (shape, dtype) not in self._graphs:
            self._graphs[shape, dtype] = _read(self.model, shape, dtype)
        return self._graphs[shape, dtype]

    def take(self, device: Device, mask: Mask) -> SparseSteps | str:
        """Return the steps of a training on a mask; or why they are dense, "" where that was asked for."""
        if self.choice == "dense":
            return ""
        graph = not_native(device) or self.graph(*_inputs(device.data))
        if device.model is not self.model:
            graph = "the method trains a model of its own"
        elif not isinstance(graph, str) and (unknown := _unknown(graph, mask)):
            graph = f"the mask of {unknown} is not one of a plain layer's weights"
        elif not isinstance(graph, str) and not of_graph(device.loss, graph):
            graph = OTHERS
        if isinstance(graph := self._allowed(graph), str):
            return graph
        if self.choice == "auto" and (why := not_worth(graph, mask, len(device.data), device.batch)):
            return why
        return SparseSteps(self, graph, device, mask)

    def trainer(self, graph: Graph, device: Device, mask: Mask) -> tuple[Trainer, bool]:
        """Return a trainer on a mask, and whether it is new, with the model's weights: else it is as it was left."""
        purpose = self._purpose(graph, device, mask)
        if self._last and self._last[0].equals(purpose):
            return self._last[1], False
        self._last = None  # whose memory serves the next
        lr, momentum, decay = device.lr, device.momentum, device.weight_decay
        trainer = Trainer(
            self.model, mask, purpose.batch, lr=lr, momentum=momentum, weight_decay=decay, graph=graph,
            norm_weight_decay=device.norm_weight_decay, loss=purpose.loss,
            optimizer=device.optimizer, clip_norm=device.clip_norm, correction=device.correction,
        )  # fmt: skip
        self._last = purpose, trainer
        return trainer, True

    def fits(self, graph: Graph, device: Device, mask: Mask) -> bool:
        """Tell whether the last trainer is the one that would be returned."""
        return self._last is not None and self._last[0].equals(self._purpose(graph, device, mask))

    def _purpose(self, graph: Graph, device: Device, mask: Mask) -> _Purpose:
        modules = self.model.named_modules()
        power = {n: m for n, m in modules if isinstance(m, PowerConv2d | PowerLinear) and m.a > 1}
        absorbing = {f"{name}.weight": module.weight.detach() != 0 for name, module in power.items()}
        frozen = [p for p in graph.layers if isinstance(p, ProductLayer) and not p.trained]
        absorbing |= {product.weight_name: product.module.weight.detach() != 0 for product in frozen}
        batch = padded(min(device.batch, len(device.data)))
        if graph.token_output is not None:  # lanes are tokens: smaller batches compute less
            batch = min(device.batch, batch)
        rule = UpdateRule.of(device.optimizer, device.momentum, device.clip_norm, device.correction)
        return _Purpose(graph, batch, _loss(device), (rule, device.norm_weight_decay), mask | absorbing)


@dataclass(frozen=True)
class _Purpose:
    """What a trainer is for."""

    graph: Graph
    batch: int
    loss: Callable[[Any, Any], Tensor]
    rule: tuple[UpdateRule, bool]
    """How steps are taken, and whether norms are decayed."""
    mask: Mask
    """And the non-zeros of th, which are absorbing, and of frozen weights."""

    def equals(self, other: _Purpose) -> bool:
        same = self.graph is other.graph and self.loss is other.loss
        same = same and (self.batch, self.rule) == (other.batch, other.rule)
        mine, theirs = self.mask, other.mask
        same = same and mine.keys() == theirs.keys()
        return same and all(own is theirs[name] or torch.equal(own, theirs[name]) for name, own in mine.items())


class SparseSteps:
    """The steps of one training, by the kernels."""

    def __init__(self, kernels: Kernels, graph: Graph, device: Device, mask: Mask):
        self.kernels, self.graph, self.device = kernels, graph, device
        self.trainer, new = kernels.trainer(graph, device, mask)
        if not new:
            self.trainer.begin(device.lr, device.momentum, device.weight_decay, device.correction)
        weights = dict(kernels.model.named_parameters()) if device.correction and device.correction.mu else {}
        self.start = {id(w): w.detach() * mask.get(name, 1) for name, w in weights.items()}
        """The weights that the training starts from, where gradients are corrected by the way from there."""

    def epoch(self, order: Tensor, draws: Tensor | None) -> Iterator[Tensor]:
        """Train on an epoch's batches, and yield their losses."""
        for x, y in self.device.batches(order, draws):
            yield self.trainer.step(x, y)

    def put_(self, mask: Mask) -> None:
        """Go on from the model's weights on another mask; weights that were not on the old one start at rest."""
        if self.kernels.fits(self.graph, self.device, mask):
            self.trainer.read_()
            return
        state = self.trainer.state()
        del self.trainer  # its memory, too, serves the next
        self.trainer, _ = self.kernels.trainer(self.graph, self.device, mask)
        self.trainer.set_state(state)
        if self.start:
            self.trainer.weights.put("start", self.start)

    def write_(self) -> None:
        """Give the model its weights."""
        self.trainer.write_()

    def multiply_adds(self, n: int) -> tuple[float, float]:
        """Return those of the last step, on ``n`` samples: at the real densities, and were all dense."""
        return self.trainer.lowered.multiply_adds(n)

    @property
    def bytes(self) -> int:
        """What the trainer keeps in memory."""
        return self.trainer.bytes


def not_native(device: Device) -> str:
    """Return which of a training's settings the kernels do not have, "" where they have all."""
    if why := _not_known(device.data, device.optimizer):
        return why
    powers = [m for m in device.model.modules() if isinstance(m, PowerConv2d | PowerLinear) and m.a > 1]
    if device.correction and device.correction.shift and any(bool((m.weight == 0).any()) for m in powers):
        return "the method's correction brings weights back that are zero, of powerpropagation's layers"
    return ""


def _not_known(data: Data, optimizer: Any) -> str:
    """Return why the kernels cannot train on such inputs, or by an optimizer; "" where they can."""
    several = not isinstance(data.x, Tensor)
    for x in leaves(data.x):
        if not (x.is_floating_point() or x.dtype in (torch.uint8, torch.int64) or (several and x.dtype == torch.bool)):
            return f"the kernels take floating inputs, pixels in uint8, or tokens in int64, not {_named(x.dtype)}"
    if optimizer is not None and not isinstance(optimizer, SGD | AdamW):
        return "the kernels take steps of SGD, Adam and AdamW"
    return ""


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _inputs(data: Data) -> tuple[tuple[int, ...] | Inputs, torch.dtype]:
    """Return the shape and the type of the inputs that a model is given."""
    if not isinstance(data.x, Tensor):
        return Inputs.of(data.x), torch.float32
    return data.shape, torch.int64 if data.x.dtype == torch.int64 else torch.float32


def _loss(device: Device) -> Callable[[Any, Any], Tensor]:
    """Return the loss: that of PyTorch where targets are not labels of classes, all that the native one knows."""
    y = device.data.y
    labels = isinstance(y, Tensor) and y.dtype == torch.int64 and y.dim() == 1 and not bool((y < 0).any())
    return device.loss if labels or device.loss is not F.cross_entropy else ANY_TARGETS


def _read(model: nn.Module, shape: tuple[int, ...] | Inputs, dtype: torch.dtype) -> Graph | str:
    """Return the model's graph, or why training it by the kernels would be another training."""
    if effective_weights(model):
        return "weights are computed wherever the model uses them (activations=where_possible)"
    for name, module in model.named_modules():
        if isinstance(module, PowerConv2d | PowerLinear) and module.a == 1 and module.prune:
            return f"at a = 1 pruned weights come back, and {name} would keep other activations at every step"
    try:
        return read_graph(model, shape, dtype)
    except Unsupported as error:
        return str(error)


def _unknown(graph: Graph, mask: Mask) -> str | None:
    """Return the first mask that the kernels would not heed."""
    products = [layer for layer in graph.layers if isinstance(layer, ProductLayer)]
    weights = {p.weight_name for p in products if not isinstance(p.module, SwatConv2d | SwatLinear)}
    embeddings = [layer for layer in graph.layers if isinstance(layer, EmbeddingLayer)]
    weights = (weights | graph.unused.keys() | {e.parameter for e in embeddings}) - {
        e.parameter for e in embeddings if e.tied
    }
    fallbacks = tuple(f"{name}." for name in graph.fallbacks)
    return next((name for name in mask if name not in weights and not name.startswith(fallbacks)), None)


def not_worth(graph: Graph, mask: Mapping[str, Tensor], examples: int, batch: int) -> str:
    """Return why an epoch takes PyTorch less time than the kernels; "" where it does not."""
    count, (whole, rest) = count_work(graph, partial(density, mask), partial(shared, mask)), divmod(examples, batch)
    batches = [(whole, batch), (1, rest)] if rest else [(whole, batch)]
    ours, theirs = (sum(n * way(count, size) for n, size in batches) for way in (kernel_seconds, pytorch_seconds))
    if ours < theirs:
        return ""
    if count["elsewhere"] > count["dense products"]:
        return f"most of the work is in layers that only PyTorch knows ({', '.join(graph.fallbacks)})"
    return f"a step would take the kernels {ours / theirs:.2g} times as long as PyTorch"


class Inference:
    """What computes a resident model's outputs in eval mode: its non-zero weights alone, where that is faster.

    ``choice`` is auto, or dense for the model itself; sparse is auto, as it is about training.
    """

    def __init__(self, model: nn.Module, choice: str):
        check_choice(choice)
        self.model, self.choice = model, choice
        self._graphs: dict[Inputs, Graph | None] = {}

    @torch.no_grad()
    def of(self, x: Examples, examples: int, batch: int) -> Callable[[Any], Any] | None:
        """Return what computes the outputs of batches, with the weights as they are now, of ``examples`` like ``x``.

        None where that is best done by the model: the kernels do not know it, or would not be faster, or give other
        outputs for ``x`` than the model does.
        """
        kinds = {torch.float32, torch.int64} | (set() if isinstance(x, Tensor) else {torch.bool})
        plain = all(
            one.dtype in kinds and one.device.type == "cpu" and one.dim() > isinstance(x, Tensor) for one in leaves(x)
        )
        if self.choice == "dense" or not plain or library.unavailable_reason():
            return None
        graph = self._graph(Inputs.of(x))
        output = graph and graph.token_output
        if graph is None or not _faster(graph, examples) or (output and not output.only):
            return None
        predictor = self._tokens(graph, batch) if output else Predictor(self.model, batch)
        few = split_examples(x, FEW)[0]
        try:
            if not close(predictor(few), logits_of(apply_model(self.model, few))):
                return None
        except Unsupported:
            return None
        return (lambda x: output.whole(predictor(x))) if output else predictor

    def _tokens(self, graph: Graph, batch: int) -> Callable[[Any], Tensor]:
        """Return passes of the resident model itself: to export it takes longer than a test."""
        passes = TokenPredictor(graph, batch)

        def predict(x: Any) -> Tensor:
            with torch.inference_mode(False), torch.no_grad():
                return passes(x)

        return predict

    def _graph(self, inputs: Inputs) -> Graph | None:
        if inputs not in self._graphs:
            try:
                graph = read_graph(self.model, inputs, training=False)
            except Unsupported:
                graph = None
            self._graphs[inputs] = graph if graph and not graph.fallbacks else None
        return self._graphs[inputs]


def _faster(graph: Graph, examples: int) -> bool:
    """Tell whether a ``Predictor`` of the model, made first, takes less time than the model for so many examples."""
    layers = [layer for layer in graph.layers if isinstance(layer, ProductLayer)]
    dense = sum(layer.multiply_adds for layer in layers)
    real = sum(layer.multiply_adds * density({layer.weight_name: layer.module.weight}, layer) for layer in layers)
    return examples * dense >= LASTING and (dense <= LITTLE or real < WORTH * dense)


def close(a: Tensor, b: Tensor) -> bool:
    """Tell whether outputs are those of the same model, rounded differently; NaN and infinity are where they are."""
    size = b[b.isfinite()].abs().max() if b.isfinite().any() else b.new_zeros(())
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-3, atol=float(1e-3 * size), equal_nan=True)
