"""FedDST beside a NumPy reference: prune and grow by itself, then rounds side by side; and its rules."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch

from fedsieve import Data, local, rounds
from fedsieve.client.gradients import gradient
from fedsieve.client.training import load_
from fedsieve.methods import FedDST
from fedsieve.server.aggregate import mean_over_holders
from fedsieve.sparse.policy import density_within, erdos_renyi_sparsity
from fedsieve.sparse.regrowth import prune_grow
from fedsieve.types import Device, InputError, RoundContext, Sparse, Tree, rng
from oracles import reference as ref
from oracles import reference_dynamic as dynamic
from oracles.lies import Reply, changed
from oracles.side_by_side import BATCH, EPOCHS, SAMPLED, SEED, SIZES, assert_equal, chance, dataset, float64, fresh
from tiny import TinyNet, tiny_run

pytestmark = pytest.mark.usefixtures("one_thread")
LR, DECAY, DENSITY, ALPHA = 0.1, 0.02, 0.4, 0.5


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("growth", ["inactive", "all"])
@pytest.mark.parametrize("ties", [False, True])
def test_prune_and_grow_equals_reference(seed: int, growth: Any, ties: bool) -> None:
    """Layers of all sizes; of rounded numbers many are equal, and the earlier of them wins."""
    g = np.random.default_rng(seed)
    shapes = [(3, 2, 3, 3), (7, 5), (1, 1), (4, 9), (6, 2)]
    layers = {f"l{i}": g.normal(size=(2, *shape)).astype(np.float32) for i, shape in enumerate(shapes)}
    layers = {name: np.round(v * 2) / 2 if ties else v for name, v in layers.items()}
    masks = {name: g.random(v.shape[1:]) < 0.5 for name, v in layers.items()}
    masks["l3"][:], masks["l4"][:] = False, True  # a layer that is empty, and one that is full
    sizes = [int(own.sum()) for own in masks.values()]
    rests = [0 if i == 1 else k // 2 for i, k in enumerate(sizes)]  # of one layer all is pruned
    counts = [max(k, 3 * (i == 3), 1) for i, k in enumerate(sizes)]
    weights = {name: torch.from_numpy(v[0] * masks[name]) for name, v in layers.items()}
    left, after = prune_grow(
        weights,
        {name: torch.from_numpy(own) for name, own in masks.items()},
        {name: torch.from_numpy(v[1]) for name, v in layers.items()},
        torch.tensor(rests),
        torch.tensor(counts),
        growth,
    )
    for i, name in enumerate(layers):
        w, mask, _ = dynamic.prune_and_grow(
            weights[name].numpy(), masks[name], layers[name][1], rests[i], counts[i], growth == "all"
        )
        assert (after[name].numpy() == mask).all()
        assert (left[name].numpy() == w).all()
        assert not left[name][~after[name]].any()
        if growth == "inactive":
            assert int(after[name].sum()) == counts[i]


Events = tuple[list[np.ndarray[Any, Any]], int, np.ndarray[Any, Any]]


def events(t: int, c: int, adjust_epoch: int) -> Events:
    """Return a client's batches, after how many its mask moves, and the batch whose gradient moves it."""
    g, orders, after = chance(t, c), list[Any](), 0
    probe = np.zeros(0, dtype=np.int64)
    for epoch in range(1, EPOCHS + 1):
        orders += [part.numpy() for part in torch.randperm(SIZES[c], generator=g).split(BATCH)]
        if epoch == (adjust_epoch or EPOCHS):
            after, probe = len(orders), torch.randperm(SIZES[c], generator=g)[:BATCH].numpy()
    return orders, after, probe


def device(model: torch.nn.Module, t: int, c: int) -> Device:
    own = dataset()[c]
    return Device(
        model=model,
        data=own,
        validation=own.subset(torch.arange(0)),
        lr=LR,
        epochs=EPOCHS,
        batch=BATCH,
        momentum=0.0,
        weight_decay=DECAY,
        rng=chance(t, c),
        round=t,
        rounds=len(SAMPLED),
    )


