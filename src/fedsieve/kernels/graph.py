"""A model's layers as the kernels see them: those that they know, and those that PyTorch runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call

from fedsieve.kernels.inputs import Inputs
from fedsieve.types import Examples


@dataclass(frozen=True)
class Window:
    """A pool's geometry; ``average``: 0 for the maximum, 1 for the mean, 2 for that of the part inside the map."""

    kernel: int
    stride: int
    padding: int
    average: int


@dataclass(eq=False)
class Value:
    """What a layer gives: [n, channels, height, width]; features have height and width 1."""

    channels: int
    height: int = 1
    width: int = 1
    flat: bool = False
    """Whether the model sees it as [n, features]."""
    single: bool = False
    """Whether the model sees it as [n]."""
    tokens: bool = False
    """Whether a sample is ``width`` tokens: the model sees [n, width, channels]."""
    plain: tuple[int, ...] | None = None
    """The shape of a sample of an input that no map holds."""
    dtype: torch.dtype = torch.float32

    @property
    def sizes(self) -> tuple[int, ...]:
        """The shape of a sample, as the model sees it."""
        if self.plain is not None:
            return self.plain
        if self.tokens and not self.flat:
            return self.width, self.channels
        if self.single:
            return ()
        return (self.channels,) if self.flat else (self.channels, self.height, self.width)


@dataclass(eq=False)
class Layer:
    """One step of the model: its inputs and its output."""

    inputs: list[Value]
    output: Value


