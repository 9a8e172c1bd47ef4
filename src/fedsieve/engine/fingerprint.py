"""A run as plain JSON, and a hash of what it computes: the same in every process that was given the same settings."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any

from fedsieve.engine.task import Federation


def described(thing: Any) -> Any:
    """Return a run as plain JSON: dataclasses by their fields (a method's kind first), functions by their names.

    A field that came later (``engine.task.LATER``) is told where it is not the default.
    """
    if is_dataclass(thing) and not isinstance(thing, type):
        told = [f for f in fields(thing) if not f.metadata.get("later") or getattr(thing, f.name) != f.default]
        return {"kind": type(thing).__name__} | {f.name: described(getattr(thing, f.name)) for f in told}
    if isinstance(thing, partial):
        return {"partial": described(thing.func), "args": described(thing.args), **described(thing.keywords)}
    if callable(thing):
        return f"{thing.__module__}:{getattr(thing, '__qualname__', type(thing).__qualname__)}"
    if isinstance(thing, Mapping):
        return {str(name): described(part) for name, part in thing.items()}
    if isinstance(thing, tuple | list):
        return [described(part) for part in thing]
    return thing


def fingerprint(federation: Federation) -> str:
    """Return a hash of what the run computes: its settings, and who holds which examples where both sides know it."""
    text = json.dumps(described(federation.run), sort_keys=True, default=lambda thing: type(thing).__qualname__)
    digest = hashlib.sha256(text.encode())
    for shard in federation.shards if federation.own is None else ():
        digest.update(shard.numpy().tobytes())
    return digest.hexdigest()
