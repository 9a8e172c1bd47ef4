"""Clients of a Flower app that lie, or are broken, are errors of their own alone."""

import logging
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from fedsieve.flower import SparseGrid, SparseMod
from fedsieve.flower.mod.records import KEY, NOTHING, STYPE, Base, pack_record, to_tensors, unpack_record
from fedsieve.wire import encode
from flower_grid import InProcessGrid
from flower_toy import NODES, app_of, initial, moved, started, strategies


def changed(reply: Message, **records: Any) -> Message:
    reply.content = RecordDict({**reply.content, **records})
    return reply


def lying(message: bytes) -> Callable[[Message], Message]:
    record = ArrayRecord({KEY: Array("uint8", (len(message),), STYPE, message)})
    return lambda reply: changed(reply, arrays=record)


def replaced(known: bool = True, **tensors: Any) -> Callable[[Message], Message]:
    """The same answer with some tensors in place of its own; ``None`` leaves one out."""

    def lie(reply: Message) -> Message:
        base = to_tensors(initial())
        arrays = {n: v for n, v in {**base, **tensors}.items() if v is not None}
        return changed(reply, arrays=pack_record(arrays, Base.of(base) if known else NOTHING)[0])

    return lie


def named(reply: Message, **metrics: Any) -> Message:
    return changed(reply, metrics=MetricRecord({**reply.content["metrics"], **metrics}))


def unchanged(records: int) -> Callable[[Message], Message]:
    """The same answer with more records, each of a few bytes and as large as the model when it is opened."""
    base = to_tensors(initial())
    record = pack_record(base, Base.of(base))[0]
    assert len(record[KEY].data) < 300
    return lambda reply: changed(reply, **{f"own {i}": record for i in range(records)})


TREE = {"means": 0.0, "arrays": {"fc1.bias": torch.zeros(24)}}
LIES: dict[str, tuple[Callable[[Message], Message], str]] = {
    "no message": (lying(b"rubbish"), "not a FedSieve message"),
    "without the base": (lying(encode(TREE)), "the message is for|manifest|base"),
    "against another model": (replaced(known=False), "manifest"),
    "not packed": (lambda reply: changed(reply, arrays=initial()), "not FedSieve's"),
    "a foreign stype": (
        lambda reply: changed(reply, arrays=ArrayRecord({KEY: Array("uint8", (1,), "pickle", b"x")})),
        "not FedSieve's",
    ),
    "not finite": (replaced(**{"fc1.bias": torch.full((24,), torch.inf)}), "'fc1.bias' is not finite"),
    "another shape": (replaced(**{"fc1.bias": torch.zeros(25)}), "not of the form"),
    "one missing": (replaced(**{"fc1.bias": None}), "not of the form"),
    "one too many": (replaced(own=torch.zeros(3)), "not of the form"),
    "an array as it is": (replaced(**{"fc1.bias": Array(np.zeros(24, np.int8))}), "travels as it is"),
    "a second record": (lambda reply: changed(reply, more=pack_record({}, NOTHING)[0]), "manifest|base"),
    "records without end": (unchanged(150), "its records unfold to more than "),
    "another metric": (lambda reply: named(reply, own=1.0), "not of the form"),
    "a longer list": (lambda reply: named(reply, each=[1.0]), "not of the form"),
    "examples that are no number": (lambda reply: named(reply, **{"num-examples": math.nan}), "'num-examples' is not"),
    "no metrics": (lambda reply: changed(reply, metrics=ConfigRecord()), "not of the form"),
}


@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize("name", ["fedavg", "krum", "fedadam"])
def test_a_lie_is_that_clients_error_alone(lie: str, name: str, caplog: pytest.LogCaptureFixture) -> None:
    tell, why = LIES[lie]
    inside = InProcessGrid(app_of(SparseMod()), NODES)
    inside.answer = lambda reply: (
        tell(reply) if reply.metadata.src_node_id == 3 and "arrays" in reply.content else reply
    )
    honest = InProcessGrid(app_of(SparseMod()), NODES)
    honest.answer = lambda reply: None if reply.metadata.src_node_id == 3 and "arrays" in reply.content else reply
    logging.getLogger("flwr").propagate = True
    with caplog.at_level(logging.ERROR, "flwr"):
        a, b = (started(strategies()[name](), SparseGrid(grid), rounds=1) for grid in (inside, honest))
    assert all(a.arrays[n].data == b.arrays[n].data for n in b.arrays)
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("SparseGrid: the answer of node 3 is refused: ")
    assert re.search(why, line)


