"""FedSieve inside a Flower app: what arrives is what the plain app has, cut as asked."""

import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.clientapp.mod import fixedclipping_mod

from fedsieve.flower import SparseGrid, SparseMod
from fedsieve.flower.mod.records import KEY, STYPE, to_record
from fedsieve.sparse.masks import top
from fedsieve.types import InputError
from fedsieve.wire import Known, decode, rounded
from flower_grid import InProcessGrid
from flower_toy import NODES, app_of, initial, moved, started, strategies


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


@pytest.mark.system
def test_fedsieve_does_without_flower_and_one_line_says_what_to_install() -> None:
    code = """import sys; sys.modules["flwr"] = None
import fedsieve.cli
try: from fedsieve.flower import SparseMod
except ImportError as error: print(error)"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "fedsieve.flower needs Flower: pip install '.[flower]' in FedSieve's checkout\n"


def test_what_travels_is_a_fedsieve_message() -> None:
    seen: list[RecordDict] = []
    inside = InProcessGrid(app_of(lambda m, c, n: (seen.append(m.content), n(m, c))[1], SparseMod()), 1)
    content = RecordDict({"arrays": initial(), "config": ConfigRecord({"server-round": 1})})
    SparseGrid(inside).send_and_receive([Message(content, 2, "train")])
    ((name, array),) = seen[0]["arrays"].items()
    assert (name, array.stype, array.dtype, array.shape) == (KEY, STYPE, "uint8", (len(array.data),))
    assert decode(array.data, Known(finite=False))["means"] == 0.0


@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 0), (5, 4), (2, 3, 4, 5)], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "int64", "int32", "uint8", "bool"])
def test_records_are_made_as_flower_makes_them(dtype: str, shape: tuple[int, ...]) -> None:
    value = np.asarray(np.random.default_rng(0).normal(0, 50, shape)).astype(dtype)
    (made,) = to_record({"x": torch.from_numpy(value.copy())}).values()
    assert made == Array(value)
