"""Several rounds before round 1: their clients, their rows, the same bits however they are interrupted, their page."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from engines import pickled
from fedsieve import Device, InputError, Update, local
from fedsieve.engine.setup import open_run
from fedsieve.methods import FLASH, FedAvg, Private
from fedsieve.report import report
from fedsieve.runs.execution import Execution
from fedsieve.runs.record import read_record, read_rows
from fedsieve.runs.recorder import record_run
from fedsieve.types import RoundContext, ServerState, Tree
from run_directories import same_run
from tiny import tiny_run


@dataclass(frozen=True)
class Staged(FedAvg):
    """FedAvg of which rounds before round 1 add to the first bias, of clients that remember the rounds they were in."""

    warm_up: tuple[int, ...] = (5, 2)  # type: ignore[assignment]
    name: str = "staged"  # type: ignore[assignment]

    def client(self, down: Tree, device: Device) -> Update:
        seen = torch.cat([device.memory.get("rounds", torch.zeros(0)), torch.tensor([float(device.round)])])
        device.memory["rounds"] = seen
        update = super().client(down, device)
        return replace(update, metrics=update.metrics | {"sum_of_rounds": float(seen.sum())})

    def expected(self, state: ServerState, context: RoundContext) -> None:  # type: ignore[override]
        return None

    def aggregate(self, state: ServerState, updates: Iterable[Update], context: RoundContext) -> ServerState:
        after, bias = super().aggregate(state, updates, context), state.params["conv1.bias"]
        return after if context.round > 0 else replace(after, params=state.params | {"conv1.bias": bias + 1})


RUN = tiny_run(Staged(), rounds=2)


def go(out: Path, engine: Any = local, **options: Any) -> list[int]:
    return [r.t for r in record_run(out, open_run(RUN), engine(), "tests", Execution(**options))]


def test_rounds_before_the_first_are_numbered_up_to_0_and_resumed_by_any_engine(tmp_path: Path) -> None:
    assert go(tmp_path / "whole") == [-1, 0, 1, 2]
    rows = read_rows(tmp_path / "whole")
    assert [len(row["clients"]) for row in rows] == [5, 2, 3, 3]
    assert [row["bytes_dense_up"] > 0 for row in rows] == [False, False, True, True]
    in_both = set(rows[0]["clients"]) & set(rows[1]["clients"])
    assert rows[1]["sum_of_rounds"] == pytest.approx(-len(in_both) / 2)
    stream = record_run(tmp_path / "parts", open_run(RUN), local(), "tests")
    assert next(stream).t == -1
    stream.close()  # killed after the first of them, it goes on with the second
    assert [path.stem for path in (tmp_path / "parts/checkpoints").iterdir()] == ["-00001"]
    assert go(tmp_path / "parts", pickled, resume=True) == [0, 1, 2]
    assert same_run(tmp_path / "whole", tmp_path / "parts")
    record = read_record(tmp_path / "whole")
    assert record.series("density")[0] == [-1, 0, 1, 2]
    assert record.upload() == record.final("upload_bytes") == pytest.approx(sum(r["bytes_up"] for r in rows[2:]) / 6)
    report([tmp_path / "whole"], tmp_path / "report.html")
    assert "staged" in (tmp_path / "report.html").read_text().lower()


def test_the_clients_of_a_round_before_the_first_are_checked() -> None:
    assert (RUN.first, RUN.most_clients, FLASH(c_d=4).warm_ups, FedAvg().warm_ups) == (-1, 5, (4,), ())
    with pytest.raises(InputError, match=r"staged warms up on 7 clients but only 6 are there"):
        tiny_run(Staged(warm_up=(1, 7)))
    with pytest.raises(InputError, match=r"0 or more, or several of 1 or more, got \(2, 0\)"):
        tiny_run(Staged(warm_up=(2, 0)))
    with pytest.raises(InputError, match="a warm-up of 2 clients is below the cohort of 3"):
        Private(Staged(), cohort=3)


def test_privacy_is_spent_by_each_of_them() -> None:
    pytest.importorskip("dp_accounting")
    method = Private(Staged(), cohort=2)
    spent = [next(iter(method.spent(t, 3, 6).values())) for t in (-1, 0, 1)]
    assert 0 < spent[0] < spent[1] < spent[2]
    alone = Private(Staged(warm_up=(5,)), cohort=2)
    assert spent[0] == next(iter(alone.spent(0, 3, 6).values()))