@pytest.mark.parametrize("adjust_epoch", [0, 1])
@pytest.mark.parametrize("growth", ["inactive", "all"])
def test_rounds_equal_the_reference(adjust_epoch: int, growth: Any) -> None:
    """Masks move in every round, by ever less: every weight, mask and running statistic of the server."""
    layers = ",".join(ref.LAYERS)
    method = FedDST(DENSITY, policy=layers, alpha=ALPHA, interval=1, end=1.0, adjust_epoch=adjust_epoch, growth=growth)
    model, state = fresh(), method.init(fresh(), rng(SEED, "init"))
    theirs = dynamic.Dynamic(float64(fresh().state_dict()), {}, DENSITY, growth == "all")
    for name, k in dynamic.erk_counts(theirs.shapes, DENSITY).items():
        best, _ = dynamic.ranked(theirs.state[name], range(theirs.state[name].size), k)
        theirs.masks[name] = np.isin(np.arange(theirs.state[name].size), best).reshape(theirs.state[name].shape)
    theirs.state = theirs.masked(theirs.state, theirs.masks)
    for t, clients in enumerate(SAMPLED, start=1):
        context = RoundContext(t, len(SAMPLED), len(SIZES))
        down = method.broadcast(state, context)
        updates = [method.client(down, device(model, t, c)) for c in clients]
        for update in updates:
            method.expected(state, context).check(update.tree)
        before, state = state.mask, method.aggregate(state, iter(updates), context)
        own = [events(t, c, adjust_epoch) for c in clients]
        answers = [
            ref.Answer(dataset()[c].x.numpy().astype(np.float64), dataset()[c].y.numpy(), orders, LR, DECAY)
            for c, (orders, _, _) in zip(clients, own, strict=True)
        ]
        z = ALPHA / 2 * (1 + math.cos(math.pi * (t - 1) / len(SAMPLED)))
        theirs.round(answers, z, [after for _, after, _ in own], [probe for _, _, probe in own])
        assert theirs.margin > 1e-8, "a decision that rounding could turn: take another seed"
        assert all((state.mask[name].numpy() == theirs.masks[name]).all() for name in dynamic.WEIGHTS)
        assert_equal(theirs.state, float64(state.params), f"round {t}")
        assert any((before[name] != own).any() for name, own in state.mask.items())


def test_weighted_holders() -> None:
    models = [({"w": torch.tensor([1.0, 2.0, 0.0])}, {"w": torch.tensor([True, True, False])})]
    models += [({"w": torch.tensor([4.0, 0.0, 0.0])}, {"w": torch.tensor([True, False, False])})]
    old = {"w": torch.tensor([9.0, 9.0, 9.0])}
    assert mean_over_holders(iter(models), old, [3, 1])["w"].tolist() == [1.75, 2.0, 9.0]
    assert mean_over_holders(iter(models), old)["w"].tolist() == [2.5, 2.0, 9.0]


def test_masks_move_in_the_papers_rounds_by_a_cosine() -> None:
    """Rounds count from 0 there: 1, 11, 21, ... below T / 2."""
    method = FedDST(alpha=0.4)
    assert [t for t in range(1, 101) if method.rate(t, 100)] == [2, 12, 22, 32, 42]
    assert method.rate(12, 44) == pytest.approx(0.2)
    assert FedDST(alpha=0.4, squared=True).rate(12, 44) == pytest.approx(0.08)
    assert method.rate(12, 22) == 0


def test_density_of_the_policy_or_of_all_parameters() -> None:
    model, sizes = TinyNet(), {n: w.numel() for n, w in TinyNet().named_parameters()}
    names = ("conv2.weight", "fc1.weight")
    within = sum(sizes[n] for n in names)
    for of, total in (("policy", within), ("all", sum(sizes.values()))):
        method = FedDST(0.3, of=of, policy="conv2,fc1")  # type: ignore[arg-type]
        state = method.init(model, rng(0, "init"))
        dense = 0 if of == "policy" else sum(sizes.values()) - within
        assert (int(state.counts.sum()) + dense) / total == pytest.approx(0.3, abs=2 / total)
    assert density_within(model, names, 1.0) == 1
    with pytest.raises(
        InputError, match=r"density 0\.05 of all parameters leaves the policy none: the others are 0\.086"
    ):
        FedDST(0.05, of="all", policy="conv2,fc1").init(model, rng(0, "init"))


