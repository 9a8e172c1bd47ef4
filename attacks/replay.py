"""A message that was good once: sent again in another round, by another client, to another run, or back."""

from __future__ import annotations

from dataclasses import replace

from common import KEY, Outcome, report, tried

from fedsieve.wire import Body, Envelope, encode, seal, unseal


def attack() -> list[Outcome]:
    """Try it."""
    was = Envelope("run-1", "lr .1", 3, 7, "up", bytes(16))
    sealed = seal(Body(encode({"n": 1.0})), was, KEY)
    others = {"round": 4, "client": 8, "run": "run-2", "settings": "lr .2", "direction": "down", "base": b"\1" * 16}
    return [
        tried(f"another {name}", lambda name=name, value=value: unseal(sealed, replace(was, **{name: value}), KEY))
        for name, value in others.items()
    ]


if __name__ == "__main__":
    report(attack())
