"""A message that claims much: 2^40 bytes or floats, all flips of a tensor of 4 million, a million empty tensors."""

from __future__ import annotations

import struct

import numpy as np
import torch
from common import Outcome, message, report, tried, varint

from fedsieve.wire import Known, Manifest, decode
from fedsieve.wire.streams import pack

MANY = 4_000_000


def attack() -> list[Outcome]:
    """Try it."""
    huge = varint(1) + b"\2\0\1x\0\1" + varint(2**40) + b"\0"
    small = varint(1) + b"\2\0\1x\0\1" + varint(64) + b"\0"
    frame = bytes.fromhex("28b52ffde0") + struct.pack("<Q", 2**40) + b"\1\0\0"
    frames = struct.pack("<4I", len(frame), 0, 0, 0) + frame
    empty = b"".join(b"\2\0\3" + bytes([i // 10_000, i // 100 % 100, i % 100]) + b"\0\1\0\0" for i in range(10**6))
    base = {"x": torch.randn(MANY, generator=torch.Generator().manual_seed(0))}
    known = Known(Manifest.of(base), base)
    return [
        tried("a dense tensor of 2^40 floats", lambda: decode(message(huge))),
        tried("a zstandard frame of 2^40 bytes", lambda: decode(message(small, varint(4 * len(frames) + 2) + frames))),
        tried("4 million flips of a support", lambda: decode(flips(known, 3, b""), known)),
        tried("4 million flips by magnitude", lambda: decode(flips(known, 4, varint(2024)), known)),
        tried("a million empty tensors", lambda: decode(message(varint(10**6) + empty))),
    ]


def flips(known: Known, way: int, edge: bytes) -> bytes:
    """Return a message whose positions differ from what the base foresees everywhere, in gaps of 0."""
    assert known.manifest
    plan = varint(1) + bytes([3 + 4 + 8, way]) + varint(MANY) + varint(MANY) + edge
    streams = [pack(np.zeros(MANY, form), "pcodec")[1] for form in (np.uint32, np.float32)]
    head = b"FSV3\3" + known.manifest.digest + known.digest + struct.pack("<II", len(plan), 0)
    return head + plan + b"".join(varint(4 * len(stream) + 1) + stream for stream in streams)


if __name__ == "__main__":
    report(attack())
