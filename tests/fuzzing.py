"""Structured mutations of whole messages, with the seal off: the decoder may take one or refuse it, and nothing else.

    python tests/fuzzing.py [MUTATIONS] [SEED] [BACK_END] [MODEL]
    python tests/fuzzing.py --keep [BACK_END] [MODEL]      (into benchmarks/results/fuzz.json; can go on)

It prints how many were taken, the longest decode, and the most memory that one set aside, as a share of the model: more
than its budget is a failure. The models: of 31 k elements, where half a million mutations are kept for each back end,
and of 4 M and 11 M, where there are as many as minutes allow, of messages that claim all of the model in few bytes.
"""

from __future__ import annotations

import json
import math
import random
import struct
import sys
import time
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import torch

from claims import SIZES, hostile, of_one_tensor
from fedsieve.sparse.masks import top
from fedsieve.types import Sparse, Tree
from fedsieve.wire import Known, Manifest, WireError, decode, encode
from fedsieve.wire.streams import BACK_ENDS
from messages import mixed, varint

SHAPES = dict.fromkeys("abcdefg", (70, 64)) | {"l.x": (400,), "l.y": (20, 20), "m.x": (300,), "m.y": (15, 20)}
WARM = 300
"""The first mutations are not traced: they also set up what Python keeps for every later one."""

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results" / "fuzz.json"
SLICES = {"31 k": (50, 10_000), "4 M": (10, 200), "11 M": (10, 50)}
"""Of each model how many slices are kept, and of how many mutations."""

INTERESTING = (0, 1, 2, 3, 7, 8, 127, 128, 255, 256, 4095, 4096, 65535, 65536, 2**22, 2**31, 2**32 - 1, 2**40, 2**63)


@dataclass
class Found:
    """What the mutations came to."""

    taken: int = 0
    refused: int = 0
    slowest: float = 0.0
    most_memory: int = 0
    """Bytes at the worst moment of a decode, what came out included."""
    model: int = 0
    """The bytes of the dense model, twice which decoding may set aside."""
    kinds: set[str] = field(default_factory=set)
    """The beginnings of the reasons: how much of the decoder was reached."""


def corpus(back_end: str) -> list[tuple[bytes, Known]]:
    """Return messages of every mode over a small model, and what their receivers know."""
    params = {name: mixed(math.prod(shape), i).view(shape) for i, (name, shape) in enumerate(SHAPES.items())}
    params |= {name: value * 2**-20 for name, value in params.items() if value.dim() == 1}
    masks = {name: top(v, 0.1) for name, v in params.items() if v.dim() > 1}
    near = {name: v * 1.0001 for name, v in params.items()}
    sparse: Tree = {name: Sparse.of(v, top(v.flip(0), 0.2)) for name, v in params.items()}
    on_masks: Tree = {name: Sparse.of(v, masks[name]) if name in masks else v for name, v in near.items()}
    manifest = Manifest.of(params)
    nothing, plain = Known(), Known(manifest)
    based, masked = Known(manifest, params), Known(manifest, masks=masks)
    held = Known(manifest, {n: torch.where(top(v, 0.1), v, torch.zeros(())) for n, v in params.items()})
    kept = {n: m & (torch.arange(m.numel()).view(m.shape) % 7 > 0) for n, m in masks.items()}
    fewer: Tree = {n: Sparse.of(params[n].flip(0), m) for n, m in kept.items()}
    units = {n: m[::8].repeat_interleave(8, 0)[: len(m)] for n, m in masks.items()}
    shared: Tree = {n: torch.where(m, params[n], torch.zeros(())) for n, m in units.items()}
    tall = {n: torch.where(m, 64 * params[n], params[n]) for n, m in units.items()}
    moved: Tree = {n: Sparse.of(near[n], kept[n][::8].repeat_interleave(8, 0)[: len(m)]) for n, m in units.items()}
    other: Tree = {"n": 3.0, "t": {"k": torch.arange(90), "b": torch.arange(90) > 7, "h": torch.ones(70).half()}}
    return [
        (encode(tree, known, values, back_end), known)
        for tree, known, values in (
            (params, nothing, "f32"), (params, plain, "f32"), (near, based, "f32"), (sparse, nothing, "f32"),
            (sparse, plain, "f32"), (sparse, based, "f32"), (sparse, held, "f32"), (on_masks, masked, "f32"),
            (on_masks, based, "f32"), (near, based, "bf16"), (sparse, plain, "bf16"), (params, plain, "int8"),
            (sparse, plain, "int4"),
            ({n: Sparse.of(params[n], m) for n, m in units.items()}, nothing, "f32"), (shared, plain, "int8"),
            (moved, Known(manifest, {**params, **shared}), "f32"), (moved, Known(manifest, {**params, **tall}), "f32"),
            (fewer, held, "f32"), (other, nothing, "f32"), ({**other, **sparse}, plain, "f32"), ({}, plain, "f32"),
        )
    ]  # fmt: skip


