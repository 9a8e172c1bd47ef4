"""A model as a user gives it, itself or by a function: called, checked, copied. Every mistake is one line."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from fedsieve.data.dataset import type_name
from fedsieve.sparse.layers import keep_calls_
from fedsieve.sparse.policy import undo_call
from fedsieve.types import InputError
from fedsieve.types.errors import error_of


def resolve_model(own: nn.Module | Callable[[], nn.Module]) -> nn.Module:
    """Return a copy, on the CPU, of a user's model or of what its function gives. Raises InputError."""
    model: object = own if isinstance(own, nn.Module) else call("model", own)
    if not isinstance(model, nn.Module):
        raise InputError(f"task.model must give a torch.nn.Module, its function gives {type_name(model)}")
    _check_plain(model)
    try:
        plain = copy.deepcopy(model).to("cpu")
    except Exception as error:
        raise InputError(f"the model cannot be copied ({first_line(error)})") from error
    keep_calls_(plain)
    return plain


def call(what: str, function: Callable[[], object]) -> object:
    """Return the result of a user's function. Raises InputError if it needs arguments."""
    try:
        inspect.signature(function).bind()
    except TypeError as error:
        raise InputError(
            f"task.{what}: {type_name(function)} needs arguments ({error}): give it without, such as functools.partial"
        ) from None
    except ValueError:
        pass  # a builtin tells no signature
    try:
        return function()
    except (InputError, MemoryError):
        raise
    except Exception as error:
        raise InputError(f"task.{what}: {error_of(function, error)}") from error


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
        if isinstance(module, torch.jit.ScriptModule):
            raise InputError(f"layer {path} is compiled by TorchScript, and out of reach: give the plain layer")
        if attributes := [n for n, v in vars(module).items() if isinstance(v, Tensor) and v.grad_fn is not None]:
            what = f"layer {path} has no parameter {attributes[0]!r} of its own"
            raise InputError(f"{what}, it is computed from others: call {undo_call(module, attributes[0])} first")
    named = dict(model.named_parameters(remove_duplicate=False))
    for name, w in (*named.items(), *model.named_buffers()):
        if w.is_meta:
            raise InputError(f"{name} is on the meta device, without numbers: load weights before you give the model")
    for name, w in named.items():
        if isinstance(w, UninitializedParameter):
            raise InputError(f"{name} has no shape yet: call the lazy model on an example before you give it")
        if w.is_complex() or w.is_quantized:
            kind = "complex" if w.is_complex() else "quantised"
            raise InputError(f"{name} is {kind} ({w.dtype}), where float32 is trained: give a model of real float32")
        if w.dtype != torch.float32:
            raise InputError(f"{name} is of {w.dtype}, where float32 is trained: give model.float()")
        if w._backward_hooks or w._post_accumulate_grad_hooks:
            raise InputError(
                f"{name} has a hook, which copies of the model lose: put what it does into the model's forward"
            )
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
    _check_aliases(model, named)


def _check_aliases(model: nn.Module, named: dict[str, nn.Parameter]) -> None:
    """Raise InputError if a module keeps a parameter's numbers (``.data``) in an attribute: a copy would not see them.

    They would stay what they are in a copy of the model whose parameters are trained.
    """
    blocks = {w.untyped_storage().data_ptr(): name for name, w in named.items() if w.numel()}
    own = {id(w) for w in (*named.values(), *model.buffers())}
    for path, module in model.named_modules():
        for attribute, value in vars(module).items():
            if attribute in ("_parameters", "_buffers", "_modules"):
                continue
            for one in _tensors_in(value):
                if id(one) not in own and (name := blocks.get(one.untyped_storage().data_ptr())) and one.numel():
                    raise InputError(
                        f"{path + '.' if path else ''}{attribute} holds the numbers of {name} beside the parameter "
                        "(.data, a view), which would not be trained: compute with the parameter itself"
                    )


def _tensors_in(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.layout is torch.strided and not value.is_meta:
            yield value
    elif isinstance(value, dict | list | tuple):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _tensors_in(one)
