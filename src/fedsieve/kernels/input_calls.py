"""What operations of an exported model give of the inputs alone, and its constants."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from fedsieve.kernels.attention_calls import AttentionCalls
from fedsieve.kernels.batch_sizes import is_constant
from fedsieve.kernels.checks import Unsupported
from fedsieve.kernels.graph import Value
from fedsieve.kernels.input_numbers import InputNumbers, changes_memory, example_inputs, memory_of
from fedsieve.kernels.places import SAMPLES, Places


class InputCalls(AttentionCalls):
    """The tensors of a model so far: places, numbers of the inputs, constants."""

    def __init__(self, model: nn.Module, inputs: list[Value], program: Any):
        super().__init__(model, inputs, program)
        self.env: dict[fx.Node, Any] = {}
        """What each operation gave, as long as others read it."""
        self.examples = dict(zip(inputs, example_inputs(inputs), strict=True))
        self.larger: dict[fx.Node, Any] = {}
        """Of constants and sizes that depend on the batch's size: what they are with one sample more."""

    def _stored(self, node: fx.Node, x: Any) -> Any:
        """Note a constant of the model, which stays from call to call."""
        if isinstance(x, Tensor):
            self.constants[node.name] = x
        return x

    def _argument(self, node: fx.Node) -> Any:
        """Return what an operation is given: of an input, its numbers."""
        return self._as_numbers(node) or self.env[node]

    def _as_numbers(self, node: fx.Node) -> InputNumbers | None:
        """Return the numbers of the inputs that a node is; None of others."""
        x = self.env[node]
        if isinstance(x, InputNumbers):
            return x
        if not isinstance(x, Places) or not isinstance(x.of, Value) or x.of not in self.examples:
            return None
        example = self.examples[x.of].flatten()[x.index]
        if example.shape == (SAMPLES, *x.of.sizes) and torch.equal(x.index.flatten(), torch.arange(example.numel())):
            node = self._placeholder(x.of)  # however it came
        return InputNumbers(node, example)

    def _numbers(self, node: fx.Node, moves: bool) -> Any:
        """Return what an operation gives of the inputs alone; None where there is more in it, or it ``moves`` them."""
        numbers = {one: own for one in node.all_input_nodes if (own := self._as_numbers(one)) is not None}
        others = [self.env[one] for one in node.all_input_nodes if one not in numbers]
        moves = moves and not any(isinstance(self.env[one], InputNumbers) for one in numbers)
        is_random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
        if not numbers or moves or is_random or not all(is_constant(x) for x in others):
            return None
        examples = {one: x.example for one, x in numbers.items()}
        target: Any = node.target
        given: Any = fx.node.map_arg((node.args, node.kwargs), lambda one: examples.get(one, self.env.get(one)))
        if changes_memory(node):
            self._change_memory(memory_of(node))
        example = target(*given[0], **given[1])
        is_size = isinstance(node.meta["val"], torch.SymInt) and target.__name__.startswith("sym_")
        return example if is_size else InputNumbers(node, example)

    def _change_memory(self, memory: fx.Node) -> None:
        """Note that constants which are changed in place by numbers of the inputs are such numbers from now on."""
        if memory.op != "call_function":
            raise Unsupported("a change in place of what the model is given, or keeps")
        for node, x in [*self.env.items()]:
            if isinstance(x, Tensor) and memory_of(node) is memory:
                self.env[node] = InputNumbers(node, x)
                self.larger.pop(node, None)

    def _check_changes(self, node: fx.Node, name: str, args: Any) -> None:
        """Raise Unsupported where a constant is changed in place that is not made in the same call."""
        changes = getattr(getattr(node.target, "_schema", None), "is_mutable", False) and name != "detach_"
        constants = {_storage(x) for x in self.constants.values()}
        if changes and (_storage(args[0]) in constants or any(x in self.larger for x in node.all_input_nodes)):
            raise Unsupported(f"a buffer that changes from call to call ({name})")


def _storage(x: Any) -> int:
    """Return the address of a tensor's memory; 0 for what is no tensor."""
    return x.untyped_storage().data_ptr() if isinstance(x, Tensor) else 0
