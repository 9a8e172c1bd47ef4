"""Causal models a token at a time: that the logits are those of whole passes by PyTorch, and what is refused."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from awkward import randn
from fedsieve import InputError
from fedsieve.client.process import num_threads
from fedsieve.client.vector_models import CharGPT
from fedsieve.kernels import Decoder, decode
from fedsieve.kernels.abi import address
from fedsieve.kernels.checks import Unsupported
from fedsieve.kernels.decode import sliced
from fedsieve.kernels.decode_ops import SlicedLinearOp
from fedsieve.kernels.program import Program
from fedsieve.sparse.layers import swat_
from fedsieve.types import logits_of
from token_models import CASES, LENGTH, VOCABULARY, gpt, made, masks_of

pytestmark = pytest.mark.usefixtures("native")


def long() -> nn.Module:
    """More positions than lie together in a cache, and sizes that are no multiple of anything."""
    return CharGPT(67, VOCABULARY, width=51, blocks=1, heads=3)


class Bent(nn.Module):
    """A small model of tokens, with something in it."""

    def __init__(self, bend: Callable[[Tensor], Tensor]):
        super().__init__()
        self.tokens, self.head, self.bend = nn.Embedding(VOCABULARY, 8), nn.Linear(8, VOCABULARY), bend

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.bend(self.tokens(ids)))
        return logits


def attended(x: Tensor, slopes: Tensor | None = None) -> Tensor:
    """Attention to all tokens; with ``slopes``, to earlier ones, the less the farther (ALiBi), each head in its way."""
    y, places = x.unflatten(-1, (2, 4)).transpose(1, 2), torch.arange(x.shape[1])
    mask = None
    if slopes is not None:
        distance = places[:, None] - places
        mask = torch.where(distance < 0, -torch.inf, -slopes[:, None, None] * distance)
    return F.scaled_dot_product_attention(y, y, y, mask).transpose(1, 2).flatten(2)


MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    **{name: (CASES[name][0], LENGTH) for name in ("gpt", "llama", "gpt2", "rotary")},
    "long": (long, 67),
    "turns": (lambda: Bent(lambda x: x.unflatten(-1, (2, 4)).transpose(2, 3).flatten(2)), 5),
    "slopes": (lambda: Bent(lambda x: attended(x, torch.tensor([0.5, 0.1]))), 9),
}


@pytest.mark.parametrize("density", [0.05, 0.3, 1.0])
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_whole_passes(name: str, density: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """At each position, of two sequences in turn; the first tokens with two threads; a row of each weight is empty."""
    make, length = MODELS[name]
    model = made(make).eval()
    for weight, mask in masks_of(model, density).items():
        mask[1] = False
        model.get_parameter(weight).data.mul_(mask)
    chance = torch.Generator().manual_seed(2)
    x = torch.randint(VOCABULARY, (2, length), generator=chance)
    with torch.no_grad():
        want = model(x).transpose(1, 2) if name == "gpt2" else logits_of(model(x))
    monkeypatch.setattr(decode, "SHARED", 0)
    decoder, found = Decoder(model, length), list[Tensor]()
    for threads, tokens in ((1, length), (1, length), (2, LENGTH)):
        decoder.reset()
        with num_threads(threads):
            found.append(torch.stack([decoder(token) for token in x[len(found) % 2, :tokens].tolist()]))
    torch.testing.assert_close(torch.stack(found[:2]), want, rtol=1e-5, atol=1e-5)
    assert torch.equal(found[0][:LENGTH], found[2])


@pytest.mark.parametrize(("rows", "columns", "density"), [(1, 1, 1.0), (17, 40, 0.2), (16, 3, 0.0), (33, 211, 0.9)])
def test_a_product_of_lists(rows: int, columns: int, density: float) -> None:
    """Beside float64; the lists have each non-zero once, and as many zeros as fill up a slice's shorter rows."""
    mask = torch.rand(rows, columns, generator=torch.Generator().manual_seed(1)) < density
    weight, x, bias, y = randn(rows, columns) * mask, randn(columns, seed=1), randn(rows, seed=2), torch.empty(rows)
    start, index, value, order = sliced(weight)
    assert order.sort().values.tolist() == [*range(rows)]
    counts = weight.count_nonzero(1).sort(descending=True).values
    assert len(value) == 16 * int(counts[::16].sum())
    assert torch.equal(value[value != 0].sort().values, weight[mask].sort().values)
    lists = [address(t) for t in (x, y, start, index, value, order, bias)]
    Program([SlicedLinearOp(*lists, rows)]).run()
    want = weight.double() @ x.double() + bias
    torch.testing.assert_close(y.double(), want, rtol=1e-5, atol=1e-5)


def swat() -> nn.Module:
    model = gpt()
    swat_(model, {"blocks.0.fc1.weight": 0.5}, 1)
    return model


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Bent(attended), "attention that is not causal"),
        (lambda: Bent(lambda x: x.flip(1)), "does not give logits of each token"),
        (lambda: Bent(lambda x: torch.cat([x[:, :1], x[:, :-1]], 1)), "tokens that change places"),
        (lambda: Bent(lambda x: x + x.mean(1, keepdim=True)), "."),
        (lambda: Bent(lambda x: x[:, -1]), "tokens that are added, left out or put together|logits of each token"),
        (lambda: Bent(lambda x: x.cumsum(1)), "cumsum"),
        (swat, "blocks.0.fc1 computes with other weights"),
    ],
)
def test_what_is_not_of_one_token_alone_is_refused(make: Callable[[], nn.Module], reason: str) -> None:
    with pytest.raises(Unsupported, match=reason):
        Decoder(made(make), LENGTH)


def test_tokens_that_there_are_not() -> None:
    decoder = Decoder(made(gpt), LENGTH)
    for token in (-1, VOCABULARY):
        with pytest.raises(InputError, match=f"tokens are 0 to {VOCABULARY - 1}, got {token}"):
            decoder(token)
    for _ in range(LENGTH):
        decoder(0)
    with pytest.raises(InputError, match=f"{LENGTH} positions, which are all taken"):
        decoder(0)
