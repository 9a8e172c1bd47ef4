"""A message for another receiver: another model's manifest, another base, none, or an older version."""

from __future__ import annotations

import torch
from common import Outcome, report, tried

from fedsieve.wire import Known, Manifest, decode, encode


def attack() -> list[Outcome]:
    """Try it."""
    x, y = torch.arange(300.0), torch.arange(300.0).view(20, 15)
    a, b = Manifest.of({"x": x}), Manifest.of({"x": y})
    based, other = Known(a, {"x": x}), Known(a, {"x": x + 1})
    return [
        tried("another manifest", lambda: decode(encode({"x": x}, Known(a)), Known(b))),
        tried("no manifest", lambda: decode(encode({"x": x}, Known(a)))),
        tried("another base", lambda: decode(encode({"x": x}, based), other)),
        tried("no base", lambda: decode(encode({"x": x}, based), Known(a))),
        tried("version 1", lambda: decode(b"FSV1" + encode({"x": x})[4:])),
    ]


if __name__ == "__main__":
    report(attack())
