"""A message without the key: no tag, a tag of zeros, a cut tag, the tag of another key, a changed number."""

from __future__ import annotations

from common import KEY, Outcome, report, tried

from fedsieve.wire import Body, Envelope, encode, seal, unseal


def attack() -> list[Outcome]:
    """Try it."""
    body, envelope = encode({"n": 100.0}), Envelope("run-1", "lr .1", 3, 7, "up")
    sealed = seal(Body(body), envelope, KEY)
    forged = {
        "no tag": body,
        "a tag of zeros": bytes(32) + body,
        "a cut tag": sealed[1:],
        "another key's tag": seal(Body(body), envelope, KEY[::-1]),
        "a changed number": sealed[:32] + encode({"n": 1e12}),
        "more behind it": sealed + b"\0",
    }
    return [tried(name, lambda data=data: unseal(data, envelope, KEY)) for name, data in forged.items()]


if __name__ == "__main__":
    report(attack())
