"""What clients tell of their training: shortened by the rule of who reads it, and never the cost of an update."""

import math
import re
import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch

from fedsieve import local, pool
from fedsieve.engine.loop import rounds
from fedsieve.engine.setup import open_run
from fedsieve.methods import FedAvg
from fedsieve.runs.record import read_rows
from fedsieve.runs.recorder import record_run
from fedsieve.server.admission import check_diagnostics, read_diagnostics
from fedsieve.types import Tree
from fedsieve.wire import decode, encode
from oracles.lies import BESIDE
from scenes import LIAR, aggregated, scene
from tiny import TinyNet, same_state, tiny_run

UNMARKED = ["no metrics", "no metrics at all", "a metric in place of metrics", "extra work", "extra note"]
UNMARKED += ["two reasons", "a tensor for a reason", "a hostile reason", "a long reason", "a reason that is none"]
UNMARKED += ["a tensor as a metric"]
"""What is read as if it were not there, or cut short."""


@pytest.mark.parametrize("lie", BESIDE)
@pytest.mark.parametrize("name", ["fedavg", "nst", "flash, round 0", "private"])
def test_what_a_client_says_of_its_training_never_costs_its_update(name: str, lie: str) -> None:
    of = scene(name)
    liar = [*of.replies][min(LIAR, len(of.replies) - 1)]
    told = BESIDE[lie](decode(of.replies[liar]), of.state)
    began = time.perf_counter()
    parts, lines = check_diagnostics(read_diagnostics(told), ("loss",), {"seconds"})
    assert time.perf_counter() - began < 0.1
    assert len(lines) <= 101
    assert all(line.isprintable() and len(line) < 400 for line in lines)
    assert check_diagnostics(read_diagnostics(read_diagnostics(told)), ("loss",), {"seconds"}) == (
        parts,
        lines,
    ) or lie.startswith("nan")
    if lie == "a million metrics":  # which no message holds
        return
    state, tally = aggregated(of, (of.replies | {liar: encode(told)}).items())
    assert not tally.refused
    assert same_state(state, of.after)
    assert math.isfinite(tally.real + tally.dense + tally.seconds + sum(tally.metrics.values()))
    assert all(warning.client == liar for warning in tally.warnings)
    if lie not in UNMARKED:
        assert len(tally.warnings) >= 1


@pytest.mark.parametrize(
    ("lie", "warning"),
    [
        ("extra metric", "its metric 'accuracy_of_others' .*metrics=('loss', 'accuracy_of_others'))"),
        ("a column as a metric", "its metric 'seconds' has the name of a column of rounds.jsonl .*rename it"),
        ("nan metric", "its metric 'loss' is no finite number, and is left out"),
        ("nan work", "its count of multiply-adds is none, and is left out of the sum"),
        ("half a step", "its notes on its training are none: .*"),
    ],
)
def test_the_warning_names_the_remedy(lie: str, warning: str) -> None:
    of = scene("fedavg")
    liar = next(iter(of.replies))
    _, tally = aggregated(of, (of.replies | {liar: encode(BESIDE[lie](decode(of.replies[liar]), of.state))}).items())
    assert [one.client for one in tally.warnings] == [liar]
    assert re.fullmatch(re.escape(warning).replace(r"\.\*", ".*"), tally.warnings[0].reason), tally.warnings[0].reason


@dataclass(frozen=True)
class Chatty(FedAvg):
    """FedAvg that tells more than its loss, in all kinds of numbers."""

    def client(self, down: Tree, device: Any) -> Any:
        update = super().client(down, device)
        more = {"lr": device.lr, "examples": len(device.data), "share": np.float32(0.5), "note": "text", "seconds": 1.0}
        return replace(update, metrics={**update.metrics, **more, "loss": torch.tensor(0.25), "diverged": math.inf})


@pytest.mark.parametrize("engine", [local(), pytest.param(pool(2), marks=pytest.mark.system)], ids=["local", "pool"])
def test_a_method_that_tells_more_than_it_says_costs_only_that(engine: Any, tmp_path: Any) -> None:
    plain_ = [*rounds(open_run(tiny_run(FedAvg(), rounds=2)), local())]
    every = [*record_run(tmp_path, open_run(tiny_run(Chatty(), rounds=2)), engine, "tests.tiny")]
    assert not any(one.refused for one in every)
    assert same_state(every[-1].state, plain_[-1].state)
    assert every[-1].metrics == {"loss": 0.25}
    rows = read_rows(tmp_path)
    for line in rows:
        named = [one["reason"].split("'")[1] for one in line["warnings"]]
        assert named == ["lr", "examples", "share", "note", "seconds", "diverged"]  # once, not for every client
        assert {one["client"] for one in line["warnings"]} == {line["clients"][0]}
    assert "metrics=('loss', 'lr')" in rows[0]["warnings"][0]["reason"]


class Wordy(TinyNet):
    """A model that torch.fx cannot read, and says so at length."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.view(*x.shape[:-1], 6))


def test_a_long_reason_for_dense_training_costs_nothing() -> None:
    task = replace(tiny_run(FedAvg()).task, model=Wordy)
    (one,) = rounds(open_run(replace(tiny_run(FedAvg(), rounds=1), task=task)), local())
    assert not one.refused
    assert not one.warnings
    assert one.dense_because is not None
    assert len(one.dense_because) <= 300
    assert one.dense_because.isprintable()


def test_notes_are_no_part_of_the_bytes() -> None:
    of = scene("fedavg")
    (a, reply), *_ = of.replies.items()
    _, short = aggregated(of, [(a, reply)])
    told = decode(reply)
    told["notes"]["why"] = {"because " * 30: 1.0}  # type: ignore[index,call-overload]
    _, long = aggregated(of, [(a, encode(told))])
    assert long.bytes_up == short.bytes_up
    assert long.why == "because " * 30
