"""A run as plain JSON, and a hash of what it computes: the same in every process that was given the same settings."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fedsieve.data import Dataset
from fedsieve.data.partition import Indices
from fedsieve.engine.experiment import Federation


def described(thing: Any) -> Any:
    """Return a run as plain JSON: dataclasses by their fields (a method's kind first), functions by their names.

    A model, a dataset or indices that were given as they are come with a hash of what they hold.

    A field that came later (``engine.experiment.LATER``) is described where it is not the default.
    """
    if isinstance(thing, Dataset):
        return f"{thing.name} {thing.digest}"
    if isinstance(thing, Indices):
        return f"indices {thing.digest}"
    if is_dataclass(thing) and not isinstance(thing, type):
        relevant = [f for f in fields(thing) if not f.metadata.get("later") or getattr(thing, f.name) != f.default]
        return {"kind": type(thing).__name__} | {f.name: described(getattr(thing, f.name)) for f in relevant}
    if isinstance(thing, partial):
        return {"partial": described(thing.func), "args": described(thing.args), **described(thing.keywords)}
    if isinstance(thing, nn.Module):
        return f"{type(thing).__module__}:{type(thing).__qualname__} {_digest(thing)}"
    if callable(thing):
        return f"{thing.__module__}:{getattr(thing, '__qualname__', type(thing).__qualname__)}"
    if isinstance(thing, Mapping):
        return {str(name): described(part) for name, part in thing.items()}
    if isinstance(thing, tuple | list):
        return [described(part) for part in thing]
    return thing


def _digest(model: nn.Module) -> str:
    """Return a hash of a model that was given as it is: its layers, and all that they hold."""
    digest = hashlib.sha256(repr(model).encode())
    for name, value in model.state_dict().items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def fingerprint(federation: Federation) -> str:
    """Return a hash of what the run computes: its settings, and who holds which examples where both sides know it."""
    text = json.dumps(described(federation.run), sort_keys=True, default=lambda thing: type(thing).__qualname__)
    holders = digest_of(federation.shards) if federation.own is None else ""
    return hashlib.sha256(f"{text}{holders}".encode()).hexdigest()


def digest_of(shards: Iterable[Tensor]) -> str:
    """Return a hash of which examples every client holds."""
    digest = hashlib.sha256()
    for shard in shards:
        digest.update(f"{len(shard)} ".encode() + shard.numpy().tobytes())
    return digest.hexdigest()
