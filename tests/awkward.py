"""What the tests of the kernels share: awkward masks, and how far a result may lie from that in float64."""

import torch
from torch import Tensor

FLOAT, BFLOAT = 2.0**-24, 2.0**-8
"""Half the distance between neighbours, as a part of the number."""
STORAGES = ("fp32", "bf16")


def randn(*shape: int, seed: int = 0) -> Tensor:
    """Return normal numbers that bfloat16 holds exactly: both storages then start from the same."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16().float()


def awkward_mask(kind: str | float, *shape: int) -> Tensor:
    """Return a mask of a density; with one element; or with its first row full, its last empty, and the rest sparse.

    unit8, unit4: one that so many successive rows share.
    """
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(3)) < (kind if isinstance(kind, float) else 0.2)
    if kind == "one":
        mask = torch.zeros(shape, dtype=torch.bool)
        mask.view(-1)[mask.numel() // 2 :][:1] = True
    if kind in ("unit8", "unit4"):
        unit = int(kind[4:])
        mask = mask[::unit].repeat_interleave(unit, 0)[: len(mask)]
    if kind == "rows" and len(mask):
        mask[0], mask[-1] = True, False
    return mask


def within(got: Tensor, want: Tensor, terms: int, size: Tensor, storage: str = "fp32", sums: int = 1) -> None:
    """Assert that a sum of ``terms`` products is as close as float32 allows.

    ``size`` is the sum of the terms' magnitudes: any order of summation errs by at most (terms + 2) half-distances of
    it; bfloat16 rounds what is stored once more, ``sums`` times.
    """
    assert got.dtype == torch.float32
    assert got.shape == want.shape
    bound = (terms + 2) * FLOAT * size.double()
    if storage == "bf16":
        bound = bound + sums * BFLOAT * (size.double() if sums > 1 else want.abs() + bound)
    error = (got.double() - want).abs()
    assert bool((error <= bound + 1e-37).all()), f"off by {(error / bound.clamp(min=1e-37)).max():.3g} times the bound"
