"""Conformance: what every method owes, for those of methods_under_test."""

from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from itertools import islice
from typing import Any

import pytest
import torch

from engines import pickled
from fedsieve import Method, Run, Task, local, pool, rounds
from fedsieve.client.evaluation import accuracy
from fedsieve.client.models import MODELS
from fedsieve.client.training import load_, params_of
from fedsieve.engine import cohort
from fedsieve.engine.federation import Federation
from fedsieve.engine.rollback import Checkpoint
from fedsieve.engine.round import Round
from fedsieve.engine.setup import open_run
from fedsieve.kernels import unavailable_reason
from fedsieve.methods import (
    SCAFFOLD,
    FedAvg,
    FedProx,
    Swat,
    TopK,
    ZeroFL,
)
from fedsieve.sparse.masks import weight_density
from fedsieve.sparse.policy import select_weights
from fedsieve.types import InputError, Sparse, flatten, rng
from methods_under_test import METHODS
from tiny import TinyNet, blobs, net, same_state, tiny_run

SPARSE_UPLOAD = [
    name for name in METHODS if not name.startswith(("fedavg", "fedadam", "fedprox", "scaffold", "swat", "zerofl full"))
]


NO_KERNELS = unavailable_reason()


@pytest.fixture(params=METHODS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> Method[Any]:
    return METHODS[request.param]


@pytest.fixture(params=["dense", "sparse"])
def kernels(request: pytest.FixtureRequest) -> str:
    """Either way through a training step."""
    if request.param == "sparse" and NO_KERNELS:
        pytest.skip(NO_KERNELS)
    return str(request.param)


def test_a_method_says_what_density_it_aims_at(method: Method[Any]) -> None:
    """A number that is one of its own fields, or 1 less one; dense methods say 1."""
    target = tiny_run(method).target_density
    inner = getattr(method, "inner", method)
    of = [getattr(inner, name) for name in ("density", "sparsity", "densities") if hasattr(inner, name)]
    value = max(of[0]) if of and isinstance(of[0], tuple) else of[0] if of else 1.0
    assert target in (pytest.approx(value), pytest.approx(1 - value))
    assert (target == 1) == (method.name in ("fedavg", "fedadam", "fedprox", "scaffold"))


def test_a_target_density_that_is_none_is_named() -> None:
    class Odd(FedAvg):
        target_density = 10

    for value in (10, 0, -0.1, float("nan"), "0.1", True, [0.1]):
        Odd.target_density = value  # type: ignore[assignment]
        with pytest.raises(InputError, match=r"target_density must be a number in \(0, 1\], or None"):
            tiny_run(Odd())
    Odd.target_density = None  # type: ignore[assignment]
    assert tiny_run(Odd()).target_density is None


ROUNDS = 16


def learning_run(name: str) -> Run:
    return tiny_run(METHODS[name], rounds=ROUNDS, lr=0.2)


@cache
def federation(name: str) -> Federation:
    return open_run(learning_run(name))


@cache
def learning(name: str, kernels: str) -> tuple[Round, ...]:
    """All rounds of a method's run with these kernels: one run for all that is asserted of it."""
    return tuple(rounds(federation(name), local(kernels=kernels)))


def last(run_: Run, kernels: str = "auto") -> Round:
    *_, final = rounds(run_, local(kernels=kernels))
    return final


def same(a: Round, b: Round) -> bool:
    return same_state(a.state, b.state) and a.bytes_up == b.bytes_up


@pytest.mark.slow
def test_it_learns(name: str, kernels: str) -> None:
    final = learning(name, kernels)[-1]
    assert final.kernels == {kernels: 3}
    assert final.accuracy is not None
    assert final.accuracy > 0.8


@pytest.mark.slow
def test_the_seed_matters(name: str, kernels: str) -> None:
    opened = federation(name)
    other = replace(opened, run=replace(opened.run, seed=1))
    assert not same(learning(name, kernels)[0], next(rounds(other, local(kernels=kernels))))


@pytest.mark.slow
def test_it_goes_on_from_a_checkpoint_bit_for_bit(name: str, kernels: str) -> None:
    whole = learning(name, kernels)
    before = whole[-3]
    start = Checkpoint(before.t, flatten(before.state), before.memory)
    resumed = list(rounds(federation(name), local(kernels=kernels), start=start))
    assert [r.t for r in resumed] == [ROUNDS - 1, ROUNDS]
    assert all(same(a, b) for a, b in zip(resumed, whole[-2:], strict=True))


def test_it_keeps_the_names_of_the_plain_model(method: Method[Any]) -> None:
    plain = net(method)()
    names = set(params_of(plain))
    state = method.init(plain, rng(0, "init"))
    assert set(state.params) == set(method.deploy(state)) == names
    assert set(params_of(method.prepare(net(method)()))) == names


def test_what_it_deploys_is_what_was_tested(name: str, kernels: str) -> None:
    final = learning(name, kernels)[-1]
    model = load_(net(METHODS[name])(), final.model)
    assert accuracy(model, blobs().test) == final.accuracy
    assert weight_density(final.model) == final.density


def test_it_counts_its_work(name: str, kernels: str) -> None:
    method, final = METHODS[name], learning(name, kernels)[-1]
    # 3 clients of 40 examples, 4 held out, each example 36 positions; conv1's input needs no gradient
    conv1, conv2, fc1, fc2 = 36 * 4 * 2 * 9, 9 * 8 * 4 * 9, 72 * 24, 24 * 3
    examples = 3 * (36 + 8 * (method.name == "feddst"))  # whose masks move in this round, by a batch's gradient
    assert final.multiply_adds_dense == examples * (2 * conv1 + 3 * (conv2 + fc1 + fc2))
    dense = type(method) in (FedAvg, FedProx, SCAFFOLD, TopK) or (
        kernels == "sparse" and getattr(method, "a", 2) == 1
    )  # zeros move
    assert (final.multiply_adds == final.multiply_adds_dense) == dense
    if method.name in ("pdst", "flash"):  # a frozen mask: every product at the density of its layer
        d = {n: float(own.double().mean()) for n, own in final.state.mask.items()}
        sizes = {"conv1": 2 * conv1, "conv2": 3 * conv2, "fc1": 3 * fc1, "fc2": 3 * fc2}
        assert final.multiply_adds == pytest.approx(
            3 * 36 * sum(size * d.get(f"{n}.weight", 1.0) for n, size in sizes.items())
        )
    assert final.multiply_adds <= final.multiply_adds_dense


@pytest.mark.slow
@pytest.mark.parametrize("name", SPARSE_UPLOAD)
def test_a_sparse_upload_is_smaller_than_dense(name: str, kernels: str) -> None:
    final = learning(name, kernels)[-1]
    assert final.bytes_up < 0.8 * final.bytes_dense_up


def test_the_global_model_is_finite_and_float32(name: str, kernels: str) -> None:
    for value in learning(name, kernels)[-1].state.params.values():
        assert value.dtype == torch.float32
        assert torch.isfinite(value).all()


def assert_same_rounds(some: Iterable[Round], others: Iterable[Round]) -> None:
    for a, b in zip(some, others, strict=True):
        assert same(a, b)
        assert (a.accuracy, a.multiply_adds, a.metrics) == (b.accuracy, b.multiply_adds, b.metrics)
        assert (a.bytes_down, a.memory) == (b.bytes_down, b.memory)
        assert (a.kernels, a.dense_because, a.steps) == (b.kernels, b.dense_because, b.steps)


def test_it_is_deterministic_at_whichever_worker(name: str, kernels: str) -> None:
    """The same run, opened anew, gives the same bits at workers that were sent it."""
    again = islice(rounds(learning_run(name), pickled(kernels)), 2)
    assert_same_rounds(learning(name, kernels)[:2], again)


@pytest.mark.system
@pytest.mark.parametrize(
    ("name", "kernels", "processes"),
    [("fedavg", "dense", 1), ("nst", "sparse", 3), ("flash", "sparse", 2), ("hetero_flash", "dense", 2)],
)
def test_a_pool_gives_the_same_bits_as_one_process(name: str, kernels: str, processes: int) -> None:
    """Of methods that differ in what a process keeps: nothing, memories, a warm-up, device classes."""
    if kernels == "sparse" and NO_KERNELS:
        pytest.skip(NO_KERNELS)
    together = islice(rounds(learning_run(name), pool(processes, kernels=kernels)), 2)
    assert_same_rounds(learning(name, kernels)[:2], together)


@pytest.mark.skipif(bool(NO_KERNELS), reason=str(NO_KERNELS))
@pytest.mark.parametrize("changes", [{}, {"momentum": 0.9, "weight_decay": 0.01, "lr": 0.02}], ids=["sgd", "momentum"])
def test_the_kernels_train_what_pytorch_trains(method: Method[Any], changes: dict[str, float]) -> None:
    first = tiny_run(method, rounds=1, **changes)
    dense, sparse = (last(first, kernels) for kernels in ("dense", "sparse"))
    if method.name not in ("nst", "dnr") or not changes:  # there a weight that grows anew starts at rest
        for name, value in dense.state.params.items():
            torch.testing.assert_close(sparse.state.params[name], value, rtol=0, atol=1e-5)
    assert sparse.multiply_adds_dense == dense.multiply_adds_dense
    if method.name != "sparsefedpp":  # whose weights' gradient is found where th is not 0, alone
        assert sparse.multiply_adds == pytest.approx(dense.multiply_adds)


@pytest.mark.gpu
def test_it_learns_on_a_gpu(method: Method[Any]) -> None:
    run_ = tiny_run(method, rounds=20, lr=0.2)
    final = [*rounds(run_, cohort(device="cuda"), device="cuda")][-1]
    assert final.accuracy is not None
    assert final.accuracy > 0.8
    assert all(value.device.type == "cpu" for value in final.state.params.values())


@pytest.mark.slow
def test_central_training_is_one_client() -> None:
    run_ = Run(Swat(0.7), Task(TinyNet, blobs, 1, validation=0.0), 20, 1, batch=16, lr=0.1)
    final = last(run_)
    assert final.accuracy is not None
    assert final.accuracy > 0.8
    assert final.clients == (0,)


def test_layers_outside_the_policy_are_sent_whole() -> None:
    method = ZeroFL(0.9, 0.0, "top_weights")
    before = params_of(TinyNet())
    sent = method.select_upload(before, before, select_weights("zerofl", TinyNet()))
    assert {n for n, v in sent.items() if isinstance(v, Sparse)} == {"conv2.weight", "fc1.weight"}
    fc1 = sent["fc1.weight"]
    assert isinstance(fc1, Sparse)
    assert len(fc1.values) == -(-72 * 24 // 10)


def test_swat_by_erdos_renyi_kernel_ships_layers_of_unequal_density() -> None:
    method, model = Swat(sparsity=0.7, policy="all", budget="erk"), TinyNet()
    params = method.deploy(method.init(model, rng(0, "init")))
    sides = {"conv1": 4 + 2 + 3 + 3, "conv2": 8 + 4 + 3 + 3, "fc1": 24 + 72, "fc2": 3 + 24}
    kept = {name: weight_density(params, [f"{name}.weight"]) for name in sides}
    shares = [kept[name] * params[f"{name}.weight"].numel() / sides[name] for name in sides]
    assert shares[:3] == pytest.approx([shares[0]] * 3, rel=0.03)
    assert kept["fc2"] == 1  # more than its share does not fit
    assert weight_density(params) == pytest.approx(0.3, abs=0.01)


def test_top_k_starts_dense_and_then_sends_down_only_what_survived() -> None:
    rounds_ = list(rounds(tiny_run(TopK(0.8)), local()))
    assert 0.75 < rounds_[0].bytes_down / rounds_[0].bytes_dense_down < 1.02  # packed without loss
    assert rounds_[1].bytes_down < 0.8 * rounds_[1].bytes_dense_down
    assert rounds_[1].density < 0.6


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda: ZeroFL(sparsity=1.2), r"sparsity must lie in \[0, 1\), got 1.2"),
        (lambda: Swat(sparsity=1.0), r"sparsity must lie in \[0, 1\), got 1.0"),
        (lambda: TopK(sparsity=-0.1), r"sparsity must lie in \[0, 1\), got -0.1"),
        (lambda: ZeroFL(sparsity=float("nan")), "sparsity must lie"),
        (lambda: ZeroFL(r_mask=1.5), r"r_mask must lie in \[0, 1\], got 1.5"),
        (lambda: ZeroFL(period=0), "period must be at least 1"),
    ],
)
def test_impossible_settings_are_refused(make: Any, line: str) -> None:
    with pytest.raises(InputError, match=line):
        make()


# ZeroFL, Tables 1 and 2: "MB" are 1,024,000 bytes.
PAPER_MB = {0.05: 5.9, 0.1: 10.1, 0.15: 14.4, 0.2: 18.7, 0.25: 23.0, 0.3: 27.3}


@pytest.mark.parametrize("q", PAPER_MB)
@pytest.mark.parametrize("upload", ["top_weights", "diff_of_top", "top_diff"])
def test_the_papers_formula_gives_the_papers_megabytes(q: float, upload: Any) -> None:
    method = ZeroFL(sparsity=0.95, r_mask=q - 0.05, upload=upload)
    size = method.paper_bytes(MODELS["resnet18"](3, 10))
    assert round(size / 1_024_000, 1) == PAPER_MB[q]


@pytest.mark.parametrize("method", [FedAvg(), Swat(), ZeroFL(upload="full")], ids=repr)
def test_the_papers_formula_for_a_dense_upload(method: Method[Any]) -> None:
    size = method.paper_bytes(MODELS["resnet18"](3, 10))
    assert size == 4 * (11_173_962 + 9_600)
    assert round(size / 1_024_000, 1) == 43.7