def test_what_an_answer_unfolds_to_is_bounded_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two records may be told from one that was broadcast; of 150 no more are opened than come to a few models."""
    opened: list[int] = []

    def counted(record: ArrayRecord, base: Base) -> Any:
        opened.append(len(record))
        return unpack_record(record, base)

    monkeypatch.setattr("fedsieve.flower.mod.server.unpack_record", counted)
    inside = InProcessGrid(app_of(SparseMod()), 1)
    content = RecordDict({"arrays": initial(), "config": ConfigRecord({"server-round": 1})})
    for more, refused in ((1, False), (150, True)):
        opened.clear()
        inside.answer = unchanged(more)
        (reply,) = SparseGrid(inside).send_and_receive([Message(content, 2, "train")])
        assert reply.has_error() == refused
        assert len(opened) < 12


@pytest.mark.parametrize("error", [MemoryError, RecursionError, KeyError])
def test_whatever_reading_an_answer_raises_is_its_clients_error(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(record: ArrayRecord, base: Base) -> Any:
        raise error

    grid = SparseGrid(InProcessGrid(app_of(SparseMod()), 1))
    content = RecordDict({"arrays": initial(), "config": ConfigRecord({"server-round": 1})})
    monkeypatch.setattr("fedsieve.flower.mod.server.unpack_record", broken)
    (reply,) = grid.send_and_receive([Message(content, 2, "train")])
    assert f"it cannot be read ({error.__name__}" in str(reply.error.reason)


def test_an_odd_answer_to_an_earlier_message_is_none_of_this_exchange() -> None:
    inside = InProcessGrid(app_of(SparseMod()), 3)
    grid = SparseGrid(inside)
    content = RecordDict({"arrays": initial(), "config": ConfigRecord({"server-round": 1})})
    inside.answer = LIES["another shape"][0]
    (late,) = grid.push_messages([Message(content, 4, "train")])
    inside.answer = lambda reply: reply
    inside.push_messages = lambda messages: [late, *InProcessGrid.push_messages(inside, messages)]  # type: ignore[method-assign]
    replies = [*grid.send_and_receive([Message(content, node, "train") for node in (2, 3)])]
    assert [reply.has_error() for reply in replies] == [False, False, False]


def test_errors_of_clients_pass_through() -> None:
    def broken(name: str, value: np.ndarray, node: int, t: int) -> np.ndarray:
        return moved(name, value, node, t) if node != 3 else 1 / 0  # type: ignore[return-value]

    grid = SparseGrid(InProcessGrid(app_of(SparseMod(), change=broken), NODES))
    content = RecordDict({"arrays": initial(), "config": ConfigRecord({"server-round": 1})})
    replies = [*grid.send_and_receive([Message(content, node, "train") for node in (2, 3)])]
    assert [reply.has_error() for reply in replies] == [False, True]
    assert "ZeroDivisionError" in str(replies[1].error.reason)


@pytest.mark.slow
def test_a_flipped_bit_anywhere_is_refused_or_an_array_like_the_others() -> None:
    inside = InProcessGrid(app_of(SparseMod(top=0.05)), 2)
    around, chance = SparseGrid(inside), np.random.default_rng(0)

    def flip(reply: Message) -> Message:
        if reply.metadata.src_node_id == 2:
            return reply
        data = bytearray(reply.content["arrays"][KEY].data)
        data[chance.integers(len(data))] ^= 1 << chance.integers(8)
        return lying(bytes(data))(reply)

    inside.answer = flip
    content = RecordDict({"arrays": initial(), "config": ConfigRecord({"server-round": 1})})
    for _ in range(40):
        first, second = around.send_and_receive([Message(content, node, "train") for node in (2, 3)])
        assert not first.has_error()
        if not second.has_error():
            assert {n: v.shape for n, v in second.content["arrays"].items()} == {
                n: v.shape for n, v in initial().items()
            }


def test_answers_of_several_forms_pass_where_that_is_wanted() -> None:
    inside = InProcessGrid(app_of(SparseMod()), 3)
    inside.answer = lambda reply: named(reply, own=1.0) if reply.metadata.src_node_id == 2 else reply
    content = RecordDict({"arrays": initial(), "config": ConfigRecord({"server-round": 1})})
    for alike, errors in ((True, 1), (False, 0)):
        replies = SparseGrid(inside, alike=alike).send_and_receive([Message(content, n, "train") for n in (2, 3, 4)])
        assert sum(reply.has_error() for reply in replies) == errors


def test_pushed_and_pulled_messages_are_packed_too_and_answered_once() -> None:
    inside = InProcessGrid(app_of(SparseMod()), 2)
    grid = SparseGrid(inside)
    content = RecordDict({"arrays": initial(), "config": ConfigRecord({"server-round": 1})})
    ids = [*grid.push_messages([Message(content, node, "train") for node in (2, 3)])]
    first = [*grid.pull_messages(ids)]
    assert [*first[0].content["arrays"]] == [*initial()]
    assert [*grid.pull_messages(ids)] == []
    assert not grid._requests


def test_messages_that_nobody_can_answer_any_more_are_forgotten() -> None:
    inside = InProcessGrid(app_of(SparseMod()), 1)
    inside.answer = lambda reply: None
    grid = SparseGrid(inside)
    content = RecordDict({"arrays": initial(), "config": ConfigRecord({"server-round": 1})})
    [*grid.push_messages([Message(content, 2, "train", ttl=1e-9)])]
    [*grid.push_messages([Message(content, 2, "train")])]
    assert len(grid._requests) == 1
