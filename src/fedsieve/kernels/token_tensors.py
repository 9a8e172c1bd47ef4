"""What a tensor of a model of tokens holds: which tokens, which of their channels, of which layer or parameter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from fedsieve.kernels.checks import Unsupported
from fedsieve.kernels.graph import Layer, Value
from fedsieve.kernels.input_numbers import InputFunction, InputNumbers, needed_for
from fedsieve.kernels.places import SAMPLES, Places, TokenRows, by_sample, token_offsets
from fedsieve.kernels.tokens import (
    ChannelsLayer,
    EmbeddingLayer,
    InputLayer,
    Parameters,
    RearrangedLayer,
    RelaidLayer,
    tokens,
)


class TokenTensors:
    """The layers of a model so far, and what tensors of theirs hold."""

    node: Any
    """The operation of the exported model that is read."""

    def __init__(self, model: nn.Module, inputs: list[Value], program: Any):
        self.model, self.inputs, self.program = model, inputs, program
        self.constants: dict[str, Tensor] = {}
        """The model's buffers and constants, by the name of their node."""
        self.functions: dict[tuple[fx.Node, frozenset[fx.Node], str], InputFunction] = {}
        """What is computed of the inputs in each step, by the node that gives it and what is done to it then."""
        self.layers: list[Layer] = []
        self.known: dict[int, tuple[Any, Places]] = {}
        """What expressions became, by their identity."""
        self.noise: Any = None
        """What was drawn last, or has dropout that was, and is not used yet."""
        self.names = {id(p): name for name, p in model.named_parameters()}

    def _places(self, tensor: Tensor) -> Places:
        return Places(tensor, torch.arange(tensor.numel()).view(tensor.shape))

    def _put(self, layer: Layer) -> Value:
        self.layers.append(layer)
        return layer.output

    def _draws(self, noise: Any = None) -> None:
        """Note that random numbers are drawn: in the model's order, by the layers that use them."""
        if self.noise is not None:
            raise Unsupported("random numbers that others are drawn before they are used, or that are not used")
        self.noise = noise

    # What a tensor holds.

    def _rows(self, x: Any, whole: bool = True) -> TokenRows:
        """Return the tokens that a tensor [..., channels] holds; ``whole``: all of their channels."""
        if isinstance(x, Places) and isinstance(x.of, nn.Parameter):
            x = self._repeated(x)
        if not isinstance(x, Places) or isinstance(x.of, Tensor) or x.index.dim() < 2:
            raise Unsupported("a tensor that is not made of the samples' tokens")
        if self._is_input(x):
            x = self._packed(x)
        assert isinstance(x.of, Value)
        wide, index = x.of.channels, x.index
        ids, first, channels = index[..., 0] // wide, int(index.flatten()[0]) % wide, index.shape[-1]
        if first + channels > wide:
            return self._relaid(x, "several tokens as the channels of one")
        if not torch.equal(index, (ids * wide + first).unsqueeze(-1) + torch.arange(channels)):
            return self._relaid(x, "channels in another order than they were made")
        rows = TokenRows(x.of, ids, first, channels)
        if whole and channels < wide:
            part = self._put(ChannelsLayer([x.of], tokens(channels, x.of.width, x.of.flat), first))
            rows = TokenRows(part, ids, 0, channels)
        return rows

    def _repeated(self, x: Places) -> Places:
        """Return rows of a parameter, which every sample has, as tokens."""
        index = x.index
        if index.dim() != 3 or len(index) != SAMPLES or not torch.equal(index[0], index[1]):
            raise Unsupported("a parameter that is not [n, length, channels], repeated for the samples")
        wide = index.shape[-1]
        row = index[0, :, 0] // wide
        if not torch.equal(index[0], (row * wide).unsqueeze(-1) + torch.arange(wide)):
            raise Unsupported("a parameter whose numbers are not rows of channels")
        module = Parameters(weight=x.of)  # type: ignore[arg-type]
        value = self._put(EmbeddingLayer([], tokens(wide, len(row)), module, self._name(x.of), row))  # type: ignore[arg-type]
        return self._given(value, torch.arange(SAMPLES * len(row)).view(SAMPLES, -1))

    def _relaid(self, x: Places, what: str) -> TokenRows:
        """Make other tokens of a value's numbers. Raises Unsupported, with ``what`` they are, if there are no such."""
        assert isinstance(x.of, Value)
        try:
            ids, token, channel = token_offsets(x.index, x.of.width * x.of.channels)
        except Unsupported:
            raise Unsupported(f"{what}, each in its own way") from None
        if len((token[:, None] + channel).unique()) < len(token) * len(channel):  # type: ignore[no-untyped-call]
            raise Unsupported(f"{what}, some of them twice")
        value = tokens(len(channel), len(token), x.index.dim() == 2)
        return TokenRows(self._put(RelaidLayer([x.of], value, token, channel)), ids, 0, len(channel))

    def _packed(self, x: Places) -> Places:
        """Make tokens of the numbers of the input: the last dimension has the channels."""
        assert isinstance(x.of, Value)
        if x.of.dtype != torch.float32:
            raise Unsupported("numbers of the input that are whole, and not looked up in an embedding")
        ids, token, channel = token_offsets(x.index, torch.Size(x.of.sizes).numel())
        value = self._put(InputLayer([], tokens(len(channel), len(token), x.index.dim() == 2), token, channel, x.of))
        return Places(value, ids.unsqueeze(-1) * value.channels + torch.arange(value.channels))

    def _all(self, rows: TokenRows) -> TokenRows:
        """Return tokens that are all of a value's, each once: rearranged, where some are missing or repeated."""
        flat, length = rows.ids.flatten(), rows.value.width
        if len(flat) == SAMPLES * length and torch.equal(flat.sort().values, torch.arange(SAMPLES * length)):
            return rows
        ids, source = by_sample(flat, length)
        value = self._put(RearrangedLayer([rows.value], tokens(rows.channels, len(source)), source))
        return TokenRows(value, ids.view(rows.ids.shape), 0, rows.channels)

    def _given(self, value: Value, ids: Tensor) -> Places:
        """Return the tensor that a layer gives, of the tokens in the order in which it was given them."""
        value.flat = ids.dim() == 1
        return Places(value, ids.unsqueeze(-1) * value.channels + torch.arange(value.channels))

    def _parameter(self, x: Any) -> Tensor | None:
        """Return a parameter or a constant that is used as it is."""
        if x is None or isinstance(x, Tensor):
            return x
        constant = isinstance(x, Places) and isinstance(x.of, Tensor)
        if constant and torch.equal(x.index.flatten(), torch.arange(x.of.numel())):
            tensor: Tensor = x.of
            return tensor
        raise Unsupported("a weight that is computed of others, or a part of one")

    def _name(self, table: Tensor) -> str:
        return self.names.get(id(table), "")

    def _is_input(self, x: Any) -> bool:
        return isinstance(x, Places) and isinstance(x.of, Value) and x.of.plain is not None

    def _value_of(self, x: InputNumbers, how: str = "") -> Value:
        """Return the input that numbers are, or a value that PyTorch computes in each step; ``how``: as a factor."""
        if x.node.op == "placeholder" and (not how or (how == "times" and x.example.dtype == torch.float32)):
            place: int = self.program.graph_signature.user_inputs.index(x.node.name)
            return self.inputs[place]
        if not isinstance(x.example, Tensor) or not x.example.dim() or len(x.example) % SAMPLES:
            raise Unsupported("numbers of the inputs whose first dimension is not the samples'")
        key = x.node, needed_for(x.node, self.node), how
        if key not in self.functions:
            self.functions[key] = InputFunction(self.program, self.constants, x, key[1], self.inputs, how)
        return self.functions[key].value

    def _placeholder(self, value: Value) -> fx.Node:
        """Return the node of an input."""
        name = self.program.graph_signature.user_inputs[self.inputs.index(value)]
        own: fx.Node = next(node for node in self.program.graph.nodes if node.name == name)
        return own

    def _input_places(self, x: InputNumbers, how: str = "") -> Places:
        """Return numbers of the inputs as a tensor that layers can be given."""
        value = self._value_of(x, how)
        if len(x.example) != SAMPLES:
            raise Unsupported("numbers of the inputs whose first dimension is not the samples'")
        return Places(value, torch.arange(x.example.numel()).view(x.example.shape))

    def _number_of_each(self, x: InputNumbers, rows: TokenRows, how: str) -> tuple[Value, Tensor]:
        """Return factors of the inputs, and which of a sample's numbers each token has [length]; x is [..., 1]."""
        places = self._input_places(x, how)
        assert isinstance(places.of, Value)
        length, numel = rows.value.width, torch.Size(places.of.sizes).numel()
        by_token = torch.empty(SAMPLES * length, dtype=torch.int64)
        by_token[rows.ids.flatten()] = places.index.squeeze(-1).expand(rows.ids.shape).flatten()
        of_samples = by_token.view(SAMPLES, length) - torch.arange(SAMPLES)[:, None] * numel
        if not torch.equal(of_samples[0], of_samples[1]):
            raise Unsupported("a number of the inputs for tokens of another sample")
        return places.of, of_samples[0]

    def _is_tokens(self, x: Any) -> bool:
        return isinstance(x, Places) and not isinstance(x.of, Tensor)

    def _alike(self, x: Places, y: Places) -> tuple[TokenRows, TokenRows]:
        """Return the tokens of two tensors, of which one may be repeated for the other."""
        sizes = torch.Size(map(max, zip(x.index.shape, y.index.shape, strict=True)))
        left, right = (
            self._all(self._rows(one if one.index.shape == sizes else Places(one.of, one.index.expand(sizes))))
            for one in (x, y)
        )
        if not torch.equal(left.ids, right.ids):
            raise Unsupported("tokens that stand in other places than those that they meet")
        return left, right

    def _table_added(self, rows: TokenRows, y: Any) -> Places:
        """Add rows of a parameter or of a constant, which each sample's tokens share."""
        if isinstance(y, Tensor) and y.dim():
            y = self._places(y.detach().float().contiguous())
        if not isinstance(y, Places) or not isinstance(y.of, Tensor):
            raise Unsupported("a sum with a number")
        index = y.index.expand(*rows.ids.shape, rows.channels)
        row = index[..., 0] // rows.channels
        if y.of.numel() % rows.channels or not torch.equal(
            index, (row * rows.channels).unsqueeze(-1) + torch.arange(rows.channels)
        ):
            raise Unsupported("a sum with a parameter whose numbers are not rows of channels")
        length = rows.value.width
        by_token = torch.empty(SAMPLES * length, dtype=torch.int64)
        by_token[rows.ids.flatten()] = row.flatten()
        if not torch.equal(by_token[:length], by_token[length:]):
            raise Unsupported("a parameter that is added to some samples alone")
        module, value = Parameters(weight=y.of), tokens(rows.channels, length)
        layer = EmbeddingLayer([rows.value], value, module, self._name(y.of), by_token[:length])
        return self._given(self._put(layer), rows.ids)
