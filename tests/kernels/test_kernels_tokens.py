"""LayerNorm and attention beside PyTorch in float64, on awkward shapes, in both storages, for any number of threads."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from awkward import STORAGES, randn
from fedsieve.kernels.abi import WORDS, Operation, address
from fedsieve.kernels.program import Program
from fedsieve.kernels.token_ops import AttentionBackwardOp, AttentionOp, LayerNormBackwardOp, LayerNormOp
from token_maps import TokenMap

pytestmark = pytest.mark.usefixtures("native")
ERROR = {"fp32": 3e-6, "bf16": 1e-2}
"""How far a result may lie from PyTorch's in float64, as a part of the largest."""


def near(got: Tensor, want: Tensor, storage: str, size: Tensor | float | None = None) -> None:
    """Assert that no number is further off than ``ERROR`` of the largest, or of ``size``."""
    assert got.shape == want.shape
    error = (got.double() - want).abs() / (want.abs().max() if size is None else size)
    assert bool((error <= ERROR[storage]).all()), f"off by {error.max():.3g}"


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def run(*ops: Operation) -> None:
    Program([*ops]).run()


class Norm(NamedTuple):
    """LayerNorm's operations, and what they write."""

    forward: LayerNormOp
    backward: LayerNormBackwardOp
    x: TokenMap
    out: TokenMap
    grad: TokenMap
    grad_x: TokenMap
    weight_gradients: Tensor
    keep: Any

    def results(self) -> list[Tensor]:
        return [self.out.memory, self.grad_x.memory, self.weight_gradients]


def layer_norm(
    x: Tensor,
    grad: Tensor,
    weights: Tensor | None = None,
    *,
    eps: float = 1e-5,
    rms: bool = False,
    in_place: bool = False,
    storage: str = "fp32",
) -> Norm:
    """Return the operations of LayerNorm with weights [2, channels], gamma and beta, or none."""
    xs, out, grads, grad_x = (TokenMap(*x.shape, storage) for _ in range(4))
    xs.write(x, 0), grads.write(grad, 0)
    grad_x = grads if in_place else grad_x
    lanes, channels = xs.lanes().shape
    kept, weight_gradients = torch.full((2, lanes), torch.nan), torch.full((2, channels), torch.nan)
    forward = LayerNormOp(x=xs.map, out=out.map, mean=address(kept), invstd=address(kept, lanes), eps=eps, rms=rms)
    backward = LayerNormBackwardOp(grad=grads.map, grad_x=grad_x.map)
    if weights is not None:
        forward.gamma, backward.grad_gamma = address(weights), address(weight_gradients)
        if not rms:
            forward.beta, backward.grad_beta = address(weights, channels), address(weight_gradients, channels)
    backward.of = forward
    return Norm(forward, backward, xs, out, grads, grad_x, weight_gradients, (kept, weights))


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize(("rms", "affine", "in_place"), [(0, 1, 0), (0, 0, 1), (1, 1, 1), (1, 0, 0)])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (1, 15, 7), (3, 17, 1), (8, 65, 33), (3, 129, 16), (2, 16, 192), (1, 500, 8)]
)
def test_layer_norm(shape: tuple[int, ...], rms: int, affine: int, in_place: int, storage: str) -> None:
    """Tokens of other sizes, whose mean is large beside the deviation."""
    length, channels = shape[1:]
    x = randn(*shape) * 2.0 ** (torch.arange(length) % 5).view(-1, 1) + (0 if rms else 48)
    x, grad = x.bfloat16().float(), randn(*shape, seed=1)
    weights = torch.stack([1 + randn(channels, seed=2) / 2, randn(channels, seed=3)]) if affine else None
    norm = layer_norm(x, grad, weights, rms=bool(rms), in_place=bool(in_place), storage=storage)
    run(norm.forward, norm.backward)

    leaves = [t.double().requires_grad_() for t in [x] + ([*weights] if weights is not None else [])]
    gamma, beta = [*leaves[1:], None, None][:2]
    with torch.enable_grad():
        if rms:
            want = F.rms_norm(leaves[0], [channels], gamma, 1e-5)
        else:
            want = F.layer_norm(leaves[0], [channels], gamma, beta, 1e-5)
    wanted = torch.autograd.grad(want, leaves[: 2 if rms else 3], grad.double(), allow_unused=True)
    sharp = 1 if rms else 48  # by so much more of the number than of its deviation are its last digits
    near(norm.out.read(), want.detach(), storage, (2 + want.abs().max()) * (sharp if storage == "fp32" else 1))
    inverse = (x.double().var(-1, correction=0) + 1e-5).rsqrt()
    if rms:
        inverse = (x.double().square().mean(-1) + 1e-5).rsqrt()
    size = (inverse * grad.abs().amax(-1))[..., None] * (2 if weights is None else 4)
    near(norm.grad_x.read(), wanted[0], storage, size * (sharp if storage == "fp32" else 1))
    for got, exact in zip(norm.weight_gradients, wanted[1:], strict=False):
        near(got, exact, "fp32", sharp * grad.abs().sum() / channels)
    assert bool((norm.grad_x.rest() == 0).all())
    assert bool(norm.out.rest().isfinite().all())
    assert all(m.is_clean() for m in (norm.x, norm.out, norm.grad, norm.grad_x))


