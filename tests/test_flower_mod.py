"""FedSieve inside a Flower app: what arrives is what the plain app has, cut as asked, and liars are alone."""

import logging
import math
import random
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import LocalDpMod, adaptiveclipping_mod, arrays_size_mod, fixedclipping_mod, message_size_mod
from flwr.serverapp.strategy import (
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideFixedClipping,
    FedAdam,
    FedAvg,
    Krum,
    Result,
    Strategy,
)

from conftest import TinyNet
from fedsieve.flower import SparseGrid, SparseMod
from fedsieve.flower.records import KEY, NOTHING, STYPE, Base, held, packed, unpacked
from fedsieve.sparsity import top
from fedsieve.types import InputError
from fedsieve.wire import Known, decode, encode, rounded
from flower_grid import InProcessGrid

NODES = 4


def moved(name: str, value: np.ndarray, node: int, t: int) -> np.ndarray:
    """What training does: some hundredths more or less in every float, one more in every integer."""
    if value.dtype.kind != "f" or value.ndim == 0:
        return np.asarray(value + 1)
    seed = [node, t, len(name), value.size]
    return value + np.random.default_rng(seed).normal(0, 0.02, value.shape).astype(value.dtype)


def app_of(*mods: Any, change: Callable[..., np.ndarray] = moved) -> ClientApp:
    app = ClientApp(mods=[*mods])

    @app.train()
    def train(message: Message, context: Any) -> Message:
        t, node = int(message.content["config"]["server-round"]), context.node_id
        arrays = {n: Array(change(n, v.numpy(), node, t)) for n, v in message.content["arrays"].items()}
        metrics = MetricRecord({"num-examples": 10 * node, "loss": 0.5, "each": [1.0, 2.0]})
        return Message(RecordDict({"arrays": ArrayRecord(arrays), "metrics": metrics}), reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Any) -> Message:
        size = sum(float(np.abs(v.numpy().astype("float64")).sum()) for v in message.content["arrays"].values())
        return Message(RecordDict({"m": MetricRecord({"num-examples": 1, "size": size})}), reply_to=message)

    return app


def initial() -> ArrayRecord:
    torch.manual_seed(0)
    return ArrayRecord(TinyNet().state_dict())


def started(strategy: Strategy, grid: Any, arrays: ArrayRecord | None = None, rounds: int = 2) -> Result:
    random.seed(0)  # the order of the nodes
    np.random.seed(0)  # the noise of the strategies
    return strategy.start(grid, arrays or initial(), num_rounds=rounds)


def strategies() -> dict[str, Callable[[], Strategy]]:
    every: dict[str, Any] = {"min_train_nodes": NODES, "min_available_nodes": NODES}
    return {
        "fedavg": lambda: FedAvg(**every),
        "fedadam": lambda: FedAdam(**every),
        "krum": lambda: Krum(num_malicious_nodes=1, **every),
        "dp on the server": lambda: DifferentialPrivacyServerSideFixedClipping(FedAvg(**every), 0.1, 1.0, NODES),
        "dp on the clients": lambda: DifferentialPrivacyClientSideFixedClipping(FedAvg(**every), 0.1, 1.0, NODES),
    }


@pytest.mark.parametrize("name", strategies())
def test_a_strategy_ends_with_the_same_bits_and_fewer_bytes(name: str) -> None:
    """BatchNorm's counters are int64 in the first broadcast and float64, averaged, from then on."""
    mods = [fixedclipping_mod] if name == "dp on the clients" else []
    floats = ArrayRecord({n: v for n, v in initial().items() if v.dtype == "float32"})  # Flower's clip needs them
    arrays = floats if name.startswith("dp") else initial()
    plain, inside = InProcessGrid(app_of(*mods), NODES), InProcessGrid(app_of(SparseMod(), *mods), NODES)
    sparse = SparseGrid(inside)
    a, b = (started(strategies()[name](), grid, arrays) for grid in (plain, sparse))
    assert [*a.arrays] == [*b.arrays] == [*arrays]
    assert all(a.arrays[n].data == b.arrays[n].data for n in arrays)
    assert a.train_metrics_clientapp == b.train_metrics_clientapp != {}
    assert a.evaluate_metrics_clientapp == b.evaluate_metrics_clientapp
    assert a.evaluate_metrics_clientapp or mods  # fixedclipping_mod refuses messages that are not to train
    assert inside.bytes_up < 0.9 * plain.bytes_up
    assert inside.bytes_down < 0.95 * plain.bytes_down
    assert 0 < sparse.bytes_up < inside.bytes_up
    assert 0 < sparse.bytes_down < inside.bytes_down


