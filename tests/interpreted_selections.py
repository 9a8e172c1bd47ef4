"""Run the kernels of the exact top-k in Triton's interpreter, which TRITON_INTERPRET=1 calls; print what is wrong."""

from contextlib import suppress

import torch
import triton.language as tl
from torch import Tensor

import selections
from fedsieve.sparse import selection, selection_kernels, selection_launch

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def cut(x: Tensor, k: int | Tensor) -> tuple[Tensor, Tensor]:
    return selection_launch.select(x, k, x.dtype) if x.numel() else selection.cut(x, k)


def support(x: Tensor, k: int | Tensor) -> Tensor:
    return selection_launch.select(x, k, torch.bool)[0] if x.numel() else selection.support(x, k)


def rounding_cut(x: Tensor, k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return selection_launch.select(x, k, dtype) if x.numel() else selection.cut(x, k, dtype)


def wrong_keys() -> list[int]:
    """Return the k for which another support of integers is selected than on a CPU: of -1, ties, and large ones."""
    keys = torch.randint(-1, 3, (700,), dtype=torch.int32, generator=torch.Generator().manual_seed(8))
    keys[::7] = 2**31 - 1 - keys[::7].abs()
    return [k for k in selections.counts(700) if not torch.equal(support(keys, k), selection.largest(keys, k))]


def accepted_batches() -> list[int]:
    """Return which of the batches that a GPU would misread are made all the same."""
    x, ones = torch.zeros(4, 6), torch.ones((), dtype=torch.int64)
    batches = [([x, x.T], [1, 1]), ([x, x.double()], [1, 1]), ([x, x], [1]), ([x, x], ones.expand(2))]
    accepted = []
    for i, batch in enumerate(batches):
        with suppress(ValueError):
            selection_launch.Batch(*batch, torch.float32)
            accepted.append(i)
    return accepted


if __name__ == "__main__":
    selection_launch.BLOCK, selection_launch.PROGRAMS = 128, 3
    selection_kernels.RANGES = selection_launch.RANGES = tl.constexpr(4)  # each then longer than a block
    print("wrong:", selections.wrong_cases(FLOATS, cut, support, block=128, every=3))
    print("wrong:", wrong_keys())
    print("wrong:", selections.wrong_rounding(rounding_cut, block=128))
    print("wrong:", accepted_batches())
    tensors, k = selections.batch(128, torch.bfloat16)
    print(
        "wrong:",
        selections.wrong_in_batch(tensors, k, selection_launch.Batch(tensors, torch.tensor(k), torch.bfloat16)),
    )