@pytest.mark.parametrize("storage", STORAGES)
def test_layer_norm_has_the_same_bits_for_any_number_of_threads(threads: int, storage: str) -> None:
    x, grad, weights = randn(5, 67, 19), randn(5, 67, 19, seed=1), randn(2, 19, seed=2)
    norm = layer_norm(x, grad, weights, storage=storage)
    run(norm.forward, norm.backward)
    torch.set_num_threads(1)
    alone = layer_norm(x, grad, weights, storage=storage)
    run(alone.forward, alone.backward)
    assert all(map(torch.equal, norm.results(), alone.results()))


class Attended(NamedTuple):
    """Attention's operations, and what they read and write: q, k, v, the output, and the gradients of each."""

    forward: AttentionOp
    backward: AttentionBackwardOp
    maps: list[TokenMap]
    keep: Any

    def read(self) -> list[Tensor]:
        return [m.read() for m in self.maps]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    in_one_map: bool = False,
    storage: str = "fp32",
    bias: Tensor | None = None,
    kept: Tensor | None = None,
) -> Attended:
    """Return the operations of attention of q [n, tokens, heads, size], k and v [n, keys, kv_heads, size].

    ``bias`` [n or 1, heads or 1, tokens, keys] is added to the scores; dropout leaves the weights that are ``kept``.
    """
    n, length, heads, size = q.shape
    parts = [q, k, v, q, grad, q, k, v]
    channels = [t.shape[2] * size for t in parts]
    maps = [TokenMap(n, t.shape[1], c, storage) for t, c in zip(parts, channels, strict=True)]
    views = [m.map for m in maps]
    if in_one_map:
        for first in (0, 5):
            of_three = channels[first : first + 3]
            whole = TokenMap(n, length, sum(of_three), storage)
            begins = [0, of_three[0], of_three[0] + of_three[1]]
            for i, begin in enumerate(begins):
                maps[first + i].memory = whole.memory[begin : begin + of_three[i] + 1]
                maps[first + i].untouched = maps[first + i].memory.clone()
                views[first + i] = whole.map.part(begin, of_three[i])
    for m, part in zip(maps[:3] + maps[4:5], (q, k, v, grad), strict=True):
        m.write(part.flatten(2))
    logsum = torch.full((heads, maps[0].lanes().shape[0]), torch.nan)
    numbers = {"samples": n, "length": length, "keys": k.shape[1], "heads": heads, "kv_heads": k.shape[2], "size": size}
    forward = AttentionOp(**dict(zip(("q", "k", "v", "out"), views, strict=False)), logsum=address(logsum), **numbers)
    forward.causal = int(causal)
    forward.scale = size**-0.5 if scale is None else scale
    keep = [logsum]
    if bias is not None:
        rows = F.pad(bias.mT / math.log(2), (0, -length % WORDS), value=torch.nan).contiguous()
        forward.bias, forward.bias_sample = address(rows), rows[0].numel() if len(rows) > 1 else 0
        forward.bias_head = rows[0, 0].numel() if rows.shape[1] > 1 else 0
        keep.append(rows)
    if kept is not None:
        bits = F.pad(kept.mT, (0, -length % WORDS), value=True).unflatten(-1, (-1, 8)).int()
        rows = (bits << torch.arange(8)).sum(-1).to(torch.uint8).contiguous()
        forward.keep, forward.factor = address(rows), 1 / kept.double().mean().clamp(0.1)
        keep.append(rows)
    backward = AttentionBackwardOp(forward, *views[4:])
    return Attended(forward, backward, maps, keep)


