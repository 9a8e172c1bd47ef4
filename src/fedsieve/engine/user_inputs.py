"""What a user gives as a task's parts: objects, or functions that return them. They are checked; models are copied."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable
from dataclasses import is_dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from fedsieve.data import Dataset
from fedsieve.data.dataset import type_name
from fedsieve.sparse.policy import undo_call
from fedsieve.types import InputError, Method

NO_DATASET = (
    "must be a name, a fedsieve.Dataset(name, Data(x, y), Data(x, y), classes), or a function that gives one: {}"
)


def check_fields(where: str, holder: object) -> None:
    """Raise InputError unless fields that are to hold numbers, words, or one of some dataclasses do."""
    for name, wanted in get_type_hints(type(holder)).items():
        value, kinds = getattr(holder, name), get_args(wanted)
        if wanted is int and type(value) is not int:
            what = "a whole number"
        elif wanted is float and not (isinstance(value, int | float) and not isinstance(value, bool)):
            what = "a number"
        elif wanted is str and not isinstance(value, str):
            what = "a text"
        elif get_origin(wanted) is Literal and not (isinstance(value, str) and value in kinds):
            what = f"one of {', '.join(kinds)}"
        elif kinds and all(map(is_dataclass, kinds)) and not isinstance(value, kinds):
            what = f"one of {', '.join(f'{one.__name__}()' for one in kinds)}"
        else:
            continue
        raise InputError(f"{where}{'.' if where else ''}{name} must be {what}, got {value!r}")


def check_method_type(method: Any) -> None:
    """Raise InputError unless a method is one, and what it declares of itself is of the right type."""
    if not isinstance(method, Method):
        what = f"{type_name(method)} is no subclass of fedsieve.Method"
        raise InputError(f"Run(method, task, ...) needs a method: {what}: docs/how-to/method.md")
    if type(method).__module__.startswith("fedsieve.") and is_dataclass(method):
        check_fields("method", method)
    for name, text in (("name", method.name), ("policy", method.policy)):
        if not isinstance(text, str):
            raise InputError(f"{type_name(method)}: {name} must be a text, got {text!r}")
    for name, number in (("warm_up", method.warm_up), ("tiers", method.tiers or 0)):
        if type(number) is not int or number < 0:
            raise InputError(f"{method.name}: {name} must be a whole number, 0 or more, got {number!r}")


def parse_tiers(value: Any) -> tuple[float, ...]:
    """Return the shares of the device classes as a tuple. Raises InputError."""
    result = () if isinstance(value, str) or not isinstance(value, Iterable) else tuple(value)
    if not result or not all(isinstance(share, int | float) for share in result):
        raise InputError(f"task.tiers must be shares that add up to 1, such as (0.5, 0.5), got {value!r}")
    return result


def resolve_dataset(own: Dataset | Callable[[], Dataset]) -> Dataset:
    """Return a user's dataset, itself or what its function gives. Raises InputError."""
    dataset: object = own if isinstance(own, Dataset) else _call("dataset", own)
    if not isinstance(dataset, Dataset):
        raise InputError(f"task.dataset {NO_DATASET.format(type_name(dataset))}")
    return dataset


def resolve_model(own: nn.Module | Callable[[], nn.Module]) -> nn.Module:
    """Return a copy, on the CPU, of a user's model or of what its function gives. Raises InputError."""
    model: object = own if isinstance(own, nn.Module) else _call("model", own)
    if not isinstance(model, nn.Module):
        raise InputError(f"task.model must give a torch.nn.Module, its function gives {type_name(model)}")
    _check_plain(model)
    try:
        return copy.deepcopy(model).to("cpu")
    except Exception as error:
        raise InputError(f"the model cannot be copied ({first_line(error)})") from error


def _call(what: str, function: Callable[[], object]) -> object:
    """Return the result of a user's function. Raises InputError if it needs arguments."""
    try:
        inspect.signature(function).bind()
    except TypeError as error:
        raise InputError(
            f"task.{what}: {type_name(function)} needs arguments ({error}): give it without, such as functools.partial"
        ) from None
    except ValueError:
        pass  # a builtin tells no signature
    return function()


def first_line(error: BaseException) -> str:
    """Return what an error of the user's own code says, in one line."""
    return (str(error).splitlines() or [""])[0] or type_name(error)


def _check_plain(model: nn.Module) -> None:
    """Raise InputError unless a model is ordinary: float32 weights by their own names, in a state of tensors."""
    if isinstance(model, torch.jit.ScriptModule):
        raise InputError("the model is compiled by TorchScript, and its layers are out of reach: give the plain module")
    compiled = hasattr(model, "_orig_mod")
    if compiled or isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        inner = "_orig_mod" if compiled else "module"
        raise InputError(f"the model is wrapped ({type_name(model)}): give what is inside, model.{inner}")
    for path, module in model.named_modules():
        if attributes := [n for n, v in vars(module).items() if isinstance(v, Tensor) and v.grad_fn is not None]:
            what = f"layer {path} has no parameter {attributes[0]!r} of its own"
            raise InputError(f"{what}, it is computed from others: call {undo_call(module, attributes[0])} first")
    named = dict(model.named_parameters(remove_duplicate=False))
    for name, w in named.items():
        if isinstance(w, UninitializedParameter):
            raise InputError(f"{name} has no shape yet: call the lazy model on an example before you give it")
        if w.is_meta:
            raise InputError(f"{name} is on the meta device, without numbers: load weights before you give the model")
        if w.dtype != torch.float32:
            raise InputError(f"{name} is of {w.dtype}, where float32 is trained: give model.float()")
    for name, value in (*named.items(), *model.named_buffers()):
        if torch._debug_has_internal_overlap(value) == 1:
            raise InputError(f"{name} is expanded from fewer numbers than it shows: give it .contiguous()")
    state = model.state_dict()
    if odd := [name for name, value in state.items() if not isinstance(value, Tensor)]:
        raise InputError(f"the model's state holds {odd[0]}, which is no tensor (is it quantised?): give a plain model")
    if odd := sorted(named.keys() - state.keys()):
        raise InputError(f"the model's state_dict has no {odd[0]}: a parameter must stand there by its own name")
    if odd := [name for name, value in state.items() if value.is_floating_point() and value.dtype != torch.float32]:
        raise InputError(f"{odd[0]} is of {state[odd[0]].dtype}, where float32 is needed: give model.float()")
