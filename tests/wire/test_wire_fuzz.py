"""A slice of scripts/fuzz: some thousand mutated messages, with the seal off."""

import pytest

from fedsieve.wire import decode
from fedsieve.wire.plan import Plan
from fedsieve.wire.positions import CHANGES, GAPS, RANKED
from fedsieve.wire.streams import BACK_ENDS
from fedsieve.wire.values import BF16_DISTANCE, TYPED
from fuzzing import MUTATIONS, corpus, fuzz


@pytest.mark.parametrize("back_end", BACK_ENDS)
@pytest.mark.slow
def test_mutated_messages_are_taken_or_refused_and_nothing_else(back_end: str) -> None:
    found = fuzz(5_000, 0, back_end)
    assert found.taken + found.refused == 5_000
    assert found.refused > found.taken / 10 > 0
    assert len(found.kinds) > 20


@pytest.mark.parametrize("back_end", BACK_ENDS)
@pytest.mark.slow
def test_and_so_are_those_over_a_model_of_millions(back_end: str) -> None:
    """Each short message claims up to all of it; what decoding sets aside is held to twice the model."""
    found = fuzz(100, 1, back_end, "4 M")
    assert found.taken > 5 < found.refused
    assert 0.2 * found.model < found.most_memory <= 2 * found.model


@pytest.mark.parametrize("back_end", BACK_ENDS)
def test_the_mutated_messages_are_of_every_mode_and_good_before(back_end: str) -> None:
    leaves, by_kind = [], set()
    for data, known in corpus(back_end):
        decode(data, known)
        plan = Plan(data, known)
        leaves += plan.leaves
        by_kind.add(plan.by_kind)
    assert by_kind == {False, True} or back_end == "zstd"  # whose planes of bytes gain nothing by kinds here
    assert {leaf.way for leaf in leaves} == set(range(RANKED + 1))
    assert {leaf.way for leaf in leaves if leaf.sharing.unit > 1} == {GAPS, CHANGES, RANKED}
    assert {leaf.mode for leaf in leaves} >= set(range(TYPED + 1, BF16_DISTANCE + 1)) - {2, 5}
    assert len(MUTATIONS) > 10
