"""A task's metrics: counted another way, of each client by itself, and in a run's directory."""

import re
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor

from fedsieve import Dataset, InputError, local, open_run, rounds
from fedsieve.client.losses import metrics_of
from fedsieve.client.metrics import Metric
from fedsieve.engine.measures import NoNumber
from fedsieve.methods import FedAvg
from fedsieve.runs.execution import Execution
from fedsieve.runs.progress import show_run
from fedsieve.runs.record import read_rows, read_summary
from fedsieve.runs.recorder import record_run, row_of
from fedsieve.runs.stopping import parse_stop_rule
from tasks import RSquared, nothing, numbers, off_by, task_run
from tiny import last


def test_the_clients_are_measured_each_by_itself(tmp_path: Path) -> None:
    run_ = task_run("regression", FedAvg(), rounds=2)
    run_ = replace(run_, task=replace(run_.task, clients=12, validation=0.3), per_round=4)
    federation = open_run(run_, measure=("clients",))
    *_, final = record_run(tmp_path / "a", federation, local(), "own")
    model = federation.model().eval()
    model.load_state_dict(final.model)
    errors = []
    for index in federation.held_out():
        x, y = federation.dataset.train.batch(index)
        errors.append(float((model(x)[:, 0] - y).square().mean().detach()))
    assert len(errors) == 12
    row = read_rows(tmp_path / "a")[-1]
    assert row["mse_clients"] == pytest.approx(sum(errors) / 12, rel=1e-5)
    assert row["mse_worst_tenth"] == pytest.approx(max(errors), rel=1e-5)
    assert row["mse_spread"] == pytest.approx(float(torch.tensor(errors).std(correction=0)), rel=1e-4)
    with pytest.raises(InputError, match=r"-s task\.validation=0\.1"):
        open_run(replace(run_, task=replace(run_.task, validation=0.0)), measure=("clients",))


def owned() -> Dataset:
    """The plane with noise, of six owners; of the test examples three have none, and one's owner trains nothing."""
    data = numbers()
    owners = torch.arange(len(data.test)) % 5
    owners[:4] = torch.tensor([-1, -1, -1, 7])
    return replace(data, group=torch.arange(len(data.train)) % 6, test_group=owners)


def test_the_clients_are_measured_on_their_own_test_examples() -> None:
    run_ = task_run("regression", FedAvg(), rounds=1)
    run_ = replace(run_, task=replace(run_.task, dataset=owned, partition="group", validation=0.0))
    federation = open_run(run_, measure=("clients",))
    *_, final = rounds(federation, local())
    model, test = federation.model().eval(), owned().test
    model.load_state_dict(final.model)
    errors = (model(test.x)[:, 0] - test.y).square().detach()
    each = [float(errors[owned().test_group == i].mean()) for i in range(5)]  # the sixth owner tests nothing
    assert final.scores["mse_clients"] == pytest.approx(sum(each) / 5, rel=1e-5)
    assert final.scores["mse_worst_tenth"] == pytest.approx(max(each), rel=1e-5)
    with pytest.raises(InputError, match=r"test_group must number the owner of each of the 60 test examples"):
        replace(owned(), test_group=torch.zeros(3))


def test_metrics_of_ones_own_and_numbers_that_are_none() -> None:
    own = {"r2": RSquared(), "nothing": nothing, "batch_mean": lambda o, y: (o[:, 0] - y).abs().mean()}
    run_ = task_run("regression", FedAvg(), rounds=4, task={"metrics": own})
    assert not metrics_of(run_.task.loss, {"a": Metric(off_by, False)})["a"].higher_is_better
    with pytest.warns(
        NoNumber, match="the metric nothing, nothing_validation is no finite number: rows have null for it"
    ):
        final = last(run_)
    assert final.scores["r2"] > 0.2
    assert final.scores["nothing"] is None
    assert final.accuracy is None
    again = last(replace(run_, task=replace(run_.task, metrics={})))
    assert final.scores["batch_mean"] == pytest.approx(again.scores["mae"], rel=1e-5)


def test_a_metric_that_fails_in_the_middle_is_named() -> None:
    def odd(output: Tensor, target: Tensor) -> Tensor:
        if len(output) > 2:
            raise KeyError("no such thing")
        return output

    with pytest.raises(InputError, match=r"task.metrics\['odd'\] fails on test examples: 'no such thing'"):
        last(task_run("regression", FedAvg(), task={"metrics": {"odd": odd}}))


def test_a_run_directory_tells_a_tasks_metrics(tmp_path: Path) -> None:
    run_ = replace(task_run("regression", FedAvg(), rounds=3, evaluate_every=2))
    federation, console = open_run(run_, measure=("clients",)), Console(file=StringIO(), width=150)
    stop = Execution(until="mse<=1000")
    rows = map(row_of, record_run(tmp_path / "a", federation, local(), "own", stop))
    show_run(tmp_path / "a", federation, rows, 3, console)
    text, summary = console.file.getvalue(), read_summary(tmp_path / "a") or {}  # type: ignore[attr-defined]
    assert summary["stopped_at"] == 2
    assert summary["accuracy"] is None
    record = read_rows(tmp_path / "a")[-1]
    assert [summary[n] for n in ("mse", "mae_validation", "mse_spread")] == [
        record[n] for n in ("mse", "mae_validation", "mse_spread")
    ]
    assert f"mse {record['mse']:6.4g}" in text
    assert re.search(rf"mse +{re.escape(format(record['mse'], '.5g'))} +of the deployed model", text)
    assert f"worst tenth {record['mse_worst_tenth']:.5g}" in text
    with pytest.raises(InputError, match=r"mse_validation needs examples that are held out.*or take mse"):
        parse_stop_rule("mse_validation<=1").check(open_run(replace(run_, task=replace(run_.task, validation=0.0))))
