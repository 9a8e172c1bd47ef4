"""The message format: ``encode`` a tree of tensors to bytes, ``decode`` it back exactly; ``seal`` binds it to a round.

docs/reference/wire.md is the specification. What is decoded equals what was encoded to the bit, subnormals, NaNs and
-0.0 included, unless rounding was asked for. What both sides know (``Known``) is not sent.
"""

from fedsieve.wire.authentication import TAG, Body, Envelope, key_of_run, seal, unseal
from fedsieve.wire.decoder import decode
from fedsieve.wire.encoder import encode
from fedsieve.wire.known import TYPES, Known, Manifest, WireError
from fedsieve.wire.plan import HEAD, MAGIC, base_of
from fedsieve.wire.positions import order_ahead
from fedsieve.wire.sharing import find_sharing
from fedsieve.wire.values import compensate, finite, rounded

__all__ = [
    "HEAD",
    "MAGIC",
    "TAG",
    "TYPES",
    "Body",
    "Envelope",
    "Known",
    "Manifest",
    "WireError",
    "base_of",
    "compensate",
    "decode",
    "encode",
    "find_sharing",
    "finite",
    "key_of_run",
    "order_ahead",
    "rounded",
    "seal",
    "unseal",
]
