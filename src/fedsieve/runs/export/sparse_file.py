"""A model in one small file, ``.fsv``: the zeros of its weights are left out, all else is kept to the bit.

    file = message of ``fedsieve.wire``, then its sha256 (32 bytes)
    tree = "metadata"    uint8: ``ModelMetadata.json`` in UTF-8
           "weights" every tensor by its name

A weight (two or more dimensions) goes as positions and values of its non-zeros where that is smaller. Its zeros come
back as +0.0, whichever sign they had: pruning leaves both, and no sum of products tells them apart.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from torch import Tensor

from fedsieve.runs.export.metadata import ModelMetadata, parse_metadata
from fedsieve.types import InputError, Params, Sparse, Tree
from fedsieve.wire import MAGIC, WireError, decode, encode

DIGEST = 32


def encode_model(metadata: ModelMetadata, weights: Params) -> bytes:
    """Return the file of a model. Raises InputError for a tensor of a type that has no place in it."""
    text = torch.frombuffer(bytearray(metadata.json().encode()), dtype=torch.uint8)
    tree: Tree = {"metadata": text, "weights": {name: _smaller(v) for name, v in weights.items()}}
    try:
        message = encode(tree)
    except WireError as error:
        raise InputError(f"the model does not fit into a .fsv ({error}): export it as .safetensors") from None
    return message + hashlib.sha256(message).digest()


def read_model(path: Path) -> tuple[ModelMetadata, dict[str, Tensor | Sparse]]:
    """Return what ``encode_model`` was given, sparse weights as they are stored. Raises InputError."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): name a run directory or a .fsv file") from None
    message = content[:-DIGEST]
    if content.startswith(b"FSV1"):
        raise InputError(f"{path} was written by an earlier FedSieve: export the model anew")
    if not content.startswith(MAGIC):
        raise InputError(f"{path} is no .fsv file: name a run directory, or what `fedsieve export -o model.fsv` wrote")
    if hashlib.sha256(message).digest() != content[-DIGEST:]:
        raise InputError(f"{path} is damaged or cut short (its checksum is wrong): copy it again, or export it anew")
    try:
        tree = decode(message)
        text, weights = tree["metadata"], tree["weights"]
        if not isinstance(text, Tensor) or not isinstance(weights, dict):
            raise TypeError
        metadata = parse_metadata(json.loads(text.numpy().tobytes()), str(path))
        return metadata, {name: v for name, v in weights.items() if isinstance(v, Tensor | Sparse)}
    except (WireError, KeyError, TypeError, ValueError, RecursionError):
        raise InputError(f"{path} holds no model: name what `fedsieve export -o model.fsv` wrote") from None


def _smaller(value: Tensor) -> Tensor | Sparse:
    """Return a weight as its non-zeros if they and a bit for each position take less than all of its numbers."""
    support = value != 0
    zeros = value.numel() - int(support.sum())
    return Sparse.of(value, support) if value.dim() >= 2 and zeros * value.element_size() * 8 > value.numel() else value
