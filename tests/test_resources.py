"""A server computes the same bits by one thread and by several, and where a GPU finds the top weights."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import pytest
import torch
from torch import Tensor

from fedsieve import InputError, Update, local, rounds
from fedsieve.engine import loop
from fedsieve.server.aggregate import mean
from fedsieve.sparse import masks
from fedsieve.sparse.masks import keep_topk, top
from fedsieve.types import Sparse
from fedsieve.types.resources import Resources, each, resources, using
from methods_under_test import METHODS
from tiny import assert_same, tiny_run


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4, initializer=torch.set_num_threads, initargs=(1,)) as executor:
        yield executor


def test_results_come_in_order_from_several_threads(threads: ThreadPoolExecutor) -> None:
    """Each item once; what is in use ends with the block, and a failure is the caller's."""
    four = threading.Barrier(4)

    def thread_of(i: int) -> tuple[int, int, str]:
        four.wait(20)
        return i, threading.get_ident(), resources().device

    with using(Resources(threads, "somewhere")):
        numbers, at_work, devices = zip(*each(thread_of, range(8)), strict=True)
        with pytest.raises(ZeroDivisionError):
            each(lambda i: 1 // i, [1, 0])
    assert numbers == (0, 1, 2, 3, 4, 5, 6, 7)
    assert len({*at_work, threading.get_ident()}) == 5
    assert {*devices} == {"somewhere"}
    assert each(lambda i: (i, resources()), [1]) == [(1, Resources())]


def answers(layers: int) -> list[Update]:
    """Return updates whose float64 sums depend on their order, dense and sparse tensors, some missing in the first."""
    generator = torch.Generator().manual_seed(3)
    several = []
    for i in range(7):
        values = {
            f"layer{j}": 10.0 ** torch.randint(-8, 8, (50,), generator=generator) * torch.rand(50, generator=generator)
            for j in range(layers)
        }
        tree: dict[str, Tensor | Sparse] = {
            name: Sparse.of(v, v > v.median()) if (i + j) % 3 else v for j, (name, v) in enumerate(values.items())
        }
        if i == 0:
            del tree["layer2"]
        several.append(Update(tree, 3 * i + 1, {}))
    return several


def test_a_mean_by_threads_is_the_same_to_the_bit(threads: ThreadPoolExecutor) -> None:
    several = answers(20)
    for weighting in ("samples", "equal"):
        wanted = mean(iter(several), weighting)  # type: ignore[arg-type]
        with using(Resources(threads)):
            by_threads = mean(iter(several), weighting)  # type: ignore[arg-type]
        assert [*by_threads] == [*wanted] == [*(f"layer{j}" for j in (0, 1, *range(3, 20))), "layer2"]
        for name, value in wanted.items():
            total, weights = torch.zeros(50, dtype=torch.float64), 0
            for one in several:
                weight = one.n if weighting == "samples" else 1
                weights += weight
                if name in one.tree:
                    part = one.tree[name]
                    assert not isinstance(part, float | dict)
                    total += weight * (part.dense() if isinstance(part, Sparse) else part).double()  # type: ignore[union-attr]
            assert torch.equal(value, (total / weights).float())
            assert torch.equal(value, by_threads[name])
    with using(Resources(threads)), pytest.raises(InputError, match="no client sent an update"):
        mean(islice(several, 0))


def test_top_weights_are_found_elsewhere_alike(threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large tensors go to the device, which here is the CPU by another name, and their supports come back."""
    generator = torch.Generator().manual_seed(1)
    sizes = {"large": 70_000, "other": 100_000, "small": 1_000, "dense": 90_000}
    params = {name: torch.randint(-40, 40, (n,), generator=generator).float() for name, n in sizes.items()}
    densities = {"large": 0.1, "other": 0.5, "small": 0.2}
    wanted = keep_topk(params, densities)
    places, to = list[tuple[int, str]](), Tensor.to
    monkeypatch.setattr(Tensor, "to", lambda self, *where: places.append((len(self), where[0])) or to(self, *where))
    with using(Resources(threads, "cpu:0")):
        elsewhere = keep_topk(params, densities)
    assert sorted(places) == [(70_000, "cpu:0"), (100_000, "cpu:0")]
    assert [*elsewhere] == [*wanted] == [*params]
    assert all(torch.equal(v, elsewhere[name]) for name, v in wanted.items())
    assert all(int((elsewhere[name] != 0).sum()) <= masks.topk_count(d, sizes[name]) for name, d in densities.items())


@pytest.mark.parametrize("name", METHODS)
def test_a_run_is_the_same_with_several_threads(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    one = tiny_run(METHODS[name], rounds=2)
    wanted = [*rounds(one, local(kernels="dense"))]
    readers = loop._readers
    monkeypatch.setattr(loop, "_readers", lambda _: readers("cuda"))
    for a, b in zip(rounds(one, local(kernels="dense")), wanted, strict=True):
        assert_same(a, b)


@pytest.mark.gpu
def test_a_gpu_finds_the_top_weights_of_a_cpu() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(-40, 40, (300, 300), generator=generator).float()
    for values in (
        x,
        torch.rand(100_000, generator=generator),
        x.view(30, 10, 30, 10).to(memory_format=torch.channels_last),
    ):
        for q in (0.0, 0.05, 0.3, 1.0):
            with using(Resources(device="cuda")):
                found = top(values, q)
            assert not found.is_cuda
            assert torch.equal(found, top(values, q))
