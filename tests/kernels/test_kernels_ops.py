"""Every kernel beside its reference in float64, on awkward shapes and masks, in both storages."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import reference_ops
import single_ops as ops
from awkward import STORAGES, awkward_mask, randn, within
from fedsieve.kernels.abi import ActivationOp, FeatureMap
from fedsieve.kernels.index import SMALL, SparseIndex

pytestmark = pytest.mark.usefixtures("native")
SIZES = (0, 1, 7, 15, 16, 17, 65)
# samples, channels in and out, kernel, stride, padding, height and width
CONVOLUTIONS = (
    [(n, 3, 5, 3, 1, 1, 5, 6) for n in SIZES]
    + [(3, c, 4, 3, 1, 1, 4, 4) for c in SIZES]
    + [(3, 2, c, 3, 2, 1, 5, 4) for c in SIZES]
    + [(17, 4, 5, k, s, p, 7, 9) for k in (1, 3, 5) for s in (1, 2) for p in range(k)]
    + [(2, 3, 4, 3, s, 1, *size) for s in (1, 2) for size in ((1, 1), (1, 7), (2, 2), (16, 17), (33, 31))]
    + [(33, 6, 7, 7, 2, 3, 12, 13), (5, 3, 3, 5, 2, 4, 2, 3)]
)
MASKS = (0.0, "one", "rows", 1.0, "unit8", "unit4")


def per_row(mask: Tensor, dim: int = 0) -> int:
    """The most entries that one output's (dim 0) or input's (dim 1) sum has."""
    return int(mask.transpose(0, dim).flatten(1).sum(1).max()) if mask.numel() else 0


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("case", CONVOLUTIONS, ids=str)
def test_conv2d(case: tuple[int, ...], kind: str | float, storage: ops.Storage) -> None:
    n, inner, outer, k, stride, padding, height, width = case
    mask = awkward_mask(kind, outer, inner, k, k)
    x, values, bias = randn(n, inner, height, width), randn(int(mask.sum()), seed=1), randn(outer, seed=2)
    after = [(size + 2 * padding - k) // stride + 1 for size in (height, width)]
    grad = randn(n, outer, *after, seed=4)
    how, double = (stride, padding), [t.double() for t in (x, values, bias, grad)]
    size = [t.abs() for t in double]

    got = ops.conv2d(x, values, mask, bias, *how, storage=storage)
    if inner and outer:
        want = reference_ops.conv2d(double[0], double[1], mask, double[2], *how)
        within(got, want, per_row(mask) + 1, reference_ops.conv2d(size[0], size[1], mask, size[2], *how), storage)
    assert torch.equal(got, bias.view(-1, 1, 1).expand(n, -1, *after)) or inner

    got = ops.conv2d_input_gradient(grad, values, mask, (height, width), *how, storage=storage)
    assert got.shape == x.shape
    if inner and outer:
        wanted = (reference_ops.conv2d_input_gradient(d[3], d[1], mask, (height, width), *how) for d in (double, size))
        within(got, next(wanted), per_row(mask, 1), next(wanted), storage)
    got = ops.conv2d_weight_gradient(grad, x, mask, *how, storage=storage)
    if inner and outer:
        wanted = (reference_ops.conv2d_weight_gradient(d[3], d[0], mask, *how) for d in (double, size))
        within(got, next(wanted), n * after[0] * after[1], next(wanted))


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize(("inner", "outer"), [(1, 1), (7, 65), (65, 7), (16, 17), (0, 3), (3, 0)])
def test_linear(n: int, inner: int, outer: int, kind: str | float, storage: ops.Storage) -> None:
    mask = awkward_mask(kind, outer, inner)
    x, values, bias, grad = (
        randn(n, inner),
        randn(int(mask.sum()), seed=1),
        randn(outer, seed=2),
        randn(n, outer, seed=4),
    )
    double = [t.double() for t in (x, values, bias, grad)]
    size = [t.abs() for t in double]
    wanted = [reference_ops.linear(d[0], d[1], mask, d[2]) for d in (double, size)]
    within(ops.linear(x, values, mask, bias, storage=storage), wanted[0], per_row(mask) + 1, wanted[1], storage)
    wanted = [reference_ops.linear_input_gradient(d[3], d[1], mask) for d in (double, size)]
    got = ops.linear_input_gradient(grad, values, mask, storage=storage)
    within(got, wanted[0], per_row(mask, 1), wanted[1], storage)
    wanted = [reference_ops.linear_weight_gradient(d[3], d[0], mask) for d in (double, size)]
    within(ops.linear_weight_gradient(grad, x, mask, storage=storage), wanted[0], n, wanted[1])


POOLS = [(2, None, 0), (3, 1, 0), (3, 2, 1), (2, 1, 1), (5, 3, 2), (1, 2, 0), (4, 4, 2)]


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("how", POOLS, ids=str)
@pytest.mark.parametrize("shape", [(0, 3, 8, 8), (1, 1, 5, 5), (17, 7, 8, 8), (65, 2, 9, 5)], ids=str)
def test_pools(shape: tuple[int, ...], how: tuple[int, int | None, int], storage: ops.Storage) -> None:
    x, area = randn(*shape), how[0] ** 2
    got = ops.max_pool2d(x, *how, storage=storage)
    assert torch.equal(got, reference_ops.max_pool2d(x, *how))
    grad = randn(*got.shape, seed=1)
    want = reference_ops.max_pool2d_gradient(grad.double(), x.double(), *how)
    size = reference_ops.max_pool2d_gradient(grad.double().abs(), x.double(), *how)
    within(ops.max_pool2d_gradient(grad, x, *how, storage=storage), want, area, size, storage, sums=area)
    for with_pad in (True, False):
        got = ops.avg_pool2d(x, *how, with_pad, storage=storage)
        size = reference_ops.avg_pool2d(x.double().abs(), *how, with_pad)
        within(got, reference_ops.avg_pool2d(x.double(), *how, with_pad), area + 1, size, storage)
        got = ops.avg_pool2d_gradient(grad, x, *how, with_pad, storage=storage)
        want = reference_ops.avg_pool2d_gradient(grad.double(), x.double(), *how, with_pad)
        size = reference_ops.avg_pool2d_gradient(grad.double().abs(), x.double(), *how, with_pad)
        within(got, want, area + 1, size, storage, sums=area)


def test_max_pool_gives_ties_to_the_first() -> None:
    x = torch.tensor([[1.0, 2, 2], [2, 2, 0], [-torch.inf, -torch.inf, -torch.inf]]).view(1, 1, 3, 3)
    for how in ((2, 1), (3, 1), (1, 1), (3, 3, 1)):
        grad = torch.ones_like(reference_ops.max_pool2d(x, *how))
        want = reference_ops.max_pool2d_gradient(grad, x, *how)
        assert torch.equal(ops.max_pool2d_gradient(grad, x, *how), want)


def batch_norm(channels: int, dtype: torch.dtype = torch.float32, training: bool = True) -> ops.BatchNorm:
    vectors = [
        randn(channels, seed=5) + 1,
        randn(channels, seed=6),
        randn(channels, seed=7),
        randn(channels, seed=8) ** 2,
    ]
    return ops.BatchNorm(*[v.to(dtype) for v in vectors], training=training, momentum=0.2)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("plus", [False, True])
@pytest.mark.parametrize("mode", ["training", "running", "none"])
@pytest.mark.parametrize("shape", [(1, 3, 2, 1), (7, 1, 3, 4), (16, 5, 1, 1), (17, 5, 4, 3), (65, 2, 2, 2)])
def test_norm(shape: tuple[int, ...], mode: str, plus: bool, relu: bool, storage: ops.Storage) -> None:
    c = shape[1]
    ours, theirs = (batch_norm(c, d, mode == "training") for d in (torch.float32, torch.float64))
    by, by64 = (None, None) if mode == "none" else (ours, theirs)
    grad = randn(*shape, seed=3)
    for seed in range(100):  # until no number is so close to 0 that rounding decides what ReLU does
        y, add = randn(*shape, seed=10 + seed), randn(*shape, seed=200 + seed) if plus else None
        add64 = None if add is None else add.double()
        linear = reference_ops.norm(y.double(), batch_norm(c, torch.float64, mode == "training") if by else None, add64)
        if linear.abs().min() > 1e-4:
            break
    got, want = ops.norm(y, by, add, relu, storage=storage), reference_ops.norm(y.double(), by64, add64, relu)
    # y scale + shift + add, with statistics that are sums along rows, and then over rows and blocks
    chain = 16 + 2 * (shape[3] + shape[2] * -(-shape[0] // 16))
    mean, inv = y.double().new_zeros(c, 1, 1), y.double().new_ones(c, 1, 1)
    gamma, beta = inv, mean
    if by64 is not None:
        mean, var = by64.running_mean, by64.running_var
        if by64.training:
            var, mean = torch.var_mean(y.double(), (0, 2, 3), correction=0)
        mean, inv = mean.view(-1, 1, 1), (var + by64.eps).rsqrt().view(-1, 1, 1)
        gamma, beta = by64.weight.view(-1, 1, 1), by64.bias.view(-1, 1, 1)
    scale, spread = (gamma * inv).abs(), (y.double() - mean).abs()
    most = spread.amax((0, 2, 3), keepdim=True)
    size = scale * (y.abs() + mean.abs() + most) + beta.abs() + (0 if add is None else add.abs())
    within(got, want, chain, size, storage)
    if by is not None and by64 is not None:
        within(by.running_mean, by64.running_mean, chain, (mean.abs() + most).flatten() + by64.running_mean.abs())
        within(by.running_var, by64.running_var, chain, (most**2).flatten() * 2 + by64.running_var.abs())

    by, by64 = (
        (None, None) if mode == "none" else (batch_norm(c, d, mode == "training") for d in (y.dtype, torch.float64))
    )
    got4 = ops.norm_gradient(grad, y, by, add, relu, storage=storage)
    want4 = reference_ops.norm_gradient(grad.double(), y.double(), by64, add64, relu)
    assert [g is None for g in got4] == [w is None for w in want4]
    dp = grad.double() * (linear > 0) if relu else grad.double()
    each = (dp.abs().mean((0, 2, 3), keepdim=True), (dp * spread).abs().mean((0, 2, 3), keepdim=True))
    near = spread + mean.abs()  # y - mean is as exact as the numbers it is made of
    size = scale * (dp.abs() + (each[0] + near * inv**2 * (each[1] + each[0] * near) if mode == "training" else 0))
    count, terms = shape[0] * shape[2] * shape[3], chain + 16
    within(got4[0], want4[0], terms, size, storage)
    if by is not None:
        sums = (each[1] + each[0] * near.amax((0, 2, 3), keepdim=True)) * inv * count
        within(got4[1], want4[1], terms, sums.flatten())
        within(got4[2], want4[2], terms, each[0].flatten() * count)
    if add is not None:
        assert torch.equal(got4[3], dp.float())


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize(
    ("groups", "affine", "plus", "relu"),
    [(1, True, False, 1), (2, False, True, 2), (3, True, True, 1), (6, True, False, 0)],
)
@pytest.mark.parametrize("shape", [(1, 2, 1), (7, 3, 4), (16, 1, 2), (17, 4, 3), (65, 2, 2), (40, 8, 33)])
def test_group_norm(
    *, shape: tuple[int, ...], groups: int, affine: bool, plus: bool, relu: int, storage: ops.Storage
) -> None:
    """Samples of other means and scales, and a mean that is large beside the deviation: the sums lose nothing."""
    n, *size = shape
    norm = nn.GroupNorm(groups, 6, affine=affine, eps=1e-3)
    if affine:
        norm.weight.data, norm.bias.data = 3 * randn(6, seed=5), randn(6, seed=6)
    y = (randn(n, 6, *size) * 2 ** (torch.arange(n) % 3).view(-1, 1, 1, 1) + 4).bfloat16().float()
    grad, add = randn(*y.shape, seed=1), randn(*y.shape, seed=2) if plus else None
    got = ops.group_norm(y, norm, grad, add, relu, storage=storage)
    double = [None if x is None else x.double() for x in (grad, add)]
    want = reference_ops.group_norm(y.double(), copy.deepcopy(norm).double(), *double, relu)
    assert len(got) == len(want)
    for found, exact in zip(got, want, strict=True):
        size_ = exact.abs().max() if found.dim() == 4 else (grad.abs().sum((0, 2, 3)) * 4).max()
        assert (found - exact).abs().max() <= size_ * (2e-5 if storage == "fp32" else 1e-2)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("function", ActivationOp.FUNCTIONS)
def test_activations(function: str, storage: ops.Storage) -> None:
    """Everywhere where a float32 result is more than 0 or x, within four half-distances of the larger of both."""
    x = torch.cat([torch.linspace(-13, 13, 7 * 17 * 21), randn(7 * 17 * 4), randn(7 * 17 * 5) * 2**-9])
    x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))].bfloat16().float().view(17, 7, 15, 2)
    grad = randn(*x.shape, seed=1)
    want = reference_ops.activation(function, x.double())
    within(ops.activation(function, x, storage=storage), want, 2, want if function == "sigmoid" else x.abs(), storage)
    want = reference_ops.activation(function, x.double(), grad.double())
    within(ops.activation(function, x, grad, storage=storage), want, 5, grad.abs(), storage)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("n", SIZES[1:])
@pytest.mark.parametrize("classes", [1, 2, 10, 65])
def test_cross_entropy(n: int, classes: int, storage: ops.Storage) -> None:
    logits, label = 3 * randn(n, classes), torch.arange(n) * 7 % classes
    logits = logits.bfloat16().float()
    loss, grad = ops.cross_entropy(logits, label, storage=storage)
    want, want_grad = reference_ops.cross_entropy(logits.double(), label)
    far = 1 + logits.double().abs().max() * 2
    within(loss, want, 8, far + want)
    within(grad, want_grad, 8, far * (want_grad.abs() + 2 * torch.finfo(torch.float32).eps / n), storage)


@pytest.mark.parametrize("power", [1.0, 1.25, 2.0])
@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
@pytest.mark.parametrize("m", SIZES)
def test_sgd(m: int, momentum: float, nesterov: bool, power: float) -> None:
    w, velocity = randn(m), randn(m, seed=1) if momentum else None
    w64, v64 = w.double(), None if velocity is None else velocity.double()
    w[:1] = w64[:1] = 0
    for step in range(3):
        grad = randn(m, seed=2 + step)
        got = ops.sgd_(w, grad, velocity, 0.25, momentum, 0.125, power, nesterov)
        want = reference_ops.sgd_(w64, grad.double(), v64, 0.25, momentum, 0.125, power, nesterov)
        for a, b in ((w, w64), (got, want), *([(velocity, v64)] if momentum else [])):
            torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("shape", [(5, 7), (0, 3), (3, 0), (17, 16), (1, 65), (4, 5, 3, 3), (3, 1, 1, 1), (2, 3, 5, 5)])
def test_the_index_of_a_mask(shape: tuple[int, ...], kind: str | float) -> None:
    mask = awkward_mask(kind, *shape)
    want, (outer, inner, k) = mask.flatten().nonzero().squeeze(1), (*shape, 1)[:3]
    counts = mask.flatten(1).sum(1) if mask.numel() else torch.zeros(outer, dtype=torch.int64)
    unit = {"unit8": 8, "unit4": 4}.get(str(kind), 8 if kind in (0.0, 1.0) else 1)
    for width, packed in ((SMALL, False), (SMALL + 1, False), (SMALL, True), (SMALL + 1, True)):
        # sorted by tap, of 3x3 kernels on small maps, or as the mask is
        index = SparseIndex(outer, inner, k, 1, k // 2, len(want))
        index.fill(mask, FeatureMap(None, inner, 2, 7, width, k // 2), packed)
        shared = 1 if packed or not mask.numel() else next((u for u in (8, 4) if u <= min(unit, outer)), 1)
        assert index.unit == shared
        assert torch.equal(index.row, F.pad(counts[::shared].cumsum(0), (1, 0)).int())
        tapped, found = shared > 1 or (k == 3 and width == SMALL), index.positions()
        assert torch.equal(found.sort().values if tapped else found, want)
        assert (index.tap is not None) == tapped
        if tapped and index.tap is not None:
            tap = torch.arange(len(index.tap) - 1).repeat_interleave(index.tap.diff())
            first = found // (inner * k**2) % shared == 0
            assert torch.equal(tap, (found // (inner * k**2) // shared * k**2 + found % k**2)[first])
