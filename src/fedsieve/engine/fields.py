"""Checks of what a user gives for the fields of a run, its task and its method; what is wrong is said in one line."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import is_dataclass
from itertools import pairwise
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from fedsieve.client.losses import BinaryCrossEntropy, CrossEntropy, NextToken, Regression
from fedsieve.client.metrics import Accumulator, Metric
from fedsieve.data.dataset import type_name
from fedsieve.types import InputError, Method


def check_numbers(name: str, values: Any, positive: bool = False) -> tuple[float, ...]:
    """Return finite numbers as a tuple. Raises InputError."""
    several = () if isinstance(values, str) or not isinstance(values, Iterable) else tuple(values)
    good = all(isinstance(v, int | float) and math.isfinite(v) and (v > 0 or not positive) for v in several)
    if not good or (not several and values != ()):
        what = "positive numbers" if positive else "numbers"
        raise InputError(f"{name} must be {what}, one or one a channel, such as (0.5,), got {values!r}")
    return several


def check_shares(name: str, values: Any) -> tuple[float, ...]:
    """Return shares as a tuple. Raises InputError unless they are positive and add up to 1."""
    shares = () if isinstance(values, str) or not isinstance(values, Iterable) else tuple(values)
    if not shares or not all(isinstance(share, int | float) for share in shares):
        raise InputError(f"{name} must be shares that add up to 1, such as (0.5, 0.5), got {values!r}")
    if not all(share > 0 for share in shares) or abs(sum(shares) - 1) > 1e-9:
        raise InputError(f"{name} must be positive shares that add up to 1, got {shares}")
    return shares


def check_milestones(name: str, rounds: Any) -> tuple[int, ...]:
    """Return rounds as a tuple. Raises InputError unless each is after the one before."""
    several = () if isinstance(rounds, str) or not isinstance(rounds, Iterable) else tuple(rounds)
    rise = all(type(t) is int for t in several) and all(a < b for a, b in pairwise((0, *several)))
    if not rise or (not several and rounds != ()):
        raise InputError(f"{name} must be rounds that rise, such as (50, 100), got {rounds!r}")
    return several


def check_fields(where: str, holder: object) -> None:
    """Raise InputError unless fields that are to hold numbers, words, or one of some dataclasses do."""
    for name, kind in get_type_hints(type(holder)).items():
        value, kinds = getattr(holder, name), get_args(kind)
        if kind is int and type(value) is not int:
            what = "a whole number"
        elif kind is float and not (isinstance(value, int | float) and not isinstance(value, bool)):
            what = "a number"
        elif kind is bool and not isinstance(value, bool):
            what = "true or false"
        elif kind is str and not isinstance(value, str):
            what = "a text"
        elif get_origin(kind) is Literal and not (isinstance(value, str) and value in kinds):
            what = f"one of {', '.join(kinds)}"
        elif kinds and all(is_dataclass(one) or one is NoneType for one in kinds) and not isinstance(value, kinds):
            what = f"one of {', '.join('None' if one is NoneType else f'{one.__name__}()' for one in kinds)}"
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
    for name, value in (("warm_up", method.warm_up), ("tiers", method.tiers or 0)):
        several = isinstance(value, tuple) and name == "warm_up"
        numbers = value if isinstance(value, tuple) and several else (value,)
        if any(type(number) is not int or number < several for number in numbers):
            more = "or several of 1 or more, " if name == "warm_up" else ""
            raise InputError(f"{method.name}: {name} must be a whole number, 0 or more, {more}got {value!r}")


def lr_factor(schedule: Callable[[float], float], past: float) -> float:
    """Return what a user's schedule multiplies the learning rate with. Raises InputError unless that is a number."""
    factor: Any = None
    try:
        factor = schedule(past)
        number = float(factor)
    except Exception as error:
        line = (str(error).splitlines() or [""])[0] or type_name(error)
        what = line if factor is None else repr(factor)
        raise InputError(f"lr_schedule({past:.3g}) must be a number of 0 or more, got {what}") from error
    if isinstance(factor, str) or not 0 <= number < math.inf:
        raise InputError(f"lr_schedule({past:.3g}) must be a number of 0 or more, got {factor!r}")
    return number


def check_task_metrics(loss: Any, metrics: Any) -> dict[str, Any]:
    """Return a task's own metrics. Raises InputError unless its loss is one, and each metric has a name and is one."""
    kinds = CrossEntropy, NextToken, BinaryCrossEntropy, Regression
    if isinstance(loss, type) or not callable(loss):
        raise InputError(
            f"task.loss must be {', '.join(f'{kind.__name__}()' for kind in kinds)}, or a function of output and "
            f"targets, got {loss!r}"
        )
    if not isinstance(metrics, Mapping):
        raise InputError(f"task.metrics must be functions by name, such as {{'f1': f1}}, got {type_name(metrics)}")
    for name, metric in metrics.items():
        if not isinstance(name, str) or not name.isidentifier():
            raise InputError(f"task.metrics: a name is of letters, digits and underscores, got {name!r}")
        inner = metric.function if isinstance(metric, Metric) else metric
        if isinstance(inner, type) or not (callable(inner) or isinstance(inner, Accumulator)):
            what = "a function of output and targets, or have update, compute and reset"
            raise InputError(f"task.metrics[{name!r}] must be {what}, got {inner!r}")
    return dict(metrics)
