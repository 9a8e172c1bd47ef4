"""docs/reference/wire.md is enough to read messages by: a decoder written from it agrees with the shipped one."""

import ast
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedsieve.types import Sparse
from fedsieve.wire import TYPES, Known, Manifest, decode, encode
from fedsieve.wire.known import array
from fuzzing import corpus
from messages import GOLDEN, golden
from oracles import spec


def told(known: Known | None) -> spec.Known:
    """What a receiver knows, in the second decoder's terms."""
    if known is None:
        return spec.Known()
    entries = [(name, kind, tuple(shape)) for name, kind, shape in known.manifest.entries] if known.manifest else []
    dense = {n: v.dense() if isinstance(v, Sparse) else v for n, v in known.base.items()}
    words = {n: array(v).view(np.uint32).tolist() for n, v in dense.items()}
    return spec.Known(entries, words, {n: m.reshape(-1).tolist() for n, m in known.masks.items()})


def plain(value: Any) -> Any:
    """What was decoded, in the second decoder's terms."""
    if isinstance(value, Mapping):
        return {name: plain(part) for name, part in value.items()}
    if isinstance(value, float):
        return struct.pack("<d", value)
    values = value.values if isinstance(value, Sparse) else value
    flat = array(values)
    if values.dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        flat = flat.view(f"<u{flat.itemsize}")
    return (
        TYPES.index(values.dtype),
        tuple(value.shape),
        value.index.tolist() if isinstance(value, Sparse) else None,
        [*map(int, flat)],
    )


def flat(value: Any) -> Any:
    """What the second decoder found, with floats of 64 bits as their bits."""
    if isinstance(value, dict):
        return {name: flat(part) for name, part in value.items()}
    if isinstance(value, float):
        return struct.pack("<d", value)
    kind, shape, at, values = value
    return kind, shape, at, [int(np.float64(v).view(np.uint64)) if kind == 1 else int(v) for v in values]


@pytest.mark.parametrize("name", golden())
def test_the_page_is_enough_for_every_kept_message(name: str) -> None:
    _, known, _ = golden()[name]
    kept = bytes.fromhex((GOLDEN / f"{name}.hex").read_text())
    assert flat(spec.decode(kept, told(known))) == plain(decode(kept, known))


@pytest.mark.parametrize("back_end", ["pcodec", "zstd"])
def test_and_for_messages_of_many_tensors(back_end: str) -> None:
    for data, known in corpus(back_end):
        assert flat(spec.decode(data, told(known))) == plain(decode(data, known))


def test_and_for_positions_that_differ_among_magnitudes_of_many_octaves() -> None:
    """The base's largest spread over octaves above the last that is sent, and some of all sizes are not sent."""
    order = torch.randperm(4000, generator=torch.Generator().manual_seed(0))
    base = torch.arange(1.0, 4001).pow(3)[order].view(40, 100)
    support = (base > base.quantile(0.7)) & (torch.arange(4000).view(40, 100) % 7 > 0)
    value = Sparse.of(base * 1.01, support)
    known = Known(Manifest.of({"w": value}), {"w": base})
    data = encode({"w": value}, known)
    assert flat(spec.decode(data, told(known))) == plain(decode(data, known)) == plain({"w": value})


def test_the_second_decoder_knows_nothing_of_the_first() -> None:
    source = ast.parse(Path(spec.__file__).read_text())
    modules = [alias.name for node in ast.walk(source) if isinstance(node, ast.Import) for alias in node.names]
    modules += [node.module or "" for node in ast.walk(source) if isinstance(node, ast.ImportFrom)]
    assert modules
    assert not any("fedsieve" in module or "messages" in module for module in modules)
