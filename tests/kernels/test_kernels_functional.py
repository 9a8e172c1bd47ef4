"""The layers for anybody's model; one thread or many, every instruction set; NaN; and what the kernels refuse."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import reference_ops
import single_ops as ops
from awkward import STORAGES, awkward_mask, randn
from fedsieve import InputError
from fedsieve.kernels import library, sparse_conv2d, sparse_linear

pytestmark = pytest.mark.usefixtures("native")
MASK, FLAT = awkward_mask("rows", 3, 2, 3, 3), awkward_mask("rows", 3, 4)
X, VALUES = randn(5, 2, 6, 5), randn(int(MASK.sum()), seed=1)


@pytest.mark.filterwarnings(
    "ignore:Input #"
)  # "is not a double precision ...": of what is linear, a wide step is exact
@pytest.mark.parametrize(("stride", "padding"), [(1, 0), (1, 1), (2, 1), (2, 2)])
def test_gradcheck_of_a_convolution(stride: int, padding: int) -> None:
    x, weight = X.clone().requires_grad_(), randn(3, 2, 3, 3, seed=4).requires_grad_()

    def call(x: Tensor, weight: Tensor) -> Tensor:
        return sparse_conv2d(x, weight, MASK, stride, padding)

    assert torch.autograd.gradcheck(call, (x, weight), eps=0.5, atol=1e-4, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:Input #")
def test_gradcheck_of_a_linear_layer() -> None:
    x, weight = randn(5, 4).requires_grad_(), randn(3, 4, seed=4).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w: sparse_linear(x, w, FLAT), (x, weight), eps=0.5, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(
    "call",
    [
        lambda x, v: reference_ops.conv2d(x, v, MASK, None, 2, 1),
        lambda x, v: reference_ops.max_pool2d(x, 3, 2, 1),
        lambda x, v: reference_ops.avg_pool2d(x, 3, 2, 1, False),
        lambda x, v: reference_ops.norm(x, ops.BatchNorm(v[:2], v[2:4], *torch.ones(2, 2).double()), x * x, True),
    ],
)
def test_gradcheck_of_the_references(call: Callable[[Tensor, Tensor], Tensor]) -> None:
    x, values = X[:2].double().requires_grad_(), VALUES.double().requires_grad_()
    assert torch.autograd.gradcheck(call, (x, values))


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.fc = nn.Conv2d(2, 3, 3, bias=False), nn.Linear(36, 4, bias=False)
        self.masks = MASK, awkward_mask(0.3, 4, 36)

    def forward(self, x: Tensor) -> Tensor:
        x = sparse_conv2d(x, self.conv.weight, self.masks[0]).sigmoid()
        return sparse_linear(x.flatten(1), self.fc.weight, self.masks[1])


class Plain(Own):
    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.conv.weight * self.masks[0]).sigmoid()
        return F.linear(x.flatten(1), self.fc.weight * self.masks[1])


def test_a_model_of_ones_own_trains_alike() -> None:
    found = []
    for model in (Own(), Plain()):
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        for step in range(5):
            optimizer.zero_grad()
            F.cross_entropy(model(randn(7, 2, 5, 6, seed=step)), torch.arange(7) % 4).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        found.append(nn.utils.parameters_to_vector(model.parameters()))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("n", [1, 17, 65])
@pytest.mark.parametrize(("kind", "outer"), [("rows", 7), ("unit8", 29), ("unit4", 7)])
def test_bits_do_not_depend_on_threads(kind: str, outer: int, n: int, storage: ops.Storage) -> None:
    x, mask = randn(n, 5, 9, 7), awkward_mask(kind, outer, 5, 3, 3)
    values, grad = randn(int(mask.sum())), randn(n, outer, 5, 4)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert library.get_num_threads() == threads
        by = ops.BatchNorm(torch.ones(5), torch.zeros(5), torch.zeros(5), torch.ones(5))
        w, velocity = randn(n), randn(n)
        ops.sgd_(w, randn(n, seed=1), velocity, 0.1, 0.9, 0.01, 1.25)
        found.append([
            ops.conv2d(x, values, mask, None, 2, 1, storage=storage),
            ops.conv2d_input_gradient(grad, values, mask, (9, 7), 2, 1, storage=storage),
            ops.conv2d_weight_gradient(grad, x, mask, 2, 1, storage=storage),
            ops.max_pool2d_gradient(x, x, 1, storage=storage),
            ops.avg_pool2d(x, 3, 2, storage=storage),
            *ops.norm_gradient(x, x, by, x, True, storage=storage),
            *ops.cross_entropy(x.flatten(1), torch.arange(n), storage=storage),
            *(w, velocity),
        ])  # fmt: skip
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.skipif("FEDSIEVE_ISA" in os.environ, reason="an instruction set is chosen already")
@pytest.mark.parametrize("isa", library.supported_isas()[1:])
@pytest.mark.system
def test_every_instruction_set(isa: str) -> None:
    files = [str(path) for path in Path(__file__).parent.glob("test_kernels_*.py") if path.stem != "test_kernels_build"]
    ops = str(Path(__file__).with_name("test_kernels_ops.py"))
    for words in (["-m", "quick", *files], [ops]):  # every case of single operations, and some of all else
        command = [sys.executable, "-m", "pytest", "-q", "-x", *words]
        done = subprocess.run(command, env={**os.environ, "FEDSIEVE_ISA": isa}, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


def not_finite(bad: float, of: Any, **how: str) -> list[Tensor | None]:
    """One bad number in the input, or in the gradient, of each operation: every weight is there, as 0 inf is NaN."""
    x, grad, mask = randn(17, 2, 6, 5), randn(17, 3, 6, 5), torch.ones(3, 2, 3, 3, dtype=torch.bool)
    x[3, 1, 2, 2], grad[2, 1, 0, 4] = bad, bad
    x, grad, values, plain = (
        t.to(torch.float64 if of is reference_ops else t.dtype) for t in (x, grad, randn(54), x * 0 + 1)
    )
    plain = plain.nan_to_num(1.0)

    def by() -> ops.BatchNorm:
        return ops.BatchNorm(plain[0, :, 0, 0], x[0, :, 0, 0], x[1, :, 0, 0].clone(), plain[1, :, 0, 0].clone())

    return [
        of.conv2d(x, values, mask, None, 1, 1, **how),
        of.conv2d_input_gradient(grad, values, mask, (6, 5), 1, 1, **how),
        of.conv2d_weight_gradient(grad, plain, mask, 1, 1, **how),
        of.conv2d_weight_gradient(grad.nan_to_num(1, 1, 1), x, mask, 1, 1, **how),
        of.max_pool2d(x, 3, 2, 1, **how),
        of.avg_pool2d(x, 3, 2, 1, **how),
        of.norm(x, None, None, True, **how),
        of.norm(plain, None, x, True, **how),
        of.norm(x, by(), None, True, **how),
        *of.norm_gradient(plain, x, None, plain, True, **how),
        *of.norm_gradient(x, plain, None, plain, True, **how),
        *of.norm_gradient(plain, x, by(), None, True, **how),
        *of.norm_gradient(x, x.nan_to_num(1, 1, 1), by(), None, True, **how),
        *of.cross_entropy(x[:, :, 2, 2], torch.arange(17) % 2, **how),
    ]


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_as_in_pytorch(bad: float, storage: ops.Storage) -> None:
    pairs = zip(not_finite(bad, ops, storage=storage), not_finite(bad, reference_ops), strict=True)
    for i, (got, want) in enumerate(pairs):
        if got is not None and want is not None:
            torch.testing.assert_close(got.double(), want.double(), equal_nan=True, rtol=0.02, atol=0.02, msg=str(i))


def test_any_memory_order_will_do() -> None:
    x = randn(17, 2, 6, 5)
    want = ops.conv2d(x, VALUES, MASK)
    for other in (
        x.to(memory_format=torch.channels_last),
        x.repeat(2, 1, 1, 1)[17:],
        x.transpose(0, 3).contiguous().transpose(0, 3),
    ):
        assert torch.equal(ops.conv2d(other, VALUES, MASK.transpose(0, 1).contiguous().transpose(0, 1)), want)


WRONG: dict[str, Callable[[], object]] = {
    "mask must be a bool tensor": lambda: ops.conv2d(X, VALUES, MASK.float()),
    "mask must be a bool tensor [any, any, any, any] on the CPU, got bool [3, 4]": lambda: ops.conv2d(X, VALUES, FLAT),
    "got bool [3, 2, 3, 3] on meta": lambda: ops.conv2d(X, VALUES, MASK.to("meta")),
    "with an odd k": lambda: ops.conv2d(X, VALUES, MASK[..., :2, :2]),
    "values must be a float32 tensor": lambda: ops.conv2d(X, VALUES[1:], MASK),
    "values must be": lambda: ops.conv2d(X, VALUES.double(), MASK),
    "x must be a float32 tensor [any, 2, any, any] on the CPU, got float64": lambda: ops.conv2d(X.double(), VALUES, MASK),  # noqa: E501
    "got int64": lambda: ops.conv2d(X.long(), VALUES, MASK),
    "got float32 [5, 1, 6, 5] on cpu": lambda: ops.conv2d(X[:, :1], VALUES, MASK),
    "x must be": lambda: ops.conv2d(X[0], VALUES, MASK),
    "got sparse_coo float32": lambda: ops.conv2d(X.to_sparse(), VALUES, MASK),
    "got [1, 2]": lambda: ops.conv2d([1, 2], VALUES, MASK),  # type: ignore[arg-type]
    "stride must be a whole number from 1 to 2, got 3": lambda: ops.conv2d(X, VALUES, MASK, None, 3),
    "padding must be a whole number from 0 to 2, got 3": lambda: ops.conv2d(X, VALUES, MASK, None, 1, 3),
    "padding must be a whole number from 0 to 2, got -1": lambda: ops.conv2d(X, VALUES, MASK, None, 1, -1),
    "a kernel of 3 does not fit into a side of 2": lambda: ops.conv2d(X[:, :, :2], VALUES, MASK),
    "bias must be a float32 tensor [3]": lambda: ops.conv2d(X, VALUES, MASK, torch.ones(2)),
    "storage must be 'fp32' or 'bf16', got 'fp16'": lambda: ops.conv2d(X, VALUES, MASK, storage="fp16"),  # type: ignore[arg-type]
    "size must be at least 1": lambda: ops.conv2d_input_gradient(X[:, :1], VALUES, MASK, (0, 5)),
    "grad must be a float32 tensor [any, 3, 4, 3]": lambda: ops.conv2d_input_gradient(X, VALUES, MASK, (6, 5)),
    "grad must be a float32 tensor [5, 3, 4, 3]": lambda: ops.conv2d_weight_gradient(X, X, MASK),
    "x must be a float32 tensor [any, any]": lambda: sparse_linear(X, randn(3, 4), FLAT),
    "mask must be a bool tensor [any, any] on": lambda: sparse_linear(X, randn(3, 4), MASK),
    "weight must be a float32 tensor [3, 2, 3, 3]": lambda: sparse_conv2d(X, randn(3, 2, 1, 1), MASK),
    "weight must be a float32 tensor [3, 4]": lambda: sparse_linear(randn(2, 4), randn(4, 3), FLAT),
}  # fmt: skip


@pytest.mark.parametrize("message", WRONG)
def test_mistakes_are_named_in_one_line(message: str) -> None:
    with pytest.raises(InputError) as found:
        WRONG[message]()
    assert message in str(found.value)
    assert "\n" not in str(found.value)
