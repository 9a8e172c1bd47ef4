"""Means that a few clients cannot move far: against numpy's arithmetic, and against clients that turn round."""

from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engines import pickled
from fedsieve import InputError, Run, Update, local, rounds
from fedsieve.engine.round import Round
from fedsieve.engine.setup import open_run
from fedsieve.methods import FedAvg
from fedsieve.recipes import apply_settings, load_recipe
from fedsieve.server.aggregate import MaskedState, mean
from fedsieve.server.robust import Bound, Clipped, Mean, Median, Multiple, Off, Plain, Trimmed, robust_updates
from fedsieve.types import Tree, flatten
from fedsieve.types.contract import Expected, Whole, expect_weights
from methods_under_test import METHODS, kinds_first
from oracles.lies import Act, Reply, changed, flipped
from tiny import tiny_run

ONE_SUPPORT = ["fedavg", "fedadam", "swat", "swat, erk, period", "zerofl full", "pdst", "pdst, adam, equal"]
ONE_SUPPORT += ["flash", "flash, sum, clip, adam", "fedprox", "scaffold", "scaffold, as Flower"]
BASE = torch.linspace(-1, 1, 6).view(2, 3)
EXPECTED = Expected(expect_weights({"w": BASE}))


def updates(m: int, seed: int = 0) -> tuple[np.ndarray[Any, Any], list[Update]]:
    values = np.random.default_rng(seed).standard_normal((m, 2, 3)).astype(np.float32)
    return values, [Update({"w": torch.from_numpy(v)}, 3 * i + 1, {"loss": float(i)}) for i, v in enumerate(values)]


def taken(how: Mean, given: list[Update], expected: Expected = EXPECTED) -> np.ndarray[Any, Any]:
    return mean(robust_updates(how, given, expected))["w"].numpy()


@pytest.mark.parametrize("m", [1, 2, 3, 4, 7, 10])
def test_the_median_is_numpys(m: int) -> None:
    values, given = updates(m)
    wanted = np.median(values.astype(np.float64), axis=0).astype(np.float32)
    assert (taken(Median(), given) == wanted).all()


@pytest.mark.parametrize(("m", "share", "drop"), [(10, 0.1, 1), (10, 0.3, 3), (7, 0.1, 1), (7, 0.49, 3), (2, 0.4, 0)])
def test_the_trimmed_mean_is_that_of_the_middle(m: int, share: float, drop: int) -> None:
    values, given = updates(m)
    middle = np.sort(values, axis=0)[drop : m - drop].astype(np.float64)
    assert taken(Trimmed(share), given) == pytest.approx(middle.mean(0), rel=1e-6)


def test_nothing_trimmed_is_the_mean_in_which_all_count_alike() -> None:
    values, given = updates(5)
    assert taken(Trimmed(0.0), given) == pytest.approx(values.astype(np.float64).mean(0), rel=1e-6)


@settings(deadline=None)
@given(st.integers(1, 12), st.floats(0.1, 5))
def test_clipping_shortens_what_is_longer(m: int, norm: float) -> None:
    values, given = updates(m, seed=m)
    change = values.astype(np.float64) - BASE.numpy()
    length = np.sqrt((change**2).sum((1, 2)))
    clipped = BASE.numpy() + change / np.maximum(1, length / norm)[:, None, None]
    n = np.array([update.n for update in given])
    wanted = (clipped * n[:, None, None]).sum(0) / n.sum()
    assert taken(Clipped(norm), given) == pytest.approx(wanted, rel=1e-5, abs=1e-6)


