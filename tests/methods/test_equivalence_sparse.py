"""The package's SparseFedPP, PDST, NST and FLASH against the NumPy float64 derivation in ``reference_sparse.py``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fedsieve.client import training
from fedsieve.client.models import truncated_normal_
from fedsieve.client.training import params_of
from fedsieve.methods import FLASH, NST, PDST, HeteroFLASH, SparseFedPP, nst
from fedsieve.sparse.layers import powerprop_
from fedsieve.sparse.masks import GrowthShare
from fedsieve.types import Data, Device, Mask, Method, Params, RoundContext, Sparse, Tree, Update, rng
from fedsieve.wire import decode, encode
from oracles import reference as ref
from oracles import reference_sparse as sparse
from oracles.side_by_side import (
    BATCH,
    FLOAT32_ROUNDING,
    LR,
    ROUNDS,
    SAMPLED,
    SEED,
    assert_equal,
    batch,
    chance,
    dataset,
    float64,
    fresh,
    theta_state,
)

pytestmark = pytest.mark.usefixtures("one_thread")

# ---------------------------------------------------------------- both side by side: what they share


NAMES = tuple(f"{layer}.weight" for layer in ref.LAYERS)
INNER = ("conv2.weight", "fc1.weight")
"""The policy of the masked methods here: not every layer, so that the others are seen to stay dense."""
PATTERN = "conv2,fc1"
DRAW = 1
"""The seed of SparseFedPP's weights: one with which no top-k decision is narrow."""


@dataclass(frozen=True)
class Watched(Data):
    """Training examples that note the order in which they are used."""

    order: list[np.ndarray] = field(default_factory=list)

    def batch(self, index: Any, change: Any = None) -> tuple[torch.Tensor, torch.Tensor]:
        self.order.append(index.numpy().copy())
        return super().batch(index, change)


def numpy_masks(given: Mask) -> dict[str, sparse.Support]:
    return {name: own.numpy().copy() for name, own in given.items()}


@dataclass
class MaskUpdate:
    """One mask update of the package: what it started from, and what it drew."""

    before: dict[str, sparse.Support]
    p: float
    after: dict[str, sparse.Support]


@dataclass
class Seen:
    """What chance decided in one client's training: the batches, the first mask, and every update of it."""

    batches: list[np.ndarray] = field(default_factory=list)
    updates: list[MaskUpdate] = field(default_factory=list)

    def answer(self, client: int, t: int, weight_decay: float = 0.0) -> ref.Answer:
        """Return the reference's orders for the same client."""
        data = dataset()[client]
        x, y = data.x.numpy().astype(np.float64), data.y.numpy()
        return ref.Answer(x, y, self.batches, ref.learning_rate(max(t, 0), ROUNDS, *LR), weight_decay)


class Watch:
    """Runs clients of the package and writes down what chance decided."""

    def __init__(self, method: Method[Any], patch: pytest.MonkeyPatch, weight_decay: float = 0.0, epochs: int = 1):
        self.method, self.weight_decay, self.epochs = method, weight_decay, epochs
        self.resident, self.memory = method.prepare(fresh()), dict[int, dict[str, torch.Tensor]]()
        self.seen: dict[tuple[int, int], Seen] = {}
        self._updates: list[MaskUpdate] = []
        original = training.prune_regrow

        def prune_regrow(weights: Params, mask: Mask, p: float, share: GrowthShare, g: torch.Generator) -> Any:
            before = numpy_masks(mask)
            left, after = original(weights, mask, p, share, g)
            self._updates.append(MaskUpdate(before, p, numpy_masks(after)))
            return left, after

        patch.setattr(training, "prune_regrow", prune_regrow)

    def client(self, down: Tree, client: int, t: int) -> Update:
        """Return a client's update in round t = 0 .. (-1: the warm-up)."""
        data, self._updates = dataset()[client], []
        watched = Watched(data.x, data.y)
        device = Device(
            model=self.resident,
            data=watched,
            validation=data.subset(torch.arange(0)),
            lr=ref.learning_rate(max(t, 0), ROUNDS, *LR),
            epochs=self.epochs,
            batch=BATCH,
            momentum=0.0,
            weight_decay=self.weight_decay,
            rng=chance(t + 1, client),
            round=t + 1,
            rounds=ROUNDS,
            memory=self.memory.setdefault(client, {}),
        )
        update = self.method.client(decode(encode(down)), device)
        self.seen[t, client] = Seen(watched.order, self._updates)
        return replace(update, tree=decode(encode(update.tree)))


