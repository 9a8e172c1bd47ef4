"""Flower carries the letters: the same bits as ``local``, and rounds that go on when clients are lost."""

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from flwr.app import Context, Error, Message, MessageType
from flwr.clientapp import ClientApp

from fedsieve import local, run
from fedsieve.engine import Quorum
from fedsieve.engine.experiment import Federation
from fedsieve.engine.loop import Engine, Exchange, Worker, rounds
from fedsieve.engine.rollback import Memory
from fedsieve.engine.round import Round
from fedsieve.engine.setup import open_run
from fedsieve.flower.engine import SimulatedNodes, client_app, grid_engine, inline
from fedsieve.flower.engine.client_memory import ClientMemory
from fedsieve.flower.engine.in_memory import InlineGrid
from fedsieve.flower.engine.nodes import SuperNodes
from fedsieve.methods import FedAvg
from fedsieve.server.admission import Fixed
from fedsieve.types import InputError, flatten, rng
from methods_under_test import METHODS, kinds_first
from tiny import tiny_run


def tapped(engine: Engine, seen: list[tuple[int, bytes]]) -> Engine:
    """Note every letter that an engine takes down and brings up."""

    @contextmanager
    def tap(federation: Federation, memory: Memory) -> Iterator[Exchange]:
        with engine(federation, memory) as exchange:

            def noted(t: int, messages: Mapping[int, bytes]) -> Iterable[tuple[int, Any]]:
                seen.extend(messages.items())
                for answer in exchange(t, messages):
                    seen.append(answer)
                    yield answer

            yield noted

    return tap


@pytest.mark.parametrize("name", kinds_first(METHODS))
def test_states_memories_and_letters_are_locals(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "perf_counter", lambda: 0.0)  # a letter tells how long training took
    federation = open_run(tiny_run(METHODS[name], rounds=3))
    payloads = list[tuple[int, bytes]](), list[tuple[int, bytes]]()
    runs = [
        [*rounds(federation, tapped(engine, seen))] for engine, seen in zip((local(), inline()), payloads, strict=True)
    ]
    for one, other in zip(*runs, strict=True):
        assert_same(one, other)
    assert payloads[0] == payloads[1]


def assert_same(one: Round, other: Round) -> None:
    states = flatten(one.state), flatten(other.state)
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert (one.memory, one.bytes_up, one.bytes_down) == (other.memory, other.bytes_up, other.bytes_down)
    assert (one.metrics, one.accuracy, one.refused) == (other.metrics, other.accuracy, other.refused)


Faults = dict[tuple[int, int], str]


def faulty(federation: Federation, faults: Faults, asked: list[tuple[int, int]], nodes: int = 1) -> InlineGrid:
    """Return a grid whose clients fail in the rounds given, each once a fault."""
    worker = Worker(federation)
    sound = client_app(lambda node: worker)

    class Faulty(ClientApp):
        def __call__(self, message: Message, context: Context) -> Message:
            config = message.content["order"]
            who = int(config["round"]), int(config["client"])  # type: ignore[call-overload]
            asked.append(who)
            if who in faults:
                return Message(Error(8, faults.pop(who)), reply_to=message)
            return sound(message, context)

    return InlineGrid(Faulty(), nodes)


def over(grid: InlineGrid, **quorum: Any) -> Engine:
    return grid_engine(grid, SimulatedNodes(grid), Quorum(**quorum), pause=0)


def test_a_round_goes_on_without_a_client_that_is_lost_and_says_why() -> None:
    federation = open_run(tiny_run(FedAvg(), rounds=2))
    first = federation.run.sample(1)[1]
    grid = faulty(federation, {(1, first): "Traceback:\n  boom\nOSError: the disk is gone\n"}, [])
    one, two = rounds(federation, over(grid))
    assert [(r.client, r.reason) for r in one.refused] == [(first, "OSError: the disk is gone")]
    assert not two.refused


def test_a_round_with_a_lost_client_is_the_round_of_the_others() -> None:
    federation = open_run(tiny_run(FedAvg(), rounds=1))
    clients = federation.run.sample(1)

    @contextmanager
    def two(federation: Federation, memory: Memory) -> Iterator[Exchange]:
        with local()(federation, memory) as exchange:
            yield lambda t, messages: [*exchange(t, messages)][1:]

    (lost,) = rounds(federation, over(faulty(federation, {(1, clients[0]): "gone"}, [])))
    (others,) = rounds(federation, two)
    assert len(lost.refused) == 1
    assert_same(replace(lost, refused=()), others)


