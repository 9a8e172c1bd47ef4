"""The seal: a message bound to its run, round, client, direction and base by HMAC-SHA256."""

from __future__ import annotations

import hashlib
import hmac
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from fedsieve.types import InputError
from fedsieve.wire.known import WireError

TAG = 32
"""Bytes of the tag, which stands before the message."""

SHORTEST = 16
"""Bytes that a key must have at least."""


@dataclass(frozen=True)
class Envelope:
    """What a message is bound to. It is not sent: the receiver knows it, and the tag tells whether it is the same.

    ``run`` is the run's random name, ``settings`` the hash of what it computes; ``direction`` is ``down`` (to the
    client) or ``up``; ``base`` the digest of the model that the message is against (``Known.digest``).
    """

    run: str
    settings: str
    round: int
    client: int
    direction: str
    base: bytes = b""

    def to_bytes(self) -> bytes:
        """Return the envelope in bytes, of which no two are alike."""
        texts = [self.run.encode(), self.settings.encode(), self.direction.encode(), self.base]
        numbers = struct.pack("<IIIIqq", *map(len, texts), self.round, self.client)
        return b"fedsieve seal 3\0" + numbers + b"".join(texts)


@dataclass(frozen=True)
class Body:
    """A message under a seal. Its digest is found once, however many clients' messages it stands in."""

    data: bytes

    @cached_property
    def digest(self) -> bytes:
        """The message's SHA-256."""
        return hashlib.sha256(self.data).digest()


def seal(body: Body, envelope: Envelope, key: bytes) -> bytes:
    """Return a message with its tag before it."""
    return _tag(body, envelope, key) + body.data


def unseal(data: bytes, envelope: Envelope, key: bytes, last: Body | None = None) -> Body:
    """Return a sealed message without its tag. Raises WireError unless it was sealed so, with this key.

    ``last``: the message opened before, which is returned if this one is the same, byte for byte.
    """
    if len(data) < TAG:
        raise WireError(f"a sealed message of {len(data)} bytes is shorter than its tag")
    same = last is not None and len(data) == TAG + len(last.data) and data.endswith(last.data)
    body = last if last is not None and same else Body(data[TAG:])
    if not hmac.compare_digest(_tag(body, envelope, key), data[:TAG]):
        raise WireError(
            f"the seal does not fit round {envelope.round} and client {envelope.client} ({envelope.direction}): "
            "the message is damaged, or of another run, other settings, another round, client, base or key"
        )
    return body


def key_of_run(environment: Mapping[str, str] | None = None) -> bytes:
    """Return the key of FEDSIEVE_KEY (hexadecimal) or of the file FEDSIEVE_KEY_FILE. Raises InputError."""
    environment = os.environ if environment is None else environment
    text, path = environment.get("FEDSIEVE_KEY"), environment.get("FEDSIEVE_KEY_FILE")
    if text and path:
        raise InputError("both FEDSIEVE_KEY and FEDSIEVE_KEY_FILE are set: unset one")
    where = "FEDSIEVE_KEY" if text else f"FEDSIEVE_KEY_FILE ({path})"
    if path:
        try:
            text = Path(path).read_text(encoding="ascii")
        except OSError as error:
            raise InputError(f"{where} cannot be read: {error.strerror}") from None
        except UnicodeDecodeError:
            text = "?"
    if not text:
        raise InputError("no key: set FEDSIEVE_KEY to 64 hexadecimal digits, or FEDSIEVE_KEY_FILE to a file of them")
    try:
        key = bytes.fromhex(text.strip())
    except ValueError:
        raise InputError(f"{where} is not hexadecimal: take what `openssl rand -hex 32` prints") from None
    if len(key) < SHORTEST:
        raise InputError(f"{where} has {len(key)} bytes, at least {SHORTEST} are due: `openssl rand -hex 32` makes 32")
    return key


def _tag(body: Body, envelope: Envelope, key: bytes) -> bytes:
    if envelope.direction not in ("up", "down"):
        raise ValueError(f"a message goes up or down, not {envelope.direction!r}")
    if len(key) < SHORTEST:
        raise ValueError(f"a key of {len(key)} bytes; at least {SHORTEST} are due")
    return hmac.new(key, envelope.to_bytes() + body.digest, hashlib.sha256).digest()
