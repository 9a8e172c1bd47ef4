"""Embeddings, places, tensors, losses and products of tokens beside PyTorch in float64, for any number of threads."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from awkward import BFLOAT, STORAGES, randn
from fedsieve.kernels.abi import MapPointer, Operation, address
from fedsieve.kernels.combinations import CombinationTable
from fedsieve.kernels.program import Program
from fedsieve.kernels.token_ops import (
    EmbeddingBackwardOp,
    EmbeddingOp,
    MultiplyOp,
    RearrangeOp,
    TokenLossOp,
    TokenPackOp,
)
from token_maps import TokenMap

pytestmark = pytest.mark.usefixtures("native")
SHAPES = [(1, 1, 1), (3, 5, 7), (2, 16, 33), (1, 65, 8), (8, 17, 3)]
"""Samples, tokens, channels."""


def run(*ops: Operation) -> None:
    Program([*ops]).run()


def rounded(x: Tensor, storage: str) -> Tensor:
    return x.bfloat16().float() if storage == "bf16" else x


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("shape", SHAPES)
def test_embedding(shape: tuple[int, int, int], storage: str) -> None:
    """Rows of a table, some tokens without one, alone and added to others; and the table's gradient, new or more."""
    n, length, channels = shape
    table, x, grad = randn(11, channels), randn(*shape, seed=1), randn(*shape, seed=2)
    row = torch.randint(-1, 11, (n * length,), generator=torch.Generator().manual_seed(4))
    want = torch.where(row[:, None] < 0, 0, table[row.clamp(min=0)]).view(shape)
    out, more = TokenMap(*shape, storage), TokenMap(*shape, storage).write(x, 0)
    run(EmbeddingOp(out.map, None, address(table), address(row), n * length))
    torch.testing.assert_close(out.read(), want, rtol=0, atol=0)
    run(EmbeddingOp(more.map, MapPointer(more.map), address(table), address(row), n * length))
    torch.testing.assert_close(more.read(), rounded(want + x, storage), rtol=0, atol=0)
    assert not out.rest().any()
    assert not more.rest().any()
    sums = torch.zeros(11, channels, dtype=torch.float64)
    sums.index_add_(0, row[row >= 0], grad.view(-1, channels)[row >= 0].double())
    sums[4] = 0  # the row of padding
    for clear in (0, 1):
        into, grads = torch.ones(11, channels), TokenMap(*shape, storage).write(grad)
        run(EmbeddingBackwardOp(grads.map, address(into), address(row), n * length, 11, 4, clear))
        torch.testing.assert_close(into.double(), sums + (1 - clear), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("storage", STORAGES)
def test_tokens_find_other_places_and_sums(storage: str) -> None:
    n, length, channels = 3, 7, 5
    x = TokenMap(n, length, channels, storage).write(randn(n, length, channels))
    source = torch.tensor([[-1, 4, 4, 0]]) + length * torch.arange(n)[:, None] * torch.tensor([0, 1, 1, 1])
    source = source.flatten().int()
    out = TokenMap(n, 4, channels, storage)
    run(RearrangeOp(x.map, out.map, address(source), 4 * n, 0, 2.0))
    want = 2 * x.read()[:, [0, 4, 4, 0]]
    want[:, 0] = 0
    torch.testing.assert_close(out.read(), want, rtol=0, atol=0)
    assert not out.rest().any()
    assert out.is_clean()
    back = TokenMap(n, length, channels, storage)
    run(RearrangeOp(out.map, back.map, address(source), 4 * n, 1, 0.5))
    sums = torch.zeros(n, length, channels)
    sums[:, 0], sums[:, 4] = want[:, 3] / 2, rounded(want[:, 1], storage)
    torch.testing.assert_close(back.read(), rounded(sums, storage), rtol=0, atol=0)
    assert not back.rest().any()


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("shape", [(2, 3, 8), (3, 17, 6), (1, 65, 4)])
def test_sums_of_channels(shape: tuple[int, int, int], storage: str) -> None:
    """Numbers for each place in a sequence, and what is made of the gradients; fewer channels, and some twice."""
    n, length, channels = shape
    chance = torch.Generator().manual_seed(6)
    source = torch.randint(channels, (2, channels - 1), generator=chance)
    factor = torch.randn(2, channels - 1, length, generator=chance)
    factor[1, 0] = factor[0, 1]
    x, grad = rounded(randn(*shape, seed=1), storage), rounded(randn(n, length, channels - 1, seed=2), storage)
    leaf = x.double().requires_grad_()
    with torch.enable_grad():
        want = (leaf[:, :, source].movedim(2, 0) * factor.double().transpose(1, 2).unsqueeze(1)).sum(0)
    (gradient,) = torch.autograd.grad(want, leaf, grad.double())
    table = CombinationTable.of(source, factor)
    back = table.transposed(channels)
    assert len(table.table) == 2 * (channels - 1)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        ins, out = TokenMap(*shape, storage).write(x, 0), TokenMap(n, length, channels - 1, storage)
        grads, into = TokenMap(n, length, channels - 1, storage).write(grad, 0), TokenMap(*shape, storage)
        run(table.op(ins.map, out.map), back.op(grads.map, into.map))
        bound = 1e-5 if storage == "fp32" else BFLOAT
        torch.testing.assert_close(out.read().double(), want.detach(), rtol=bound, atol=1e-5)
        torch.testing.assert_close(into.read().double(), gradient, rtol=bound, atol=1e-5)
        assert not out.rest().any()
        assert out.is_clean()
        assert into.is_clean()
        results.append((out.memory, into.memory))
    assert all(torch.equal(a, b) for one in results[1:] for a, b in zip(one, results[0], strict=True))


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("shape", SHAPES)
def test_tensors_become_tokens_and_are_again(shape: tuple[int, int, int], storage: str) -> None:
    """Channels first: a token's and a channel's offsets add up to a number's place."""
    n, length, channels = shape
    plain = randn(n, channels, length)
    token = (torch.arange(n)[:, None] * channels * length + torch.arange(length)).flatten()
    channel = torch.arange(channels) * length
    out, again = TokenMap(*shape, storage), torch.full_like(plain, torch.nan)
    for x, unpack in ((plain, 0), (again, 1)):
        run(TokenPackOp(out.map, address(x), address(token), address(channel), n * length, unpack))
    torch.testing.assert_close(out.read(), plain.transpose(1, 2), rtol=0, atol=0)
    assert torch.equal(again, plain)
    assert not out.rest().any()


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 7), (2, 16, 65), (1, 65, 300), (8, 17, 2)])
def test_the_loss_of_tokens(shape: tuple[int, int, int], storage: str) -> None:
    """Some are left out; large logits, and lanes behind the tokens that are none."""
    n, length, classes = shape
    logits = 8 * randn(*shape)
    logits[0, 0] *= 4
    label = torch.randint(classes, (n, length), generator=torch.Generator().manual_seed(2))
    label[0, 1:3] = -100
    leaf = logits.double().requires_grad_()
    with torch.enable_grad():
        want = F.cross_entropy(leaf.flatten(0, 1), label.flatten())
    (gradient,) = torch.autograd.grad(want, leaf)
    losses = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        x, grad = TokenMap(*shape, storage).write(logits), TokenMap(*shape, storage)
        loss, each = torch.full((1,), torch.nan), torch.full((len(x.lanes()),), torch.nan)
        run(TokenLossOp(x.map, grad.map, address(label), address(loss), address(each), n * length, -100))
        torch.testing.assert_close(loss.double()[0], want.detach(), rtol=1e-6, atol=1e-6)
        bound = 1e-6 if storage == "fp32" else BFLOAT
        torch.testing.assert_close(grad.read().double(), gradient, rtol=bound, atol=1e-6 / label.numel())
        assert not grad.rest().any()
        assert grad.is_clean()
        losses.append((loss, grad.memory))
    assert all(torch.equal(a, b) for one in losses[1:] for a, b in zip(one, losses[0], strict=True))


def test_without_labels_loss_and_gradient_are_zero() -> None:
    x, grad = TokenMap(2, 3, 4).write(randn(2, 3, 4)), TokenMap(2, 3, 4)
    label, loss, each = torch.full((6,), -100), torch.ones(1), torch.zeros(len(x.lanes()))
    run(TokenLossOp(x.map, grad.map, address(label), address(loss), address(each), 6, -100))
    assert float(loss) == 0
    assert not grad.read().any()


@pytest.mark.parametrize("storage", STORAGES)
def test_products_of_numbers(storage: str) -> None:
    shape = 3, 11, 5
    a, b, c = (randn(*shape, seed=seed) for seed in range(3))
    maps = [TokenMap(*shape, storage).write(x, 0) for x in (a, b, c)]
    out = TokenMap(*shape, storage)
    run(MultiplyOp(maps[0].map, maps[1].map, out.map), MultiplyOp(maps[0].map, maps[1].map, maps[2].map, 1))
    want = (a.double() * b.double(), a.double() * b.double() + c.double())
    bound = 1e-6 if storage == "fp32" else BFLOAT
    for got, exact in zip((out, maps[2]), want, strict=True):
        torch.testing.assert_close(got.read().double(), exact, rtol=bound, atol=1e-6)
