"""Partitions: who holds what, against what the law says."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedsieve.data import Dataset
from fedsieve.data.partition import by_group, counts, hold_out, iid, lda, partition
from fedsieve.types import Data, InputError

LABELS = torch.arange(5000) % 10


def dataset(group: torch.Tensor | None = None) -> Dataset:
    data = Data(torch.zeros(5000, 1), LABELS)
    return Dataset("toy", data, data, tuple("0123456789"), group)


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDSIEVE_CACHE", str(tmp_path / "cache"))


@given(n=st.integers(1, 300), share=st.floats(0, 1), seed=st.integers(0, 99))
def test_iid_covers_everything_once_in_equal_sizes(n: int, share: Any, seed: int) -> None:
    clients = max(1, int(share * n))
    shards = iid(n, clients, seed)
    assert torch.equal(torch.cat(shards).sort().values, torch.arange(n))
    assert {len(shard) for shard in shards} <= {n // clients, -(-n // clients)}


@given(
    labels=st.lists(st.integers(0, 6), min_size=1, max_size=200),
    share=st.floats(0, 1),
    alpha=st.floats(1e-6, 1e6),
    seed=st.integers(0, 99),
)
def test_lda_gives_equal_disjoint_shards_at_any_alpha(labels: Any, share: Any, alpha: Any, seed: int) -> None:
    clients = max(1, int(share * len(labels)))
    shards = lda(torch.tensor(labels), clients, alpha, seed)
    assert [len(shard) for shard in shards] == [len(labels) // clients] * clients
    assert len(torch.cat(shards).unique()) == len(labels) // clients * clients


@pytest.mark.slow
def test_lda_first_clients_follow_the_dirichlet() -> None:
    # A client's share of one class is p ~ Beta(a, (C-1) a) and its count of m draws is beta-binomial:
    # E = m / C, Var = m (1/C) (1 - 1/C) (m + C a) / (1 + C a). The first client meets full pools, so nothing is cut.
    alpha, classes, m, runs, labels = 0.5, 10, 100, 2000, LABELS[:1000]
    held = torch.stack([counts(lda(labels, 10, alpha, seed)[:1], labels, classes)[0] for seed in range(runs)]).double()
    expected = m * 0.1 * 0.9 * (m + classes * alpha) / (1 + classes * alpha)
    assert held.mean(0) == pytest.approx(m / classes, abs=5 * (expected / runs) ** 0.5)
    assert held.var(0).mean().item() == pytest.approx(expected, rel=0.1)


def test_lda_redrawing_exhausted_classes_keeps_the_law() -> None:
    # Classes of 1 and 3 examples, 2 clients of 2, alpha -> infinity: each draw is a fair coin until a class is empty.
    # The first client takes the only example of class 0 unless both its coins say class 1: probability 1 - 1/4.
    labels, runs = torch.tensor([0, 1, 1, 1]), 4000
    took = sum(bool((lda(labels, 2, 1e6, seed)[0] == 0).any()) for seed in range(runs))
    assert took / runs == pytest.approx(0.75, abs=5 * (0.75 * 0.25 / runs) ** 0.5)


def test_lda_small_alpha_concentrates_and_large_alpha_evens_out() -> None:
    dominant = [
        counts(lda(LABELS, 50, alpha, 0), LABELS, 10)[:25].max(1).values.double().mean() for alpha in (0.01, 1e4)
    ]
    assert dominant[0] > 90  # of 100: nearly one class a client
    assert dominant[1] < 20  # ten a class, and the largest of ten binomials of standard deviation 3


@pytest.mark.parametrize("alpha", [1e-6, 1.79e308])
def test_lda_deals_at_the_ends_of_its_range(alpha: Any) -> None:
    assert [len(shard) for shard in lda(LABELS, 50, alpha, 0)] == [100] * 50


def test_lda_uses_every_class_up_when_nothing_is_left_over() -> None:
    assert counts(lda(LABELS, 10, 0.01, 3), LABELS, 10).sum(0).tolist() == [500] * 10


def test_by_group_makes_one_client_of_each_group() -> None:
    group = torch.tensor([4, 2, 4, 2, 9, 2])
    everyone = [[1, 3, 5], [0, 2], [4]]
    assert [shard.tolist() for shard in by_group(group, 3, 1)] == everyone
    some = {seed: [shard.tolist() for shard in by_group(group, 2, seed)] for seed in range(20)}
    assert all(len(chosen) == 2 and all(shard in everyone for shard in chosen) for chosen in some.values())
    assert len(set(map(str, some.values()))) == 3


@pytest.mark.parametrize(("clients", "remedy"), [(7, "lower"), (0, "raise")])
def test_by_group_names_both_numbers_and_the_remedy(clients: int, remedy: str) -> None:
    with pytest.raises(InputError, match=rf"{clients} clients, but the data has 3 groups: {remedy} task\.clients"):
        by_group(torch.tensor([0, 1, 2]), clients, 0)


@pytest.mark.parametrize("spec", ["iid", "lda:1.0", "lda:0.01", "group"])
def test_partition_is_deterministic_cached_and_differs_by_seed(spec: str, tmp_path: Path) -> None:
    data = dataset(torch.arange(5000) // 10)
    first, cached, other = (partition(spec, data, 20, seed) for seed in (0, 0, 1))
    assert len(list((tmp_path / "cache").glob("partition-*.npz"))) == 2
    assert all(map(torch.equal, first, cached))
    assert not all(map(torch.equal, first, other))
    assert all(shard.dtype == torch.int64 and bool((shard.diff() > 0).all()) for shard in first)


def test_partition_is_keyed_by_the_labels() -> None:
    data = dataset()
    other = replace(data, train=Data(torch.zeros(5000, 1), LABELS.roll(1)))
    assert not all(map(torch.equal, partition("lda:0.1", data, 5, 0), partition("lda:0.1", other, 5, 0)))


@pytest.mark.slow
def test_partition_is_the_same_in_another_process() -> None:
    code = (
        "import torch; from fedsieve.data.partition import lda; print(lda(torch.arange(90) % 9, 9, 0.3, 5)[4].tolist())"
    )
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert there.strip() == str(lda(torch.arange(90) % 9, 9, 0.3, 5)[4].tolist())


@pytest.mark.parametrize(
    ("spec", "clients", "message"),
    [
        ("dirichlet", 10, "write iid, lda:ALPHA"),
        ("iid:3", 10, "write iid, lda:ALPHA"),
        ("lda:", 10, "write iid, lda:ALPHA"),
        ("lda:x", 10, "write iid, lda:ALPHA"),
        *((f"lda:{alpha}", 10, "from 1e-06 up") for alpha in ("0", "-1", "nan", "inf", "1e999", "1e-310", "9e-7")),
        ("iid", 5001, "5001 clients cannot share 5000 examples"),
        ("lda:1", 0, "0 clients cannot share 5000 examples"),
        ("group", 10, "does not say whose"),
    ],
)
def test_partition_refuses_in_one_line(spec: str, clients: int, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        partition(spec, dataset(), clients, 0)
    assert "\n" not in str(caught.value)


@given(n=st.integers(0, 100), fraction=st.sampled_from([0.0, 0.1, 0.25, 1.0]), client=st.integers(0, 9))
def test_hold_out_splits_without_losing_anything(n: int, fraction: float, client: int) -> None:
    index = torch.arange(n) * 3
    training, validation = hold_out(index, fraction, 0, client)
    assert len(validation) == int(fraction * n)
    assert torch.equal(torch.cat([training, validation]).sort().values, index)
    assert torch.equal(hold_out(index, fraction, 0, client)[1], validation)


def test_hold_out_differs_by_client_and_seed() -> None:
    choices = {tuple(hold_out(torch.arange(50), 0.1, seed, k)[1].tolist()) for seed in range(3) for k in range(3)}
    assert len(choices) == 9


def test_counts_say_who_holds_what() -> None:
    shards = [torch.tensor([0, 1, 2]), torch.tensor([3, 13]), torch.tensor([], dtype=torch.int64)]
    expected = torch.zeros(3, 10, dtype=torch.int64)
    expected[0, :3] = 1
    expected[1, 3] = 2
    assert torch.equal(counts(shards, LABELS, 10), expected)


def test_parts_are_every_nth_example_or_all_of_every_nth_owners() -> None:
    x, tests = torch.arange(10.0)[:, None], torch.arange(4.0)[:, None]
    plain = Dataset("ten", Data(x, torch.arange(10) % 2), Data(tests, torch.arange(4) % 2), tuple("ab"))
    halves = [plain.part(text) for text in ("1/2", "2/2")]
    assert [half.train.x[:, 0].tolist() for half in halves] == [[0, 2, 4, 6, 8], [1, 3, 5, 7, 9]]  # type: ignore[union-attr, call-overload]
    assert all(len(half.test) == 4 for half in halves)
    assert plain.part("") is plain
    owners, test_owners = torch.tensor([0, 0, 1, 2, 2, 2, 3, 3, 4, 4]), torch.tensor([0, 1, 2, 3])
    owned = replace(plain, group=owners, groups=tuple("vwxyz"), test_group=test_owners, columns={"n": owners * 10})
    first, second = owned.part("1/2"), owned.part("2/2")
    assert first.group is not None
    assert second.group is not None
    assert first.group.tolist() == [0, 0, 1, 1, 1, 2, 2]
    assert second.group.tolist() == [0, 1, 1]
    assert (first.groups, second.groups) == (("v", "x", "z"), ("w", "y"))
    assert first.columns["n"].tolist() == [0, 0, 20, 20, 20, 40, 40]
    assert second.test_group is not None
    assert (second.test_group.tolist(), second.test.x[:, 0].tolist()) == ([0, 1], [1, 3])  # type: ignore[union-attr, call-overload]
    for wrong in ("0/2", "3/2", "half", "1/0"):
        with pytest.raises(InputError, match=r"task\.part must be k/n"):
            plain.part(wrong)
    with pytest.raises(InputError, match=r"task\.part has no examples"):
        plain.part("11/11")
