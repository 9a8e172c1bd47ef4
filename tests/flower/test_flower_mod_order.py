"""What SparseMod and other mods cannot do together is refused with the reason."""

import math
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.clientapp.mod import LocalDpMod, adaptiveclipping_mod, arrays_size_mod, fixedclipping_mod, message_size_mod

from fedsieve.flower import SparseGrid, SparseMod
from fedsieve.flower.mod.records import KEY, STYPE
from fedsieve.types import InputError
from flower_grid import InProcessGrid
from flower_toy import app_of, initial


def asked(*mods: Any, config: dict[str, Any] | None = None, grid: Any = SparseGrid) -> str:
    """The error that a client answers with."""
    content = RecordDict({"arrays": initial(), "config": ConfigRecord({"server-round": 1, **(config or {})})})
    (reply,) = grid(InProcessGrid(app_of(*mods), 1)).send_and_receive([Message(content, 2, "train")])
    return str(reply.error.reason) if reply.has_error() else ""


def named(mod: Any) -> str:
    return str(getattr(mod, "__name__", type(mod).__name__))


@pytest.mark.parametrize("mod", [fixedclipping_mod, adaptiveclipping_mod, LocalDpMod(1.0, 1.0, 1.0, 1e-5)], ids=named)
def test_a_mod_that_computes_with_arrays_must_stand_inside(mod: Any) -> None:
    name = named(mod)
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
