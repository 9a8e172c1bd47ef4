"""What is done ahead of replies while clients train, on a GPU's machine: it is used, and changes no byte."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fedsieve import local, rounds
from fedsieve.engine import loop, messages
from fedsieve.engine.messages import Inbox, Messages
from fedsieve.types import Sparse
from fedsieve.wire import Known, Manifest, decode, encode, order_ahead, positions
from methods_under_test import METHODS
from tiny import assert_same, tiny_run


@pytest.fixture
def ahead(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Known]]:
    """Order bases ahead on either side, as on a GPU's machine; of the last messages whose needs were known."""
    readers, begin, done, order = loop._readers, Inbox.__init__, list[Known](), messages.order_ahead
    with ThreadPoolExecutor(1) as thread:

        def with_thread(self: Inbox, own: Messages) -> None:
            begin(self, own)
            self.ahead = thread

        monkeypatch.setattr(loop, "_readers", lambda _: readers("cuda"))
        monkeypatch.setattr(Inbox, "__init__", with_thread)
        monkeypatch.setattr(messages, "order_ahead", lambda known, last: (order(known, last), done.append(last)))
        yield done


def answer(seed: int, base: dict[str, Tensor]) -> dict[str, Sparse]:
    """Return the top weights of a base that has changed a little."""
    generator = torch.Generator().manual_seed(seed)
    changed = {name: v + 0.01 * torch.randn(v.shape, generator=generator) for name, v in base.items()}
    return {name: Sparse.of(v, v.abs() >= v.abs().flatten().kthvalue(2700).values) for name, v in changed.items()}


def test_a_base_that_is_ordered_ahead_is_not_ordered_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """By encoder and decoder; the message is the same."""
    generator = torch.Generator().manual_seed(0)
    first = {name: torch.randn(60, 50, generator=generator) for name in ("a", "support of b")}
    first["a"] *= first["a"].abs() > 0.5
    second = {name: 1.0001 * v for name, v in first.items()}
    plain = Known(Manifest.of(first))
    last, known, unordered = replace(plain, base=first), replace(plain, base=second), replace(plain, base=second)
    encode(answer(1, first), last)
    order_ahead(known, last)
    assert known.orders.keys() == last.orders.keys()
    assert {"support of a", "sizes of support of b"} <= known.orders.keys()
    assert "digest" in vars(known)
    sent = answer(2, second)
    wanted = encode(sent, unordered)

    def again(*_: object) -> None:
        raise AssertionError("it is ordered a second time")

    assert {name: edge for name, (edge, _) in known.orders.items()} == {n: e for n, (e, _) in unordered.orders.items()}
    monkeypatch.setattr(positions, "_counted", again)
    message = encode(sent, known)
    assert message == wanted
    for name, value in decode(message, known).items():
        assert isinstance(value, Sparse)
        assert torch.equal(value.dense(), sent[name].dense())


@pytest.mark.parametrize("name", ["zerofl top_weights", "hetero_flash", "fedavg"])
def test_a_run_with_all_that_ahead_is_the_same(name: str, request: pytest.FixtureRequest) -> None:
    one = tiny_run(METHODS[name], rounds=3)
    if "hetero" in name:
        one = replace(one, task=replace(one.task, tiers=(0.4, 0.3, 0.3)))
    wanted = [*rounds(one, local(kernels="dense"))]
    done = request.getfixturevalue("ahead")
    for a, b in zip(rounds(one, local(kernels="dense")), wanted, strict=True):
        assert_same(a, b)
        assert (a.bytes_up, a.bytes_down) == (b.bytes_up, b.bytes_down)
    assert len(done) >= 3
