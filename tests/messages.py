"""Messages written by hand, byte by byte as docs/reference/wire.md has them, and trees whose messages are kept."""

import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from fedsieve.types import Sparse, Tree
from fedsieve.wire import Known, Manifest, decode, encode
from fedsieve.wire.streams import _pco

GOLDEN = Path(__file__).with_name("golden") / "wire"


def varint(number: int) -> bytes:
    return b"" if number < 0 else bytes([number]) if number < 128 else bytes([number & 127 | 128]) + varint(number >> 7)


def message(plan: bytes, streams: bytes = b"", pad: bytes = b"", flags: int = 0, digests: bytes = b"") -> bytes:
    return b"FSV3" + bytes([flags]) + digests + struct.pack("<II", len(plan), len(pad)) + plan + streams + pad


def named(kind: int, name: bytes = b"x") -> bytes:
    """An entry's head and its name, written out."""
    return bytes([kind, 0]) + varint(len(name)) + name


def leaf(kind: int, shape: tuple[int, ...], mode: int = 0, way: int = 0, told: bytes = b"", dtype: int = 0) -> bytes:
    """A tree of one tensor called x."""
    shaped = bytes([dtype, len(shape)]) + b"".join(map(varint, shape))
    return varint(1) + named(kind) + shaped + bytes([8 * mode + way]) + told


def stream(numbers: object, dtype: str, way: int = 0) -> bytes:
    """A stream: raw (0), by pcodec (1), or a byte each (3)."""
    array = np.array(numbers, dtype)
    data = _pco(array, True) if way == 1 else array.tobytes()
    if way == 3:
        data = array.astype(np.uint8).tobytes()
    return framed(data, way)


def framed(data: bytes, way: int) -> bytes:
    return varint(4 * len(data) + way) + data


ONE = struct.pack("<f", 1.0)


def mixed(numel: int, salt: int = 0) -> torch.Tensor:
    """Floats in [0.5, 2) of either sign, by integer arithmetic alone: the same on every machine."""
    i = np.arange(numel, dtype=np.uint64) + np.uint64(1000 * salt)
    hashed = (i * np.uint64(2654435761) ^ (i * np.uint64(40503) >> np.uint64(3))) & np.uint64(0xFFFFFFFF)
    words = (hashed & np.uint64(0x80FFFFFF)) + np.uint64(0x3F000000)
    return torch.from_numpy(words.astype(np.uint32).view(np.float32))


def every(numel: int, n: int) -> torch.Tensor:
    """A mask of about every n-th element."""
    i = np.arange(numel, dtype=np.uint64)
    return torch.from_numpy((i * np.uint64(2654435761) >> np.uint64(7)) % np.uint64(n) == 0)


def units(mask: torch.Tensor, unit: int) -> torch.Tensor:
    """The mask [20, 15] of units [groups * 15]."""
    return mask.view(-1, 15).repeat_interleave(unit, 0)[:20]