@pytest.mark.parametrize("name", ["fedavg", "nst", "flash"])
def test_below_the_quorum_the_lost_are_asked_again_and_the_bits_are_the_same(name: str) -> None:
    federation = open_run(tiny_run(METHODS[name], rounds=2))
    t = federation.run.first
    clients, asked = federation.run.sample(t), list[tuple[int, int]]()
    grid = faulty(federation, {(t, clients[0]): "gone", (t, clients[-1]): "gone"}, asked)
    for one, other in zip(
        rounds(federation, local()), rounds(federation, over(grid, min_clients=len(clients))), strict=True
    ):
        assert_same(one, other)
    again = {clients[0], clients[-1]}
    assert asked[: len(clients) + len(again)] == [(t, c) for c in [*clients, *sorted(again)]]


class Backwards(InlineGrid):
    """The last of the clients answers first."""

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return super().pull_messages([*message_ids][::-1])


@pytest.mark.parametrize(("kind", "trained"), [(InlineGrid, [1, 2, 3]), (Backwards, [3, 3, 3])])
def test_an_answer_is_given_on_when_it_is_its_turn(kind: type[InlineGrid], trained: list[int]) -> None:
    federation = open_run(tiny_run(FedAvg(), rounds=1))
    worker, asked = Worker(federation), list[int]()
    sound = client_app(lambda node: worker)

    class Counting(ClientApp):
        def __call__(self, message: Message, context: Context) -> Message:
            asked.append(1)
            return sound(message, context)

    clients = federation.run.sample(1)
    with over(kind(Counting()))(federation, {}) as exchange, local()(federation, {}) as plain:
        outgoing = worker.messages.broadcast(1, dict.fromkeys(clients, 0), {0: params(federation)})
        wanted = [client for client, _ in plain(1, outgoing)]
        found = [(client, len(asked)) for client, _ in exchange(1, outgoing)]
    assert found == [*zip(wanted, trained, strict=True)]


def params(federation: Federation) -> Any:
    return federation.run.method.init(federation.model(), rng(0, "init")).params


def test_a_quorum_that_is_missed_is_told_though_answers_were_refused() -> None:
    """One client of three answers, with an update that no bound lets through."""
    federation = open_run(tiny_run(FedAvg(), rounds=1, bound=Fixed(1e-9)))
    silent = dict.fromkeys([(1, client) for client in federation.run.sample(1)[1:]], "gone")
    grid = faulty(federation, silent, [])
    with pytest.raises(InputError, match="1 of 3 clients answered in 1 attempts, 2 are needed"):
        [*rounds(federation, over(grid, attempts=1))]


def test_too_few_in_every_attempt_end_the_run_in_one_line() -> None:
    federation = open_run(tiny_run(FedAvg()))

    def app(message: Message, context: Context) -> Message:
        raise OSError("no disk")

    grid = InlineGrid(app)  # type: ignore[arg-type]
    with pytest.raises(
        InputError, match=r"round 1: 0 of 3 clients answered in 2 attempts, 2 are needed .*no disk.*--re"
    ):
        [*rounds(federation, over(grid, attempts=2))]


class Deaf(InlineGrid):
    """A grid that answers nobody."""

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return []


def test_a_round_ends_at_its_time() -> None:
    federation = open_run(tiny_run(FedAvg()))
    with pytest.raises(InputError, match=r"no answer within the round's time"):
        [*rounds(federation, over(Deaf(ClientApp()), attempts=1, round_timeout=0.05))]


def test_a_reply_to_another_message_or_without_a_letter_is_no_answer() -> None:
    federation = open_run(tiny_run(FedAvg()))

    def empty(message: Message, context: Context) -> Message:
        return Message(message.content.__class__(), reply_to=message)

    with pytest.raises(InputError, match="its answer holds no letter"):
        [*rounds(federation, over(InlineGrid(empty), attempts=1))]  # type: ignore[arg-type]

    class Stray(InlineGrid):
        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            for reply in super().pull_messages(message_ids):
                reply.metadata.__dict__["_reply_to_message_id"] = "another"
                yield reply

    worker = Worker(federation)
    with pytest.raises(InputError, match="no answer within"):
        [*rounds(federation, over(Stray(client_app(lambda node: worker)), attempts=1, round_timeout=0.2))]


