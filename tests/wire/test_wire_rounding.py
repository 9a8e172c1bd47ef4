"""Rounded values: how small they are, how far off, and what makes up for it."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsieve.sparse.masks import top
from fedsieve.types import Sparse, Tree
from fedsieve.wire import Known, Manifest, WireError, compensate, decode, encode, rounded
from fedsieve.wire.values import at_bf16_distance, bf16_distance
from messages import BASE, W, same, size


@pytest.mark.parametrize(("how", "bits"), [("bf16", 11.5), ("int8", 7.5), ("int4", 3.6)])
def test_rounded_values_are_small_and_arrive_as_foretold(how: str, bits: float) -> None:
    sparse = Sparse.of(W, top(W, 0.5))
    tree: Tree = {"w": W, "s": sparse, "b": W[0], "k": torch.arange(3)}
    back = decode(encode(tree, values=how))
    assert same(back["w"], rounded(W, how))
    assert same(back["s"], Sparse(rounded(sparse.values, how), sparse.index, sparse.shape))
    assert same(back["b"], rounded(W[0], "bf16"))
    assert same(back["k"], torch.arange(3))
    assert size({"w": W}, values=how) < bits * W.numel() / 8


@pytest.mark.parametrize(("how", "most"), [("bf16", 2**-8), ("int8", 0.5 / 127), ("int4", 0.5 / 7)])
def test_rounding_errs_by_half_a_step_at_most(how: str, most: float) -> None:
    error = (rounded(W, how) - W).abs()
    assert bool((error <= most * (W.abs() if how == "bf16" else W.abs().max()) * 1.0001).all())
    assert float(error.max()) > most * 0.5 * float(W.abs().max()) * (0.25 if how == "bf16" else 0.9)


def test_rounded_values_near_a_known_base_are_smaller_and_the_same() -> None:
    known = Known(Manifest.of(BASE), BASE)
    assert same(decode(encode({"w": W}, known, "bf16"), known)["w"], rounded(W, "bf16"))
    assert size({"w": W}, known, values="bf16") < 0.4 * size({"w": W}, values="bf16")


@settings(deadline=None, max_examples=200)
@given(st.lists(st.tuples(st.integers(0, 2**16 - 1), st.integers(0, 2**16 - 1)), min_size=1, max_size=40))
def test_every_bf16_is_at_its_distance_from_every_other(pairs: list[tuple[int, int]]) -> None:
    a, b = np.array(pairs, dtype=np.uint16).T.copy()
    assert (at_bf16_distance(bf16_distance(a, b), b) == a).all()


@pytest.mark.parametrize("how", ["bf16", "int8", "int4"])
def test_what_rounding_takes_is_made_up_for(how: str) -> None:
    """The sum of what arrived over the rounds is off by one round's error, not by the rounds' number of them."""
    sparse = Sparse.of(W, top(W, 0.3))
    tree = {"w": W, "s": sparse, "b": W[0]}
    residual: dict[str, torch.Tensor] = {}
    sums = {"w": torch.zeros(512, 600), "s": torch.zeros(512, 600)}
    for _ in range(20):
        sent, residual = compensate(tree, residual, how)
        back = decode(encode(sent, values=how))
        for name in sums:
            value = back[name]
            sums[name] += value.dense() if isinstance(value, Sparse) else value
    assert set(residual) == {"w", "s"}
    for name, wanted in (("w", W), ("s", sparse.dense())):
        error = (sums[name] - 20 * wanted).abs().max()
        assert torch.allclose(sums[name] + residual[name], 20 * wanted, atol=1e-4)
        assert error <= 1.5 * (rounded(W, how) - W).abs().max()


def test_a_residual_waits_where_nothing_is_sent() -> None:
    sparse = Sparse(torch.ones(1), torch.tensor([0]), (1, 2))
    sent, left = compensate({"w": sparse}, {"w": torch.tensor([[0.25, 0.5]])}, "int8")
    assert same(sent["w"], Sparse(torch.tensor([1.25]), torch.tensor([0]), (1, 2)))
    assert left["w"].view(-1)[1] == 0.5
    with pytest.raises(WireError, match="residual of shape"):
        compensate({"w": sparse}, {"w": torch.zeros(2)}, "int8")


def test_nothing_but_finite_values_becomes_whole_multiples() -> None:
    with pytest.raises(WireError, match="finite"):
        encode({"w": torch.full((2, 2), float("inf"))}, values="int8")
