"""The nouns of the package: plain data, of torch and numpy.

A round is: ``Method.broadcast`` -> bytes -> ``Method.client`` -> bytes -> ``Method.aggregate``. Everything that
crosses an arrow is one of these types.
"""

from fedsieve.types.contract import Expected
from fedsieve.types.data import (
    Data,
    Examples,
    Mask,
    Params,
    Sparse,
    Tree,
    apply_model,
    compute_loss,
    leaves,
    logits_of,
    map_examples,
    normalize_inputs,
    tensors_of,
    true_positions,
)
from fedsieve.types.errors import InputError
from fedsieve.types.method import (
    LATER,
    Augment,
    Correction,
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
from fedsieve.types.optimizers import SGD, AdamW

__all__ = [
    "LATER",
    "SGD",
    "AdamW",
    "Augment",
    "Correction",
    "Data",
    "Device",
    "Examples",
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
    "apply_model",
    "clone_shared",
    "compute_loss",
    "flatten",
    "leaves",
    "logits_of",
    "map_examples",
    "normalize_inputs",
    "rng",
    "tensors_of",
    "true_positions",
    "unflatten",
]
