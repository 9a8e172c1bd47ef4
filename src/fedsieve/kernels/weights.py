"""What is trained, as the kernels store it: vectors of numbers, and the indices that the sparse products walk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from fedsieve.kernels.abi import address
from fedsieve.kernels.checks import Unsupported
from fedsieve.kernels.graph import FallbackLayer, Graph, NormLayer, ProductLayer
from fedsieve.kernels.index import SparseIndex
from fedsieve.kernels.library import native
from fedsieve.kernels.program import huge_pages, lazy_zeros
from fedsieve.kernels.tokens import EmbeddingLayer, LayerNormLayer, ScaleLayer, TokenProduct
from fedsieve.sparse.layers import PowerConv2d, PowerLinear, SwatConv2d, SwatLinear, powerprop_weight
from fedsieve.sparse.masks import topk_count

SLACK = 1.5
"""Memory for entries beyond the exact top-k: a threshold lets more pass, as weights grow."""
UNEVEN = 3
"""Memory for the candidates of a block of output channels, times an even share of all."""


class MaskedWeights:
    """The weights of a layer on a mask that stays as it is: ``count`` entries of all vectors from ``start`` on."""

    def __init__(self, layer: ProductLayer, mask: Tensor | None, start: int):
        module = layer.module
        power = module if isinstance(module, PowerConv2d | PowerLinear) else None
        self.layer, self.start, self.numel = layer, start, layer.numel
        own = slice(layer.first * layer.shape[1], layer.first * layer.shape[1] + self.numel)
        self.part = own if self.numel < module.weight.numel() else slice(None)
        """Which of the module's weights the layer has."""
        self.power, self.prune, self.cached = (power.a, power.prune, power.cached) if power else (1.0, False, False)
        if mask is None:
            whole = self.power == 1 and layer.trained
            mask = torch.ones(layer.shape, dtype=torch.bool) if whole else module.weight.detach() != 0
        if mask.numel() > self.numel:
            mask = mask[layer.first : layer.first + layer.shape[0]]
        self.transposed = isinstance(layer, TokenProduct) and layer.transposed
        self.mask = (mask.t() if self.transposed and mask.dim() == 2 else mask).detach().contiguous()
        """Needed until the index is filled."""
        self.count = int(self.mask.count_nonzero())
        self.index = SparseIndex(*layer.shape[:3], layer.stride, layer.padding, self.count, layer.groups)

    def positions(self) -> Tensor:
        """Return the flat positions of the entries in the module's weight, int64 [count]."""
        positions, (out, inner, _, _) = self.index.positions(), self.layer.shape
        return positions % inner * out + positions // inner if self.transposed else positions

    def read(self, weights: Weights) -> None:
        """Copy the module's weights, if it has any, into the vectors."""
        if self.layer.module.weight.stride(0) == 0:
            return
        own = slice(self.start, self.start + self.count)
        weights.w[own] = self.layer.module.weight.detach().reshape(-1)[self.part].index_select(0, self.positions())
        if weights.effective is not weights.w:
            weights.effective[own] = powerprop_weight(weights.w[own], self.power)

    def write(self, weights: Weights) -> None:
        """Copy the weights from the vectors into the module, zero off the mask."""
        weight = self.layer.module.weight
        if weight.stride(0) == 0:
            weight.data = torch.empty(weight.shape)
        flat = weight.view(-1)[self.part] if weight.is_contiguous() else torch.empty(self.numel)
        if self.count < self.numel:
            flat.zero_()
        flat.index_copy_(0, self.positions(), weights.w[self.start : self.start + self.count])
        if not weight.is_contiguous():
            weight.copy_(flat.view(weight.shape))

    def moments_of(self, weights: Weights) -> list[Tensor]:
        """Return the layer's moments, each [numel], 0 off the mask."""
        if not weights.moments:
            return []
        own, positions = slice(self.start, self.start + self.count), self.positions()
        return [torch.zeros(self.numel).index_copy_(0, positions, moment[own]) for moment in weights.moments]

    def set_moments(self, weights: Weights, moments: Sequence[Tensor]) -> None:
        """Take over the layer's moments, as far as the mask reaches."""
        for into, own in zip(weights.moments, moments, strict=True):
            self.put(into, own)

    def put(self, into: Tensor, values: Tensor | None) -> None:
        """Copy numbers of all weights, 0 of None, into a vector of all entries."""
        own = into[self.start : self.start + self.count]
        own.zero_() if values is None else own.copy_(values.reshape(-1)[self.part][self.positions()])

    def release(self) -> None:
        """Give the module a weight without memory, until ``write``."""
        if self.count < self.numel == self.layer.module.weight.numel():
            self.layer.module.weight.data = torch.zeros(()).expand(self.layer.module.weight.shape)


