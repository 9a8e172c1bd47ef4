"""A small message that has its receiver sort the whole model: an edge below all magnitudes, or beyond the last step."""

from __future__ import annotations

import struct

import torch
from common import Outcome, report, tried, varint

from fedsieve.wire import Known, Manifest, decode

MANY = 1_000_000


def attack() -> list[Outcome]:
    """Try it."""
    base = {"x": torch.randn(MANY, generator=torch.Generator().manual_seed(0))}
    manifest = Manifest.of(base)
    known = Known(manifest, base)

    def one(edge: int) -> bytes:
        plan = varint(1) + b"\3\0\1x\0\1" + varint(MANY) + b"\4" + varint(1) + varint(0) + varint(edge)
        head = b"FSV3\3" + manifest.digest + known.digest + struct.pack("<II", len(plan), 0)
        return head + plan + varint(4 * 4) + struct.pack("<f", 1.0)

    return [
        tried("an edge that makes a million elements likely", lambda: decode(one(0), known)),
        tried("an edge beyond the last step", lambda: decode(one(2**40), known)),
    ]


if __name__ == "__main__":
    report(attack())
