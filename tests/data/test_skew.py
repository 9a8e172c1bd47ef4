"""Partitions of unequal sizes and few classes, against the laws they are drawn from."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedsieve import Data, Dataset, InputError
from fedsieve.data.partition import counts, holdings, partition
from fedsieve.data.skew import dirichlet, quantity, shards

LABELS = torch.arange(5000) % 10
FLOATS = Data(torch.zeros(40, 3), torch.arange(40) % 4)


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDSIEVE_CACHE", str(tmp_path / "cache"))


def dataset(**changes: Any) -> Dataset:
    return replace(Dataset("toy", FLOATS, FLOATS, tuple("abcd")), **changes)


@pytest.mark.parametrize(
    "deal",
    [
        lambda seed: dirichlet(LABELS, 20, 0.5, seed),
        lambda seed: shards(LABELS, 23, 3, seed),
        lambda seed: quantity(5000, 20, 0.5, seed),
    ],
)
def test_everything_is_dealt_once_and_by_the_seed(deal: Callable[[int], list[torch.Tensor]]) -> None:
    each = deal(0)
    assert torch.equal(torch.cat(each).sort().values, torch.arange(5000))
    assert all(part.dtype == torch.int64 and bool((part.diff() > 0).all()) for part in each)
    assert all(map(torch.equal, each, deal(0)))
    assert not all(map(torch.equal, each, deal(1)))


def test_a_class_is_shared_out_by_one_draw_of_the_dirichlet() -> None:
    # A client's share of a class is Beta(a, (N - 1) a): mean 1 / N, variance (N - 1) / (N^2 (N a + 1)). Floors move a
    # count by less than one of a class's 1,000; the redraws for the minimum are rare at this alpha.
    clients, alpha, labels = 5, 0.5, torch.arange(4000) % 4
    each = torch.stack([counts(dirichlet(labels, clients, alpha, seed, 1), labels, 4) for seed in range(400)]) / 1000
    assert each.mean().item() == pytest.approx(1 / clients)
    assert each.var().item() == pytest.approx((clients - 1) / clients**2 / (clients * alpha + 1), rel=0.06)
    # Two classes are drawn apart: what a client has of one says nothing of the other.
    one, other = each[:, :, 0].flatten(), each[:, :, 1].flatten()
    assert abs(float(torch.corrcoef(torch.stack([one, other]))[0, 1])) < 0.08


@pytest.mark.parametrize("minimum", [1, 10, 30])
def test_every_client_has_the_minimum(minimum: int) -> None:
    assert min(map(len, dirichlet(LABELS, 40, 0.3, 0, minimum))) >= minimum
    sizes = list(map(len, quantity(5000, 40, 0.3, 0, minimum)))
    assert min(sizes) >= minimum
    assert max(sizes) > 400


def test_quantity_shares_out_what_is_left_by_the_dirichlet() -> None:
    clients, alpha, n, least = 4, 0.8, 2000, 10
    sizes = torch.tensor([[len(part) for part in quantity(n, clients, alpha, seed, least)] for seed in range(1500)])
    assert sizes.min() >= least
    shares = (sizes - least) / (n - clients * least)
    assert shares.mean(0) == pytest.approx(1 / clients, abs=0.02)
    assert shares.var().item() == pytest.approx((clients - 1) / clients**2 / (clients * alpha + 1), rel=0.08)
    # which classes a client has is chance alone
    each = counts(quantity(5000, 2, 100.0, 0), LABELS, 10)
    assert each.min() > 180


def test_shards_are_mcmahans() -> None:
    # 60,000 examples in 200 shards of 300, two to each of 100 clients: no shard is of two classes.
    labels = torch.arange(6000) % 10
    each = counts(shards(labels, 100, 2, 0), labels, 10)
    assert set(each.sum(1).tolist()) == {60}
    assert {*each.flatten().tolist()} == {0, 30, 60}
    assert set((each > 0).sum(1).tolist()) == {1, 2}
    assert each.sum(0).tolist() == [600] * 10


@given(n=st.integers(1, 200), k=st.integers(1, 4), clients=st.integers(1, 12), seed=st.integers(0, 9))
def test_shards_differ_by_k_at_most_and_lose_nothing(n: int, k: int, clients: int, seed: int) -> None:
    labels = torch.arange(n) % 3
    if k * clients > n:
        with pytest.raises(InputError, match=r"cannot (be cut|share)"):
            shards(labels, clients, k, seed)
        return
    sizes = [len(part) for part in shards(labels, clients, k, seed)]
    assert sum(sizes) == n
    assert max(sizes) - min(sizes) <= k


@pytest.mark.parametrize("alpha", [1e-6, 1e300])
def test_alpha_may_be_as_small_and_large_as_it_likes(alpha: float) -> None:
    assert sum(map(len, dirichlet(LABELS, 2, alpha, 0, 1))) == 5000
    assert sum(map(len, quantity(5000, 7, alpha, 0))) == 5000


def test_columns_are_partitioned_by_name() -> None:
    data = dataset(columns={"ward": torch.arange(40) // 10, "night": torch.arange(40) % 2 == 1})
    assert [part.tolist() for part in partition("group:ward", data, 4, 0)] == np.arange(40).reshape(4, 10).tolist()
    assert [len(part) for part in partition("group:night", data, 2, 0)] == [20, 20]
    assert data.digest != dataset().digest
    assert data.empty().columns == {}


REGRESSION = Data(torch.zeros(40, 3), torch.zeros(40, dtype=torch.int64))
object.__setattr__(REGRESSION, "y", torch.rand(40))


@pytest.mark.parametrize("spec", ["lda:1", "dirichlet:1", "shards:2"])
def test_targets_that_are_no_classes_cannot_be_dealt_by_class(spec: str) -> None:
    for data in (dataset(train=REGRESSION), dataset(classes=())):
        with pytest.raises(InputError, match="goes by class, but the targets of toy are no class labels: use iid"):
            partition(spec, data, 2, 0)


def test_targets_that_are_no_classes_are_dealt_otherwise() -> None:
    data = dataset(train=REGRESSION, columns={"ward": torch.arange(40) // 20})
    for spec in ("iid", "quantity:1:2", "group:ward"):
        each = partition(spec, data, 2, 0)
        assert sum(map(len, each)) == 40
        names, table = holdings(each, data)
        assert names == ()
        assert table.tolist() == [[len(part)] for part in each]


@pytest.mark.parametrize(
    ("spec", "clients", "message"),
    [
        ("dirichlet:0.5", 5, r"5 clients cannot have 10 of 40 examples each: write dirichlet:0\.5:8 or less"),
        ("quantity:0.5", 5, r"5 clients cannot have 10 of 40 examples each: write quantity:0\.5:8 or less"),
        ("dirichlet:0.5:0", 5, r"a client without an example cannot train: write dirichlet:0\.5:1"),
        ("quantity:0.5:-3", 5, "a client without an example cannot train"),
        ("dirichlet:1e-6:2", 20, "none of 1000 draws gives each of 20 clients 2 of 40 examples: write dirichlet"),
        ("dirichlet:1e-6:1", 20, "each of 20 clients 1 of 40 examples: raise alpha, or lower task.clients"),
        ("shards:0", 5, "take 1 to 8"),
        ("shards:9", 5, "take 1 to 8"),
        ("shards:2.5", 5, "write iid, lda:ALPHA"),
        ("shards:inf", 5, "write iid, lda:ALPHA"),
        ("dirichlet:nan", 5, "alpha must be a number from 1e-06 up"),
        ("quantity:0", 5, "alpha must be a number from 1e-06 up"),
        ("dirichlet:1:2:3", 5, "write iid, lda:ALPHA"),
        ("dirichlet:1:x", 5, "write iid, lda:ALPHA"),
        ("quantity", 5, "write iid, lda:ALPHA"),
        ("group:ward", 5, r"toy has no column 'ward' \(it has none\)"),
        ("groups", 5, "write iid, lda:ALPHA"),
    ],
)
def test_what_cannot_be_dealt_is_one_line(spec: str, clients: int, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        partition(spec, dataset(), clients, 0)
    assert "\n" not in str(caught.value)


def test_a_column_must_have_a_number_for_each_example() -> None:
    with pytest.raises(InputError, match=r"column ward must number the owner of each of the 40"):
        dataset(columns={"ward": [1, 2]})
    with pytest.raises(InputError, match="group:night: 2 clients, but the data has 1 groups: lower"):
        partition("group:night", dataset(columns={"night": [0] * 40}), 2, 0)


def test_the_command_line_takes_them() -> None:
    from fedsieve.engine import open_run
    from fedsieve.recipes import load_recipe

    run = load_recipe("fedavg.digits", ["task.partition=dirichlet:0.3", "task.clients=10", "per_round=2"])
    sizes = [len(part) for part in open_run(run).shards]
    assert sum(sizes) == 1442
    assert max(sizes) > 2 * min(sizes) >= 20
