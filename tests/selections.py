"""What tests of the exact top-k share: awkward tensors, and what is to be selected of them, by a sort of NumPy's."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
Cut = Callable[[Tensor, int | Tensor], tuple[Tensor, Tensor]]
Support = Callable[[Tensor, int | Tensor], Tensor]


def bits(x: Tensor) -> Tensor:
    """Return the bits of floating point numbers: of NaNs and zeros, too, each is equal to itself alone."""
    return x.view(INTEGERS[x.element_size()])


def awkward_values(dtype: torch.dtype, block: int) -> dict[str, Tensor]:
    """Return flat tensors: no element, one, a block and one more; ties, zeros, and what is not a number."""
    rng = torch.Generator().manual_seed(5)
    nan, inf = float("nan"), float("inf")
    tiny = torch.finfo(dtype).smallest_normal
    special = torch.tensor([0.0, -0.0, 1.0, -1.0, inf, -inf, nan, tiny / 4, -tiny / 2, tiny, torch.finfo(dtype).max])
    other_nan = bits(torch.tensor([nan, nan, nan], dtype=dtype)) | torch.tensor([0, 1, 3], dtype=bits(special).dtype)
    normal = torch.randn(2 * block + 907, generator=rng)
    picked = special[torch.randint(len(special), (block + 452,), generator=rng)]
    values = {
        "empty": torch.zeros(0),
        "one": torch.tensor([-2.5]),
        "seven": torch.tensor([3.0, -3.0, 0.0, 1.0, -0.0, 3.0, 2.0]),
        "normal": normal,
        "a block and one": normal[: block + 1],
        "ties": (normal * 2).round(),
        "after a ReLU": normal.relu(),
        "zeros": torch.zeros(2 * block + 4),
        "signed zeros": normal.sign() * 0,
        "equal": torch.full((block + 252,), -1.5),
        "special": picked,
        "denormal": normal * tiny / 8,
    }
    return {name: x.to(dtype) for name, x in values.items()} | {
        "NaNs": torch.cat([other_nan.view(dtype)] * (block // 2))
    }


def formats(dtype: torch.dtype) -> dict[str, Tensor]:
    """Return tensors with many ties that lie in memory in every way."""
    x = (torch.randn(3, 7, 9, 4, generator=torch.Generator().manual_seed(6)) * 2).round().to(dtype)
    last = x.to(memory_format=torch.channels_last)
    return {
        "contiguous": x,
        "channels_last": last,
        "channels_last of one image": last[:1],
        "cut out of channels_last": last[:, 1:5],
        "transposed": x.transpose(0, 3),
        "strided": x[..., ::2],
        "expanded": x[:, :1].expand(3, 4, 9, 4),
        "no dimension": x[0, 0, 0, 0],
    }


def counts(n: int) -> list[int]:
    """Return awkward k."""
    return sorted({0, 1, n // 20, n // 2, max(n - 1, 0), n, n + 5})


def expected(x: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return mask, values and smallest magnitude of the k largest: a stable sort of the bits without their sign."""
    flat = bits(x.detach().cpu().contiguous()).numpy().reshape(-1)
    keys = (flat & np.iinfo(flat.dtype).max).astype(np.int64)
    order = np.argsort(-keys, kind="stable")[:k]
    mask = np.zeros(len(keys), dtype=bool)
    mask[order] = True
    smallest = torch.from_numpy(np.array(keys[order].min() if len(order) else -1))
    values = torch.from_numpy(np.where(mask, flat, 0)).view(x.dtype).view(x.shape)
    return torch.from_numpy(mask).view(x.shape), values, smallest


def agrees(x: Tensor, k: int, on_device: bool, cut: Cut, support: Support) -> bool:
    """Tell whether both functions give what is expected, to the bit."""
    wanted = torch.tensor(k, device=x.device) if on_device else k
    values, threshold = cut(x, wanted)
    mask, want, smallest = expected(x, k)
    nothing = smallest < 0
    right = threshold.isnan() if nothing else (bits(threshold.cpu()) == smallest) & (threshold.dtype == x.dtype)
    return bool(
        right
        and (values.shape, values.dtype, threshold.dim()) == (x.shape, x.dtype, 0)
        and torch.equal(bits(values.cpu().contiguous()), bits(want))
        and torch.equal(support(x, wanted).cpu(), mask)
    )


def wrong_cases(
    dtypes: tuple[torch.dtype, ...],
    cut: Cut,
    support: Support,
    block: int = 2048,
    move: Callable[[Tensor], Tensor] = Tensor.detach,
    every: int = 1,
) -> list[str]:
    """Return the names of the cases in which the functions are wrong; k is by turns on the host and beside the tensor.

    ``move`` brings a tensor to the device; only one case of ``every`` is tried.
    """
    tensors = [
        (f"{dtype} {name}", x)
        for dtype in dtypes
        for name, x in {**awkward_values(dtype, block), **formats(dtype)}.items()
    ]
    cases = [(name, move(x), k) for name, x in tensors for k in counts(x.numel())][::every]
    return [f"{name} {k}" for i, (name, x, k) in enumerate(cases) if not agrees(x, k, i % 2 == 0, cut, support)]


def wrong_rounding(
    cut: Callable[[Tensor, int, torch.dtype], tuple[Tensor, Tensor]],
    block: int = 2048,
    move: Callable[[Tensor], Tensor] = Tensor.detach,
) -> list[str]:
    """Return the names of the float32 tensors whose kept values are not rounded to bfloat16 as by PyTorch."""
    wrong = []
    for name, x in awkward_values(torch.float32, block).items():
        k = x.numel() // 3
        values, threshold = cut(move(x), k, torch.bfloat16)
        _, want, smallest = expected(x, k)
        equal = torch.equal(values.cpu().nan_to_num(7.0), want.bfloat16().nan_to_num(7.0))
        if not equal or (smallest >= 0 and bits(threshold.cpu()) != smallest):
            wrong.append(name)
    return wrong


def batch(block: int, dtype: torch.dtype) -> tuple[list[Tensor], list[int]]:
    """Return tensors of one dtype, of several sizes and memory formats, and how many of each to keep."""
    rng = torch.Generator().manual_seed(7)
    shapes = [(4, 6, 3, 3), (3 * block + 4,), (5, 5, 4, 4), (1,)]
    ties = [(torch.randn(shape, generator=rng) * 2).round().to(dtype) for shape in shapes]
    ties[0] = ties[0].to(memory_format=torch.channels_last)
    return ties, [30, 25, 0, 9]


def wrong_in_batch(
    tensors: list[Tensor], k: list[int], cuts: Callable[[], tuple[list[Tensor], Tensor]]
) -> list[tuple[int, int]]:
    """Return call and place of every tensor of a batch that is cut wrongly, before and after its values changed."""
    wrong = []
    for call in range(2):
        values, thresholds = cuts()
        for i, own in enumerate(k):
            if not agrees(tensors[i], own, False, lambda *_: (values[i], thresholds[i]), support_by_sort):  # noqa: B023
                wrong.append((call, i))
        for x in tensors:
            x.sub_(1)
    return wrong


def support_by_sort(x: Tensor, k: int | Tensor) -> Tensor:
    """Return the mask that is expected."""
    return expected(x, int(k))[0]
