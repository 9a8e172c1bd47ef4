"""Whether a run can be given more rounds: not where its learning rate, or its method, goes by their number."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from types import CodeType, FunctionType
from typing import Any

from fedsieve.engine.experiment import Run
from fedsieve.types import Method


def reason_not_to_prolong(run: Run) -> str | None:
    """Return why a run cannot be prolonged, with the remedy; None if it can."""
    if callable(run.lr_schedule) and not run.lr_rounds:
        return "its learning rate's schedule is stretched over all rounds: give lr_rounds, or choose another --out"
    if run.lr != run.lr_end and not run.lr_rounds and not run.lr_milestones:
        return (
            f"its learning rate falls to lr_end={run.lr_end} over all rounds; a run can be prolonged where lr_end=lr "
            f"({run.lr}), or over lr_rounds or in lr_milestones; choose another --out"
        )
    if uses_rounds(run.method):
        return f"{run.method.name} itself goes by the number of rounds (device.rounds); choose another --out"
    return None


def uses_rounds(part: Any) -> bool:
    """Return whether a method goes by the number of rounds: what its ``uses_rounds`` says.

    One that says nothing does if a function of its class or module reads an attribute ``rounds``, or if a ``part`` of
    it does: a dataclass among its fields.
    """
    if isinstance(part, Method) and part.uses_rounds is not None:
        return part.uses_rounds
    values = [getattr(part, f.name) for f in fields(part)] if is_dataclass(part) else []
    inner = [value for value in values if is_dataclass(value) and not isinstance(value, type)]
    return any("rounds" in code.co_names for code in _codes(type(part))) or any(map(uses_rounds, inner))


def _codes(kind: type) -> Iterator[CodeType]:
    """Yield the code of a class, of those above it, and of the functions of their modules."""
    for above in kind.__mro__[:-1]:
        for part in (*vars(above).values(), *vars(sys.modules.get(above.__module__, above)).values()):
            inner = part.fget if isinstance(part, property) else getattr(part, "__func__", part)
            if isinstance(inner, FunctionType):
                yield from _nested(inner.__code__)


def _nested(code: CodeType) -> Iterator[CodeType]:
    yield code
    for part in code.co_consts:
        if isinstance(part, CodeType):
            yield from _nested(part)
