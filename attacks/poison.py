"""Values that ruin a mean: NaN, infinities, in a number, in a tensor, or made by a scale."""

from __future__ import annotations

import math
import struct

import torch
from common import Outcome, message, report, tried, varint

from fedsieve.wire import Known, Manifest, decode, encode


def attack() -> list[Outcome]:
    """Try it."""
    x = torch.zeros(300)
    known = Known(Manifest.of({"x": x}))
    bad = {"NaN in a tensor": math.nan, "infinity in a tensor": math.inf, "minus infinity": -math.inf}
    told = [
        tried(name, lambda value=value: decode(encode({"x": x + value}, known), known)) for name, value in bad.items()
    ]
    scaled = varint(1) + b"\2\0\1y\0\1" + varint(1) + bytes([8 * 6]) + struct.pack("<f", math.inf)
    return [
        *told,
        tried("NaN for a number", lambda: decode(encode({"n": math.nan}, known), known)),
        tried("an infinite scale", lambda: decode(message(scaled, varint(4 * 2) + b"\2\0", known), known)),
    ]


if __name__ == "__main__":
    report(attack())