class SwatWeights:
    """A SWAT layer's weights: all in ``dense``, by blocks of ``fs_lanes()`` output channels; an index of the largest.

    At stride 1 whoever writes the weights records which reach the threshold (``marks``, ``candidates`` and, for each
    block, ``counts``; below 0 where nothing is known); not where the step is taken ``apart``, the gradient in ``grad``.
    """

    def __init__(self, layer: ProductLayer, moments: int, apart: bool):
        assert isinstance(layer.module, SwatConv2d | SwatLinear)
        self.layer, top_k = layer, layer.module.cut_weight
        self.density, self.period = top_k.density, top_k.period
        self.lanes, (out, inner, k, _) = int(native().fs_lanes()), layer.shape
        self.blocks, numel = -(-out // self.lanes), layer.module.weight.numel()
        self.dense = self._blocked(inner * k * k)
        self.moments = [self._blocked(inner * k * k) for _ in range(moments)]
        self.grad = self._blocked(inner * k * k) if apart else None
        self.start: Tensor | None = None
        self.shift: Tensor | None = None
        self.k = topk_count(self.density, numel)
        self.capacity = min(numel, int(SLACK * self.k) + 64)
        self.index = SparseIndex(out, inner, k, layer.stride, layer.padding, self.capacity)
        self.values, self.back_values = torch.empty(self.capacity), torch.empty(self.capacity)
        self.index.value, self.index.back_value = address(self.values), address(self.back_values)
        self.tally = torch.empty(self.blocks * (self.lanes + layer.stride**2 * inner), dtype=torch.int32)
        self.counts: Tensor | None = None
        if layer.stride == 1 and not apart:
            self.most = UNEVEN * self.k // self.blocks + self.lanes * 9
            self.marks = torch.zeros(self.blocks, inner * k * k, dtype=torch.int32)
            self.candidates = lazy_zeros(self.blocks * (self.most + self.lanes))
            self.counts = torch.full((self.blocks,), -1, dtype=torch.int32)

    def _blocked(self, each: int) -> Tensor:
        memory = huge_pages(self.blocks * each * self.lanes).view(torch.float32)
        return memory.view(self.blocks, each, self.lanes).zero_()

    @property
    def trained(self) -> Tensor:
        """The numbers that are trained."""
        return self.dense

    def read(self, _: Weights) -> None:
        """Copy the module's weights into the blocks."""
        self.put(self.dense, self.layer.module.weight)
        if self.counts is not None:
            self.counts.fill_(-1)

    def write(self, _: Weights) -> None:
        """Copy the weights from the blocks into the module."""
        weight = self.layer.module.weight
        flat = self.dense.transpose(1, 2).reshape(self.blocks * self.lanes, -1)[: len(weight)]
        weight.copy_(flat.view_as(weight))

    def moments_of(self, _: Weights) -> list[Tensor]:
        """Return copies of the layer's moments."""
        return [moment.clone() for moment in self.moments]

    def set_moments(self, _: Weights, moments: Sequence[Tensor]) -> None:
        """Take the layer's moments from such copies."""
        for into, own in zip(self.moments, moments, strict=True):
            into.copy_(own)

    def put(self, into: Tensor, values: Tensor | None) -> None:
        """Copy numbers of all weights, 0 of None, into blocks."""
        out = self.layer.shape[0]
        padded = torch.zeros(self.blocks * self.lanes, into.shape[1])
        if values is not None:
            padded[:out] = values.reshape(out, -1)
        into.copy_(padded.view(self.blocks, self.lanes, -1).transpose(1, 2))


class Weights:
    """The trained numbers of a graph: ``w``, ``grad`` and what an optimizer keeps of as many numbers.

    That are its ``moments`` (a velocity; or means of gradients and of their squares), and what is added to gradients:
    ``start``, the weights at the start of a training, and ``shift``. First all entries, then all small vectors.
    """

    def __init__(self, graph: Graph, mask: Mapping[str, Tensor], moments: int = 0, apart: bool = False):
        norms = [layer for layer in graph.layers if isinstance(layer, NormLayer) and layer.module is not None]
        self.norms = [layer for layer in norms if isinstance(layer.module, nn.BatchNorm2d)]
        self.layers: dict[ProductLayer, MaskedWeights | SwatWeights] = {}
        self.names = set[str]()
        """The names of the parameters that heed a mask."""
        vectors, start = list[Tensor](), 0
        for product in (layer for layer in graph.layers if isinstance(layer, ProductLayer)):
            if isinstance(product.module, SwatConv2d | SwatLinear):
                if not product.trained:
                    raise Unsupported(f"{product.weight_name} is frozen, and selected from at every step")
                self.layers[product] = SwatWeights(product, moments, apart)
            else:
                name = product.weight_name
                self.layers[product] = own = MaskedWeights(product, mask.get(name), start)
                self.names.add(name)
                start += own.count
            bias = product.module.bias
            vectors += [] if bias is None or any(bias is vector for vector in vectors) else [bias]
        self.masks: dict[int, Tensor] = {}
        """The masks of small vectors, by the identity of the parameter."""
        for fallback in (layer for layer in graph.layers if isinstance(layer, FallbackLayer)):
            for name, parameter in fallback.parameters.items():
                vectors.append(parameter)
                if (own_mask := mask.get(f"{fallback.name}.{name}")) is not None:
                    self.names.add(f"{fallback.name}.{name}")
                    self.masks[id(parameter)] = own_mask.clone()
        vectors += [vector for layer in norms for vector in layer.module.parameters()]  # type: ignore[union-attr]
        for layer in graph.layers:
            if isinstance(layer, LayerNormLayer | ScaleLayer):
                vectors += layer.module.parameters()
            if isinstance(layer, EmbeddingLayer) and not layer.tied and not layer.shared:
                vectors += layer.module.parameters()
                if layer.parameter in mask:
                    self.names.add(layer.parameter)
                    self.masks[id(layer.module.weight)] = mask[layer.parameter].clone()
        for name, unused in graph.unused.items():
            vectors.append(unused)
            if name in mask:
                self.names.add(name)
                self.masks[id(unused)] = mask[name].clone()
        self.sparse, self.small, self.vectors = start, dict[int, int](), vectors
        for vector in vectors:
            self.small[id(vector)] = start
            start += vector.numel()
        for layer in graph.layers:
            if isinstance(layer, EmbeddingLayer) and layer.tied:
                (own,) = (w for w in self.masked if w.layer.module.weight is layer.module.weight)
                if own.count < own.numel or own.transposed:
                    raise Unsupported(f"a mask on {layer.parameter}, the weight of an embedding and of a product")
                self.small[id(layer.module.weight)] = own.start
        self.frozen = [(own.start, own.count) for own in self.masked if not own.layer.trained]
        self.frozen += [(self.small[id(v)], v.numel()) for v in vectors if not v.requires_grad]
        """Where numbers stand that are not trained: from where on, and how many."""
        self.w, self.grad = lazy_zeros(start), lazy_zeros(start)
        self.moments = [lazy_zeros(start) for _ in range(moments)]
        self.start: Tensor | None = None
        self.shift: Tensor | None = None
        self.effective = lazy_zeros(self.sparse) if any(own.power != 1 for own in self.masked) else self.w
        """What the products multiply with: of powerpropagation, not w itself."""
        self.back_value, self.order = lazy_zeros(self.sparse), lazy_zeros(self.sparse).view(torch.int32)
        self.stats = {layer: torch.zeros(4, layer.output.channels) for layer in self.norms}
        """[mean, 1 / std, running mean, running variance] of every BatchNorm."""

    @property
    def trained(self) -> Tensor:
        """The numbers that are trained, SWAT's weights apart."""
        return self.w

    @property
    def masked(self) -> list[MaskedWeights]:
        """The layers on a mask that stays as it is."""
        return [own for own in self.layers.values() if isinstance(own, MaskedWeights)]

    @torch.no_grad()
    def read(self, steps: int = 0) -> None:
        """Copy the model's weights, as they are after so many steps."""
        for own in self.layers.values():
            own.read(self)
        for vector in self.vectors:
            view = self.view(vector).copy_(vector)
            if id(vector) in self.masks:
                view.mul_(self.masks[id(vector)])
        for layer in self.norms:
            for i, running in enumerate(layer.running, start=2):
                self.stats[layer][i] = running
        self.tracked = {layer: int(layer.tracked) - steps for layer in self.norms}

    @torch.no_grad()
    def write(self, steps: int) -> None:
        """Copy the weights after so many steps into the model: zero off the masks."""
        for own in self.layers.values():
            own.write(self)
        for vector in self.vectors:
            vector.copy_(self.view(vector))
        for layer in self.norms:
            for i, running in enumerate(layer.running, start=2):
                running.copy_(self.stats[layer][i])
            layer.tracked.fill_(self.tracked[layer] + steps)

    def rest(self) -> None:
        """Set all moments to zero."""
        for storage in self.storages:
            for moment in storage.moments:
                moment.zero_()

    def all_moments(self) -> dict[ProductLayer | None, list[Tensor]]:
        """Return the moments of every product's weights, and (None) of all small vectors."""
        small: dict[ProductLayer | None, list[Tensor]] = {None: [m[self.sparse :].clone() for m in self.moments]}
        return small | {layer: own.moments_of(self) for layer, own in self.layers.items()}

    def set_all_moments(self, moments: Mapping[ProductLayer | None, Sequence[Tensor]]) -> None:
        """Take over what ``all_moments`` of this graph returned, as far as the masks reach."""
        for layer, own in self.layers.items():
            own.set_moments(self, moments[layer])
        for into, small in zip(self.moments, moments[None], strict=True):
            into[self.sparse :] = small

    @property
    def storages(self) -> list[Weights | SwatWeights]:
        """What holds numbers of its own: the vectors, and every SWAT layer."""
        return [self, *(own for own in self.layers.values() if isinstance(own, SwatWeights))]

    @torch.no_grad()
    def put(self, what: Literal["start", "shift"], values: Mapping[int, Tensor]) -> None:
        """Set ``start`` or ``shift`` from tensors by the identity of their parameters; 0 where there is none."""
        vector = getattr(self, what)
        for own in self.layers.values():
            into = getattr(own, what) if isinstance(own, SwatWeights) else vector
            own.put(into, values.get(id(own.layer.module.weight)))
        for small in self.vectors:
            view, mask = self.view(small, vector), self.masks.get(id(small))
            view.copy_(values.get(id(small), torch.zeros(())))
            if mask is not None:
                view.mul_(mask)

    def release(self) -> None:
        """Free what the masked layers of the model hold, until ``write``."""
        for own in self.masked:
            own.release()

    def view(self, vector: Tensor, where: Tensor | None = None) -> Tensor:
        """Return a small vector in ``w`` (or ``where``), shaped as the model has it."""
        return (self.w if where is None else where)[self.small[id(vector)] :][: vector.numel()].view(vector.shape)

    def address(self, vector: Tensor | None, where: Tensor | None = None) -> int | None:
        """Return the address of a small vector in ``w`` (or ``where``)."""
        return None if vector is None else address(self.w if where is None else where, self.small[id(vector)])

    def bias_address(self, layer: ProductLayer, where: Tensor | None = None) -> int | None:
        """Return the address of a layer's bias, or of its gradient in ``where``."""
        place = self.address(layer.module.bias, where)
        return None if place is None else place + layer.first * self.w.element_size()

    @property
    def tensors(self) -> list[Tensor]:
        """Every tensor that takes memory: vectors, layers and indices."""
        owners = [self, *self.layers.values(), *(own.index for own in self.layers.values())]
        values = [value for owner in owners for value in vars(owner).values()]
        moments = [moment for storage in self.storages for moment in storage.moments]
        return [*moments, *(value for value in values if isinstance(value, Tensor))]
