"""Bytes that no tensor comes from: behind the message, the plan, a frame, in the padding, in unused bits."""

from __future__ import annotations

import numpy as np
import torch
from common import Outcome, message, report, tried, varint

from fedsieve.wire import decode, encode
from fedsieve.wire.streams import pack


def attack() -> list[Outcome]:
    """Try it."""
    x = torch.arange(300.0) ** 1.5
    whole = encode({"x": x})
    plan = varint(1) + b"\2\0\1x\0\1" + varint(64)
    frame = pack(np.linspace(1, 2, 64, dtype=np.float32), "pcodec")[1] + b"hidden"
    signed = varint(1) + b"\2\0\1x\0\1" + varint(1) + bytes([8])
    return [
        tried("behind the message", lambda: decode(whole + b"hidden")),
        tried("behind the plan", lambda: decode(message(varint(0) + b"hidden"))),
        tried("behind a frame", lambda: decode(message(plan + b"\0", varint(4 * len(frame) + 1) + frame))),
        tried("in unused bits", lambda: decode(message(signed, varint(16) + bytes(4) + b"\xfe"))),
    ]


if __name__ == "__main__":
    report(attack())
