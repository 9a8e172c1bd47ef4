"""SuperNodes that are clients: they keep memories, come and go, and must be whom they say."""

import time
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from flwr.app import Context, Message, MessageType

from fedsieve import local
from fedsieve.engine import Quorum
from fedsieve.engine.cache import Cache
from fedsieve.engine.federation import Federation
from fedsieve.engine.loop import rounds
from fedsieve.engine.setup import open_run
from fedsieve.engine.worker import Worker
from fedsieve.flower.engine import grid_engine, make_client_app
from fedsieve.flower.engine.exchange import SuperNodes, to_content
from fedsieve.flower.engine.in_memory import InlineGrid
from fedsieve.methods import FedAvg
from fedsieve.types import InputError
from methods_under_test import METHODS
from tiny import TinyNet, assert_same, tiny_run


class Deployment(InlineGrid):
    """SuperNodes that are clients, some of which come and go."""

    def __init__(self, federation: Federation, folder: Any, clients: Iterable[Any], **node: Any):
        worker = Worker(federation)
        super().__init__(make_client_app(lambda node: worker))
        self.contexts = {
            node_id: Context(
                1, node_id, {"partition-id": client, "memory": str(folder)}, type(self.contexts[2].state)(), {}
            )
            for node_id, client in enumerate(clients, 2)
        }


ABOUT = {"run": "0123456789abcdef"}


@pytest.fixture
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedsieve.flower.engine.exchange.PAUSE", 0.001)


@pytest.mark.usefixtures("_quick")
@pytest.mark.parametrize("name", ["nst", "flash", "hetero_flash"])
def test_supernodes_are_the_clients_they_say_and_keep_their_memories(name: str, tmp_path: Any) -> None:
    federation = open_run(tiny_run(METHODS[name], rounds=3))
    grid = Deployment(federation, tmp_path, range(6))
    engine = grid_engine(grid, SuperNodes(grid, federation, ABOUT), Quorum(), pause=0)
    for one, other in zip(rounds(federation, local()), rounds(federation, engine), strict=True):
        assert not other.memory
        assert_same(replace(one, memory={}), other)


@pytest.mark.usefixtures("_quick")
def test_a_supernode_that_has_gone_is_lost_at_once_and_may_come_back(tmp_path: Any) -> None:
    federation = open_run(tiny_run(FedAvg(), rounds=3, per_round=6))
    grid = Deployment(federation, tmp_path, range(6))
    engine = grid_engine(grid, SuperNodes(grid, federation, ABOUT), Quorum(), pause=0)
    stream = rounds(federation, engine)
    assert not next(stream).refused
    gone = grid.contexts.pop(4)
    assert [(r.client, r.reason) for r in next(stream).refused] == [(2, "its SuperNode is not connected")]
    grid.contexts[9] = Context(1, 9, gone.node_config, type(gone.state)(), {})
    assert not next(stream).refused


@pytest.mark.usefixtures("_quick")
@pytest.mark.slow
def test_a_supernode_that_starts_again_under_its_own_id_is_told_of_the_run_again(tmp_path: Any) -> None:
    """With node keys an id is the node's for good, and a restart between two looks is not to be seen."""
    federation = open_run(tiny_run(METHODS["nst"], rounds=3, per_round=6))
    grid = Deployment(federation, tmp_path, range(6))
    stream = rounds(federation, grid_engine(grid, SuperNodes(grid, federation, ABOUT), Quorum(), pause=0))
    assert not next(stream).refused
    old = grid.contexts[4]
    grid.contexts[4] = Context(1, 4, old.node_config, type(old.state)(), {})
    for one, other in zip(stream, [*rounds(federation, local())][1:], strict=True):
        assert_same(one, replace(other, memory={}))


class Watched(Deployment):
    """Notes the times that messages have."""

    ttls: ClassVar[list[float]] = []

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        messages = [*messages]
        self.ttls.extend(m.metadata.ttl for m in messages if m.metadata.message_type == MessageType.TRAIN)
        return super().push_messages(messages)


