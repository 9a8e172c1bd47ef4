"""What the attacks share: a key, messages written by hand, and how an attempt ended."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass

from fedsieve.wire import Known, WireError

KEY = bytes(range(32))


@dataclass(frozen=True)
class Outcome:
    """How one attempt ended: refused, and why; or taken."""

    idea: str
    refused: str | None


def tried(idea: str, attempt: Callable[[], object]) -> Outcome:
    """Return how an attempt ended. Any other error than WireError is let through: it would be a finding."""
    try:
        attempt()
    except WireError as error:
        return Outcome(idea, str(error))
    return Outcome(idea, None)


def varint(number: int) -> bytes:
    """Return a number as docs/reference/wire.md writes it."""
    return bytes([number]) if number < 128 else bytes([number & 127 | 128]) + varint(number >> 7)


def message(plan: bytes, streams: bytes = b"", known: Known | None = None) -> bytes:
    """Return a message of this plan and these streams, whatever they say."""
    head = b"\1" + known.manifest.digest if known and known.manifest else b"\0"
    return b"FSV3" + head + struct.pack("<II", len(plan), 0) + plan + streams


def report(outcomes: list[Outcome]) -> None:
    """Print how every attempt ended."""
    for outcome in outcomes:
        print(f"{outcome.idea}: {'TAKEN' if outcome.refused is None else f'refused: {outcome.refused}'}")
