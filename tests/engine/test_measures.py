"""What is measured beside accuracy and bytes: columns of a row, positions on disk, memory for backward."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from engines import pickled
from fedsieve import local, rounds
from fedsieve.client.cost import SavedTensors
from fedsieve.engine.setup import open_run
from fedsieve.methods import FLASH, NST, FedAvg, SparseFedPP, Swat, ZeroFL
from fedsieve.runs.execution import Execution
from fedsieve.runs.record import read_rows
from fedsieve.runs.recorder import record_run, row_of
from fedsieve.sparse.masks import mismatch
from fedsieve.types import InputError
from tiny import TIMES, tiny_run

pytestmark = pytest.mark.slow

MASKS = ("masks", "pruned")


def test_the_columns_are_those_of_the_states(tmp_path: Path) -> None:
    federation = open_run(tiny_run(NST(density=0.3), rounds=3), measure=MASKS)
    rounds = list(record_run(tmp_path / "run", federation, local(), "x"))
    rows = read_rows(tmp_path / "run")
    masks = [r.state.mask for r in rounds]
    sent = [{n: r.state.params[n] != 0 for n in r.state.sparse} for r in rounds]
    assert all((sent[t][n] <= masks[t][n]).all() for t in range(3) for n in masks[t])
    assert rows[0]["mismatch"] is None
    for t in (1, 2):
        both = sum(int((masks[t][n] & masks[t - 1][n]).sum()) for n in masks[t])
        either = sum(int((masks[t][n] | masks[t - 1][n]).sum()) for n in masks[t])
        assert rows[t]["mismatch"] == 1 - both / either > 0
    assert rows[1]["layers"] == {n: float(m.double().mean()) for n, m in masks[1].items()}
    assert all(0 <= row["accuracy_pruned"] <= 1 for row in rows)


def test_positions_are_kept_in_the_first_every_twentieth_and_the_last_round(tmp_path: Path) -> None:
    federation = open_run(tiny_run(ZeroFL(0.9, 0.1), rounds=23), measure=("masks",))
    *_, final = record_run(tmp_path / "run", federation, local(), "x")
    folder = tmp_path / "run/masks"
    assert sorted(p.name for p in folder.iterdir()) == [f"{t:06d}.safetensors" for t in (1, 20, 23)]
    kept = load_file(folder / "000023.safetensors")
    for name in ("conv2.weight", "fc1.weight"):
        v = final.state.params[name].reshape(-1)
        bits = torch.from_numpy(np.unpackbits(kept[name].numpy(), count=len(v)).astype(bool))
        assert int(bits.sum()) == -(-len(v) // 10)
        assert v[bits].abs().min() >= v[~bits].abs().max()


def test_measuring_changes_nothing_and_engines_agree(tmp_path: Path) -> None:
    run = tiny_run(FLASH(density=0.3, c_d=3, E_d=2), rounds=3)
    for name, engine, measure in (("a", local(), ()), ("b", local(), MASKS), ("c", pickled(), MASKS)):
        list(record_run(tmp_path / name, open_run(run, measure=measure), engine, "x"))
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b == c
    rows = [read_rows(tmp_path / name) for name in "bc"]
    for one, two in zip(*rows, strict=True):
        assert one | TIMES == two | TIMES
    assert [row["round"] for row in rows[0]] == [0, 1, 2, 3]
    assert [row["mismatch"] for row in rows[0]] == [None, 0, 0, 0]


def test_a_resumed_run_measures_the_same(tmp_path: Path) -> None:
    federation = open_run(tiny_run(NST(density=0.3), rounds=4), measure=("masks",))
    list(record_run(tmp_path / "whole", federation, local(), "x"))
    list(record_run(tmp_path / "two", federation, local(), "x", Execution(until=2)))
    list(record_run(tmp_path / "two", federation, local(), "x", Execution(resume=True)))
    whole, two = (read_rows(tmp_path / name) for name in ("whole", "two"))
    assert [row | TIMES for row in whole] == [row | TIMES for row in two]


def test_the_mismatch_of_a_dense_aggregate_is_that_of_the_shipped_model(tmp_path: Path) -> None:
    federation = open_run(tiny_run(Swat(sparsity=0.9), rounds=2), measure=("masks",))
    first, second = record_run(tmp_path / "run", federation, local(), "x")
    masks = [{n: r.model[n] != 0 for n in r.state.sparse} for r in (first, second)]
    row = read_rows(tmp_path / "run")[-1]
    assert row["mismatch"] == mismatch(*masks) > 0
    assert set(row["layers"].values()) == {1.0}


def test_a_run_cannot_be_measured_otherwise_half_way(tmp_path: Path) -> None:
    run_ = tiny_run(NST(density=0.3))
    list(record_run(tmp_path, open_run(run_), local(), "x", Execution(until=1)))
    with pytest.raises(InputError, match=r"measured otherwise \(--measure none there, masks here\)"):
        record_run(tmp_path, open_run(run_, measure=("masks",)), local(), "x", Execution(resume=True))


def test_a_dense_method_has_no_masks_to_measure(tmp_path: Path) -> None:
    list(record_run(tmp_path / "run", open_run(tiny_run(FedAvg(), rounds=1), measure=MASKS), local(), "x"))
    (row,) = read_rows(tmp_path / "run")
    assert (row["mismatch"], row["layers"]) == (None, {})
    assert "accuracy_pruned" not in row
    assert not (tmp_path / "run/masks").exists()
    json.dumps(row, allow_nan=False)


def test_a_metric_must_not_bear_the_name_of_a_column(tmp_path: Path) -> None:
    *_, final = local_rounds = list(rounds(tiny_run(FedAvg(), rounds=1), local()))
    assert len(local_rounds) == 1
    with pytest.raises(InputError, match=r"has the name of a column of rounds.jsonl \(accuracy\): rename it"):
        row_of(replace(final, metrics={"accuracy": 0.99}))


def test_measures_are_listed_and_an_unknown_one_is_refused() -> None:
    assert Execution(measure="masks, pruned,").measures == ("masks", "pruned")
    with pytest.raises(InputError, match="unknown measure 'mask'; the measures are masks, pruned"):
        open_run(tiny_run(FedAvg()), measure=("mask",))


def test_what_autograd_keeps_is_counted_once() -> None:
    """A linear layer keeps its input, a ReLU its output, the last layer that same block again: 5 x 7 and 5 x 3."""
    model = nn.Sequential(nn.Linear(7, 3), nn.ReLU(), nn.Linear(3, 2))
    saved = SavedTensors(model)
    x = torch.ones(5, 7)
    x[0] = 0
    model(x)
    assert saved.bytes == 0  # nobody asked
    saved.restart()
    hidden = model[1](model[0](x)).detach()
    model(x)
    model(x)  # the second step is not counted
    assert saved.metrics()["saved_bytes"] == 4 * (35 + 15)
    assert saved.metrics()["saved_nonzero"] == (28 + int(hidden.count_nonzero())) / 50


def test_counting_stops_when_the_model_fails() -> None:
    saved = SavedTensors(model := nn.Sequential(nn.Linear(7, 3)))
    saved.restart()
    with pytest.raises(RuntimeError):
        model(torch.ones(5, 6))
    before = saved.bytes
    other = torch.ones(3, requires_grad=True)
    _ = other * other
    assert saved.bytes == before


def test_sparse_activations_have_fewer_non_zeros(tmp_path: Path) -> None:
    shares = {}
    for method in (FedAvg(), SparseFedPP(sparsity=0.9)):
        federation = open_run(tiny_run(method), measure=("masks",))
        list(record_run(tmp_path / method.name, federation, local(kernels="dense"), "x"))
        shares[method.name] = read_rows(tmp_path / method.name)[-1]["saved_nonzero"]
    assert shares["sparsefedpp"] < shares["fedavg"]
