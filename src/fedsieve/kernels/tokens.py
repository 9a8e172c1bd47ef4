"""The layers of models of tokens, as the kernels see them: what a sequence's places have in common with a batch's.

A map of tokens has the tokens of all samples in its lanes. Which they are is nobody's business but attention's, the
input's and that of layers that give tokens other places; products, norms and activations take them one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_unflatten

from fedsieve.kernels.graph import Layer, ProductLayer, Value
from fedsieve.kernels.input_numbers import InputMask


class Parameters(nn.Module):
    """Tensors of a model that belong to one layer: trained where they are parameters."""

    def __init__(self, **tensors: Tensor | None):
        super().__init__()
        for name, tensor in tensors.items():
            if isinstance(tensor, nn.Parameter):
                self.register_parameter(name, tensor)
            else:
                self.register_buffer(name, tensor)

    weight: Tensor
    bias: Tensor | None


def tokens(channels: int, length: int, flat: bool = False) -> Value:
    """Return a value of so many tokens a sample; ``flat``: one, which the model sees as [n, channels]."""
    return Value(channels, 1, length, flat=flat, tokens=True)


@dataclass(eq=False)
class InputLayer(Layer):
    """Tokens made of the numbers of a sample: that of a token and a channel stands at the sum of their offsets."""

    token: Tensor
    """int64 [length]."""
    channel: Tensor
    """int64 [channels]."""
    of: Value
    """Which input."""


@dataclass(eq=False)
class RelaidLayer(Layer):
    """Other tokens of the input's numbers: that of a token and a channel stands at the sum of their offsets."""

    token: Tensor
    """int64 [length]: of the output's tokens."""
    channel: Tensor
    """int64 [channels]."""


@dataclass(eq=False)
class TokenProduct(ProductLayer):
    """A linear layer of tokens, whose weight may have any shape; ``transposed``: [in, out]."""

    parameter: str = ""
    """The weight's name."""
    transposed: bool = False

    @property
    def numel(self) -> int:
        """The weights that it has."""
        return self.output.channels * self.inputs[0].channels

    @property
    def weight_name(self) -> str:
        """The weight's name in the model."""
        return self.parameter

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """The weight's shape as a convolution's with a kernel of 1."""
        return self.output.channels, self.inputs[0].channels, 1, 1

    kernel = stride = groups = 1
    padding = reach = 0


@dataclass(eq=False)
class EmbeddingLayer(Layer):
    """Rows of a table, added to the tokens of ``inputs`` where there are any; of the model's input: int64 [n, length].

    ``rows`` [length] says which of them each token of a sample has, -1 for none; None: the input does.
    """

    module: Parameters
    parameter: str
    rows: Tensor | None = None
    of: Value | None = None
    """Which input of the model, or numbers of the inputs, say the rows, where ``rows`` does not."""
    padding: int = -1
    """The row that is not trained by this layer, ``padding_idx``; -1: none."""
    tied: bool = False
    """Whether the table is a product's weight as well."""
    shared: bool = False
    """Whether it is that of a later layer as well."""


@dataclass(eq=False)
class LayerNormLayer(Layer):
    """LayerNorm over the channels of each token; ``rms``: RMSNorm."""

    module: Parameters
    eps: float
    rms: bool = False


@dataclass(eq=False)
class AttentionLayer(Layer):
    """Attention of q, k and v, which are channels of ``inputs`` from ``first`` on: ``size`` for each head.

    Keys and values are of as many tokens as queries, or, where it is not causal, of another number of them.
    """

    first: tuple[int, int, int]
    heads: int
    kv_heads: int
    size: int
    causal: bool
    scale: float
    bias: Tensor | None = None
    """float32 [heads or 1, queries, keys]: is added to the scores; -inf where none may count."""
    p: float = 0.0
    """Of the dropout of the probabilities."""
    masks: tuple[InputMask, ...] = ()
    """What is added to the scores by numbers of the inputs."""
    written_out: bool = False
    """Whether the model takes a softmax itself, which is NaN for a query without keys; else that attends to none."""

    @property
    def pairs(self) -> float:
        """How many queries and keys of a sample are multiplied."""
        return self.output.width * self.inputs[1].width * (0.5 if self.causal else 1)

    @property
    def channels(self) -> tuple[int, int, int]:
        """How many q, k and v have."""
        return self.heads * self.size, self.kv_heads * self.size, self.kv_heads * self.size


def masks_of(layer: Layer) -> list[Value]:
    """Return the numbers of the inputs that are added to a layer's scores."""
    return [mask.of for mask in layer.masks] if isinstance(layer, AttentionLayer) else []


@dataclass(eq=False)
class RearrangedLayer(Layer):
    """Tokens in other places, scaled: ``source`` [length] is where in its sample each comes from, -1 for zeros."""

    source: Tensor
    scale: float = 1.0


@dataclass(eq=False)
class CombinationLayer(Layer):
    """Sums of a token's channels, each times a number for each place in a sequence: rotations of positions, scales."""

    source: Tensor
    """int64 [terms, channels]: which channels."""
    factor: Tensor
    """float32 [terms, channels, length], or [terms, channels, 1]."""


@dataclass(eq=False)
class ScaleLayer(Layer):
    """Channels, each times a number that is a parameter."""

    module: Parameters


@dataclass(eq=False)
class RowDropoutLayer(Layer):
    """Stochastic depth: each sample times a number that PyTorch's generator draws, ``scale`` with probability ``p``."""

    p: float
    scale: float


@dataclass(eq=False)
class MeanLayer(Layer):
    """The mean of a sample's tokens; ``total``: their sum."""

    total: bool = False


@dataclass(eq=False)
class TokenFactorLayer(Layer):
    """Each token times a number of the inputs."""

    of: Value
    place: Tensor
    """int64 [length]: which number of its sample, for each token."""

    def factors(self, numbers: Tensor) -> Tensor:
        """Return what the tokens of a batch are multiplied by, float32 [n, length]."""
        return numbers.flatten(1)[:, self.place]


@dataclass(eq=False)
class PickedLayer(Layer):
    """A token of each sample, whose place is a number of the inputs."""

    of: Value


@dataclass(eq=False)
class ChannelsLayer(Layer):
    """Some successive channels, from ``first`` on."""

    first: int


@dataclass(eq=False)
class ElementProductLayer(Layer):
    """The product of two values, number by number."""


@dataclass(eq=False)
class DropoutLayer(Layer):
    """Dropout by what PyTorch's generator draws, number by number as they stand in its memory."""

    p: float
    order: list[int]
    """Which dimension of the memory the samples, the tokens (where there are several) and the channels are."""


@dataclass
class TokenOutput:
    """Where a model's output has the number of a token and a channel: at the sum of their offsets, and the sample's."""

    shape: Sequence[int]
    """That of a sample."""
    token: Tensor
    channel: Tensor
    labels: bool = field(default=False)
    """Whether the output is [n, length, classes]."""
    structure: Any = None
    """Of tuples, dictionaries and dataclasses: PyTorch's ``TreeSpec`` of what a model returns."""

    def whole(self, logits: Tensor) -> Any:
        """Return what the model does, given its only tensor."""
        return logits if self.structure is None else tree_unflatten([logits], self.structure)

    @property
    def only(self) -> bool:
        """Whether the model returns no other tensor."""
        return self.structure is None or self.structure.num_leaves == 1

    @classmethod
    def plain(cls, value: Value) -> TokenOutput:
        """Return that of [n, length, channels]."""
        return cls(value.sizes, torch.arange(value.width) * value.channels, torch.arange(value.channels))