@dataclass(eq=False)
class ProductLayer(Layer):
    """A convolution or a linear layer, with its bias and a ReLU behind it."""

    module: nn.Conv2d | nn.Linear
    name: str
    relu: int = 0
    """1: ReLU; 2: ReLU6."""
    first: int = 0
    """The first row of the weight that it has; some of tokens have a part of one."""

    @property
    def trained(self) -> bool:
        """Whether the weight is trained."""
        return self.module.weight.requires_grad

    @property
    def weight_name(self) -> str:
        """The weight's name in the model."""
        return f"{self.name}.weight"

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """The weight's shape as a convolution's: [out, in / groups, kernel, kernel]."""
        out, inner = self.module.weight.shape[:2]
        return out, inner, self.kernel, self.kernel

    @property
    def numel(self) -> int:
        """The weights that it has."""
        return self.module.weight.numel()

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds of a sample's dense forward."""
        return self.output.height * self.output.width * self.numel

    @property
    def kernel(self) -> int:
        """The kernel's width; 1 for a linear layer."""
        return int(self.module.kernel_size[0]) if isinstance(self.module, nn.Conv2d) else 1

    @property
    def stride(self) -> int:
        """The stride; 1 for a linear layer."""
        return int(self.module.stride[0]) if isinstance(self.module, nn.Conv2d) else 1

    @property
    def padding(self) -> int:
        """The padding; 0 for a linear layer."""
        return int(self.module.padding[0]) if isinstance(self.module, nn.Conv2d) else 0

    @property
    def groups(self) -> int:
        """The groups of a convolution; 1 for a linear layer."""
        return int(self.module.groups) if isinstance(self.module, nn.Conv2d) else 1

    @property
    def reach(self) -> int:
        """How far beyond the border of the output's gradient the input's gradient looks."""
        k, s, p, x, y = self.kernel, self.stride, self.padding, self.inputs[0], self.output
        below = -min((top + p - tap) // s for top in range(s) for tap in range(k) if (top + p - tap) % s == 0)
        above = max((x.height - 1 + p) // s - (y.height - 1), (x.width - 1 + p) // s - (y.width - 1))
        return max(below, above, 0)


@dataclass(eq=False)
class NormLayer(Layer):
    """relu(norm(y) + add), each of the three optional; ``inputs`` holds y, and add where there is one."""

    module: nn.BatchNorm2d | nn.GroupNorm | None = None
    relu: int = 0
    """1: ReLU; 2: ReLU6."""

    @property
    def running(self) -> tuple[Tensor, Tensor]:
        """The running mean and variance of a BatchNorm."""
        assert isinstance(self.module, nn.BatchNorm2d)
        assert self.module.running_mean is not None
        assert self.module.running_var is not None
        return self.module.running_mean, self.module.running_var

    @property
    def tracked(self) -> Tensor:
        """How many batches a BatchNorm has seen."""
        assert isinstance(self.module, nn.BatchNorm2d)
        assert self.module.num_batches_tracked is not None
        return self.module.num_batches_tracked


@dataclass(eq=False)
class PoolLayer(Layer):
    """A maximum or a mean over windows."""

    window: Window


@dataclass(eq=False)
class ActivationLayer(Layer):
    """A function of each number: one of ``ActivationOp.FUNCTIONS``."""

    function: str


@dataclass(eq=False)
class ConcatenationLayer(Layer):
    """Values one behind another, by channel."""

    @property
    def starts(self) -> list[int]:
        """The first channel of each input in the output."""
        return [0, *accumulate(value.channels for value in self.inputs[:-1])]


@dataclass(eq=False)
class FlattenLayer(Layer):
    """[n, c, h, w] to [n, c h w]."""


@dataclass(eq=False)
class FallbackLayer(Layer):
    """Anything else: run by PyTorch, sample first; ``inputs`` are those of ``node.all_input_nodes``."""

    node: fx.Node
    module: nn.Module | None
    name: str

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The module's parameters by name; none of a function's."""
        return {} if self.module is None else dict(self.module.named_parameters())

    def __call__(self, inputs: Sequence[Tensor], parameters: Mapping[str, Tensor]) -> Tensor:
        """Compute with these parameters in place of the module's."""
        values = dict(zip(self.node.all_input_nodes, inputs, strict=True))
        args, kwargs = fx.node.map_arg((self.node.args, self.node.kwargs), values.__getitem__)
        out: Tensor
        if self.module is not None:
            out = functional_call(self.module, dict(parameters), args, kwargs)
        elif self.node.op == "call_method":
            out = getattr(args[0], str(self.node.target))(*args[1:], **kwargs)
        else:
            out = self.node.target(*args, **kwargs)  # type: ignore[operator]
        return out


@dataclass
class ModelOutput:
    """What a model returns: a value, or several in tuples, lists, dictionaries and dataclasses."""

    form: Any
    """The same with nodes in place of the values."""
    values: Mapping[fx.Node, Value]

    def tensors(self, of: Mapping[Value, Tensor]) -> Any:
        """Return the same with the tensors of the values."""
        return self._filled(self.form, of)

    def _filled(self, form: Any, of: Mapping[Value, Tensor]) -> Any:
        if isinstance(form, fx.Node):
            if form in self.values:
                return of[self.values[form]]
            assert callable(form.target)  # a dataclass
            return form.target(**{name: self._filled(part, of) for name, part in form.kwargs.items()})
        if isinstance(form, Mapping):
            return {name: self._filled(part, of) for name, part in form.items()}
        if isinstance(form, tuple | list):
            parts = [self._filled(part, of) for part in form]
            return type(form)(*parts) if hasattr(form, "_fields") else tuple(parts) if type(form) is tuple else parts
        return form


@dataclass
class Graph:
    """A model's layers in order, from ``input`` to the logits, ``output``, or the first of all that it returns."""

    input: Value
    output: Value
    layers: list[Layer]
    outputs: list[Value] = field(default_factory=list)
    """All values that a model in training returns."""
    model_output: ModelOutput | None = None
    """How it returns them; None: ``output`` alone, [n, classes]."""
    more_inputs: list[Value] = field(default_factory=list)
    """A model of tokens may have others than ``input``."""
    form: Inputs | None = None
    """Of several inputs, or of inputs by name."""
    functions: Mapping[Value, Callable[[Sequence[Tensor]], Tensor]] = field(default_factory=dict)
    """What PyTorch computes of the inputs in each step."""
    unused: dict[str, Tensor] = field(default_factory=dict)
    """Parameters, by their names, that the model does not compute with: their gradients are 0."""
    token_output: Any = None
    """How a model of tokens returns ``output``: a ``TokenOutput``."""

    @property
    def fallbacks(self) -> list[str]:
        """The layers that PyTorch runs, by name."""
        return [layer.name for layer in self.layers if isinstance(layer, FallbackLayer)]

    @cached_property
    def needs_grad(self) -> dict[Value, bool]:
        """Which values depend on something that is trained."""
        needs = dict.fromkeys(self.inputs, False)
        for layer in self.layers:
            module = getattr(layer, "module", None)
            trained = module is not None and any(p.requires_grad for p in module.parameters())
            needs[layer.output] = trained or any(needs[value] for value in layer.inputs)
        return needs

    @property
    def inputs(self) -> list[Value]:
        """All inputs of the model."""
        return [self.input, *self.more_inputs]

    @property
    def input_names(self) -> list[str]:
        """What they are called in messages: "x", or "x[0]", ... of several, where they have no names."""
        names = [*self.form.names] if self.form else []
        several = [f"x[{i}]" for i in range(len(self.inputs))]
        return names or (several if len(several) > 1 else ["x"])

    def name_of(self, value: Value) -> str:
        """Return what an input is called in messages."""
        return self.input_names[self.inputs.index(value)]

    def tensors(self, x: Examples) -> list[Tensor]:
        """Return the tensors of a batch, one for each input. Raises InputError for others."""
        if self.form is not None:
            return self.form.take(x)
        return [x]  # type: ignore[list-item] # which is checked

    def halo(self, value: Value) -> int:
        """Return the halo that the products which read a value need around it."""
        products = (layer for layer in self.users(value) if isinstance(layer, ProductLayer | FusedProduct))
        return max((product.padding for product in products), default=0)

    def users(self, value: Value) -> list[Layer]:
        """Return the layers that read a value."""
        return [layer for layer in self.layers if value in layer.inputs]

    def maker(self, value: Value) -> Layer | None:
        """Return the layer that gives a value; None for the model's input."""
        return next((layer for layer in self.layers if layer.output is value), None)


@dataclass(eq=False)
class FusedProduct(Layer):
    """relu(product(x) + bias + add), the last two optional; ``inputs`` holds x, and add where there is one."""

    shape: tuple[int, int, int, int]
    stride: int
    padding: int
    groups: int
    relu: int
    bias: Tensor | None
    values: Tensor
    """The weight's non-zeros [entries]."""
    positions: Tensor
    """Where each stands in the flat weight, int64 [entries], ascending."""
    indices: dict[tuple[object, ...], Any] = field(default_factory=dict)
    """Indices of the entries, by the layout of the maps that they are for."""

    @property
    def kernel(self) -> int:
        """The kernel's width; 1 for a linear layer."""
        return self.shape[-1]