def test_running_statistics_are_clipped_by_themselves() -> None:
    base = {"w": torch.zeros(2), "bn.running_var": torch.tensor([1.0, 1.0])}
    sent = Update({"w": torch.tensor([3.0, 4.0]), "bn.running_var": torch.tensor([4.0, 5.0])}, 1)
    for how, w, var in ((Clipped(1.0), [0.6, 0.8], [4.0, 5.0]), (Clipped(9.0, 2.5), [3.0, 4.0], [2.5, 3.0])):
        (one,) = robust_updates(how, [sent], Expected(expect_weights(base)))
        assert one.tree["w"].tolist() == pytest.approx(w)  # type: ignore[union-attr]
        assert one.tree["bn.running_var"].tolist() == pytest.approx(var)  # type: ignore[union-attr]


def test_what_is_short_enough_is_not_touched() -> None:
    _, given = updates(3)
    assert [*robust_updates(Clipped(1e9), given, EXPECTED)] == given
    assert robust_updates(Plain(), given, EXPECTED) is given


def test_what_has_no_norm_is_not_clipped() -> None:
    sensed = Expected({"w": Whole(BASE, counts=False)})
    _, given = updates(3)
    assert [*robust_updates(Clipped(1e-9), given, sensed)] == given


def test_large_tensors_are_taken_in_parts() -> None:
    x = torch.randn(5, 2**20 + 3, generator=torch.Generator().manual_seed(0))
    (one,) = robust_updates(Median(), [Update({"w": row}, 1) for row in x], EXPECTED)
    assert torch.equal(one.tree["w"], x.median(0).values)  # type: ignore[arg-type]


@pytest.mark.parametrize("how", [Median(), Trimmed(0.2), Clipped(1.0), Plain()], ids=lambda how: type(how).__name__)
def test_no_update_is_no_mean(how: Mean) -> None:
    with pytest.raises(InputError, match="no client sent"):
        taken(how, [])


@cache
def two_rounds(name: str, how: Mean) -> list[Round]:
    return [*rounds(tiny_run(METHODS[name], rounds=2, mean=how), local())]


@pytest.mark.parametrize("how", [Median(), Trimmed(0.2), Clipped(0.05)], ids=lambda how: type(how).__name__)
@pytest.mark.parametrize("name", kinds_first(ONE_SUPPORT))
def test_it_works_with_every_method_of_one_support(name: str, how: Mean) -> None:
    (first, *_, plain), (robust_first, *_, robust) = two_rounds(name, Plain()), two_rounds(name, how)
    a, b = flatten(plain.state), flatten(robust.state)
    assert a.keys() == b.keys()
    assert all(a[n].shape == b[n].shape and a[n].dtype == b[n].dtype for n in a)
    assert all(torch.isfinite(v).all() for v in robust.state.params.values())
    assert not all(torch.equal(a[n], b[n]) for n in a)
    assert first.bytes_up == robust_first.bytes_up  # later, the models differ, and so does what tells them
    if isinstance(robust.state, MaskedState):
        assert all(not v[~robust.state.mask[n]].any() for n, v in robust.state.params.items() if n in robust.state.mask)


@pytest.mark.parametrize("name", ["fedavg", "flash"])
def test_a_norm_that_nobody_reaches_changes_no_bit(name: str) -> None:
    plain, robust = ([*rounds(tiny_run(METHODS[name], mean=mean_), local())][-1] for mean_ in (Plain(), Clipped(1e9)))
    a, b = flatten(plain.state), flatten(robust.state)
    assert all(torch.equal(a[n], b[n]) for n in a)


def test_the_median_of_a_round_is_that_of_its_updates() -> None:
    """Of the whole method, against numpy: FedAvg's next model is the median of its clients'."""
    sent: list[dict[str, Any]] = []

    def record(t: int, client: int, down: Tree, reply: Reply) -> Iterable[tuple[int, Tree]]:
        sent.append(reply["tree"])
        yield client, reply

    (round_,) = rounds(open_run(tiny_run(FedAvg(), rounds=1, per_round=4, mean=Median())), changed(record))
    for name, value in round_.state.params.items():
        wanted = np.median(np.stack([tree[name].numpy() for tree in sent]).astype(np.float64), axis=0)
        assert (value.numpy() == wanted.astype(np.float32)).all()


