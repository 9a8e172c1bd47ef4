"""What of a run is stretched over its ``rounds``, so that more of them would be another run from the first on."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from types import CodeType, FunctionType
from typing import Any

from fedsieve.engine.experiment import Run


def stretched(run: Run) -> str | None:
    """Return why a run cannot be prolonged, with the remedy; None if it can."""
    if run.lr != run.lr_end:
        return (
            f"its learning rate falls to lr_end={run.lr_end} over all rounds; a run can be prolonged where lr_end=lr "
            f"({run.lr}); choose another --out"
        )
    if uses_rounds(run.method):
        return f"{run.method.name} itself goes by the number of rounds (device.rounds); choose another --out"
    return None


def uses_rounds(method: Any) -> bool:
    """Return whether a method goes by the number of rounds: what its ``uses_rounds`` says.

    One that says nothing does if a function of its class or module reads an attribute ``rounds``, or if a part of it
    does: a dataclass among its fields.
    """
    said: bool | None = getattr(method, "uses_rounds", None)
    if said is not None:
        return said
    parts = [getattr(method, f.name) for f in fields(method)] if is_dataclass(method) else []
    inner = [part for part in parts if is_dataclass(part) and not isinstance(part, type)]
    return any("rounds" in code.co_names for code in _codes(type(method))) or any(map(uses_rounds, inner))


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
