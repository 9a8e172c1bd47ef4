"""The package's NST against the NumPy float64 derivation in ``reference_sparse.py``."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fedsieve.client.training import params_of
from fedsieve.methods import NST, nst
from fedsieve.types import Device, Mask, RoundContext, Sparse, rng
from oracles import reference as ref
from oracles import reference_sparse as sparse
from oracles.side_by_side import (
    FLOAT32_ROUNDING,
    SAMPLED,
    SEED,
    assert_equal,
    float64,
    fresh,
)
from oracles.watch import (
    INNER,
    PATTERN,
    Watch,
    counts,
    numpy_masks,
    replay,
    uniform_counts,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def first_masks(state: ref.State, seen: dict[int, Mask], common: sparse.Masks | None, unit: int) -> dict[int, Any]:
    """Return every client's first mask, after checking that each is of uniform density, and the common or its own."""
    first = {c: numpy_masks(own) for c, own in seen.items()}
    for c, own in first.items():
        assert counts(own, unit) == uniform_counts(state, "0.3", unit)
        if common is None:
            assert all(sparse.mismatch(own, other) > 0.3 for d, other in first.items() if d != c)
        else:
            assert sparse.mismatch(own, common) == 0
    return first


@pytest.mark.parametrize(
    ("share", "epochs", "p0", "first_mask", "unit"),
    [
        ("mean", 1, 0.25, "common", 1),
        ("sum", 1, 0.3, "common", 1),
        ("mean", 3, 0.25, "common", 1),
        ("mean", 1, 0.25, "independent", 1),
        ("mean", 3, 0.25, "common", 4),
        ("mean", 1, 0.25, "independent", 4),
    ],
)
def test_nst_equals_reference(
    share: Any, epochs: int, p0: float, first_mask: Any, unit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three rounds: the server, every client's mask, and the number that each update pruned and regrew.

    In units of four channels the last groups have two: of six and ten channels.
    """
    method = NST(0.3, p0, share=share, first_mask=first_mask, policy=PATTERN, unit=unit)
    watch, state = Watch(method, monkeypatch, epochs=epochs), method.init(fresh(), rng(SEED, "init"))
    used, original = dict[int, Mask](), nst.train_on_mask

    def train_on_mask(device: Device, mask: Mask, *rest: Any) -> Any:
        used[current] = mask
        return original(device, mask, *rest)

    monkeypatch.setattr(nst, "train_on_mask", train_on_mask)
    initial, common = float64(params_of(fresh())), None
    if first_mask == "common":
        common = numpy_masks(state.mask)
        assert counts(common, unit) == uniform_counts(initial, "0.3", unit)
        initial = sparse.masked(initial, common)
    assert_equal(initial, float64(state.params), "init")
    server, done = sparse.NST(initial, {}, p0, epochs, unit), list[bool]()
    for t, clients in enumerate(SAMPLED):
        updates, used = [], {}
        for current in clients:
            updates.append(watch.client(method.broadcast(state, RoundContext()), current, t))
        state = method.aggregate(state, iter(updates), RoundContext())
        new = {c: own for c, own in used.items() if c not in server.masks}
        server.masks |= first_masks(server.state, new, common, unit)
        for c in clients:
            assert sparse.mismatch(server.masks[c], numpy_masks(used[c])) == 0, "a client forgot its mask"
        chances = {c: replay(watch.seen[t, c], share, done, unit) for c in clients}
        server.round({c: watch.seen[t, c].answer(c, t) for c in clients}, chances)
        assert_equal(server.state, float64(state.params), f"round {t}")
        for c, u in zip(clients, updates, strict=True):
            sent = {name: v for name in INNER if isinstance(v := u.tree[name], Sparse)}
            for name, own in server.masks[c].items():
                np.testing.assert_array_equal(sent[name].index, np.flatnonzero(own))
            assert sum(counts(server.masks[c], unit).values()) == sum(
                uniform_counts(server.state, "0.3", unit).values()
            )
        assert server.margin > FLOAT32_ROUNDING, "a pruning that rounding could turn: take another seed"
    updates_made = sum(len(seen.updates) for seen in watch.seen.values())
    assert len(done) == updates_made == (9 if epochs == 1 else 18)