@pytest.mark.parametrize("name", [name for name in METHODS if name not in ONE_SUPPORT and "private" not in name])
def test_other_methods_say_why_not(name: str) -> None:
    why = (
        "device classes hold different weights" if "hetero_flash" in name else "every client chooses its own positions"
    )
    for how in (Median(), Trimmed(), Clipped()):
        with pytest.raises(InputError, match=f"mean={type(how).__name__.lower()} needs clients .* {why}.*mean=plain"):
            open_run(tiny_run(METHODS[name], mean=how))
    assert open_run(tiny_run(METHODS[name], bound=Multiple()))


def test_the_mean_is_a_setting_like_any_other() -> None:
    run_: Run = tiny_run(FedAvg())
    assert apply_settings(run_, ["mean=trimmed", "mean.share=0.3"]).mean == Trimmed(0.3)
    assert apply_settings(run_, ["mean=clipped", "mean.norm=2"]).mean == Clipped(2.0)
    assert apply_settings(run_, ["mean=median"]).mean == Median()
    assert apply_settings(run_, ["mean=plain"]) == run_
    with pytest.raises(InputError, match=r"mean\.share must lie in \[0, 0.5\), got 0.5"):
        apply_settings(run_, ["mean=trimmed", "mean.share=0.5"])
    with pytest.raises(InputError, match=r"mean\.norm must be positive"):
        apply_settings(run_, ["mean=clipped", "mean.norm=-1"])
    with pytest.raises(InputError, match="mean must be one of plain, clipped, median, trimmed, got 'krum'"):
        apply_settings(run_, ["mean=krum"])


@pytest.mark.parametrize("how", [Median(), Clipped(0.05)], ids=["median", "clipped"])
def test_engines_agree_on_it(how: Mean) -> None:
    a, b = ([*rounds(tiny_run(METHODS["flash"], rounds=2, mean=how), engine)][-1] for engine in (local(), pickled()))
    fa, fb = flatten(a.state), flatten(b.state)
    assert all(torch.equal(fa[n], fb[n]) for n in fa)


def byzantine(many: int) -> Act:
    """The first so many clients turn their changes round, ten times as long."""

    def act(t: int, client: int, down: Tree, reply: Reply) -> Iterable[tuple[int, Tree]]:
        yield client, flipped(10)(down, reply) if client < many else reply

    return act


@pytest.fixture(scope="module")
def ten() -> Run:
    """Ten clients of the digits, all in every round: the setting of ``benchmarks/byzantine.py``."""
    run_ = load_recipe("fedavg.digits")
    task = replace(run_.task, clients=10, partition="iid", validation=0.1)
    return replace(run_, task=task, per_round=10, rounds=24, lr=0.3, evaluate_every=24)


def reached(run_: Run, many: int) -> float:
    """The accuracy at the end; 0 where training was lost altogether."""
    try:
        *_, final = rounds(run_, changed(byzantine(many)))
    except InputError:
        return 0.0
    assert final.accuracy is not None
    return final.accuracy


@pytest.fixture(scope="module")
def honest(ten: Run) -> float:
    return reached(ten, 0)


@pytest.mark.system
def test_a_plain_mean_fails(ten: Run, honest: float) -> None:
    assert honest > 0.85
    assert reached(ten, 1) < 0.5


@pytest.mark.system
@pytest.mark.parametrize(
    ("how", "bound"),
    [(Median(), Off()), (Trimmed(0.3), Off()), (Plain(), Multiple(3.0)), (Median(), Multiple(3.0))],
    ids=["median", "trimmed", "bound", "median and bound"],
)
def test_robust_options_hold_against_three_of_ten(ten: Run, honest: float, how: Mean, bound: Bound) -> None:
    assert reached(replace(ten, mean=how, bound=bound), 3) >= honest - 0.05