def golden() -> dict[str, tuple[Tree, Known | None, dict[str, str]]]:
    """What is encoded for every kept message: the tree, what is known, and further arguments."""
    x = mixed(300)
    steps = (x.view(torch.int32) + (torch.arange(300) % 7).int()).view(torch.float32)
    some, other = every(300, 6), every(300, 6) ^ every(300, 50)
    manifest = Manifest.of({"x": x, "y": x.view(20, 15)})
    based = Known(manifest, {"x": x})
    held = Known(manifest, {"x": torch.where(some, x, torch.zeros(()))})
    ranked = torch.cat([x[:60] * 64, x[60:]])
    tops = ranked.abs() > 8
    alike = {"x": Sparse.of(mixed(300, 3), tops), "y": mixed(300, 1).view(20, 15)}
    odd = torch.tensor([0, 1, -(2**31), 0x7F800000, 0x7FC00001, -1], dtype=torch.int32).view(torch.float32)
    own, moved = (units(every(45, 4) ^ (torch.arange(45) == at), 8) for at in (0, 7))
    y, held_units = x.view(20, 15), torch.where(own, x.view(20, 15), torch.zeros(()))
    tall = Known(manifest, {"y": torch.where(own, 64 * y, y)})
    punctured = torch.where(own & (torch.arange(300).view(20, 15) % 97 > 0), y, torch.zeros(()))
    kinds = {
        f"{dtype}".removeprefix("torch."): torch.arange(-3, 70).to(dtype)
        for dtype in (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32)
    }
    return {
        "empty": ({}, None, {}),
        "number": ({"n": 2.5, "deeper": {"n": -0.0}}, None, {}),
        "floats": ({"x": odd, "scalar": torch.tensor(1.0), "none": torch.zeros(0, 2)}, None, {}),
        "types": ({**kinds, "uint8": torch.arange(60).byte(), "bool": every(77, 3)}, None, {}),
        "integers": ({"x": torch.arange(600.0)}, None, {}),
        "signed": ({"x": x}, None, {}),
        "unsigned": ({"x": x.abs()}, None, {}),
        "manifest": ({"y": x.view(20, 15), "x": x}, Known(manifest), {}),
        "gaps": ({"x": Sparse.of(x, some)}, None, {}),
        "zeros": ({"x": torch.where(some, x, torch.zeros(()))}, None, {}),
        "padding": ({"x": torch.zeros(40, 1000)}, None, {}),
        "mask": ({"x": Sparse.of(x, some)}, Known(manifest, masks={"x": some}), {}),
        "distance": ({"x": steps}, based, {}),
        "changes": ({"x": Sparse.of(steps, other)}, held, {}),
        "ranked": (alike, Known(manifest, {"x": ranked}), {}),
        "bf16": ({"x": x, "y": x.abs()}, None, {"values": "bf16"}),
        "bf16_distance": ({"x": steps, "y": x.view(20, 15)}, based, {"values": "bf16"}),
        "int8": ({"y": x.view(20, 15)}, None, {"values": "int8"}),
        "int4": ({"y": x.view(20, 15)}, None, {"values": "int4"}),
        "own_stream": ({"x": every(5000, 9).float()}, None, {}),
        "unit_gaps": ({"y": Sparse.of(y, own)}, None, {}),
        "unit_zeros": ({"y": punctured}, None, {}),
        "unit_changes": ({"y": Sparse.of(y, moved)}, Known(manifest, {"y": held_units}), {}),
        "unit_ranked": ({"y": Sparse.of(y, moved)}, tall, {}),
        "zstd": ({"x": Sparse.of(x, some), "y": x, "k": torch.arange(-90, 90)}, None, {"back_end": "zstd"}),
        "zstd_distance": ({"x": steps}, based, {"back_end": "zstd"}),
    }


if __name__ == "__main__":  # python tests/messages.py: only after a change of the format that is meant
    GOLDEN.mkdir(exist_ok=True, parents=True)
    for name, (tree, known, how) in golden().items():
        text = encode(tree, known, **how).hex()
        (GOLDEN / f"{name}.hex").write_text("\n".join(text[i : i + 96] for i in range(0, len(text), 96)) + "\n")


def same(a: object, b: object) -> bool:
    if isinstance(a, Sparse):
        return isinstance(b, Sparse) and a.shape == b.shape and same(a.index, b.index) and same(a.values, b.values)
    if isinstance(a, torch.Tensor):
        if not isinstance(b, torch.Tensor) or a.dtype != b.dtype or a.shape != b.shape:
            return False
        return a.numel() == 0 or torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
    if isinstance(a, Mapping):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    return struct.pack("<d", a) == struct.pack("<d", b)  # type: ignore[arg-type]


def size(tree: Tree, known: Known | None = None, **how: str) -> int:
    message = encode(tree, known, **how)
    assert decode(message, known).keys() == tree.keys()
    return len(message)


W = torch.randn(512, 600, generator=torch.Generator().manual_seed(3))


BASE = {"w": W * (1 + 0.001 * torch.randn(512, 600, generator=torch.Generator().manual_seed(4)))}