@pytest.mark.usefixtures("_quick")
def test_who_waits_for_an_absent_supernode_has_all_of_a_rounds_time_afterwards(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedsieve.flower.engine.exchange.MEETING", 0.3)
    monkeypatch.setattr(Watched, "ttls", [])
    federation = open_run(tiny_run(FedAvg(), rounds=2, per_round=6))
    grid = Watched(federation, tmp_path, range(5))
    engine = grid_engine(grid, SuperNodes(grid, federation, ABOUT), Quorum(round_timeout=60.0), pause=0)
    began = time.monotonic()
    assert [[r.client for r in one.refused] for one in rounds(federation, engine)] == [[5], [5]]
    assert 0.3 < time.monotonic() - began < 30
    assert len(grid.ttls) == 10
    assert min(grid.ttls) > 50


@pytest.mark.usefixtures("_quick")
def test_nobody_trains_for_a_round_that_cannot_be_one(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Watched, "ttls", [])
    federation = open_run(tiny_run(FedAvg(), rounds=1, per_round=6))
    grid = Watched(federation, tmp_path, range(2))
    engine = grid_engine(grid, SuperNodes(grid, federation, ABOUT), Quorum(round_timeout=0.1), pause=0)
    with pytest.raises(InputError, match=r"0 of 6 clients answered in 3 attempts, 3 are needed .* is not connected"):
        [*rounds(federation, engine)]
    assert grid.ttls == []


@pytest.mark.usefixtures("_quick")
def test_a_supernode_that_could_not_say_who_it_is_is_asked_again(
    tmp_path: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    federation = open_run(tiny_run(FedAvg(), rounds=3, per_round=6))
    grid = Deployment(federation, tmp_path, [0, 1, 2, 3, 4, "not yet"])
    engine = grid_engine(grid, SuperNodes(grid, federation, ABOUT), Quorum(round_timeout=0.3), pause=0)
    stream = rounds(federation, engine)
    assert [r.client for r in next(stream).refused] == [5]
    grid.contexts[7].node_config["partition-id"] = 5
    assert not next(stream).refused
    said = capfd.readouterr().err.splitlines()
    assert sum(line.startswith("fedsieve: SuperNode 7 takes no part: no partition-id") for line in said) == 1
    assert "fedsieve: waiting for the SuperNodes of clients 5" in said


class Late(Deployment):
    """One node's data appears when its node has been asked in vain."""

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        replies = [*super().pull_messages(message_ids)]
        if any(reply.has_error() for reply in replies):
            self.contexts[7].node_config["partition-id"] = 5
        return replies


@pytest.mark.usefixtures("_quick")
def test_a_supernode_that_is_waited_for_is_asked_again_after_a_while(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedsieve.flower.engine.exchange.AGAIN", 0.05)
    federation = open_run(tiny_run(FedAvg(), rounds=1, per_round=6))
    grid = Late(federation, tmp_path, [0, 1, 2, 3, 4, "not yet"])
    (final,) = rounds(federation, grid_engine(grid, SuperNodes(grid, federation, ABOUT), Quorum(), pause=0))
    assert not final.refused


@pytest.mark.usefixtures("_quick")
@pytest.mark.parametrize(
    ("clients", "line"),
    [
        ([0, 1, 2, 2], "another one has partition-id 2 already"),
        ([0, 1, 2, 6], "partition-id 6, but the run has 6 clients"),
        ([0, 1, 2, "x"], "no partition-id: start the SuperNode with"),
    ],
)
def test_a_supernode_that_is_no_client_takes_no_part(
    clients: list[Any], line: str, tmp_path: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    federation = open_run(tiny_run(FedAvg(), rounds=1, per_round=6))
    grid = Deployment(federation, tmp_path, clients)
    engine = grid_engine(grid, SuperNodes(grid, federation, ABOUT), Quorum(round_timeout=0.3), pause=0)
    (final,) = rounds(federation, engine)
    assert f"takes no part: {line}" in capfd.readouterr().err
    assert len(final.refused) == 3


@pytest.mark.usefixtures("_quick")
@pytest.mark.parametrize("client", [-1, 6, "0"])
def test_a_supernode_that_lies_about_who_it_is_takes_no_part(client: Any, capfd: pytest.CaptureFixture[str]) -> None:
    federation = open_run(tiny_run(FedAvg(), rounds=1))

    def app(message: Message, context: Context) -> Message:
        return Message(to_content({}, {"client": client, "examples": 4}), reply_to=message)

    assert SuperNodes(InlineGrid(app), federation, ABOUT).find([0], 0.01, 1) == {}
    assert f"its partition-id must be from 0 to 5, it says {client}" in capfd.readouterr().err


@pytest.mark.usefixtures("_quick")
def test_a_supernode_with_another_key_is_lost_to_every_round(tmp_path: Any) -> None:
    federation = open_run(tiny_run(FedAvg(), rounds=1))
    grid = Deployment(replace(federation, key=b"x" * 32), tmp_path, range(6))
    engine = grid_engine(grid, SuperNodes(grid, federation, ABOUT), Quorum(attempts=1), pause=0)
    with pytest.raises(InputError, match=r"0 of 3 clients answered.*the seal does not fit round 1 and client"):
        [*rounds(federation, engine)]


class Frozen(TinyNet):
    """A network whose largest layers stay as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.conv2.requires_grad_(False)
        self.fc1.requires_grad_(False)


@pytest.mark.usefixtures("_quick")
def test_a_supernode_keeps_frozen_weights_between_processes_and_asks_again_for_what_it_lost(tmp_path: Any) -> None:
    run = tiny_run(FedAvg(), rounds=3, per_round=6)
    federation = open_run(replace(run, task=replace(run.task, model=Frozen)))
    grid = Deployment(federation, tmp_path, range(6))
    grid.app = make_client_app(lambda node: Worker(replace(federation, cache=Cache())))  # a process for each message
    stream = rounds(federation, grid_engine(grid, SuperNodes(grid, federation, ABOUT), Quorum(), pause=0))
    wanted = [*rounds(federation, local())]
    whole = wanted[0].bytes_down / 6
    assert wanted[1].bytes_down < 0.6 * wanted[0].bytes_down
    for one in wanted:
        other = next(stream)
        assert not other.refused
        again = 2 * whole if one.t == 3 else 0
        assert other.bytes_down - one.bytes_down == pytest.approx(again, abs=0.1 * whole)
        assert all(torch.equal(v, other.model[name]) for name, v in one.model.items())
        if one.t == 2:
            paths = sorted(tmp_path.rglob("*.cache"))
            assert len(paths) == 6
            paths[0].unlink()
            paths[1].write_bytes(b"damaged")
