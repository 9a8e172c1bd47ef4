"""Mistakes of the user's, and what a machine could not do or has not got, each in one line."""

from __future__ import annotations

import errno
import traceback
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

MEMORY = ("allocate memory", "out of memory", "could not create a primitive", "can't start new thread")
"""What PyTorch, oneDNN and Python say where memory is lacking and no MemoryError is raised."""


class InputError(ValueError):
    """A mistake of the user's: the message names it and the remedy, in one line."""


def check_interval(name: str, value: float, interval: str) -> None:
    """Raise InputError unless a value is a number in an interval, written as in ``[0, 1)``."""
    low, high = map(float, interval[1:-1].split(","))
    inside = isinstance(value, int | float) and low <= value <= high
    if not inside or (value == low and interval[0] == "(") or (value == high and interval[-1] == ")"):
        raise InputError(f"{name} must lie in {interval}, got {value!r}")


def install(extra: str) -> str:
    """Return the command that brings what an optional part of FedSieve needs."""
    return f"pip install '.[{extra}]' in FedSieve's checkout"


def package(name: str, extra: str) -> Any:
    """Import an optional package, or say which extra brings it."""
    try:
        return import_module(name)
    except ImportError:
        raise InputError(f"the package {name} is not installed: {install(extra)}") from None


def of_machine(error: BaseException) -> str | None:
    """Return what was lacking and what to do; None if the error is of another kind."""
    lacking = isinstance(error, MemoryError | torch.OutOfMemoryError)
    lacking |= isinstance(error, RuntimeError) and any(text in str(error) for text in MEMORY)
    lacking |= isinstance(error, OSError) and error.errno == errno.ENOMEM
    if lacking:
        return "there is not enough memory: free some, or lower batch, or give the process more (ulimit -v)"
    if isinstance(error, torch.AcceleratorError):
        return f"the GPU failed: {str(error).splitlines()[0]}"
    if isinstance(error, OSError):
        return f"{error.strerror or error}: {error.filename or 'the output'}: free the place, or choose another"
    if isinstance(error, RecursionError):
        last = traceback.extract_tb(error.__traceback__)[-1]
        return f"something is nested too deeply ({error}; {last.filename} line {last.lineno})"
    return None


def error_of(function: object, error: Exception) -> str:
    """Return in one line what a user's function raised, and in which line of which file."""
    name = getattr(function, "__qualname__", type(function).__name__)
    line = (str(error).splitlines() or [""])[0]
    frames = traceback.extract_tb(error.__traceback__)
    where = f", {Path(frames[1].filename).name} line {frames[1].lineno}" if len(frames) > 1 else ""
    return f"{name} fails ({type(error).__name__}{': ' if line else ''}{line}{where})"
