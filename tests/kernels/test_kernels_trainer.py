"""Whole training steps beside the masked dense step in float64: the four models, and nets with every odd turn."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedsieve.client.models import MODELS
from fedsieve.kernels import Trainer, library, weights
from fedsieve.kernels.products import SwatProduct
from fedsieve.sparse.layers import swat_
from nets import NETS, Net, biased, chain
from stepping import Sgd, assert_as_dense, batches, dense, distance, masks, trained

pytestmark = pytest.mark.usefixtures("native")
SHAPES = {
    "resnet18": (3, 32, 32),
    "leaf_cnn": (1, 28, 28),
    "mnist_net": (1, 28, 28),
    "digits_net": (1, 8, 8),
    "lenet5": (3, 32, 32),
    "feddst_net": (3, 32, 32),
}
SHAPES["mnist_net_softmax"] = SHAPES["mnist_net"]
BRISK = Sgd(0.05, 0.9, 1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
def test_the_models(name: str) -> None:
    torch.manual_seed(0)
    model = MODELS[name](SHAPES[name][0], 4)
    trainer = assert_as_dense(model, SHAPES[name], (3, 2) if name == "resnet18" else (17, 5), BRISK)
    assert trainer.fallbacks == (["softmax"] if "softmax" in name else [])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "fallbacks"), [("resnet50", 0), ("resnet18_groupnorm", 0), ("mobilenet_v2", 0)])
def test_models_of_further_layers(name: str, fallbacks: int) -> None:
    torch.manual_seed(0)
    trainer = assert_as_dense(MODELS[name](3, 4), (3, 32, 32), (3,), BRISK)
    assert len(trainer.fallbacks) == fallbacks


@pytest.mark.parametrize("name", NETS)
def test_nets(name: str) -> None:
    make, shape = NETS[name]
    torch.manual_seed(0)
    assert assert_as_dense(make(), shape, (17, 5, 17), BRISK).fallbacks == []


@pytest.mark.parametrize("n", [1, 2, 15, 16, 17, 33])
def test_batches(n: int) -> None:
    torch.manual_seed(0)
    model = NETS["a value used three times"][0]()
    assert_as_dense(model, (2, 6, 5), (n, 1, n, n), Sgd(0.05, 0.5))


@pytest.mark.parametrize("density", [0.0, 0.02, 1.0, None])
def test_densities(density: float | None) -> None:
    torch.manual_seed(0)
    model = NETS["a value used three times"][0]()
    mask = {} if density is None else masks(model, density)
    trainer = assert_as_dense(model, (2, 6, 5), (17, 17), BRISK, mask)
    assert trainer.weights.sparse == (sum(int(m.sum()) for m in mask.values()) if mask else 108 + 324 + 900 + 720)


def test_relu6_behind_products_whose_rows_share_their_entries() -> None:
    """Dense ones, as all rows have all entries; the bias takes about half of the numbers beyond 6."""
    torch.manual_seed(0)
    layers = [biased(2, 16), nn.ReLU6(), biased(16, 9), nn.ReLU6()]
    for conv in (layers[0], layers[2]):
        nn.init.constant_(conv.bias, 6.0)  # type: ignore[arg-type]
    assert assert_as_dense(chain(270, *layers), (2, 6, 5), (17, 5, 17), Sgd(0.01), {}).fallbacks == []


@pytest.mark.parametrize("name", ["a value used three times", "5x5 stride 2", "padded means", "linear layers"])
def test_bf16_storage(name: str) -> None:
    """Rounding by 2^-8 turns the sign of some 2^-8 of what ReLU sees, and so a part of gradients of 1 / sqrt(2^8)."""
    make, shape = NETS[name]
    torch.manual_seed(0)
    model = make()
    mask, data = masks(model), batches(shape, (33, 5, 32))
    exact = dense(model, mask, data, Sgd(), torch.float64)
    start = dense(model, mask, [], Sgd(), torch.float32)
    found = distance(trained(model, mask, data, Sgd(), "bf16")[0], exact, start)
    assert max(found.values()) < 1 / 16, found
    assert max(found.values()) > 1e-5


def further() -> nn.Module:
    """The same with depthwise convolutions, GroupNorm, other activations and concatenation."""
    layers = {
        "a": nn.Conv2d(2, 6, 3, padding=1),
        "b": nn.Conv2d(6, 12, 3, 2, 1, groups=6),
        "c": nn.Conv2d(12, 5, 5, 2, 2),
    }
    norms = {"p": nn.GroupNorm(2, 6), "q": nn.BatchNorm2d(12), "r": nn.GroupNorm(1, 5)}

    def run(m: Net, x: Tensor) -> Tensor:
        x = F.silu(m.b(F.relu6(m.p(m.a(x)))))
        return m.fc(torch.cat([F.gelu(m.r(m.c(m.q(x)))), F.max_pool2d(x, 2)], 1).flatten(1))

    return Net(run, **layers, **norms, fc=nn.Linear(17 * 8 * 8, 4))


def large() -> nn.Module:
    """A net whose maps are divided by lines, by blocks and by channels."""
    convs = [nn.Conv2d(2, 6, 3, padding=1), nn.Conv2d(6, 7, 3, 2, 1), nn.Conv2d(7, 5, 5, 2, 2)]
    layers = [part for conv in convs for part in (conv, nn.BatchNorm2d(conv.out_channels), nn.ReLU())]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(5 * 8 * 8, 4))


@pytest.mark.parametrize("make", [NETS["a value used three times"][0], large, further])
@pytest.mark.parametrize("storage", ["fp32", "bf16"])
@pytest.mark.parametrize("unit", [1, 4, 8])
def test_bits_do_not_depend_on_threads(unit: int, storage: str, make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model, shape = make(), (2, 32, 32) if make in (large, further) else (2, 6, 5)
    mask = {name: own[::unit].repeat_interleave(unit, 0)[: len(own)] for name, own in masks(model).items()}
    found = []
    for threads in (1, 2, 3, 4):
        torch.set_num_threads(threads)
        assert library.get_num_threads() == threads
        found.append(trained(model, mask, batches(shape, (17, 5, 65)), BRISK, storage)[0].state_dict())
    for other in found[1:]:
        assert all(torch.equal(x, other[name]) for name, x in found[0].items())


@pytest.mark.parametrize("storage", ["fp32", "bf16"])
@pytest.mark.parametrize("name", [*NETS, "large"])
def test_low_memory_training_is_the_same(name: str, storage: str) -> None:
    torch.manual_seed(0)
    make, shape = (large, (2, 32, 32)) if name == "large" else NETS[name]
    model, data = make(), batches(shape, (17, 5, 33))
    mask = masks(model)
    full, low = (trained(model, mask, data, BRISK, storage, low_memory) for low_memory in (False, True))
    assert all(torch.equal(x, low[0].state_dict()[name]) for name, x in full[0].state_dict().items())
    assert low[1].bytes <= full[1].bytes


def test_the_loss_is_the_batchs_mean() -> None:
    torch.manual_seed(0)
    model = NETS["5x5 stride 2"][0]()
    x, y = batches((2, 9, 5), (7,))[0]
    trainer = Trainer(model, {}, 20, lr=0.1)
    with torch.no_grad():
        want = F.cross_entropy(copy.deepcopy(model).double()(x.double()), y)
    assert abs(float(trainer.step(x, y)) - float(want)) < 1e-6


def test_multiply_adds_are_those_of_a_full_batch() -> None:
    """Forward, weight gradient and, but for the first layer, input gradient; at the masks' densities, and dense."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4))
    mask = {"0.weight": torch.arange(48).view(6, 8) % 4 == 0, "2.weight": torch.arange(24).view(4, 6) % 3 == 0}
    trainer = Trainer(model, mask, 10, lr=0.1)
    for x, y in batches((8,), (10, 5)):
        trainer.step(x, y)
    assert trainer.multiply_adds == (10 * (2 * 12 + 3 * 8), 10 * (2 * 48 + 3 * 24))


