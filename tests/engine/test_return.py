"""Back to the last good state: what stood out before training turned non-finite is left out, and nobody else blamed."""

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from engines import pickled
from fedsieve import InputError, Run, local
from fedsieve.engine import Engine, Exchange, Federation
from fedsieve.engine.loop import rounds
from fedsieve.engine.rollback import Memory, Rollbacks, Snapshot, Snapshots, find_outliers
from fedsieve.engine.round import Round
from fedsieve.engine.setup import open_run
from fedsieve.flower.engine import inline
from fedsieve.runs import recorder, resume
from fedsieve.runs.execution import Execution
from fedsieve.runs.record import read_rows
from fedsieve.runs.recorder import record_run
from fedsieve.server.robust import Off
from fedsieve.types import Tree
from fedsieve.types.contract import Norms
from methods_under_test import METHODS, kinds_first
from oracles.lies import Act, Reply, changed, largest, values_of
from tiny import TIMES, same_state, tiny_run

pytestmark = pytest.mark.slow

RECIPE = "tests.tiny"


def four(name: str = "fedavg", **changes: Any) -> Run:
    return tiny_run(METHODS[name], per_round=4 if "hetero" not in name else 6, bound=Off(), **changes)


def liar_of(run_: Run, t: int) -> int:
    return run_.sample(t)[1]


def poison(reply: Reply, number: float) -> Reply:
    values_of(reply["tree"][largest(reply["tree"])])[:4] = number
    return reply


def lying(run_: Run, numbers: dict[int, float]) -> Act:
    """In these rounds one client has four weights changed to a number."""

    def act(t: int, client: int, down: Tree, reply: Reply) -> Iterable[tuple[int, Tree]]:
        yield client, poison(reply, numbers[t]) if t in numbers and client == liar_of(run_, t) else reply

    return act


def unasked(run_: Run, t: int) -> Engine:
    """An engine that leaves a client alone in a round."""

    @contextmanager
    def engine(federation: Federation, memory: Memory) -> Iterator[Exchange]:
        with local()(federation, memory) as exchange:
            away = {(t, liar_of(run_, t))}
            yield lambda now, messages: exchange(now, {c: messages[c] for c in messages if (now, c) not in away})

    return engine


def walked(every: Iterable[Round]) -> tuple[list[int], list[Round]]:
    """The rounds as they came, and those that are left of them."""
    seen = [*every]
    straight: dict[int, Round] = {}
    for one in seen:
        straight = {t: r for t, r in straight.items() if t < one.t} | {one.t: one}
    return [one.t for one in seen], [*straight.values()]


@pytest.mark.filterwarnings("ignore")  # of layers that a poisoned cut empties
@pytest.mark.parametrize("name", kinds_first(name for name in METHODS if "private" not in name and "," not in name))
def test_a_run_goes_back_before_the_update_that_poisoned_it(name: str) -> None:
    run_ = four(name)
    order, straight = walked(rounds(open_run(run_), changed(lying(run_, {2: 1e18}))))
    if len(order) == len(straight):  # Adam's step is bounded
        assert name == "fedadam"
        return
    _, without = walked(rounds(open_run(run_), unasked(run_, 2)))
    assert [one.t for one in straight] == [one.t for one in without]
    assert all(same_state(a.state, b.state) and a.memory == b.memory for a, b in zip(straight, without, strict=True))
    assert straight[-1].rollbacks.count == 1
    (left,) = straight[-1].rollbacks.left_out
    assert (left.round, left.client) == (2, liar_of(run_, 2))
    assert "times as much as the others, and round" in left.reason
    assert [one.left_out for one in straight if one.t != 2] == [()] * (len(straight) - 1)
    assert left.client not in next(one for one in straight if one.t == 2).clients


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("engine", [pickled(), inline()], ids=["pickled", "inline"])
def test_engines_agree_on_the_way_back(engine: Any) -> None:
    run_ = four("nst")
    act = lying(run_, {2: 1e18, 4: 1e18})
    a, b = (walked(rounds(open_run(run_), changed(act, one))) for one in (local(), engine))
    assert a[0] == b[0]
    assert all(same_state(x.state, y.state) and x.memory == y.memory for x, y in zip(a[1], b[1], strict=True))
    assert a[1][-1].rollbacks == b[1][-1].rollbacks


def test_who_lies_in_every_round_is_named_at_the_end() -> None:
    run_ = four(rounds=6)
    with pytest.raises(InputError) as found:
        [*rounds(open_run(run_), changed(lying(run_, dict.fromkeys(range(1, 7), 1e18))))]
    line = str(found.value)
    assert "the run has gone back twice, and left out the longest updates: client" in line
    assert f"client {liar_of(run_, 1)}'s of round 1" in line
    assert "\n" not in line


def test_a_rate_that_is_too_high_blames_nobody_and_ends_at_once() -> None:
    for lr in (1e2, 1e4, 1e6):
        seen = list[int]()
        stream = rounds(open_run(four(lr=lr, lr_end=lr, rounds=50)), local())
        with pytest.raises(InputError, match=r"lower lr \(now") as found:
            seen.extend(one.t for one in stream)
        assert "gone back" not in str(found.value)
        assert len(seen) <= 3
        assert seen == sorted(set(seen))


def lengths(*norms: float) -> dict[int, Norms]:
    return {client: (norm, 0.0, norm / 10, 0.0) for client, norm in enumerate(norms)}


