"""Error feedback: what rounding took from a value is added to it the next time it is sent.

Seide et al., "1-bit stochastic gradient descent", Interspeech 2014. The residual belongs in the client's memory.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from fedsieve.types import Sparse
from fedsieve.wire.known import NOTHING, Known, WireError, array
from fedsieve.wire.values import BF16, INT4, INT8, LOSSY, from_bf16, multiples, quantised, to_bf16


def rounded(values: Tensor, how: str) -> Tensor:
    """Return float32 values as they arrive when a whole tensor of them is sent as bf16, int8 or int4."""
    mode = LOSSY.get(how)
    if mode is None:
        raise WireError(f"values go as {', '.join(LOSSY)}, not as {how!r}")
    words = array(values).view(np.uint32)
    if mode == BF16:
        words = from_bf16(to_bf16(words))
    elif mode in (INT8, INT4):
        scale, folded = quantised(words, mode)
        words = multiples(folded, float(scale), mode)
    return torch.from_numpy(words.view(np.float32).copy()).view(values.shape)


def compensate(
    tree: Mapping[str, Tensor | Sparse], residual: Mapping[str, Tensor], how: str, known: Known = NOTHING
) -> tuple[dict[str, Tensor | Sparse], dict[str, Tensor]]:
    """Return what to encode with ``values=how``, and the residual to keep: the sum of both equals what was to be sent.

    ``tree`` is flat. Float32 entries of two dimensions and more take part, and values on a mask of such a tensor, where
    ``known`` has a manifest that says so. A residual is as large as what its entry stands for; where a sparse entry
    sends nothing, it waits.
    """
    sent: dict[str, Tensor | Sparse] = {}
    kept: dict[str, Tensor] = {}
    for name, value in tree.items():
        values = (value.values if isinstance(value, Sparse) else value).detach().cpu()
        if values.dtype != torch.float32 or known.dimensions(name, value.shape) < 2:
            sent[name] = value
            continue
        left = residual[name].clone() if name in residual else torch.zeros(tuple(value.shape))
        if left.shape != tuple(value.shape):
            raise WireError(f"a residual of shape {tuple(left.shape)} for {name}")
        if isinstance(value, Sparse):
            index = value.index.detach().cpu()
            whole = values + left.view(-1)[index]
            left.view(-1)[index] = whole - rounded(whole, how)
            sent[name] = Sparse(whole, index, value.shape)
        else:
            whole = values + left
            left, sent[name] = whole - rounded(whole, how), whole
        kept[name] = left
    return sent, kept
