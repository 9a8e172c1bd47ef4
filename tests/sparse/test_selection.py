"""The exact top-k by every way, on awkward input; by Triton in its interpreter, compiled, and on a GPU."""

import importlib
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor

import selections
from fedsieve.sparse import layers, masks, selection

TESTS = Path(selections.__file__).parent
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


def sort_support(x: Tensor, k: int | Tensor) -> Tensor:
    if not x.numel():
        return selection.support(x, k)
    return selection.sort_select(selection.magnitude_keys(x), k)[0].view(x.shape)


def sort_cut(x: Tensor, k: int | Tensor) -> tuple[Tensor, Tensor]:
    if not x.numel():
        return selection.cut(x, k)
    support, kth = selection.sort_select(selection.magnitude_keys(x), k)
    return torch.where(support.view(x.shape), x, 0), kth.view(x.dtype)


@pytest.mark.parametrize("dtype", selections.DTYPES, ids=str)
def test_a_cpu_keeps_the_k_largest(dtype: torch.dtype) -> None:
    assert selections.wrong_cases((dtype,), selection.cut, selection.support) == []


@pytest.mark.parametrize("dtype", selections.DTYPES, ids=str)
def test_a_sort_keeps_the_same(dtype: torch.dtype) -> None:
    assert selections.wrong_cases((dtype,), sort_cut, sort_support) == []


def test_a_sort_asks_nothing_of_the_device() -> None:
    keys, k = torch.empty(100, dtype=torch.int32, device="meta"), torch.empty((), dtype=torch.int64, device="meta")
    with pytest.raises(RuntimeError):  # what a meta tensor answers to a question of the host's
        int(k)
    for support, kth in (selection.sort_select(keys, k), selection.sort_select(keys, 7)):
        assert (support.shape, kth.shape) == ((100,), ())


def test_keys_off_a_mask_are_never_selected_before_those_on_it() -> None:
    keys = torch.tensor([5, -1, 0, -1, 7], dtype=torch.int32)
    for support in (selection.largest(keys, 3), selection.sort_select(keys, 3)[0]):
        assert support.tolist() == [True, False, True, False, True]


