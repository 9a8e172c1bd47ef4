from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import pytest

from fedsieve.engine.setup import open_run
from fedsieve.methods import FedAvg, Swat, ZeroFL
from fedsieve.recipes import apply_settings
from fedsieve.server.aggregate import Adam
from fedsieve.types import InputError
from methods_under_test import METHODS
from tiny import tiny_run


def test_fields_are_changed_by_path_and_type() -> None:
    run = apply_settings(
        tiny_run(ZeroFL()),
        ["rounds=20", "lr=3e-2", "method.upload=top_diff", "method.sparsity=0.95", "task.partition=lda:0.1"],
    )
    assert (run.rounds, run.lr, run.task.partition) == (20, 0.03, "lda:0.1")
    assert run.method == ZeroFL(sparsity=0.95, upload="top_diff")


def test_the_order_of_settings_does_not_matter() -> None:
    both = ["task.clients=2", "per_round=2"]
    for settings in (both, both[::-1]):
        run = apply_settings(tiny_run(FedAvg()), settings)
        assert (run.task.clients, run.per_round) == (2, 2)
    assert apply_settings(tiny_run(FedAvg()), ["method.server.eta=0.5", "method.server=adam"]).method == FedAvg(
        Adam(eta=0.5)
    )
    assert apply_settings(tiny_run(FedAvg()), ["rounds=2", "rounds=3"]).rounds == 3


def test_one_of_several_dataclasses_is_chosen_by_its_name() -> None:
    run = apply_settings(tiny_run(FedAvg()), ["method.server=adam", "method.server.eta=0.5"])
    assert run.method == FedAvg(Adam(eta=0.5))


def test_a_tuple_is_written_with_commas() -> None:
    assert apply_settings(tiny_run(FedAvg()), ["task.tiers=0.4,0.3,0.3"]).task.tiers == (0.4, 0.3, 0.3)


def test_a_model_is_named_though_it_may_be_a_function() -> None:
    assert apply_settings(tiny_run(FedAvg()), ["task.model=resnet18"]).task.model == "resnet18"


@dataclass(frozen=True)
class Switch:
    on: bool = False
    names: dict[str, int] | None = None


def test_booleans() -> None:
    assert apply_settings(Switch(), ["on=true"]).on
    with pytest.raises(InputError, match="on must be true or false, got 'yes'"):
        apply_settings(Switch(), ["on=yes"])


@pytest.mark.parametrize(
    ("setting", "line"),
    [
        ("rounds", "write it as name=value"),
        ("rounds=ten", "rounds must be a whole number, got 'ten'"),
        ("rounds=1.5", "rounds must be a whole number"),
        ("lr=fast", "lr must be a number, got 'fast'"),
        ("epoch=3", "unknown field 'epoch': Run has method, task, rounds, per_round, epochs"),
        ("method.sparsty=0.9", "unknown field 'method.sparsty': Swat has sparsity, policy, period, budget"),
        ("method.sparsity=1.2", r"sparsity must lie in \[0, 1\), got 1.2"),
        ("method.budget=flat", "method.budget must be one of uniform, erk, got 'flat'"),
        ("rounds.x=3", "unknown field 'rounds.x': int has no fields"),
        ("task.adapters.rank=4", "unknown field 'task.adapters.rank': choose it first, -s task.adapters=..."),
        ("method=zerofl", "method cannot be set with -s"),
        ("per_round=7", "per_round is 7 but there are only 6 clients"),
        ("=3", "unknown field ''"),
    ],
)
def test_mistakes_are_one_line(setting: str, line: str) -> None:
    with pytest.raises(InputError, match=line):
        apply_settings(tiny_run(Swat()), [setting])


def test_an_unknown_server_names_those_there_are() -> None:
    with pytest.raises(InputError, match=r"method\.server must be one of average, adam, got 'sgd'"):
        apply_settings(tiny_run(FedAvg()), ["method.server=sgd"])


def settable(node: Any, path: str = "") -> Iterator[str]:
    """Every field of a dataclass, and of those in its fields."""
    for one in fields(node):
        yield path + one.name
        if is_dataclass(inner := getattr(node, one.name)) and not isinstance(inner, type):
            yield from settable(inner, f"{path}{one.name}.")


@pytest.mark.parametrize("method", METHODS)
def test_no_text_for_any_field_ends_otherwise_than_in_a_line(method: str) -> None:
    """The names of what only Python can give are texts like others."""
    run = tiny_run(METHODS[method], per_round=6)
    for name in settable(run):
        if method != "fedavg" and not name.startswith("method"):
            continue
        for text in ("", ",", "nan", "none", "[]", "function", "dataset", "indices", "flowerpartitioner", "metric"):
            with suppress(InputError):
                apply_settings(run, [f"{name}={text}"])


@pytest.mark.parametrize("text", ["indices", "function", "list", "[[0, 1], [2]]"])
def test_what_only_python_gives_is_named_as_that(text: str) -> None:
    run = apply_settings(tiny_run(FedAvg()), [f"task.partition={text}"])
    with pytest.raises(InputError, match=r"write iid.*a function or a partitioner are given in Python") as caught:
        open_run(run)
    assert str(caught.value).startswith(f"partition {text!r}: ")
