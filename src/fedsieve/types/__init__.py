"""The nouns of the package: plain data, torch only.

A round is: ``Method.broadcast`` -> bytes -> ``Method.client`` -> bytes -> ``Method.aggregate``. Everything that
crosses an arrow is one of these types.
"""

from fedsieve.types.contract import Expected
from fedsieve.types.data import Data, Mask, Params, Sparse, Tree, normalize_inputs
from fedsieve.types.errors import InputError
from fedsieve.types.method import (
    LATER,
    Augment,
    Device,
    Method,
    RoundContext,
    ServerState,
    Steps,
    Update,
    clone_shared,
    flatten,
    rng,
    unflatten,
)

__all__ = [
    "LATER",
    "Augment",
    "Data",
    "Device",
    "Expected",
    "InputError",
    "Mask",
    "Method",
    "Params",
    "RoundContext",
    "ServerState",
    "Sparse",
    "Steps",
    "Tree",
    "Update",
    "clone_shared",
    "flatten",
    "normalize_inputs",
    "rng",
    "unflatten",
]