def test_no_layer_is_denser_than_full_or_sparser_than_empty() -> None:
    shapes = {"a": (1, 1, 1, 1), "b": (2, 2), "c": (64, 64)}
    for q in (0.01, 0.1, 0.5, 0.9, 1.0):
        densities = erdos_renyi_sparsity({n: torch.zeros(s) for n, s in shapes.items()}, tuple(shapes), q)
        assert all(0 <= d <= 1 for d in densities.values())


def test_a_gradient_at_all_positions_of_any_inputs() -> None:
    """Dictionaries, and a loss of one's own; running statistics, and the weights, stay."""

    class Two(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = TinyNet()

        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.net(a) * b[:, None]
            return out

    model = Two()
    data = Data({"a": torch.randn(8, 2, 6, 6), "b": torch.randn(8)}, torch.randn(8, 3))
    own = device(model, 1, 0)
    own.data, own.loss = data, torch.nn.functional.mse_loss
    before = {name: v.clone() for name, v in model.state_dict().items()}
    index = torch.tensor([5, 1, 2])
    g = gradient(own, index)
    loss = torch.nn.functional.mse_loss(model(data.x["a"][index], data.x["b"][index]), data.y[index])  # type: ignore[index,call-overload]
    loss.backward()
    assert set(g) == {name for name, _ in model.named_parameters()}
    for name, w in model.named_parameters():
        torch.testing.assert_close(g[name], w.grad)
    load_(model, {name: v for name, v in before.items() if v.is_floating_point()})
    gradient(own, index)
    assert all(torch.equal(v, before[name]) for name, v in model.state_dict().items() if "tracked" not in name)


def test_who_leaves_the_mask_in_a_round_that_does_not_move_it_is_refused() -> None:
    """In one that does, any positions are honest."""

    def act(t: int, client: int, down: Tree, reply: Reply) -> Iterable[tuple[int, Tree]]:
        value = reply["tree"]["fc1.weight"]
        if client == run_.sample(t)[0] and isinstance(value, Sparse):
            free = torch.nonzero(~value.support.view(-1)).squeeze(1)[:1]
            index = torch.cat([value.index[1:], free]).sort().values
            reply["tree"]["fc1.weight"] = Sparse(value.values, index, value.shape)
        yield client, reply

    run_ = tiny_run(FedDST(0.3, interval=2, end=1.0))
    refused = [[one.reason for one in r.refused] for r in rounds(run_, changed(act))]
    assert refused == [["fc1.weight is not on the server's mask"], [], ["fc1.weight is not on the server's mask"], []]


def test_impossible_settings_are_named() -> None:
    for changes, words in (
        ({"density": 0}, "density must lie in"),
        ({"alpha": 1.0}, "alpha must lie in"),
        ({"interval": 0}, "interval must be 1 or more"),
    ):
        with pytest.raises(InputError, match=words):
            FedDST(**changes)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="adjust_epoch is 2 but clients train 1 epochs"):
        tiny_run(FedDST(adjust_epoch=2))


def test_the_kernels_move_masks_as_pytorch_does() -> None:
    one, other = (
        [*rounds(tiny_run(FedDST(0.3, interval=1, end=1.0, adjust_epoch=1), epochs=2), local(kernels=kernels))][-1]
        for kernels in ("dense", "sparse")
    )
    assert one.multiply_adds == pytest.approx(other.multiply_adds)
    for name, value in one.state.params.items():
        torch.testing.assert_close(other.state.params[name], value, rtol=0, atol=1e-4)