def test_patience_is_checked() -> None:
    times = [{"round_timeout": float(seconds)} for seconds in ("0", "nan", "inf")]
    for wrong in ({"min_clients": -1}, *times, {"attempts": 0}):
        with pytest.raises(InputError, match=f"{next(iter(wrong))} must be"):
            Quorum(**wrong)  # type: ignore[arg-type]
    assert [Quorum().needed(n) for n in (1, 2, 3, 10)] == [1, 1, 2, 5]
    assert Quorum(min_clients=4).needed(3) == 3


class Deployment(InlineGrid):
    """SuperNodes that are clients, some of which come and go."""

    def __init__(self, federation: Federation, folder: Any, clients: Iterable[Any], **node: Any):
        worker = Worker(federation)
        super().__init__(client_app(lambda node: worker))
        self.contexts = {
            node_id: Context(
                1, node_id, {"partition-id": client, "memory": str(folder)}, type(self.contexts[2].state)(), {}
            )
            for node_id, client in enumerate(clients, 2)
        }


ABOUT = {"run": "0123456789abcdef"}


@pytest.fixture
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedsieve.flower.engine.nodes.PAUSE", 0.001)


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
    """Notes the times that letters have."""

    ttls: ClassVar[list[float]] = []

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        messages = [*messages]
        self.ttls.extend(m.metadata.ttl for m in messages if m.metadata.message_type == MessageType.TRAIN)
        return super().push_messages(messages)


@pytest.mark.usefixtures("_quick")
def test_who_waits_for_an_absent_supernode_has_all_of_a_rounds_time_afterwards(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedsieve.flower.engine.nodes.MEETING", 0.3)
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
    monkeypatch.setattr("fedsieve.flower.engine.nodes.AGAIN", 0.05)
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
def test_a_supernode_with_another_key_is_lost_to_every_round(tmp_path: Any) -> None:
    federation = open_run(tiny_run(FedAvg(), rounds=1))
    grid = Deployment(replace(federation, key=b"x" * 32), tmp_path, range(6))
    engine = grid_engine(grid, SuperNodes(grid, federation, ABOUT), Quorum(attempts=1), pause=0)
    with pytest.raises(InputError, match=r"0 of 3 clients answered.*the seal does not fit round 1 and client"):
        [*rounds(federation, engine)]


def test_a_memory_is_that_before_the_round(tmp_path: Any) -> None:
    memories = ClientMemory(tmp_path, "0123abcd", 3)
    assert memories.before(1) == b""
    for t in (1, 4, 6):
        memories.keep(t, bytes([t]))
    assert [memories.before(t) for t in (1, 2, 4, 5, 6, 7)] == [b"", b"\1", b"\1", b"\4", b"\4", b"\6"]
    memories.keep(4, b"new")
    assert [memories.before(t) for t in (5, 7, 99)] == [b"new"] * 3
    for t in range(5, 20):
        memories.keep(t, bytes([t]))
    assert len([*tmp_path.rglob("*.bin")]) == 5  # a server goes back three rounds, and needs what was before them
    assert memories.before(17) == b"\x10"
    assert not [*tmp_path.rglob("*.tmp")]
    with pytest.raises(ValueError, match="names no run"):
        ClientMemory(tmp_path, "../x", 3)


def test_a_memory_is_its_owners_alone(tmp_path: Any) -> None:
    (tmp_path / "0123abcd").mkdir(mode=0o755)
    ClientMemory(tmp_path, "0123abcd", 3).keep(1, b"mine")
    modes = {p.name: p.stat().st_mode & 0o777 for p in (tmp_path / "0123abcd", *tmp_path.rglob("*/*"))}
    assert modes == {"0123abcd": 0o700, "3": 0o700, "000001.bin": 0o600}


def test_the_last_rounds_of_an_inline_run_are_those_of_the_python_call() -> None:
    *_, final = run(tiny_run(FedAvg(), rounds=2), inline())
    *_, same = run(tiny_run(FedAvg(), rounds=2), local())
    assert_same(final, same)