def test_of_equal_weights_no_more_are_kept_than_the_cut_says() -> None:
    """Weights of four magnitudes: most are equal to the threshold, and the first of them stay, as in PyTorch."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 4))
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight.copy_((torch.rand_like(layer.weight) * 8 - 4).round() / 16)
    data = batches((40,), (17,))
    swat_(model, {"0.weight": 0.3, "2.weight": 0.2}, 1)
    plain = dense(model, {}, data, Sgd(0.1), torch.float32).state_dict()
    ours, _ = trained(model, {}, data, Sgd(0.1))
    assert all(torch.allclose(value, plain[name], atol=1e-6) for name, value in ours.state_dict().items())


UNDECAYED = {
    "BatchNorm twice": NETS["BatchNorm twice"],
    "a bias before BatchNorm": NETS["a bias before BatchNorm"],
    "a sum with BatchNorm on both sides": NETS["a sum with BatchNorm on both sides"],
    "GroupNorm between": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 6, 3, padding=1), nn.GroupNorm(2, 6), nn.ReLU(), nn.Conv2d(6, 5, 3, bias=False),
            nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(), nn.Linear(60, 4),
        ),
        (2, 6, 5),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", UNDECAYED)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_norms_need_not_be_decayed(name: str, momentum: float) -> None:
    """A decay so strong that a norm's weight that took it would be far off."""
    make, shape = UNDECAYED[name]
    torch.manual_seed(0)
    model = make()
    assert_as_dense(model, shape, (17, 5, 17), Sgd(0.05, momentum, 0.5, norms=False))
    data = batches(shape, (17, 5))
    decayed, undecayed = (
        dense(model, {}, data, Sgd(0.05, momentum, 0.5, norms), torch.float64) for norms in (True, False)
    )
    assert max(distance(decayed, undecayed, model).values()) > 0.1


