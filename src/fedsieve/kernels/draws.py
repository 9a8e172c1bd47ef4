"""What PyTorch's generator draws for dropout, in a tenth of its time: by the library, where that draws the same."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from fedsieve.kernels.library import native


def bernoulli(sizes: Sequence[int], p: float) -> Tensor:
    """Return what ``torch.empty(sizes, dtype=torch.uint8).bernoulli_(p)`` does, and leave the generator as it does."""
    return _drawn(sizes, p) if _is_pytorchs() else torch.empty(*sizes, dtype=torch.uint8).bernoulli_(p)


def _drawn(sizes: Sequence[int], p: float) -> Tensor:
    state, drawn = torch.get_rng_state(), torch.empty(*sizes, dtype=torch.uint8)
    native().fs_bernoulli(state.data_ptr(), p, drawn.data_ptr(), drawn.numel())
    torch.set_rng_state(state)
    return drawn


@cache
def _is_pytorchs() -> bool:
    """Tell whether PyTorch draws one number after another: on Intel's CPUs its matrix library may, in another way."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        torch.randint(9, (7,))
        start = torch.get_rng_state()
        want, after = torch.empty(3, 1001, dtype=torch.uint8).bernoulli_(0.3), torch.get_rng_state()
        torch.set_rng_state(start)
        return torch.equal(_drawn((3, 1001), 0.3), want) and torch.equal(torch.get_rng_state(), after)
