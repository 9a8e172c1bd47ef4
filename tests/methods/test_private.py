"""Differential privacy on a mask: clipped to the norm, noised on the support alone, accounted for, or refused."""

import json
import math
from dataclasses import replace
from pathlib import Path
from statistics import NormalDist
from typing import Any

import pytest
import torch

from fedsieve import Run, local, rounds
from fedsieve.engine.rollback import Checkpoint
from fedsieve.engine.round import Round
from fedsieve.engine.setup import open_run
from fedsieve.methods import FLASH, NST, PDST, FedAvg, HeteroFLASH, Private, TopK
from fedsieve.methods.private import Release, TooFew, epsilon
from fedsieve.report import report
from fedsieve.runs.recorder import record_run
from fedsieve.server.robust import Clipped, Median, Multiple, Trimmed
from fedsieve.types import InputError, RoundContext, Update, flatten, rng
from tiny import PlainNet, TinyNet, tiny_run

QUIET = {"clip": 1.0, "noise": 1e-3, "cohort": 3}
METHODS = {
    "pdst": Private(PDST(density=0.5), **QUIET),  # type: ignore[arg-type]
    "flash": Private(FLASH(density=0.5, c_d=3, E_d=3), **QUIET),  # type: ignore[arg-type]
    "fedavg": Private(FedAvg(), **QUIET),  # type: ignore[arg-type]
}


def last(run_: Run, engine: Any = None) -> Round:
    *_, final = rounds(run_, engine or local())
    return final


def same(a: Round, b: Round) -> bool:
    fa, fb = flatten(a.state), flatten(b.state)
    return fa.keys() == fb.keys() and all(torch.equal(fa[n], fb[n]) for n in fa) and a.bytes_up == b.bytes_up


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_it_learns_repeats_and_goes_on(name: str) -> None:
    run_ = tiny_run(METHODS[name], rounds=15, lr=0.3)
    assert (last(run_).accuracy or 0) > 0.8
    federation = open_run(tiny_run(METHODS[name]))
    whole = [*rounds(federation, local())]
    second = whole[-3]
    resumed = [*rounds(federation, local(), start=Checkpoint(2, flatten(second.state), second.memory))]
    assert same(resumed[-1], whole[-1])
    assert not same(last(replace(federation.run, seed=1)), whole[-1])


def answers(method: Private, n: int = 1) -> tuple[Any, list[dict[str, Any]], list[dict[str, Any]]]:
    """The state on the server, what ``n`` clients answer, and what they would without privacy: their changes."""
    torch.manual_seed(0)
    federation = open_run(tiny_run(method, lr=0.5))
    state = method.init(PlainNet(), rng(0, "init"))
    down, model = method.broadcast(state, RoundContext()), method.prepare(PlainNet())
    before: Any = down.get("params", down)
    given, plain = [], []
    for client in range(n):
        for one, to in ((method, given), (method.inner, plain)):
            update = one.client(down, federation.device(1, client, model, "cpu", {}))
            to.append({name: value - before[name] for name, value in update.tree.items()})
    return state, given, plain


def norm(change: dict[str, Any]) -> float:
    return math.sqrt(sum(float(v.double().square().sum()) for v in change.values()))