def odd_keys(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Many keys of which a sample of every 61st says little, or the wrong thing."""
    most, n = torch.iinfo(dtype).max, 70_001
    at = torch.arange(n)
    random = torch.randint(most, (n,), generator=torch.Generator().manual_seed(2))
    cases = {
        "alike": torch.zeros(n),
        "two": at % 2 * most,
        "rising": at % most,
        "every 61st large": (at % 61 == 0) * most + at % 7,
        "every 61st small": (at % 61 != 0) * (most - 9) + at % 7 - 1,
        "random": random,
        "off a mask": torch.where(random % 3 == 0, -1, random),
    }
    return {name: keys.to(dtype) for name, keys in cases.items()}


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64], ids=str)
def test_of_many_keys_a_sample_never_changes_what_is_selected(dtype: torch.dtype) -> None:
    for name, keys in odd_keys(dtype).items():
        ordered = keys.sort(stable=True, descending=True)
        for k in (1, 2, 1000, len(keys) // 61, len(keys) // 2, len(keys) - 1):
            expected = torch.zeros(len(keys), dtype=torch.bool).index_fill_(0, ordered.indices[:k], True)
            assert torch.equal(selection.largest(keys, k), expected), (name, k)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_values_are_rounded_after_they_are_selected(device: str) -> None:
    assert selections.wrong_rounding(selection.cut, move=lambda x: x.to(device)) == []
    cut = selection.cuts([torch.tensor([1.0, 1.001, -1.002], device=device)], [1], torch.bfloat16)
    (values,), thresholds = cut()
    assert values.tolist() == [0, 0, -1]
    assert (values.dtype, thresholds.dtype) == (torch.bfloat16, torch.float32)


def test_a_cut_keeps_its_memory_format_and_gives_the_threshold_that_layers_reuse() -> None:
    x = torch.randn(4, 6, 5, 5, generator=torch.Generator().manual_seed(1)).to(memory_format=torch.channels_last)
    periodic = layers.PeriodicTopK(0.2, 3)
    values, threshold = selection.cut(x.requires_grad_(), masks.topk_count(0.2, x.numel()))
    assert torch.equal(periodic(x), values)
    assert threshold == periodic.threshold
    assert values.is_contiguous(memory_format=torch.channels_last)
    assert not values.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_many_tensors_are_cut_at_once_and_again_after_they_changed(dtype: torch.dtype, device: str) -> None:
    tensors, k = selections.batch(2048, dtype)
    tensors = [x.to(device) for x in tensors]
    for own in (k, torch.tensor(k, device=device)):
        assert selections.wrong_in_batch(tensors, k, selection.cuts(tensors, own)) == []


@pytest.mark.slow
def test_the_benchmark_selects_the_same_by_every_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(TESTS.parent / "benchmarks")
    topk = importlib.import_module("topk")
    shapes = [(tuple(weight.shape), tuple(a.shape)) for weight, a in topk.layers_of(2)]
    assert (len(shapes), shapes[0], shapes[-1]) == (
        16,
        ((64, 64, 3, 3), (2, 64, 32, 32)),
        ((512, 512, 3, 3), (2, 512, 4, 4)),
    )
    row = topk.measure("cpu", torch.bfloat16, batch=2, repeats=1)
    assert row["selections"] == 32
    assert min(row[name] for name in ("ms", "single_ms", "sort_ms")) > 0


def in_subprocess(script: str, **environment: str) -> str:
    """Run a script of the tests; return what it prints."""
    done = subprocess.run(
        [sys.executable, str(TESTS / script)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@needs_triton
@pytest.mark.system
def test_the_kernels_keep_the_same_in_their_interpreter() -> None:
    """In blocks of 128, of which each reads several times: an interpreter is slow."""
    assert in_subprocess("interpreted_selections.py", TRITON_INTERPRET="1").splitlines() == ["wrong: []"] * 5


@needs_triton
@pytest.mark.system
def test_the_kernels_compile_for_a_gpu_that_is_not_there() -> None:
    """As they are launched, for an H100 (sm_90): float32 takes 5 launches, half of its bits 4, and a batch no more."""
    single, batch = ["float32 5", "float16 4", "bfloat16 4", "int32 5"], ["batch 5", "batch 5", "batch 4", "batch 4"]
    assert in_subprocess("compiled_selections.py").splitlines() == single + batch


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", selections.DTYPES, ids=str)
def test_a_gpu_keeps_the_same_by_every_way(dtype: torch.dtype) -> None:
    assert selections.wrong_cases((dtype,), selection.cut, selection.support, move=Tensor.cuda) == []
    assert selections.wrong_cases((dtype,), sort_cut, sort_support, move=Tensor.cuda) == []


@pytest.mark.gpu
def test_a_gpu_selects_from_keys() -> None:
    keys = torch.randint(-1, 60, (100_003,), dtype=torch.int32, generator=torch.Generator().manual_seed(2))
    for k in (0, 1, 5000, 99_000, 100_003):
        assert torch.equal(selection.largest(keys.cuda(), k).cpu(), selection.largest(keys, k))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", selections.DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(16, 64, 32, 32), (512, 256, 3, 3)])
def test_a_graph_selects_anew_at_each_replay(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Without a look from the host, of other values and another k than were there at the capture; twice the same."""
    rng = torch.Generator().manual_seed(4)
    samples = [torch.randn(shape, generator=rng).relu().to(dtype).to(memory_format=torch.channels_last) for _ in "abc"]
    x, counts = samples[0].cuda(), torch.full((3,), samples[0].numel() // 20, device="cuda")
    k, cut_both = counts[0], selection.cuts([x, x], counts[1:])

    def select() -> tuple[tuple[Tensor, Tensor], Tensor, tuple[list[Tensor], Tensor]]:
        return selection.cut(x, k), selection.support(x, k), cut_both()

    torch.use_deterministic_algorithms(True)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(side):  # what is compiled at its first call is compiled before the capture
            select()
            torch.cuda.set_sync_debug_mode("error")
            select()
            torch.cuda.set_sync_debug_mode("default")
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            (values, threshold), mask, both = select()
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.use_deterministic_algorithms(False)
    for sample, count in zip(samples, (x.numel() // 20, 7, x.numel() - 3), strict=True):
        x.copy_(sample)
        counts.fill_(count)
        for _ in range(2):
            graph.replay()
            want, smallest = selection.cut(sample, count)
            assert all(torch.equal(v.cpu(), want) for v in (values, *both[0]))
            assert all(torch.equal(t.cpu(), smallest) for t in (threshold, *both[1]))
            assert torch.equal(mask.cpu(), selection.support(sample, count))