def test_training_again_begins_with_the_models_weights() -> None:
    torch.manual_seed(0)
    model, data = NETS["5x5 stride 2"][0](), batches((2, 9, 5), (7, 5))
    trainer = Trainer(model, masks(model), 7, lr=0.1, momentum=0.9)
    first, start = [], copy.deepcopy(model.state_dict())
    for _ in range(2):
        model.load_state_dict(start)
        trainer.begin(0.1, 0.9, 0.0)
        first.append([float(trainer.step(x, y)) for x, y in data])
    assert first[0] == first[1]


@pytest.mark.parametrize("memory", ["enough", "too little"])
def test_candidates_are_the_weights_that_a_scan_finds(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What reaches the threshold is recorded as it is written; where that does not fit, all are looked through."""
    if memory == "too little":
        monkeypatch.setattr(weights, "UNEVEN", 0)  # what the linear layer has fits all the same
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 40, 3, padding=1), nn.ReLU(), nn.Conv2d(40, 70, 5, 1, 2), nn.ReLU(), nn.Conv2d(70, 9, 3, 2)]
    model = nn.Sequential(*layers, nn.ReLU(), nn.Flatten(), nn.Linear(81, 4))
    swat_(model, {f"{i}.weight": d for i, d in ((0, 0.2), (2, 0.05), (4, 0.1), (7, 0.05))}, 4)
    data = batches((3, 8, 8), (17,) * 11)
    found = []
    for recorded in (True, False):
        own = copy.deepcopy(model)
        trainer = Trainer(own, {}, 17, lr=0.05, momentum=0.9)
        trainer.step(*data[0])
        products = [p for p in trainer.lowered.products.values() if isinstance(p, SwatProduct)]
        recorded_at = [bool(product.top.candidates.marks) for product in products]
        assert recorded_at == [True, True, False, True]  # not at stride 2
        if not recorded:
            for op in (*(product.top for product in products), *trainer.lowered.wide):
                op.candidates.marks = None
        for x, y in data[1:]:
            trainer.step(x, y)
        if recorded:
            counts = torch.cat([c for c in (product.own.counts for product in products) if c is not None])
            assert (counts < 0).any() == (memory == "too little")
            assert (counts >= 0).any()
        trainer.write_()
        found.append((own.state_dict(), trainer.multiply_adds))
    assert found[0][1] == found[1][1]
    assert all(torch.equal(value, found[1][0][name]) for name, value in found[0][0].items())
