"""Flower carries the messages: the same bits as ``local``, and rounds that go on when clients are lost."""

import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp

from fedsieve import local, rounds
from fedsieve.engine import Quorum
from fedsieve.engine.engines import Engine, Exchange
from fedsieve.engine.federation import Federation
from fedsieve.engine.rollback import Memory
from fedsieve.engine.setup import open_run
from fedsieve.engine.worker import Worker
from fedsieve.flower.engine import SimulatedNodes, grid_engine, inline, make_client_app
from fedsieve.flower.engine.client import ClientMemory
from fedsieve.flower.engine.in_memory import InlineGrid
from fedsieve.methods import FedAvg
from fedsieve.server.robust import Fixed
from fedsieve.types import InputError, rng
from methods_under_test import METHODS, kinds_first
from tiny import assert_same, tiny_run


def tapped(engine: Engine, seen: list[tuple[int, bytes]]) -> Engine:
    """Note every message that an engine takes down and brings up."""

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
def test_states_memories_and_messages_are_locals(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "perf_counter", lambda: 0.0)  # a reply tells how long training took
    federation = open_run(tiny_run(METHODS[name], rounds=3))
    payloads = list[tuple[int, bytes]](), list[tuple[int, bytes]]()
    runs = [
        [*rounds(federation, tapped(engine, seen))] for engine, seen in zip((local(), inline()), payloads, strict=True)
    ]
    for one, other in zip(*runs, strict=True):
        assert_same(one, other)
    assert payloads[0] == payloads[1]


Faults = dict[tuple[int, int], str]


def faulty(federation: Federation, faults: Faults, asked: list[tuple[int, int]], nodes: int = 1) -> InlineGrid:
    """Return a grid whose clients fail in the rounds given, each once a fault."""
    worker = Worker(federation)
    sound = make_client_app(lambda node: worker)

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
    sound = make_client_app(lambda node: worker)

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


def test_a_reply_to_another_message_or_without_a_payload_is_no_answer() -> None:
    federation = open_run(tiny_run(FedAvg()))

    def empty(message: Message, context: Context) -> Message:
        return Message(message.content.__class__(), reply_to=message)

    with pytest.raises(InputError, match="its answer has no payload"):
        [*rounds(federation, over(InlineGrid(empty), attempts=1))]  # type: ignore[arg-type]

    class Stray(InlineGrid):
        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            for reply in super().pull_messages(message_ids):
                reply.metadata.__dict__["_reply_to_message_id"] = "another"
                yield reply

    worker = Worker(federation)
    with pytest.raises(InputError, match="no answer within"):
        [*rounds(federation, over(Stray(make_client_app(lambda node: worker)), attempts=1, round_timeout=0.2))]


def test_patience_is_checked() -> None:
    times = [{"round_timeout": float(seconds)} for seconds in ("0", "nan", "inf")]
    for wrong in ({"min_clients": -1}, *times, {"attempts": 0}):
        with pytest.raises(InputError, match=f"{next(iter(wrong))} must be"):
            Quorum(**wrong)  # type: ignore[arg-type]
    assert [Quorum().needed(n) for n in (1, 2, 3, 10)] == [1, 1, 2, 5]
    assert Quorum(min_clients=4).needed(3) == 3


def test_a_memory_is_that_before_the_round(tmp_path: Any) -> None:
    memories = ClientMemory(tmp_path, "0123abcd", 3)
    assert memories.before(1) == b""
    for t in (1, 4, 6):
        memories.keep(t, bytes([t]))
    warm = ClientMemory(tmp_path, "4567abcd", 3)
    for t in (-1, 0):
        warm.keep(t, b"%d" % t)
    assert [warm.before(t) for t in (-1, 0, 1)] == [b"", b"-1", b"0"]
    shutil.rmtree(tmp_path / "4567abcd")
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
    *_, final = rounds(tiny_run(FedAvg(), rounds=2), inline())
    *_, same = rounds(tiny_run(FedAvg(), rounds=2), local())
    assert_same(final, same)
