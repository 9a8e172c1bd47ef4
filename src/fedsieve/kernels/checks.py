"""What the kernels are given, checked before an address leaves Python: every mistake is an InputError of one line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from fedsieve.types import InputError
from fedsieve.types.optimizers import SGD, AdamW

LARGEST = 2**31 - 1
"""Offsets in a map are 32-bit."""


class Unsupported(Exception):
    """A model that the kernels cannot take at all, and why."""


def refuse(what: str, requirement: str, got: object) -> NoReturn:
    """Raise the InputError that says what is required and what there is instead."""
    raise InputError(f"{what} must be {requirement}, got {describe(got) if isinstance(got, Tensor) else repr(got)}")


def describe(x: Tensor) -> str:
    """Return a tensor's kind in words: ``float32 [2, 3] on cpu``."""
    strided = "" if x.layout == torch.strided else f"{str(x.layout).removeprefix('torch.')} "
    return f"{strided}{str(x.dtype).removeprefix('torch.')} {list(x.shape)} on {x.device}"


def tensor(what: str, x: object, dtype: torch.dtype, *shape: int | None) -> Tensor:
    """Return a CPU tensor of this type and shape (None: any size), contiguous; raises InputError for anything else."""
    sizes = ", ".join("any" if n is None else str(n) for n in shape)
    requirement = f"a {str(dtype).removeprefix('torch.')} tensor [{sizes}] on the CPU"
    if not isinstance(x, Tensor) or x.layout != torch.strided or x.device.type != "cpu" or x.dtype != dtype:
        refuse(what, requirement, x)
    if x.dim() != len(shape) or any(n not in (None, m) for n, m in zip(shape, x.shape, strict=True)):
        refuse(what, requirement, x)
    return x.detach().contiguous()


def floats(what: str, x: object, *shape: int | None) -> Tensor:
    """Return a float32 tensor of this shape, contiguous."""
    return tensor(what, x, torch.float32, *shape)


def samples(x: object) -> Tensor:
    """Return a batch of at least one sample: of floating numbers, or of whole ones, which an embedding looks up."""
    if not isinstance(x, Tensor) or x.dim() < 2 or not len(x):
        refuse("x", "a float32 tensor [n, ...] on the CPU with n > 0", x)
    if not (x.is_floating_point() or x.dtype == torch.int64):
        refuse("x", "of float32, or of int64 where it is tokens", x)
    return tensor("x", x, torch.int64 if x.dtype == torch.int64 else torch.float32, *x.shape)


def integer(what: str, n: object, least: int, most: int = LARGEST) -> int:
    """Return a whole number between the two."""
    if isinstance(n, bool) or not isinstance(n, int) or not least <= n <= most:
        refuse(what, f"a whole number from {least} to {most}" if most < LARGEST else f"at least {least}", n)
    return n


def boolean_mask(what: str, mask: object, dims: int) -> Tensor:
    """Return a boolean mask [out, in] or [out, in, k, k] with k odd, contiguous."""
    checked = tensor(what, mask, torch.bool, *[None] * dims)
    if dims == 4 and (checked.shape[2] != checked.shape[3] or checked.shape[2] % 2 == 0):
        refuse(what, "[out, in, k, k] with an odd k", checked)
    if checked.numel() > LARGEST:
        refuse(what, "of less than 2^31 elements", checked)
    return checked


def is_bf16(storage: object) -> bool:
    """Tell whether maps are stored as bfloat16."""
    if storage not in ("fp32", "bf16"):
        refuse("storage", "'fp32' or 'bf16'", storage)
    return storage == "bf16"


def optimizer(given: object) -> SGD | AdamW | None:
    """Return an optimizer that the kernels have, or None."""
    if given is not None and not isinstance(given, SGD | AdamW):
        refuse("optimizer", "SGD or AdamW", given)
    return given


def norm(what: str, x: object) -> float:
    """Return a finite number of 0 or more."""
    if isinstance(x, bool) or not isinstance(x, int | float) or not 0 <= x < float("inf"):
        refuse(what, "a finite number of 0 or more", x)
    return float(x)


def labels(what: str, y: object, *shape: int, classes: int, ignored: int = -1) -> Tensor:
    """Return int64 labels of this shape, each of a class, or, where it is negative, ``ignored``."""
    checked = tensor(what, y, torch.int64, *shape)
    between(what, checked[checked != ignored] if ignored != -1 else checked, classes)
    return checked


def between(what: str, x: Tensor, most: int) -> None:
    """Raise InputError unless all whole numbers are from 0 to below ``most``."""
    wrong = x[(x < 0) | (x >= most)]
    if len(wrong):
        refuse(what, f"of 0 to {most - 1}", int(wrong[0]))


def model(module: object, masks: object) -> None:
    """Raise InputError unless a model is of float32 on the CPU, and each mask is that of one of its parameters."""
    if not isinstance(module, nn.Module):
        refuse("model", "a torch.nn.Module", type(module).__name__)
    if not isinstance(masks, Mapping):
        refuse("mask", "a dictionary of masks by parameter name", type(masks).__name__)
    parameters = dict(module.named_parameters())
    for name, x in (parameters | dict(module.named_buffers())).items():
        if x.device.type != "cpu" or (x.is_floating_point() and x.dtype != torch.float32):
            refuse(f"{name} of the model", "float32 on the CPU", x)
    for name, mask in masks.items():
        if name not in parameters:
            refuse("the name of a mask", f"one of {', '.join(parameters)}", name)
        tensor(f"the mask of {name}", mask, torch.bool, *parameters[name].shape)


def changed_calls(model: nn.Module) -> str:
    """Return which module computes something else than its class says, by a hook or a forward; "" if none does."""
    calls = "_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks"
    for name, module in model.named_modules():
        if any(not _is_ours(hook) for kind in calls for hook in getattr(module, kind).values()):
            return f"{name or 'the model'} has a hook"
        if "forward" in vars(module):
            return f"{name or 'the model'} has a forward of its own, which is not its class's"
    return ""


def _is_ours(hook: Any) -> bool:
    """Tell whether a hook only counts, or keeps PyTorch from its fused layers: functions of this package do no more."""
    return str(getattr(getattr(hook, "func", hook), "__module__", "")).startswith("fedsieve.")