ODD = {
    "scalar": np.array(3, np.float32),
    "empty": np.zeros((0, 3), np.float32),
    "special": np.array([0.0, -0.0, 1e-45, np.inf, np.nan], np.float32),
    "half": np.arange(6, dtype=np.float16).reshape(2, 3),
    "double": np.array([[math.pi]]),
    "int8": np.array([-1, 5], np.int8),
    "bytes": np.frombuffer(b"any", np.uint8),
    "flags": np.array([True, False]),
    "columns": np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3)),
    "words": np.array(["a", "bc"]),
}


def test_arrays_of_every_kind_arrive_as_the_plain_app_has_them() -> None:
    seen: list[ArrayRecord] = []

    def same(name: str, value: np.ndarray, *_: int) -> np.ndarray:
        return value

    app = app_of(SparseMod(), lambda m, c, n: (seen.append(m.content["arrays"]), n(m, c))[1], change=same)
    sent = ArrayRecord({name: Array(v) for name, v in ODD.items()})
    grid = SparseGrid(InProcessGrid(app, 1))
    content = RecordDict({"config": ConfigRecord({"server-round": 1, "raw": b"\0"}), "arrays": sent})
    (reply,) = grid.send_and_receive([Message(content, 2, "train")])
    for got in (seen[0], reply.content["arrays"]):
        assert [*got] == [*sent]
        for name, value in ODD.items():
            array = got[name]
            assert (array.dtype, array.shape, array.stype) == (str(value.dtype), value.shape, "numpy.ndarray")
            assert array.numpy().tobytes() == value.tobytes()
    assert [*content] == ["config", "arrays"]
    assert content["arrays"] is sent
    assert [*sent] == [*ODD]


def exchange(mod: SparseMod, change: Callable[..., np.ndarray] = moved, rounds: int = 1, **grid: Any) -> Any:
    """One client's answers to rounds of one broadcast: the base, what arrived in each round, and the grid."""
    inside = InProcessGrid(app_of(mod, change=change), 1)
    around, base = SparseGrid(inside, **grid), initial()
    found = []
    for t in range(1, rounds + 1):
        content = RecordDict({"arrays": base, "config": ConfigRecord({"server-round": t})})
        (reply,) = around.send_and_receive([Message(content, 2, "train")])
        assert not reply.has_error(), reply.error.reason
        found.append({n: v.numpy() for n, v in reply.content["arrays"].items()})
    return {n: v.numpy() for n, v in base.items()}, found, inside


def test_the_top_of_the_update_is_exact_and_the_rest_is_the_broadcast() -> None:
    base, (got,), _ = exchange(SparseMod(top=0.1))
    for name, before in base.items():
        after = moved(name, before, 2, 1)
        if before.ndim > 1:
            support = top(torch.from_numpy(after - before), 0.1).numpy()
            assert support.sum() == math.ceil(round(0.1 * before.size, 6))
            after = np.where(support, after, before)
        np.testing.assert_array_equal(got[name], after)


def test_the_top_of_the_weights_is_exact_and_the_rest_is_zero() -> None:
    base, (got,), _ = exchange(SparseMod(top=0.2, of="weights"))
    for name, before in base.items():
        after = moved(name, before, 2, 1)
        if before.ndim > 1:
            after = after * top(torch.from_numpy(after), 0.2).numpy()
        np.testing.assert_array_equal(got[name], after)


