"""A run from Python is the command's run, to the byte; its callbacks, and what ends it early."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import fedsieve
from command_line import CommandLine
from fedsieve import InputError, Round, local
from fedsieve.methods import FedAvg, ZeroFL
from fedsieve.runs.callbacks import CallbackFailed
from fedsieve.runs.execution import Execution
from fedsieve.runs.sweep.jobs import Job, is_finished
from run_directories import flat, same_run
from tasks import task_run
from tiny import TIMES, tiny_run

SHORT = ["rounds=3", "per_round=2", "task.clients=4", "task.test_limit=60", "task.partition=iid"]
TIMED = {"started", "peak_memory_mb", *TIMES}


def untimed(node: Any) -> Any:
    if isinstance(node, dict):
        return {key: untimed(value) for key, value in node.items() if key not in TIMED}
    return [*map(untimed, node)] if isinstance(node, list) else node


def files(folder: Path) -> dict[str, Any]:
    """Every file of a run directory by its name: its bytes, or where it tells times what else it says."""
    content = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for name in ("run.json", "summary.json"):
        content[name] = untimed(json.loads(content[name]))
    content["rounds.jsonl"] = [untimed(json.loads(line)) for line in content["rounds.jsonl"].splitlines()]
    checkpoints = [name for name in content if name.startswith("checkpoints/")]  # which have the hash of the rows
    return content | {name: {"size": len(content[name])} for name in checkpoints}


@pytest.mark.slow
def test_a_run_from_python_is_the_commands(tmp_path: Path, fedsieve: CommandLine) -> None:
    settings = [word for setting in SHORT for word in ("-s", setting)]
    fedsieve("run", "zerofl.digits", *settings, "--out", tmp_path / "command", "--until", 2)
    fedsieve("run", "zerofl.digits", *settings, "--out", tmp_path / "command", "--resume")
    first = __import__("fedsieve").run("zerofl.digits", tmp_path / "python", settings=SHORT, until=2)
    assert [row["round"] for row in first.rows] == [1, 2]
    result = __import__("fedsieve").run("zerofl.digits", tmp_path / "python", settings=SHORT, resume=True)
    assert files(tmp_path / "command") == files(tmp_path / "python")
    assert result.path == tmp_path / "python"
    assert [row["round"] for row in result.rows] == [1, 2, 3]
    assert result.summary == json.loads((tmp_path / "python/summary.json").read_text())


def test_without_a_directory_the_result_is_the_same_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = tiny_run(ZeroFL(0.7), rounds=2)
    inside = fedsieve.run(run)
    assert [*tmp_path.iterdir()] == []
    there = fedsieve.run(run, tmp_path / "run")
    assert inside.path is None
    assert untimed(inside.summary) == untimed(there.summary)
    assert untimed(inside.rows) == untimed(there.rows)
    x = torch.randn(2, 2, 6, 6)
    assert not there.model.training
    assert torch.equal(inside.model(x), there.model(x))


def test_an_engine_that_is_made_runs_too_and_gives_its_name(tmp_path: Path) -> None:
    run = tiny_run(FedAvg(), rounds=1)
    fedsieve.run(run, tmp_path / "made", engine=local())
    fedsieve.run(run, tmp_path / "named", engine="local")
    assert same_run(tmp_path / "made", tmp_path / "named")
    assert json.loads((tmp_path / "made/run.json").read_text())["engine"] == "local"


def test_a_run_goes_on_with_the_kernels_that_it_was_begun_with(tmp_path: Path) -> None:
    run = tiny_run(FedAvg(), rounds=2)
    fedsieve.run(run, tmp_path, kernels="dense", until=1)
    fedsieve.run(run, tmp_path, resume=True)
    assert json.loads((tmp_path / "run.json").read_text())["kernels"] == "dense"


def test_mistakes_are_one_line_each(tmp_path: Path) -> None:
    run = tiny_run(FedAvg(), rounds=1)
    out = tmp_path / "run"
    with pytest.raises(InputError, match=r"for a loop over the rounds there is fedsieve\.rounds"):
        fedsieve.run(run, local())  # type: ignore[arg-type]
    with pytest.raises(InputError, match="resume goes on with what a directory holds: name it, out="):
        fedsieve.run(run, resume=True)
    with pytest.raises(InputError, match=r"unknown engine 'flower:2'.*from Python engine=fedsieve.flower"):
        fedsieve.run(run, out, engine="flower:2")
    with pytest.raises(InputError, match="a callback must be a function of the Round, or a logger: 3"):
        fedsieve.run(run, out, callbacks=[3])  # type: ignore[list-item]
    with pytest.raises(InputError, match="on_error must be stop or warn, got 'ignore'"):
        fedsieve.run(run, out, on_error="ignore")
    with pytest.raises(InputError, match="measure=kernels is measured from a checkpoint: name a directory"):
        fedsieve.run(run, measure="kernels")
    with pytest.raises(InputError, match=r"unknown recipe 'zerofl.nowhere'"):
        fedsieve.run("zerofl.nowhere", out)
    assert not out.exists()
    fedsieve.run(run, out)
    with pytest.raises(InputError, match="already holds this run: add --resume"):
        fedsieve.run(run, out)
    with pytest.raises(InputError, match=r"holds another run \(lr 0.1 there, 0.2 here\)"):
        fedsieve.run(replace(run, lr=0.2), out, resume=True)


def test_a_callback_is_called_after_its_round_is_recorded(tmp_path: Path) -> None:
    calls = list[tuple[int, int, bool]]()

    def look(round: Round) -> None:
        rows = (tmp_path / "rounds.jsonl").read_text().splitlines()
        calls.append((round.t, len(rows), (tmp_path / f"checkpoints/{round.t:06d}.safetensors").exists()))

    fedsieve.run(tiny_run(FedAvg(), rounds=2), tmp_path, callbacks=[look])
    assert calls == [(1, 1, True), (2, 2, True)]


def trip(round: Round) -> None:
    if round.t >= 2:
        raise ZeroDivisionError("by nothing")


def test_a_callback_that_raises_stops_the_run_which_goes_on_as_if_it_had_not(tmp_path: Path) -> None:
    run, calls = tiny_run(FedAvg(), rounds=3), list[int]()
    with pytest.raises(InputError, match=r"^callback trip failed in round 2 \(ZeroDivisionError: by nothing\): the ro"):
        fedsieve.run(run, tmp_path / "a", callbacks=[trip])
    assert not (tmp_path / "a/summary.json").exists()
    fedsieve.run(run, tmp_path / "a", resume=True, callbacks=[lambda round: calls.append(round.t)])
    assert calls == [3]
    fedsieve.run(run, tmp_path / "b")
    assert same_run(tmp_path / "a", tmp_path / "b")


def test_or_it_is_named_once_and_the_run_goes_on(tmp_path: Path) -> None:
    with pytest.warns(CallbackFailed) as warned:
        result = fedsieve.run(tiny_run(FedAvg(), rounds=4), tmp_path, callbacks=[trip], on_error="warn")
    assert [str(one.message) for one in warned] == [
        "callback trip failed in round 2 (ZeroDivisionError: by nothing); the run goes on, and this is said once"
    ]
    assert len(result.rows) == 4


def test_a_run_ends_after_the_first_tested_round_that_meets_a_condition(tmp_path: Path) -> None:
    run = flat(FedAvg(), 6)
    whole = fedsieve.run(run, tmp_path / "whole").rows
    run = replace(run, evaluate_every=2)
    bar = max(row["accuracy"] for row in whole[:2])
    assert min(row["accuracy"] for row in whole[3:]) >= bar  # or the numbers below say something else
    text = f"accuracy>={whole[3]['accuracy']}"
    met = next(row["round"] for row in whole if row["round"] % 2 == 0 and row["accuracy"] >= whole[3]["accuracy"])
    result = fedsieve.run(run, tmp_path / "a", until=text)
    assert len(result.rows) == met
    assert result.summary["rounds"] == result.summary["stopped_at"] == met
    assert result.summary["stopped_because"] == text
    assert untimed(fedsieve.run(run, until=text).summary) == untimed(result.summary)
    before = files(tmp_path / "a")
    for again in ("", text):
        assert len(fedsieve.run(run, tmp_path / "a", resume=True, until=again).rows) == met
        assert files(tmp_path / "a") == before
    result = fedsieve.run(run, tmp_path / "a", resume=True, until=6)
    assert len(result.rows) == 6
    assert "stopped_at" not in result.summary
    fedsieve.run(run, tmp_path / "b")
    assert same_run(tmp_path / "a", tmp_path / "b")


def test_a_condition_is_of_any_number_in_a_row_and_the_first_that_is_met_counts() -> None:
    run = tiny_run(FedAvg(), rounds=4)
    assert fedsieve.run(run, until="loss<=1e9").summary["stopped_because"] == "loss<=1e9"
    assert fedsieve.run(replace(run, evaluate_every=2), until="loss<=1e9").summary["stopped_at"] == 2  # once tested
    assert fedsieve.run(run, until="loss<=-1").summary["rounds"] == 4
    result = fedsieve.run(run, until="accuracy_validation >= 2, bytes_up>=1, 3")
    assert (result.summary["stopped_at"], result.summary["stopped_because"]) == (1, "bytes_up>=1")
    assert fedsieve.run(run, until="accuracy>=2, 3, 9").summary["rounds"] == 3


@pytest.mark.parametrize(
    ("until", "line"),
    [
        ("-1", "until must be a round, or COLUMN>=NUMBER or COLUMN<=NUMBER, such as 30, or accuracy_val.*, got -1"),
        ("accuracy>.9", "until must be a round, .*, got accuracy>.9"),
        ("accuracy>=high", "until must be a round, .*, got accuracy>=high"),
        ("accuracy>=nan", "until must be a round, .*, got accuracy>=nan"),
        ("acuracy>=.9", "there is no column 'acuracy'; did you mean accuracy"),
        ("kernels>=1", "there is no column .kernels.; did you mean .*accuracy|there is no column"),
        ("accuracy_worst_tenth>=.9", "there is no column .*; it is there with --measure clients"),
    ],
)
def test_a_condition_that_cannot_be_is_one_line(until: str, line: str) -> None:
    with pytest.raises(InputError, match=line):
        fedsieve.run(tiny_run(FedAvg(), rounds=1), until=until)


def test_a_sweep_takes_a_run_that_a_condition_has_ended_as_finished(tmp_path: Path) -> None:
    run = task_run("regression", FedAvg(), rounds=3, lr=0.02, lr_end=0.02)

    def finished(until: str) -> bool:
        return is_finished(Job("own", "own", (), run, tmp_path, Execution(until=until)), 3)

    assert not finished("")
    fedsieve.run(run, tmp_path, until="mae<=1e9")
    assert [finished(until) for until in ("", "mae<=1e9", "mae<=1", "3")] == [True, True, False, False]
    fedsieve.run(run, tmp_path, resume=True, until=3)
    assert [finished(until) for until in ("", "mae<=1", "3")] == [True] * 3


def test_a_task_without_accuracy_ends_by_its_own_metric(tmp_path: Path) -> None:
    run = task_run("regression", FedAvg(), rounds=4, lr=0.02, lr_end=0.02, evaluate_every=2)
    errors = [row["mae_validation"] for row in fedsieve.run(run).rows]
    assert errors[0] is None
    assert errors[3] < errors[1]
    until = f"mae_validation<={errors[1]}"
    assert fedsieve.run(run, tmp_path, until=until).summary["stopped_at"] == 2
    assert fedsieve.run(run, tmp_path, resume=True).summary["rounds"] == 2
    with pytest.raises(InputError, match=r"the task has no accuracy; its metrics are .*mae_validation"):
        fedsieve.run(run, until="accuracy>=.9")


def test_a_condition_on_validation_needs_examples_that_are_held_out(tmp_path: Path) -> None:
    run = tiny_run(FedAvg(), rounds=1)
    run = replace(run, task=replace(run.task, validation=0.0))
    with pytest.raises(InputError, match=r"needs examples that are held out: -s task.validation=0.1"):
        fedsieve.run(run, tmp_path / "run", until="accuracy_validation>=.9")