def exact_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    bias: Tensor | None = None,
    kept: Tensor | None = None,
) -> list[Tensor]:
    """Return the output and the gradients of q, k and v, in the arguments' precision."""
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    with torch.enable_grad():
        heads = [t.repeat_interleave(q.shape[2] // t.shape[2], 2).transpose(1, 2) for t in leaves]
        scores = heads[0] @ heads[1].mT * (q.shape[3] ** -0.5 if scale is None else scale)
        if causal:
            scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
        if bias is not None:
            scores = scores + bias
        none = (scores == -torch.inf).all(-1, True)  # a query that may attend to no key: its sum is 0
        weights = (scores.masked_fill(none, 0) if bias is not None else scores).softmax(-1)
        weights = weights.masked_fill(none, 0) if bias is not None else weights
        if kept is not None:
            weights = weights * kept / kept.double().mean().clamp(0.1)
        out = (weights @ heads[2]).transpose(1, 2)
    return [t.flatten(2) for t in (out, *torch.autograd.grad(out, leaves, grad))]


def inputs(n: int, length: int, heads: int, kv_heads: int, size: int) -> list[Tensor]:
    """Return q, k, v and the output's gradient."""
    return [randn(n, length, h, size, seed=i) for i, h in enumerate((heads, kv_heads, kv_heads, heads))]


# samples, tokens, heads, heads of k and v, size of a head
ATTENTIONS = (
    [(3, t, 2, 1, 8) for t in (1, 15, 16, 17, 24, 65, 127, 128, 129)]
    + [(8, 65, 3, 3, 64), (1, 256, 2, 2, 32), (1, 500, 1, 1, 7)]
    + [(2, 33, 4, 2, size) for size in (1, 7, 32, 48, 80)]
)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("case", ATTENTIONS, ids=str)
def test_attention(case: tuple[int, ...], causal: bool, storage: str) -> None:
    """Also where the scores are large, so that each block's largest changes the sums before."""
    tensors = inputs(*case)
    for scale in (None, 1.5):
        done = attention(*tensors, causal=causal, scale=scale, in_one_map=scale is None, storage=storage)
        run(done.forward, done.backward)
        want = exact_attention(*[t.double() for t in tensors], causal=causal, scale=scale)
        got = done.read()
        steep = 1 + (scale or case[4] ** -0.5) * case[4] ** 0.5  # how far a score's error reaches
        near(got[3], want[0], storage, steep * want[0].abs().max())
        for found, exact in zip(got[5:], want[1:], strict=True):
            near(found, exact, storage, steep * (exact.abs().max() + tensors[3].abs().max() / 8))
        for m in (done.maps[3], *done.maps[5:]):
            assert bool((m.rest() == 0).all())
        assert all(m.is_clean() for m in done.maps)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("causal", [False, True])
def test_attention_has_the_same_bits_for_any_number_of_threads(threads: int, causal: bool, storage: str) -> None:
    tensors, extra = inputs(3, 65, 4, 2, 8), marks(3, 65, 4, "bias of head, dropout")
    done = attention(*tensors, causal=causal, storage=storage, **extra)
    run(done.forward, done.backward)
    torch.set_num_threads(1)
    alone = attention(*tensors, causal=causal, storage=storage, **extra)
    run(alone.forward, alone.backward)
    assert all(torch.equal(a.memory, b.memory) for a, b in zip(done.maps, alone.maps, strict=True))


def marks(n: int, length: int, heads: int, kind: str) -> dict[str, Tensor]:
    """Return what is added to the scores, -inf among it, and what dropout keeps, or one of both."""
    chance = torch.Generator().manual_seed(7)
    bias = torch.randn(n if "sample" in kind else 1, heads if "head" in kind else 1, length, length, generator=chance)
    bias[torch.rand(bias.shape, generator=chance) < 0.4] = -torch.inf
    bias.diagonal(dim1=2, dim2=3).fill_(0.5)
    if "none" in kind:
        bias[..., length // 2, :] = -torch.inf
    kept = torch.rand(n, heads, length, length, generator=chance) < 0.7
    return ({"bias": bias} if "bias" in kind else {}) | ({"kept": kept} if "dropout" in kind else {})


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "kind",
    [
        "dropout",
        "bias",
        "bias of head",
        "bias of sample",
        "bias of sample and head, dropout",
        "bias with none, dropout",
    ],
)
@pytest.mark.parametrize("case", [c for c in ATTENTIONS if c[1] not in (24, 127, 129, 256)], ids=str)
def test_attention_with_a_bias_and_with_dropout(case: tuple[int, ...], kind: str, causal: bool, storage: str) -> None:
    n, length, heads, *_ = case
    tensors, extra = inputs(*case), marks(n, length, heads, kind)
    done = attention(*tensors, causal=causal, storage=storage, **extra)
    run(done.forward, done.backward)
    got, want = done.read(), exact_attention(*[t.double() for t in tensors], causal=causal, **extra)
    assert all(t.isfinite().all() for t in want)
    near(got[3], want[0], storage, 2 * want[0].abs().max() + 0.1)
    for found, exact in zip(got[5:], want[1:], strict=True):
        near(found, exact, storage, 2 * (exact.abs().max() + tensors[3].abs().max() / 8))
    for m in (done.maps[3], *done.maps[5:]):
        assert bool((m.rest() == 0).all())


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("kind", ["", "bias of sample and head, dropout"])
@pytest.mark.parametrize("keys", [1, 16, 17, 65, 130])
@pytest.mark.parametrize("length", [1, 15, 33, 96, 129])
def test_attention_to_keys_of_another_sequence(length: int, keys: int, kind: str, storage: str) -> None:
    n, heads = 3, 2
    q, _, _, grad = inputs(n, length, heads, 1, 8)
    _, k, v, _ = inputs(n, keys, heads, 1, 8)
    chance, extra = torch.Generator().manual_seed(7), {}
    if kind:
        bias = torch.randn(n, heads, length, keys, generator=chance)
        bits = torch.rand(n, heads, length, keys, generator=chance) < 0.7
        extra = {"bias": bias.masked_fill(bias > 1, -torch.inf), "kept": bits}
    ours = attention(q, k, v, grad, storage=storage, **extra)
    run(ours.forward, ours.backward)
    got, want = ours.read(), exact_attention(*[t.double() for t in (q, k, v, grad)], **extra)
    near(got[3], want[0], storage, 2 * want[0].abs().max() + 0.1)
    for gradient, exact in zip(got[5:], want[1:], strict=True):
        near(gradient, exact, storage, 2 * (exact.abs().max() + grad.abs().max() * 2))
    for m in (ours.maps[3], *ours.maps[5:]):
        assert bool((m.rest() == 0).all())
    assert all(m.is_clean() for m in ours.maps)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_in_its_rows(bad: float, storage: str) -> None:
    """A query's is its own; a key's is that of the queries that look at it, but for a score of minus infinity."""
    q, k, v, grad = inputs(2, 70, 1, 1, 8)
    for poisoned in (q, k):
        before, poisoned[1, 40, 0, 0] = float(poisoned[1, 40, 0, 0]), bad
        done = attention(q, k, v, grad, causal=True, storage=storage)
        run(done.forward)
        got, want = done.maps[3].read(), exact_attention(*[t.double() for t in (q, k, v, grad)], causal=True)[0]
        assert torch.equal(got.isnan(), want.isnan())
        assert 8 <= int(want.isnan().sum()) < want.numel() / 2
        near(got.nan_to_num(), want.nan_to_num(), storage)
        poisoned[1, 40, 0, 0] = before
