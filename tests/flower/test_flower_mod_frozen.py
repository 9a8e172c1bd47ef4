"""Inside a Flower app what training leaves alone travels once, whatever the strategy, and after every loss."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp.strategy import FedAvg

from fedsieve.flower import SparseGrid, SparseMod
from fedsieve.flower.mod import client as mod_client
from fedsieve.flower.mod.frozen import KeptArrays, is_lost, lost
from fedsieve.flower.mod.records import KEY, NOTHING, pack_record, to_tensors
from fedsieve.wire import base_of
from flower_grid import InProcessGrid
from flower_toy import NODES, app_of, moved, started

TRAINED = 4 * (64 * 4 + 4) + 8


def encoded(names: str) -> int:
    """The bytes of a message with the arrays that begin so."""
    arrays = {name: v for name, v in weights().items() if name.startswith(names)}
    return pack_record(to_tensors(ArrayRecord(arrays)), NOTHING)[1]


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    forget_process()
    yield
    forget_process()


def forget_process() -> None:
    SparseMod._kept, SparseMod._last = KeptArrays(), mod_client._Opened()


def weights() -> ArrayRecord:
    rng = np.random.default_rng(0)
    shapes = {"backbone.weight": (64, 100), "head.weight": (4, 64), "backbone.bias": (100,), "head.bias": (4,)}
    floats = {name: Array(rng.normal(size=shape).astype(np.float32)) for name, shape in shapes.items()}
    return ArrayRecord({**floats, "steps": Array(np.array(0))})


def tuned(name: str, value: np.ndarray, node: int, t: int) -> np.ndarray:
    """Training of a head on a frozen backbone."""
    return value if name.startswith("backbone") else moved(name, value, node, t)


def assert_alike(a: ArrayRecord, b: ArrayRecord) -> None:
    """The same bits; but a strategy's mean of equal numbers is off by roundings, in plain Flower in each round anew."""
    for name, value in a.items():
        if name.startswith("backbone"):
            np.testing.assert_allclose(b[name].numpy(), value.numpy(), rtol=1e-6, atol=1e-7)
        else:
            assert b[name].data == value.data


class Counted(SparseGrid):
    """Notes what each exchange of a strategy weighs, down and up."""

    def __init__(self, *args: Any, **more: Any):
        super().__init__(*args, **more)
        self.exchanges: list[tuple[int, int]] = []

    def send_and_receive(self, *args: Any, **more: Any) -> Any:
        before = self.bytes_down, self.bytes_up
        replies = super().send_and_receive(*args, **more)
        self.exchanges.append((self.bytes_down - before[0], self.bytes_up - before[1]))
        return replies


FROZEN = encoded("backbone")


def strategy(**settings: Any) -> FedAvg:
    return FedAvg(**{"min_train_nodes": NODES, "min_available_nodes": NODES, **settings})


def test_what_training_leaves_alone_travels_once_to_each_node() -> None:
    plain, grid = (
        InProcessGrid(app_of(change=tuned), NODES),
        Counted(inside := InProcessGrid(app_of(SparseMod(), change=tuned), NODES)),
    )
    a, b = (started(strategy(), one, weights(), rounds=4) for one in (plain, grid))
    assert_alike(a.arrays, b.arrays)
    assert [*a.arrays] == [*b.arrays]
    (first, up), *others = grid.exchanges
    assert first == pytest.approx(NODES * (FROZEN + TRAINED), rel=0.1)
    assert up < 1.2 * NODES * TRAINED  # what has not moved costs nothing on the way up
    assert len(others) == 7  # three more to train, four to evaluate
    assert all(down <= 1.1 * NODES * TRAINED for down, _ in others)
    assert inside.bytes_down < first + 7 * NODES * (1.1 * TRAINED + 500)
    state = inside.contexts[2].state["fedsieve frozen arrays"]
    assert len(state[KEY].data) == pytest.approx(FROZEN, rel=0.1)