def large(size: str, back_end: str) -> list[tuple[bytes, Known]]:
    """Return short messages over a model of millions of elements: those that claim much, and honest ones."""
    known = of_one_tensor(size)
    base = known.base["x"]
    assert isinstance(base, torch.Tensor)
    based, thin = Known(known.manifest, known.base), Known(known.manifest, {"x": base * (base > 2.5)})
    tops, ones = base.abs() > 3, torch.ones_like(base)
    some = tops ^ (torch.arange(base.numel()).view(base.shape) % 50_021 == 0)
    shared = tops[::8].repeat_interleave(8, 0)[: len(tops)]
    honest: list[tuple[Tree, Known, str]] = [
        ({"x": base}, based, "f32"), ({"x": base}, based, "bf16"), ({"x": ones}, based, "f32"),
        ({"x": ones}, thin, "f32"),
        ({"x": Sparse.of(base, tops)}, based, "f32"), ({"x": Sparse.of(base, some)}, based, "f32"),
        ({"x": Sparse.of(base, some & (base > 2.5))}, thin, "f32"), ({"x": Sparse.of(base, ones > 0)}, based, "f32"),
        ({"x": base * tops}, thin, "bf16"), ({"x": base * tops}, based, "int8"),
        ({"x": Sparse.of(base, shared)}, based, "f32"), ({"x": Sparse.of(base, shared)}, thin, "f32"),
        ({"x": torch.where(shared, base, torch.zeros(()))}, based, "bf16"),
    ]  # fmt: skip
    told = [(encode(tree, context, values, back_end), context) for tree, context, values in honest]
    return told + [(data, known) for data in hostile(size, back_end).values()]


def _bits(data: bytearray, random: random.Random) -> None:
    data[random.randrange(len(data))] ^= 1 << random.randrange(8)


def _byte(data: bytearray, random: random.Random) -> None:
    data[random.randrange(len(data))] = random.randrange(256)


def _plan(data: bytearray, random: random.Random) -> None:
    """Change a byte of the head or of the plan, where the claims are."""
    start = 5 + 16 * (data[4] & 1) + 16 * (data[4] >> 1 & 1) if len(data) > 4 else 0
    data[min(len(data) - 1, random.randrange(max(1, min(len(data), start + 200))))] = random.choice(range(256))


def _number(data: bytearray, random: random.Random) -> None:
    """Put a number that is awkward over what stands there, as a varint or fixed."""
    number = random.choice(INTERESTING) + random.choice((-1, 0, 1))
    text = varint(max(0, number)) if random.random() < 0.6 else struct.pack("<q", min(max(number, 0), 2**63 - 1))
    at = random.randrange(len(data))
    data[at : at + len(text)] = text


def _cut(data: bytearray, random: random.Random) -> None:
    del data[random.randrange(len(data)) :]


def _drop(data: bytearray, random: random.Random) -> None:
    at = random.randrange(len(data))
    del data[at : at + random.choice((1, 2, 4, 8, 40))]


def _repeat(data: bytearray, random: random.Random) -> None:
    at, size = random.randrange(len(data)), random.choice((1, 2, 4, 8, 40))
    data[at:at] = data[at : at + size]


def _append(data: bytearray, random: random.Random) -> None:
    data += random.randbytes(random.choice((1, 4, 30))) if random.random() < 0.5 else bytes(random.choice((1, 4, 30)))


def _swap(data: bytearray, random: random.Random) -> None:
    a, b, size = random.randrange(len(data)), random.randrange(len(data)), random.choice((1, 2, 4, 16))
    data[a : a + size], data[b : b + size] = data[b : b + size], data[a : a + size]


def _lengths(data: bytearray, random: random.Random) -> None:
    """Change the lengths of the plan or the padding by a little."""
    at = 5 + 16 * (data[4] & 1) + 16 * (data[4] >> 1 & 1) + 4 * random.randrange(2) if len(data) > 60 else 0
    if len(data) > 60:
        number = struct.unpack_from("<I", data, at)[0] + random.choice((-2, -1, 1, 2, 1000))
        struct.pack_into("<I", data, at, max(0, min(2**32 - 1, number)))