def replay(seen: Seen, by: str, done: list[bool]) -> sparse.Regrow:
    """Return the package's own choice of positions, after checking its numbers against the exact division."""
    updates = iter(seen.updates)

    def regrow(weights: ref.State, left: dict[str, sparse.Support], counts: sparse.Counts) -> dict[str, sparse.Support]:
        after = next(updates).after
        share = sparse.shares(weights, left, by)
        room = {name: int((~kept).sum()) for name, kept in left.items()}
        exact = sparse.regrowth(sum(counts.values()), share, room)
        grown = {name: int(after[name].sum() - kept.sum()) for name, kept in left.items()}
        assert sum(grown.values()) == sum(counts.values())
        for name, kept in left.items():
            assert not (kept & ~after[name]).any(), f"{name}: another weight was pruned"
            assert abs(grown[name] - exact[name]) < 1, name
        done.append(True)
        return after

    return regrow


# ---------------------------------------------------------------- powerpropagation and SparseFedPP


@pytest.mark.parametrize("alpha", [1.0, 1.25, 2.0])
@pytest.mark.parametrize(("zeros", "emptied"), [(0.0, None), (0.3, None), (0.9, None), (0.3, "fc1"), (0.3, "fc2")])
def test_powerprop_gradient_equals_reference(alpha: float, zeros: float, emptied: str | None) -> None:
    """Every gradient of one batch, and exactly as many activations kept as the effective weight's density asks for."""
    state, (x, y) = theta_state(11, zeros), batch(11)
    if emptied:
        state[f"{emptied}.weight"] *= 0
    model = fresh()
    model.load_state_dict({name: torch.tensor(v, dtype=torch.float32) for name, v in state.items()}, strict=False)
    model = powerprop_(model, NAMES, alpha, True).train()
    loss_ = F.cross_entropy(model(torch.tensor(x, dtype=torch.float32)), torch.tensor(y))
    loss_.backward()
    step = sparse.PowerPass(state, alpha=alpha)
    value, g = ref.cross_entropy(step.forward(x), y)
    wanted = step.backward(g)
    assert loss_.item() == pytest.approx(value, abs=1e-6)
    found = {name: p.grad for name, p in model.named_parameters()}
    assert_equal(wanted, {name: v.numpy().astype(np.float64) for name, v in found.items() if v is not None}, "gradient")
    for layer in ref.LAYERS:
        kept = step.kept[layer]
        density: Any = model.get_submodule(layer).densities
        assert round(density[2] * kept.size) == (np.count_nonzero(kept) if zeros else kept.size)
        if alpha > 1:
            assert (wanted[f"{layer}.weight"][state[f"{layer}.weight"] == 0] == 0).all()
    assert step.margin > FLOAT32_ROUNDING


def test_the_truncated_normal_initialisation() -> None:
    """Std sqrt(1 / fan_in) after the cut at 2 std of sqrt(1 / fan_in) / 0.8796 (METHODS sec. 5); the rest stays."""
    plain, model = float64(params_of(fresh())), fresh()
    truncated_normal_(model, rng(1, "initialisation"))
    drawn = float64(params_of(model))
    for name in NAMES:
        w, std = drawn[name], math.sqrt(1 / drawn[name][0].size)
        assert np.abs(w).max() <= 2 * std / 0.8796 * (1 + 1e-6)
        assert np.sqrt((w**2).mean()) == pytest.approx(std, rel=4 / math.sqrt(2 * w.size))
    assert all(np.array_equal(drawn[name], plain[name]) for name in plain.keys() - set(NAMES))


def test_sparsefedpp_keeps_the_weights_that_a_model_starts_from() -> None:
    """``th`` is the root of the given weights, so that what is deployed before round 1 is the given model."""
    state = SparseFedPP(0.8).init(fresh(), rng(1, "init"))
    theta, given = float64(state.params), float64(params_of(fresh()))
    for name in NAMES:
        np.testing.assert_allclose(theta[name], sparse.root(given[name], 1.25), rtol=1e-6)
    assert_equal(sparse.SparseFedPP(theta, 0.8).deployed(), float64(SparseFedPP(0.8).deploy(state)), "round 0")
    assert_equal(given, float64(SparseFedPP(0.8).deploy(state)), "the given weights")