def test_nodes_that_come_later_are_sent_all_of_it_once() -> None:
    grid = Counted(InProcessGrid(app_of(SparseMod(), change=tuned), NODES))
    started(strategy(fraction_train=0.25, min_train_nodes=1, fraction_evaluate=1.0), grid, weights(), rounds=6)
    whole = sum(down // FROZEN for down, _ in grid.exchanges)
    assert whole == NODES
    assert [down // FROZEN for down, _ in grid.exchanges[:2]] == [1, NODES - 1]


def exchange(grid: SparseGrid, t: int, arrays: ArrayRecord, kind: str = "train") -> list[Message]:
    content = RecordDict({"arrays": arrays, "config": ConfigRecord({"server-round": t})})
    return [*grid.send_and_receive([Message(content, node, kind) for node in (2, 3)])]


def polled(grid: SparseGrid, t: int, arrays: ArrayRecord) -> list[Message]:
    """As a server app of one's own would: pushes, then pulls until every message has its answer."""
    content = RecordDict({"arrays": arrays, "config": ConfigRecord({"server-round": t})})
    left, answers = {*grid.push_messages([Message(content, node, "train") for node in (2, 3)])}, []
    for _ in range(3):
        answers += grid.pull_messages([*left])
        left -= {answer.metadata.reply_to_message_id for answer in answers}
    assert not left
    return answers


@pytest.mark.parametrize("way", [exchange, polled])
@pytest.mark.parametrize("loss", ["process", "state", "damaged"])
def test_a_client_that_lost_them_is_served_again_in_the_round(
    loss: str, way: Callable[[SparseGrid, int, ArrayRecord], list[Message]]
) -> None:
    inside = InProcessGrid(app_of(SparseMod(), change=tuned), 2)
    grid, arrays = SparseGrid(inside), weights()
    sizes = list[int]()
    for t in range(1, 6):
        if t == 3:
            forget_process()
            if loss == "state":
                del inside.contexts[3].state["fedsieve frozen arrays"]
            if loss == "damaged":
                data = b"damaged"
                state = inside.contexts[3].state["fedsieve frozen arrays"]
                state[KEY] = Array("uint8", (len(data),), state[KEY].stype, data)
        if t == 3 and loss != "process":  # node 3 is another process, which has nothing of node 2's
            inside.answer = lambda reply: (forget_process(), reply)[1]
        before = grid.bytes_down
        answers = way(grid, t, arrays)
        sizes.append(grid.bytes_down - before)
        assert {answer.metadata.src_node_id for answer in answers} == {2, 3}
        for answer in answers:
            assert not answer.has_error(), answer.error.reason
            node = answer.metadata.src_node_id
            for name, value in answer.content["arrays"].items():
                np.testing.assert_array_equal(value.numpy(), tuned(name, arrays[name].numpy(), node, t))
        inside.answer = lambda reply: reply
    again = FROZEN + TRAINED if loss != "process" else 0
    assert sizes[0] == pytest.approx(2 * (FROZEN + TRAINED), rel=0.1)
    assert sizes[1] == sizes[3] == sizes[4] < 2.2 * TRAINED
    assert sizes[2] == pytest.approx(sizes[1] + again, rel=0.1)


def test_a_digest_of_something_else_opens_nothing() -> None:
    """A message whose digest was changed on its way is answered as lost, and nothing is trained from it."""
    seen: list[RecordDict] = []
    app = app_of(SparseMod(), lambda m, c, n: (seen.append(m.content), n(m, c))[1], change=tuned)
    grid = SparseGrid(inside := InProcessGrid(app, 1))
    arrays = weights()
    content = RecordDict({"arrays": arrays, "config": ConfigRecord({"server-round": 1})})
    grid.send_and_receive([Message(content, 2, "train")])
    deliver, kinds = inside.deliver, list[bool]()

    def forged(message: Message) -> str:
        record = message.content["arrays"]
        digest, data = base_of(record[KEY].data), record[KEY].data
        kinds.append(bool(digest))
        if digest:
            data = data.replace(digest, bytes(len(digest)))
            record = ArrayRecord({KEY: Array("uint8", (len(data),), record[KEY].stype, data)})
            message.content = RecordDict({**message.content, "arrays": record})
        return deliver(message)

    inside.deliver = forged  # type: ignore[method-assign]
    before = grid.bytes_down
    (reply,) = grid.send_and_receive([Message(content, 2, "train")])
    assert kinds == [True, False]
    assert grid.bytes_down - before > FROZEN
    assert not reply.has_error()
    for one in seen:
        assert all(one["arrays"][name].data == v.data for name, v in arrays.items())
    assert len(seen) == 2


def test_a_client_that_says_it_lost_what_it_was_sent_is_refused() -> None:
    grid = SparseGrid(inside := InProcessGrid(app_of(SparseMod(), change=tuned), 2))
    exchange(grid, 1, weights())
    inside.answer = losing
    before = grid.bytes_down
    answers = exchange(grid, 2, weights())
    assert grid.bytes_down - before == pytest.approx(FROZEN + 3 * TRAINED, rel=0.15)  # once more, not for ever
    assert not any(not one.has_error() and is_lost(one.content) for one in answers)
    assert {one.metadata.src_node_id for one in answers if not one.has_error() and "arrays" in one.content} >= {2}


def losing(reply: Message) -> Message:
    if reply.metadata.src_node_id == 3:
        reply.content = lost()
    return reply


def test_a_layer_that_moves_after_all_arrives() -> None:
    """An array that is taken for frozen at first costs itself alone: nodes that have more keep what still is."""

    def thawed(name: str, value: np.ndarray, node: int, t: int) -> np.ndarray:
        return (
            value if name == "backbone.bias" or (name == "backbone.weight" and t < 3) else moved(name, value, node, t)
        )

    plain, grid = (
        InProcessGrid(app_of(change=thawed), NODES),
        Counted(InProcessGrid(app_of(SparseMod(), change=thawed), NODES)),
    )
    a, b = (started(strategy(), one, weights(), rounds=5) for one in (plain, grid))
    assert_alike(a.arrays, b.arrays)
    sizes = [down // NODES for down, _ in grid.exchanges]
    bias = encoded("backbone.bias")
    assert max(sizes[1:5]) < 1.1 * TRAINED  # up to the third round's training
    assert all(FROZEN - bias < size < FROZEN - bias + 1.2 * TRAINED for size in sizes[5:])


@pytest.mark.parametrize("settings", [{"top": 0.1}, {"values": "int8"}, {"top": 0.1, "of": "weights"}], ids=str)
@pytest.mark.parametrize("values", ["f32", "bf16", "int8"])
def test_cut_and_rounded_messages_come_to_the_same_as_without_memory(
    settings: dict[str, Any], values: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_memory = Counted(InProcessGrid(app_of(SparseMod(**settings), change=tuned), NODES), values=values)
    a = started(strategy(), with_memory, weights(), rounds=3)
    monkeypatch.setattr(mod_client, "unmoved", lambda *_: frozenset())
    without = Counted(InProcessGrid(app_of(SparseMod(**settings), change=tuned), NODES), values=values)
    b = started(strategy(), without, weights(), rounds=3)
    assert_alike(a.arrays, b.arrays)
    if "of" not in settings:  # the tenth of all weights that is largest: nothing is frozen
        assert with_memory.bytes_down < without.bytes_down / 2


def test_a_simulations_nodes_share_what_their_process_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedsieve.flower.mod.frozen.in_simulation", lambda: True)
    grid = SparseGrid(inside := InProcessGrid(app_of(SparseMod(), change=tuned), 2))
    for t in (1, 2, 3):
        assert not any(answer.has_error() for answer in exchange(grid, t, weights()))
    assert not any(len(context.state) for context in inside.contexts.values())
    assert grid.bytes_down < 2.2 * FROZEN + 7 * TRAINED