@pytest.mark.parametrize("values", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("share", [None, 0.25])
def test_rounded_values_are_those_of_the_update(values: Any, share: float | None) -> None:
    base, (got,), _ = exchange(SparseMod(top=share, values=values))
    for name, before in base.items():
        if before.dtype != np.float32:
            np.testing.assert_array_equal(got[name], before + 1)
            continue
        change = torch.from_numpy(moved(name, before, 2, 1) - before)
        weights = change.dim() > 1
        support = top(change, share) if share and weights else torch.ones_like(change).bool()
        change[support] = rounded(change[support], values if weights else "bf16")
        np.testing.assert_array_equal(got[name], before + (change * support).numpy())


@pytest.mark.parametrize("settings", [{"top": 0.1}, {"values": "int4"}, {"top": 0.3, "values": "int8"}], ids=str)
def test_feedback_sends_what_was_left_out_later(settings: Any) -> None:
    """What arrived in all, and what is left in the client's state, come to what was trained in all."""
    rounds = 5
    base, got, inside = exchange(SparseMod(feedback=True, **settings), rounds=rounds)
    state = inside.contexts[2].state["fedsieve arrays"]
    assert [*state] == [name for name, v in base.items() if v.ndim > 1]
    for name in state:
        trained = sum(moved(name, base[name], 2, t) - base[name] for t in range(1, rounds + 1))
        arrived = sum(one[name] - base[name] for one in got)
        np.testing.assert_allclose(arrived + state[name].numpy(), trained, atol=1e-6)
        assert np.abs(state[name].numpy()).max() > 1e-4


def test_a_diverged_training_leaves_nothing_for_the_next_time() -> None:
    def diverged(name: str, value: np.ndarray, *_: int) -> np.ndarray:
        return value * np.float32("nan") if value.dtype == np.float32 else value

    inside = InProcessGrid(app_of(SparseMod(top=0.1, feedback=True), change=diverged), 1)
    content = RecordDict({"arrays": initial(), "config": ConfigRecord({"server-round": 1})})
    (reply,) = SparseGrid(inside).send_and_receive([Message(content, 2, "train")])
    assert "is not finite" in str(reply.error.reason)
    assert not len(inside.contexts[2].state["fedsieve arrays"])


@pytest.mark.parametrize("values", ["bf16", "int8"])
def test_a_rounded_broadcast_is_the_base_of_its_answers(values: Any) -> None:
    def same(name: str, value: np.ndarray, *_: int) -> np.ndarray:
        return value

    base, (got,), _ = exchange(SparseMod(top=0.01), change=same, values=values)
    for name, before in base.items():
        how = values if before.ndim > 1 else "bf16"
        value = torch.from_numpy(before)
        np.testing.assert_array_equal(
            got[name], rounded(value, how).numpy() if value.dtype == torch.float32 else before
        )
        assert before.dtype != np.float32 or before.ndim < 2 or (got[name] != before).any()


def test_answers_get_smaller_as_they_are_asked_to() -> None:
    sizes = [
        exchange(mod)[2].bytes_up
        for mod in (
            SparseMod(),
            SparseMod(values="bf16"),
            SparseMod(top=0.3),
            SparseMod(top=0.1),
            SparseMod(0.1, values="int4"),
        )
    ]
    assert sizes == sorted(sizes, reverse=True)
    assert len({*sizes}) == len(sizes)


# Clients that lie, or are broken


def changed(reply: Message, **records: Any) -> Message:
    reply.content = RecordDict({**reply.content, **records})
    return reply


def lying(message: bytes) -> Callable[[Message], Message]:
    record = ArrayRecord({KEY: Array("uint8", (len(message),), STYPE, message)})
    return lambda reply: changed(reply, arrays=record)


def replaced(known: bool = True, **tensors: Any) -> Callable[[Message], Message]:
    """The same answer with some tensors in place of its own; ``None`` leaves one out."""

    def lie(reply: Message) -> Message:
        base = held(initial())
        arrays = {n: v for n, v in {**base, **tensors}.items() if v is not None}
        return changed(reply, arrays=packed(arrays, Base.of(base) if known else NOTHING)[0])

    return lie


def named(reply: Message, **metrics: Any) -> Message:
    return changed(reply, metrics=MetricRecord({**reply.content["metrics"], **metrics}))


def unchanged(records: int) -> Callable[[Message], Message]:
    """The same answer with more records, each of a few bytes and as large as the model when it is opened."""
    base = held(initial())
    record = packed(base, Base.of(base))[0]
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
    "a second record": (lambda reply: changed(reply, more=packed({}, NOTHING)[0]), "manifest|base"),
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
        return unpacked(record, base)

    monkeypatch.setattr("fedsieve.flower.grid.unpacked", counted)
    inside = InProcessGrid(app_of(SparseMod()), 1)
    content = RecordDict({"arrays": initial(), "config": ConfigRecord({"server-round": 1})})
    for more, refused in ((1, False), (150, True)):
        opened.clear()
        inside.answer = unchanged(more)
        (reply,) = SparseGrid(inside).send_and_receive([Message(content, 2, "train")])
        assert reply.has_error() == refused
        assert len(opened) < 12


def test_errors_of_clients_pass_through() -> None:
    def broken(name: str, value: np.ndarray, node: int, t: int) -> np.ndarray:
        return moved(name, value, node, t) if node != 3 else 1 / 0  # type: ignore[return-value]

    grid = SparseGrid(InProcessGrid(app_of(SparseMod(), change=broken), NODES))
    content = RecordDict({"arrays": initial(), "config": ConfigRecord({"server-round": 1})})
    replies = [*grid.send_and_receive([Message(content, node, "train") for node in (2, 3)])]
    assert [reply.has_error() for reply in replies] == [False, True]
    assert "ZeroDivisionError" in str(replies[1].error.reason)


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
    assert not grid._sent


def test_messages_that_nobody_can_answer_any_more_are_forgotten() -> None:
    inside = InProcessGrid(app_of(SparseMod()), 1)
    inside.answer = lambda reply: None
    grid = SparseGrid(inside)
    content = RecordDict({"arrays": initial(), "config": ConfigRecord({"server-round": 1})})
    [*grid.push_messages([Message(content, 2, "train", ttl=1e-9)])]
    [*grid.push_messages([Message(content, 2, "train")])]
    assert len(grid._sent) == 1


# What cannot work


def asked(*mods: Any, config: dict[str, Any] | None = None, grid: Any = SparseGrid) -> str:
    """The error that a client answers with."""
    content = RecordDict({"arrays": initial(), "config": ConfigRecord({"server-round": 1, **(config or {})})})
    (reply,) = grid(InProcessGrid(app_of(*mods), 1)).send_and_receive([Message(content, 2, "train")])
    return str(reply.error.reason) if reply.has_error() else ""


@pytest.mark.parametrize("mod", [fixedclipping_mod, adaptiveclipping_mod, LocalDpMod(1.0, 1.0, 1.0, 1e-5)], ids=str)
def test_a_mod_that_computes_with_arrays_must_stand_inside(mod: Any) -> None:
    name = getattr(mod, "__name__", type(mod).__name__)
    config = {"clipping_norm": 1.0}
    assert f"{name} stands before it" in asked(mod, SparseMod(), config=config)
    assert name == "LocalDpMod" or not asked(SparseMod(), mod, config=config).startswith("SparseMod")


def test_mods_that_measure_sizes_may_stand_outside() -> None:
    assert not asked(message_size_mod, arrays_size_mod, SparseMod())


@pytest.mark.parametrize("mod", [SparseMod(0.1, "weights"), SparseMod(0.1, feedback=True), SparseMod(values="bf16")])
def test_what_may_lengthen_an_update_is_refused_after_a_clip(mod: SparseMod) -> None:
    assert "the strategy clips on the clients" in asked(mod, config={"clipping_norm": 1.0})


def test_the_top_of_a_clipped_update_is_no_longer_than_the_clip() -> None:
    floats = ArrayRecord({n: v for n, v in initial().items() if v.dtype == "float32"})
    content = RecordDict({"arrays": floats, "config": ConfigRecord({"server-round": 1, "clipping_norm": 0.05})})
    inside = InProcessGrid(app_of(SparseMod(0.2), fixedclipping_mod), 1)
    (reply,) = SparseGrid(inside).send_and_receive([Message(content, 2, "train")])
    squares = [np.square(v.numpy() - floats[n].numpy().astype(float)).sum() for n, v in reply.content["arrays"].items()]
    assert 0.01 < math.sqrt(sum(squares)) < 0.05


def test_secure_aggregation_is_refused_on_both_sides() -> None:
    from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS

    content = RecordDict({RECORD_KEY_CONFIGS: ConfigRecord({"stage": "setup"})})
    inside = InProcessGrid(app_of(SparseMod()), 1)
    (reply,) = inside.send_and_receive([Message(content, 2, "train")])
    assert "SecAgg+ adds masked vectors" in str(reply.error.reason)
    with pytest.raises(InputError, match=r"SecAgg\+ adds masked vectors"):
        SparseGrid(inside).send_and_receive([Message(content, 2, "train")])


def test_half_of_the_pair_is_named() -> None:
    assert "uses no SparseMod or SparseGrid" in asked(SparseMod(), grid=lambda grid: grid)
    assert f"'{STYPE}'" in asked() or KEY in asked()
    assert "uses no SparseMod or SparseGrid" in asked(SparseMod(), SparseMod())
    with pytest.raises(InputError, match="once is enough"):
        SparseGrid(SparseGrid(InProcessGrid(app_of(), 1)))


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"top": 0.0}, r"top must lie in \(0, 1\], got 0.0"),
        ({"of": "gradient"}, "of must be update or weights"),
        ({"of": "weights"}, "give top as well"),
        ({"values": "fp8"}, "values must be f32, bf16, int8 or int4"),
        ({"feedback": True}, "set top or values"),
        ({"feedback": True, "top": 0.1, "of": "weights"}, "set top or values"),
    ],
)
def test_impossible_settings_are_refused(settings: Any, line: str) -> None:
    with pytest.raises(InputError, match=line):
        SparseMod(**settings)


def test_fedsieve_does_without_flower_and_one_line_says_what_to_install() -> None:
    code = """import sys; sys.modules["flwr"] = None
import fedsieve.cli
try: import fedsieve.flower
except ImportError as error: print(error)"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "fedsieve.flower needs Flower: pip install 'fedsieve[flower]'\n"


def test_what_travels_is_a_fedsieve_message() -> None:
    seen: list[RecordDict] = []
    inside = InProcessGrid(app_of(lambda m, c, n: (seen.append(m.content), n(m, c))[1], SparseMod()), 1)
    content = RecordDict({"arrays": initial(), "config": ConfigRecord({"server-round": 1})})
    SparseGrid(inside).send_and_receive([Message(content, 2, "train")])
    ((name, array),) = seen[0]["arrays"].items()
    assert (name, array.stype, array.dtype, array.shape) == (KEY, STYPE, "uint8", (len(array.data),))
    assert decode(array.data, Known(finite=False))["means"] == 0.0