def test_an_update_stands_out_from_the_others_of_its_round() -> None:
    assert find_outliers({}) == find_outliers(lengths(1e9)) == find_outliers(lengths(1.0, 5.0, 2.0)) == {}
    assert find_outliers(lengths(1.0, 50.0, 1.0, 2.0)) == {1: 50.0}
    assert find_outliers(lengths(1.0, 1e9, 1e9, 2.0, 1.0)) == {1: 1e9 / 1.5, 2: 1e9 / 1.5}
    assert find_outliers(lengths(1.0, 11.0)) == {1: 11.0}
    assert find_outliers({0: (1.0, 0.0, 1.0, 0.0), 1: (1.0, 3.0, 1.0, 2.0)}) == {1: float("inf")}


def points(*norms: dict[int, Norms]) -> list[Callable[[], Snapshot]]:
    return [partial(Snapshot, t, f"state {t}", {}, (), one) for t, one in enumerate(norms)]


def test_the_way_back_leads_before_the_last_round_in_which_one_stood_out() -> None:
    even, odd = lengths(1.0, 1.0, 1.0), lengths(1.0, 99.0, 1.0)
    for held, failed, wanted in (
        ([{}, even, even], odd, 2),
        ([{}, even, odd], even, 1),
        ([{}, odd, even], even, 0),
        ([{}, even, even], {}, None),
        ([odd, even, even], even, None),  # what came before it is not known any more
    ):
        history = Snapshots(points(*held), Rollbacks())
        back = history.back(3, failed)
        assert (back.t if back else None) == wanted
        assert history.rollbacks.count == (wanted is not None)
        if back:
            assert [(one.round, one.client) for one in history.rollbacks.left_out] == [(back.t + 1, 1)]
            history.add(Snapshot(back.t + 1, "again", {}, (), even))
            assert history._readers[-2]() == back
    assert Snapshots(points({}, even, odd), Rollbacks(2)).back(3, odd) is None
    assert (
        Snapshots([*points({}, odd)[:1], *points({}, odd, even, even)[2:]], Rollbacks()).back(4, even) is None
    )  # a gap


def kept(out: Path, run_: Run, act: Act, **options: Any) -> list[int]:
    return [one.t for one in record_run(out, open_run(run_), changed(act), RECIPE, Execution(**options))]


def same_run(a: Path, b: Path) -> bool:
    rows = [[row | TIMES for row in read_rows(out)] for out in (a, b)]
    models = [(out / "model.safetensors").read_bytes() for out in (a, b)]
    files_ = [sorted((out / "checkpoints").iterdir()) for out in (a, b)]
    states = [[(path.name, load_file(path)) for path in own] for own in files_]
    alike = all(
        m == n and x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)
        for (m, x), (n, y) in zip(*states, strict=True)
    )
    return rows[0] == rows[1] and models[0] == models[1] and alike


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["nst", "flash"])
def test_rows_are_a_straight_line_and_say_what_was_left_out(name: str, tmp_path: Path) -> None:
    run_ = four(name, rounds=5)
    act = lying(run_, {2: 1e18, 4: 1e18})
    order = kept(tmp_path / "whole", run_, act)
    rows = read_rows(tmp_path / "whole")
    assert [row["round"] for row in rows] == sorted(set(order))
    assert [[one["client"] for one in row["left_out"]] for row in rows if row["round"]] == [
        [],
        [liar_of(run_, 2)],
        [],
        [liar_of(run_, 4)],
        [],
    ]
    summary = json.loads((tmp_path / "whole/summary.json").read_text())
    assert [(one["round"], one["client"]) for one in summary["left_out"]] == [
        (2, liar_of(run_, 2)),
        (4, liar_of(run_, 4)),
    ]
    for until in (2, 3):
        kept(tmp_path / f"{until}", run_, act, until=until)
        kept(tmp_path / f"{until}", run_, act, resume=True)
        assert same_run(tmp_path / "whole", tmp_path / f"{until}")


class Killed(BaseException):
    """The process has been killed."""


@pytest.mark.filterwarnings("ignore")
def test_a_crash_anywhere_on_the_way_back_changes_no_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_ = four("nst", rounds=3)
    act = lying(run_, {2: 1e18})
    assert kept(tmp_path / "whole", run_, act) == [1, 2, 2, 3]
    steps = [0, 10**9]

    def counting(do: Callable[..., Any], after: bool) -> Callable[..., Any]:
        def counted(*args: Any, **options: Any) -> Any:
            steps[0] += 1
            if steps[0] == steps[1] and not after:
                raise Killed
            done = do(*args, **options)
            if steps[0] == steps[1] and after:
                raise Killed
            return done

        return counted

    with monkeypatch.context() as patch:
        for module, name, after in (
            (recorder, "write", True),
            (recorder, "append", True),
            (resume, "write", False),
            (resume, "sync", True),
        ):
            patch.setattr(module, name, counting(getattr(module, name), after))
        kept(tmp_path / "counted", run_, act)
        total = steps[0]
        assert total >= 9
        for at in range(3, total + 1):
            steps[:] = [0, at]
            out = tmp_path / f"{at}"
            with pytest.raises(Killed):
                kept(out, run_, act)
            steps[:] = [0, 10**9]
            kept(out, run_, act, resume=True)
            assert same_run(tmp_path / "whole", out), at


def test_a_poisoned_state_is_never_the_only_checkpoint(tmp_path: Path) -> None:
    run_ = four(rounds=6)
    act = lying(run_, dict.fromkeys(range(3, 7), 1e18))
    with pytest.raises(InputError, match="gone back twice"):
        kept(tmp_path, run_, act)
    left = sorted((tmp_path / "checkpoints").iterdir())
    every = [load_file(path) for path in left]
    assert all(torch.isfinite(v).all() for one in every for v in one.values() if v.is_floating_point())
    assert any(all(v.abs().max() < 1e3 for n, v in one.items() if n.startswith("state/params")) for one in every)
    with pytest.raises(InputError, match="gone back twice"):
        kept(tmp_path, run_, act, resume=True)
