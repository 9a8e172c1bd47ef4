"""Kept messages of every mode: what is encoded today is the same bytes, and what was encoded then still decodes."""

import pytest

from fedsieve.types import Sparse
from fedsieve.wire import decode, encode, rounded
from fedsieve.wire.known import NOTHING
from fedsieve.wire.plan import Plan
from fedsieve.wire.positions import CHANGES, GAPS, RANKED
from fedsieve.wire.values import BF16_DISTANCE
from messages import GOLDEN, golden, same

KEPT = {path.stem: bytes.fromhex(path.read_text()) for path in sorted(GOLDEN.glob("*.hex"))}


@pytest.mark.parametrize("name", golden())
def test_a_kept_message_decodes_to_its_tree(name: str) -> None:
    tree, known, how = golden()[name]
    values = how.get("values", "f32")
    wanted = {n: v if isinstance(v, Sparse | float | dict) else v if values == "f32" else rounded(v, values)
              for n, v in tree.items()}  # fmt: skip
    assert same(wanted, decode(KEPT[name], known))


@pytest.mark.parametrize("name", golden())
def test_a_tree_encodes_to_its_kept_message(name: str) -> None:
    tree, known, how = golden()[name]
    assert encode(tree, known, **how) == KEPT[name]


def test_every_mode_of_positions_and_of_values_is_kept() -> None:
    assert set(KEPT) == set(golden())
    leaves = [leaf for name, (_, known, _) in golden().items() for leaf in Plan(KEPT[name], known or NOTHING).leaves]
    assert {leaf.way for leaf in leaves} == set(range(RANKED + 1))
    assert {leaf.way for leaf in leaves if leaf.sharing.unit > 1} == {GAPS, CHANGES, RANKED}
    assert {leaf.mode for leaf in leaves} == set(range(BF16_DISTANCE + 1))
    assert {leaf.dtype for leaf in leaves} == set(range(8))


def test_the_number_message_is_what_the_page_shows() -> None:
    """docs/reference/wire.md, "An example"."""
    assert KEPT["number"].hex(" ") == (
        "46 53 56 33 00 23 00 00 00 00 00 00 00 02 01 00 01 6e 00 00 00 00 00 00 04 40"
        " 00 00 06 64 65 65 70 65 72 01 01 00 01 6e 00 00 00 00 00 00 00 80"
    )