@pytest.mark.parametrize(
    ("sp", "alpha", "activations", "decay", "epochs"),
    [(0.8, 1.25, True, 0.0, 2), (0.9, 2.0, True, 0.05, 1), (0.7, 1.0, True, 0.0, 2), (0.8, 1.25, False, 0.0, 2)],
)
def test_sparsefedpp_equals_reference(
    sp: float, alpha: float, activations: bool, decay: float, epochs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three rounds: ``th`` and everything else on the server, the deployed weights, and exact numbers sent."""
    method = SparseFedPP(sp, a=alpha, activations="pruned" if activations else "all")
    watch, state = Watch(method, monkeypatch, decay, epochs), method.init(fresh(), rng(DRAW, "init"))
    server = sparse.SparseFedPP(float64(state.params), sp, alpha, activations=activations)
    total = sum(state.params[name].numel() for name in NAMES)
    for t, clients in enumerate(SAMPLED):
        updates = [watch.client(method.broadcast(state, RoundContext()), c, t) for c in clients]
        for u in updates:
            sent = [u.tree[name] for name in NAMES]
            assert sum(len(v.values) for v in sent if isinstance(v, Sparse)) == math.ceil(ref.density(sp) * total)
        state = method.aggregate(state, iter(updates), RoundContext())
        server.round([watch.seen[t, c].answer(c, t, decay) for c in clients])
        assert_equal(server.state, float64(state.params), f"round {t}")
        assert_equal(server.deployed(), float64(method.deploy(state)), f"round {t}, deployed")
        assert server.margin > FLOAT32_ROUNDING, "a top-k decision that rounding could turn: take another seed"


# ---------------------------------------------------------------- PDST, NST, FLASH


def uniform_counts(state: ref.State, d: str) -> sparse.Counts:
    return {name: math.ceil(Fraction(d) * state[name].size) for name in INNER}


def counts(given: sparse.Masks) -> sparse.Counts:
    return {name: int(own.sum()) for name, own in given.items()}


@pytest.mark.parametrize(
    ("decay", "epochs", "weighting"), [(0.0, 2, "samples"), (0.05, 1, "samples"), (0.0, 1, "equal")]
)
def test_pdst_equals_reference(decay: float, epochs: int, weighting: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    method = PDST(0.3, policy=PATTERN, weighting=weighting)
    watch, state = Watch(method, monkeypatch, decay, epochs), method.init(fresh(), rng(SEED, "init"))
    server, mask_ = float64(state.params), numpy_masks(state.mask)
    assert counts(mask_) == uniform_counts(server, "0.3")
    assert_equal(sparse.masked(float64(params_of(fresh())), mask_), server, "init")
    for t, clients in enumerate(SAMPLED):
        updates = [watch.client(method.broadcast(state, RoundContext()), c, t) for c in clients]
        state = method.aggregate(state, iter(updates), RoundContext())
        answers = [watch.seen[t, c].answer(c, t, decay) for c in clients]
        server = sparse.pdst_round(server, mask_, answers, equal=weighting == "equal")
        assert_equal(server, float64(state.params), f"round {t}")
        assert_equal(server, float64(method.deploy(state)), f"round {t}, deployed")
    assert sparse.mismatch(mask_, numpy_masks(state.mask)) == 0


def first_masks(state: ref.State, seen: dict[int, Mask], common: sparse.Masks | None) -> dict[int, Any]:
    """Return every client's first mask, after checking that each is of uniform density, and the common or its own."""
    first = {c: numpy_masks(own) for c, own in seen.items()}
    for c, own in first.items():
        assert counts(own) == uniform_counts(state, "0.3")
        if common is None:
            assert all(sparse.mismatch(own, other) > 0.3 for d, other in first.items() if d != c)
        else:
            assert sparse.mismatch(own, common) == 0
    return first


@pytest.mark.parametrize(
    ("share", "epochs", "p0", "first_mask"),
    [
        ("mean", 1, 0.25, "common"),
        ("sum", 1, 0.3, "common"),
        ("mean", 3, 0.25, "common"),
        ("mean", 1, 0.25, "independent"),
    ],
)
def test_nst_equals_reference(
    share: Any, epochs: int, p0: float, first_mask: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three rounds: the server, every client's mask, and the number that each update pruned and regrew."""
    method = NST(0.3, p0, share=share, first_mask=first_mask, policy=PATTERN)
    watch, state = Watch(method, monkeypatch, epochs=epochs), method.init(fresh(), rng(SEED, "init"))
    used, original = dict[int, Mask](), nst.train_on_mask

    def train_on_mask(device: Device, mask: Mask, *rest: Any) -> Any:
        used[current] = mask
        return original(device, mask, *rest)

    monkeypatch.setattr(nst, "train_on_mask", train_on_mask)
    initial, common = float64(params_of(fresh())), None
    if first_mask == "common":
        common = numpy_masks(state.mask)
        assert counts(common) == uniform_counts(initial, "0.3")
        initial = sparse.masked(initial, common)
    assert_equal(initial, float64(state.params), "init")
    server, done = sparse.NST(initial, {}, p0, epochs), list[bool]()
    for t, clients in enumerate(SAMPLED):
        updates, used = [], {}
        for current in clients:
            updates.append(watch.client(method.broadcast(state, RoundContext()), current, t))
        state = method.aggregate(state, iter(updates), RoundContext())
        new = {c: own for c, own in used.items() if c not in server.masks}
        server.masks |= first_masks(server.state, new, common)
        for c in clients:
            assert sparse.mismatch(server.masks[c], numpy_masks(used[c])) == 0, "a client forgot its mask"
        chances = {c: replay(watch.seen[t, c], share, done) for c in clients}
        server.round({c: watch.seen[t, c].answer(c, t) for c in clients}, chances)
        assert_equal(server.state, float64(state.params), f"round {t}")
        for c, u in zip(clients, updates, strict=True):
            sent = {name: v for name in INNER if isinstance(v := u.tree[name], Sparse)}
            for name, own in server.masks[c].items():
                np.testing.assert_array_equal(sent[name].index, np.flatnonzero(own))
            assert sum(counts(server.masks[c]).values()) == sum(uniform_counts(server.state, "0.3").values())
        assert server.margin > FLOAT32_ROUNDING, "a pruning that rounding could turn: take another seed"
    updates_made = sum(len(seen.updates) for seen in watch.seen.values())
    assert len(done) == updates_made == (9 if epochs == 1 else 18)


def warm_up(
    watch: Watch, state: Any, clients: tuple[int, ...], epochs: int, share: str
) -> tuple[Any, list[dict[str, Fraction]]]:
    """Run stage 1 on both sides; return the package's state of stage 2 and the reference's clients' densities."""
    updates = [watch.client(watch.method.broadcast(state, RoundContext()), c, -1) for c in clients]
    start, mask_, answers = float64(state.params), numpy_masks(state.mask), []
    for c in clients:
        done = list[bool]()
        seen = watch.seen[-1, c]
        learner = sparse.Learner(start, mask_, 0.25, epochs, replay(seen, share, done))
        learner.train(seen.answer(c, -1))
        assert learner.margin > FLOAT32_ROUNDING, "a pruning that rounding could turn: take another seed"
        assert len(done) == len(seen.updates) == epochs - 1
        answers.append(sparse.densities(learner.masks))
    return watch.method.aggregate(state, iter(updates), RoundContext()), answers


def assert_drawn(found: sparse.Masks, wanted: Mapping[str, Fraction]) -> None:
    """Compare the numbers of weights, exactly: ceil(d_l * k_l), as every density here is rounded."""
    assert counts(found) == {name: math.ceil(d * found[name].size) for name, d in wanted.items()}


@pytest.mark.parametrize(("share", "excess", "d"), [("mean", "redistribute", "0.3"), ("sum", "clip", "0.3")])
def test_flash_equals_reference(share: Any, excess: Any, d: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stage 1: every client's pruning and its layer densities, the re-calibrated counts. Stage 2: three rounds."""
    method = FLASH(float(d), c_d=3, E_d=4, share=share, excess=excess, policy=PATTERN)
    watch, state = Watch(method, monkeypatch), method.init(fresh(), rng(SEED, "init"))
    initial, first = float64(params_of(fresh())), numpy_masks(state.mask)
    assert counts(first) == uniform_counts(initial, d)
    state, answers = warm_up(watch, state, (0, 2, 3), 4, share)
    sizes = {name: initial[name].size for name in INNER}
    (wanted,) = sparse.warmed_up(answers, sizes, [Fraction(d)], excess == "redistribute")
    mask_ = numpy_masks(state.mask)
    assert_drawn(mask_, wanted)
    assert sparse.mismatch(first, mask_) > 0.3, "the mask is drawn afresh"
    server = float64(state.params)
    assert_equal(sparse.masked(initial, mask_), server, "the initial weights on the new mask")
    for t, clients in enumerate(SAMPLED):
        updates = [watch.client(method.broadcast(state, RoundContext()), c, t) for c in clients]
        state = method.aggregate(state, iter(updates), RoundContext())
        server = sparse.pdst_round(server, mask_, [watch.seen[t, c].answer(c, t) for c in clients])
        assert_equal(server, float64(state.params), f"round {t}")
    assert sparse.mismatch(mask_, numpy_masks(state.mask)) == 0
    assert not any(watch.seen[t, c].updates for t, clients in enumerate(SAMPLED) for c in clients)


@pytest.mark.parametrize("excess", ["redistribute", "clip"])
def test_flash_takes_sensitivities_alike_and_recalibrates_them(excess: Any) -> None:
    """Answers made up, from unequal numbers of examples: by eq. 2 conv2 overflows, fc1 gets its excess or not."""
    method = FLASH(0.6, c_d=3, excess=excess, policy=PATTERN)
    state = method.init(fresh(), rng(SEED, "init"))
    told = [
        (Fraction("0.5"), Fraction("0.1"), 13),
        (Fraction("0.75"), Fraction("0.125"), 10),
        (Fraction(1), Fraction("0.2"), 5),
    ]
    updates = [Update({"sensed": torch.tensor([float(a), float(b)], dtype=torch.float64)}, n) for a, b, n in told]
    found = numpy_masks(method.aggregate(state, iter(updates), RoundContext()).mask)
    answers = [dict(zip(INNER, (a, b), strict=True)) for a, b, _ in told]
    sizes = {name: state.params[name].numel() for name in INNER}
    (wanted,) = sparse.warmed_up(answers, sizes, [Fraction("0.6")], excess == "redistribute")
    assert wanted["conv2.weight"] == 1
    assert_drawn(found, wanted)
    assert (sum(counts(found).values()) == math.ceil(0.6 * sum(sizes.values()))) == (excess == "redistribute")


TIERS = (1, 0, 2, 2)
"""The device class of each client; the last round has none of the first."""


def test_hetero_flash_equals_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    targets = ("0.5", "0.3", "0.1")
    method = HeteroFLASH(tuple(map(float, targets)), c_d=2, E_d=3, policy=PATTERN)
    watch, state = Watch(method, monkeypatch), method.init(fresh(), rng(SEED, "init"))
    initial = float64(params_of(fresh()))
    state, answers = warm_up(watch, state, (1, 3), 3, "mean")
    sizes = {name: initial[name].size for name in INNER}
    found = [numpy_masks(state.mask_of(tier)) for tier in range(3)]
    for own, wanted in zip(found, sparse.warmed_up(answers, sizes, [Fraction(d) for d in targets]), strict=True):
        assert_drawn(own, wanted)
    for large, small in pairwise(found):
        assert not any((small[name] & ~large[name]).any() for name in INNER), "not nested"
    server = float64(state.params)
    assert_equal(sparse.masked(initial, found[0]), server, "the initial weights on the largest mask")
    for t, clients in enumerate(SAMPLED):
        updates = [watch.client(method.broadcast(state, RoundContext(tier=TIERS[c])), c, t) for c in clients]
        state, before = method.aggregate(state, iter(updates), RoundContext()), server
        answers_ = [watch.seen[t, c].answer(c, t) for c in clients]
        server = sparse.hetero_round(server, [found[TIERS[c]] for c in clients], answers_)
        assert_equal(server, float64(state.params), f"round {t}")
    only_largest = found[0]["fc1.weight"] & ~found[1]["fc1.weight"]
    np.testing.assert_array_equal(server["fc1.weight"][only_largest], before["fc1.weight"][only_largest])
