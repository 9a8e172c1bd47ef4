"""A small message that claims a huge tensor: a zstandard frame of 2^40 bytes, a dense tensor of 2^40 floats."""

from __future__ import annotations

import struct

from common import Outcome, message, report, tried, varint

from fedsieve.wire import decode


def attack() -> list[Outcome]:
    """Try it."""
    frame = bytes.fromhex("28b52ffde0") + struct.pack("<Q", 2**40) + b"\1\0\0"
    huge = varint(1) + b"\2\0\1x\0\1" + varint(2**40) + b"\0"
    small = varint(1) + b"\2\0\1x\0\1" + varint(64) + b"\0"
    return [
        tried("a dense tensor of 2^40 floats", lambda: decode(message(huge))),
        tried("a zstandard frame of 2^40 bytes", lambda: decode(message(small, varint(4 * len(frame) + 2) + frame))),
    ]


if __name__ == "__main__":
    report(attack())