@pytest.mark.slow
def test_an_update_is_shortened_to_the_clip_and_no_more() -> None:
    quiet = Private(PDST(density=0.5), clip=0.05, noise=1e-5, cohort=1)
    _, (given,), (plain,) = answers(quiet)
    assert norm(plain) > 0.2
    assert norm(given) == pytest.approx(0.05, rel=1e-3)
    for name, change in plain.items():
        torch.testing.assert_close(given[name], change * (0.05 / norm(plain)), rtol=0, atol=1e-5)
    _, (given,), (plain,) = answers(replace(quiet, clip=1e3, noise=1e-9))
    for name, change in plain.items():
        torch.testing.assert_close(given[name], change, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_noise_has_its_share_of_the_deviation_on_the_mask_alone_and_vectors_of_one_length() -> None:
    method = Private(PDST(density=0.5), clip=0.1, noise=3.0, cohort=3)
    state, given, plain = answers(method, n=3)
    lengths = {tuple(v.numel() for v in one.values()) for one in given}
    assert len(lengths) == 1
    assert given[0]["fc1.weight"].numel() == int(state.mask["fc1.weight"].sum()) < 24 * 72
    noise = torch.cat(
        [(g[n] - p[n] * min(1, 0.1 / norm(p))).reshape(-1) for g, p in zip(given, plain, strict=True) for n in g]
    )
    share = 3.0 * 0.1 / math.sqrt(3)
    assert float(noise.std()) == pytest.approx(share, rel=4 / math.sqrt(2 * len(noise)))
    assert abs(float(noise.mean())) < 4 * share / math.sqrt(len(noise))


def test_noise_from_the_system_does_not_repeat() -> None:
    secret = Private(PDST(density=0.5), cohort=3, secret=True)
    a, b = (last(tiny_run(secret, rounds=1)) for _ in range(2))
    assert not same(a, b)


def test_clients_tell_neither_their_number_of_examples_nor_their_loss() -> None:
    method = METHODS["pdst"]
    federation = open_run(tiny_run(method))
    state = method.init(PlainNet(), rng(0, "init"))
    device = federation.device(1, 0, method.prepare(PlainNet()), "cpu", {})
    update = method.client(method.broadcast(state, RoundContext()), device)
    assert (update.n, dict(update.metrics)) == (1, {})
    assert len(device.data) > 1


def test_a_round_below_the_cohort_changes_nothing() -> None:
    method = METHODS["pdst"]
    state = method.init(PlainNet(), rng(0, "init"))
    ones = {name: torch.ones_like(v) for name, v in method.broadcast(state, RoundContext())["params"].items()}  # type: ignore[union-attr]
    with pytest.warns(TooFew, match="2 answers, whose noise is not that of a cohort of 3"):
        assert method.aggregate(state, [Update(ones, 1)] * 2, RoundContext()) is state
    assert method.aggregate(state, [Update(ones, 1)] * 3, RoundContext()) is not state


def test_sensed_densities_are_noised_and_brought_back_to_what_can_be() -> None:
    method = Private(FLASH(density=0.5, c_d=3, E_d=3), clip=1.0, noise=50.0, cohort=3)
    first = next(iter(rounds(tiny_run(method), local())))
    assert first.t == 0
    assert first.density <= 0.7
    assert all(0 < int(own.sum()) <= own.numel() for own in first.state.mask.values())


def exact(multiplier: float, delta: float) -> float:
    """The smallest epsilon of one Gaussian release (Balle and Wang 2018, Theorem 8), by bisection."""
    cdf, low, high = NormalDist().cdf, 0.0, 500.0
    for _ in range(200):
        e = (low + high) / 2
        at = cdf(0.5 / multiplier - e * multiplier) - math.exp(e) * cdf(-0.5 / multiplier - e * multiplier)
        low, high = (e, high) if at > delta else (low, e)
    return high


@pytest.mark.parametrize("noise", [1.0, 3.0, 10.0])
@pytest.mark.parametrize("times", [1, 25])
def test_epsilon_is_no_smaller_than_the_exact_one_and_not_much_larger(noise: float, times: int) -> None:
    """With everybody drawn, releases compose to one of noise / sqrt(times); the sum's sensitivity is two clips."""
    least = exact(noise / 2 / math.sqrt(times), 1e-5)
    told = epsilon((Release(40, 40, noise, times),), 1e-5)
    assert least <= told <= 1.25 * least


def test_epsilon_falls_with_the_population_and_grows_with_rounds() -> None:
    found = [epsilon((Release(n, 10, 2.0, 20),), 1e-5) for n in (10, 100, 1000)]
    assert found == sorted(found, reverse=True)
    assert found[0] > 4 * found[2]
    flash, pdst, shorter = (METHODS[name].spent(t, 3, 6) for name, t in (("flash", 3), ("pdst", 3), ("pdst", 2)))
    assert flash["epsilon_rehearsed"] > pdst["epsilon_rehearsed"] > shorter["epsilon_rehearsed"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("secret", [True, False])
def test_rows_and_report_tell_it_as_a_rehearsals_unless_the_noise_is_secret(secret: bool, tmp_path: Path) -> None:
    run_ = tiny_run(replace(METHODS["pdst"], noise=5.0, secret=secret), rounds=2)
    [*record_run(tmp_path / "run", open_run(run_), local(), "private")]
    rows = [json.loads(line) for line in (tmp_path / "run/rounds.jsonl").read_text().splitlines()]
    told, other = ("epsilon", "epsilon_rehearsed")[:: 1 if secret else -1]
    assert [row[told] for row in rows] == [epsilon((Release(6, 3, 5.0, t),), 1e-5) for t in (1, 2)]
    assert all(other not in row for row in rows)
    report([tmp_path / "run"], tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert f"ε = {rows[1][told]:.3g} at δ = 1e-05, after 2 rounds" in page
    assert ("a rehearsal" in page) != secret


def test_noise_repeats_for_whoever_has_the_seed_unless_it_is_secret() -> None:
    method = replace(METHODS["pdst"], noise=5.0)
    _, (first,), _ = answers(method)
    _, (again,), _ = answers(method)
    assert all(torch.equal(first[name], again[name]) for name in first)
    _, (own,), _ = answers(replace(method, secret=True))
    assert not any(torch.equal(first[name], own[name]) for name in first)


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda: Private(TopK()).init(PlainNet(), rng(0, "init")), "every client of topk chooses its own positions"),
        (lambda: Private(NST()).init(PlainNet(), rng(0, "init")), "every client of nst chooses its own positions"),
        (lambda: Private(HeteroFLASH()), "at different positions"),
        (lambda: Private(PDST()).init(TinyNet(), rng(0, "init")), "take a model without BatchNorm"),
        (lambda: Private(PDST(), clip=0.0), r"clip must lie in \(0, 1e6\), got 0.0"),
        (lambda: Private(PDST(), noise=float("nan")), "noise must lie in"),
        (lambda: Private(PDST(), delta=1.0), r"delta must lie in \(0, 1\)"),
        (lambda: Private(PDST(), cohort=0), "cohort must be at least 1"),
        (lambda: Private(FLASH(c_d=3), cohort=5), "a warm-up of 3 clients is below the cohort of 5"),
        (lambda: Private(PDST(), cohort=5).spent(1, 3, 6), "method.cohort is 5 but per_round 3"),
    ],
)
def test_what_would_not_be_private_is_refused(make: Any, line: str) -> None:
    with pytest.raises(InputError, match=line):
        make()


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"mean": Median()}, "mean=median cannot be private: private accounts for the plain sum"),
        ({"mean": Trimmed(0.2)}, "mean=trimmed cannot be private"),
        ({"mean": Clipped(1.0)}, "mean=clipped cannot be private"),
        ({"bound": Multiple()}, "bound=multiple cannot be private"),
        ({"per_round": 2}, "method.cohort is 3 but per_round 2"),
    ],
)
def test_what_would_not_be_private_or_never_train_is_refused_before_a_run_begins(changes: Any, line: str) -> None:
    with pytest.raises(InputError, match=line):
        open_run(tiny_run(METHODS["pdst"], **changes))


def test_without_the_accountant_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedsieve.methods.private.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install '\.\[dp\]'"):
        last(tiny_run(METHODS["pdst"]))