MUTATIONS: tuple[Callable[[bytearray, random.Random], None], ...] = (
    _bits, _byte, _plan, _plan, _plan, _number, _number, _cut, _drop, _repeat, _append, _swap, _lengths,
)  # fmt: skip


def check(tree: object, known: Known) -> None:
    """Hold what every tree that comes out must be."""
    for value in tree.values() if isinstance(tree, dict) else ():
        if isinstance(value, dict):
            check(value, known)
        elif isinstance(value, Sparse):
            assert len(value.index) == len(value.values)
            assert not len(value.index) or 0 <= int(value.index[0]) <= int(value.index[-1]) < math.prod(value.shape)
            assert bool((value.index.diff() > 0).all())
        values = value.values if isinstance(value, Sparse) else value
        if known.finite and isinstance(values, torch.Tensor) and values.is_floating_point():
            assert bool(torch.isfinite(values).all())


def fuzz(mutations: int, seed: int, back_end: str, model: str = "31 k") -> Found:
    """Decode so many mutated messages, some under a trace of memory. Other errors than WireError get through."""
    small = model == "31 k"
    chance, messages = random.Random(f"{seed} {back_end}"), corpus(back_end) if small else large(model, back_end)
    elements = sum(math.prod(shape) for shape in SHAPES.values()) if small else math.prod(SIZES[model])
    found, warm, traced = Found(model=4 * elements), WARM if small else 0, 20 if small else 4
    for data, known in messages:  # fills what is kept for the next time
        with suppress(WireError):
            decode(data, known)
    for i in range(mutations):
        data, known = chance.choice(messages)
        changed = bytearray(data)
        for _ in range(chance.choice((1, 1, 1, 2, 3, 5))):
            chance.choice(MUTATIONS)(changed, chance) if changed else None
        mutated = bytes(changed)
        watched = i >= warm and i % traced == 0
        if watched:
            known.orders.clear()
            tracemalloc.start()
        began = time.process_time()
        try:
            tree = decode(mutated, known)
            found.slowest = max(found.slowest, time.process_time() - began)
            if watched:
                found.most_memory = max(found.most_memory, tracemalloc.get_traced_memory()[1])
            check(tree, known)
            found.taken += 1
        except WireError as error:
            found.refused += 1
            if watched:
                found.most_memory = max(found.most_memory, tracemalloc.get_traced_memory()[1])
            found.kinds.add("".join(c for c in str(error)[:40] if not c.isdigit()))
        finally:
            if watched:
                tracemalloc.stop()
    assert found.most_memory <= 2 * found.model, f"{found.most_memory} bytes, where the model has {found.model}"
    return found


def kept() -> list[dict[str, Any]]:
    """Return what every slice so far came to."""
    rows: list[dict[str, Any]] = json.loads(RESULTS.read_text())["slices"] if RESULTS.exists() else []
    return rows


def keep(back_end: str, model: str) -> None:
    """Fuzz slice by slice, a seed each, and write down what each came to; those that are there are not redone."""
    slices, mutations = SLICES[model]
    for seed in range(slices):
        if any((row["model"], row["back_end"], row["seed"]) == (model, back_end, seed) for row in kept()):
            continue
        began, f = time.perf_counter(), fuzz(mutations, seed, back_end, model)
        row: dict[str, Any] = {"model": model, "back_end": back_end, "seed": seed, "taken": f.taken}
        row |= {"refused": f.refused, "kinds": len(f.kinds), "memory": f.most_memory / f.model}
        row["seconds"] = time.perf_counter() - began
        order = [*SLICES]
        rows = sorted([*kept(), row], key=lambda row: (order.index(row["model"]), row["back_end"], row["seed"]))
        RESULTS.write_text('{"slices": [\n' + ",\n".join(map(json.dumps, rows)) + "\n]}\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1:2] == ["--keep"]:
        for size in sys.argv[3:] or SLICES:
            for back in sys.argv[2:3] or BACK_ENDS:
                keep(back, size)
        sys.exit()
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    first = int(sys.argv[2]) if len(sys.argv) > 2 else 0
    for size, back in product(sys.argv[4:] or ["31 k"], sys.argv[3:4] or BACK_ENDS):
        f = fuzz(count, first, back, size)
        print(
            f"{size}, {back}: {f.taken + f.refused} mutations, seed {first}: {f.taken} taken, {f.refused} refused for "
            f"{len(f.kinds)} kinds of reasons, none crashed; slowest {1000 * f.slowest:.0f} ms, "
            f"most memory {f.most_memory / f.model:.2f} x the model"
        )
