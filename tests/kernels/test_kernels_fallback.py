"""Layers that the kernels do not have, in the midst of those that they have; and what a trainer refuses."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedsieve import InputError
from fedsieve.kernels import Trainer
from fedsieve.kernels.checks import Unsupported
from nets import COMMON, Net, Shape, biased, bn, chain, conv, net
from stepping import Sgd, assert_as_dense, batches, dense, distance, masks, trained

pytestmark = pytest.mark.usefixtures("native")
BRISK = Sgd(0.05, 0.9, 1e-2)


class Standardized(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight / self.weight.norm(), self.bias, self.stride, self.padding)


FALLBACK: dict[str, tuple[Callable[[], nn.Module], Shape, list[str]]] = {
    "GroupNorm of features": (
        lambda: nn.Sequential(nn.Linear(9, 18), nn.GroupNorm(3, 18), nn.ReLU(), nn.Linear(18, 4)), (9,), ["1"]),
    "softplus": (lambda: net(lambda m, x: F.softplus(m.a(x)).flatten(1), a=conv(2, 6)), COMMON, ["softplus"]),
    "tanh of the input": (lambda: chain(180, nn.Tanh(), conv(2, 6)), COMMON, ["0"]),
    "Hardtanh": (lambda: chain(180, conv(2, 6), nn.Hardtanh(0, 5)), COMMON, ["1"]),
    "dilated": (lambda: chain(150, nn.Conv2d(2, 6, 3, 1, 2, 2, groups=2), bn(6), conv(6, 5)), COMMON, ["0"]),
    "an even kernel": (lambda: chain(100, nn.Conv2d(2, 6, 2), nn.ReLU(), biased(6, 5)), COMMON, ["0"]),
    "oblong": (lambda: chain(150, nn.Conv2d(2, 6, (1, 3), padding=(0, 1)), nn.ReLU(), biased(6, 5)), COMMON, ["0"]),
    "stride 3": (lambda: chain(20, nn.Conv2d(2, 6, 3, 3, 1), nn.ReLU(), biased(6, 5)), COMMON, ["0"]),
    "a layer of one's own": (lambda: chain(150, Standardized(2, 6, 3, padding=1), biased(6, 5)), COMMON, ["0"]),
    "LayerNorm of features": (
        lambda: nn.Sequential(nn.Linear(9, 17), nn.LayerNorm(17), nn.GELU(), nn.Linear(17, 4)), (9,), ["1"]),
    "BatchNorm of features": (
        lambda: nn.Sequential(nn.Linear(9, 17), nn.BatchNorm1d(17), nn.Tanh(), nn.Linear(17, 4)), (9,), ["1", "2"]),
    "cat of rows": (
        lambda: net(lambda m, x: m.c(torch.cat([m.a(x).relu(), m.b(x)], dim=2)).flatten(1), 360, a=biased(2, 6),
                    b=biased(2, 6), c=conv(6, 6)), COMMON, ["cat"]),
    "a product": (
        lambda: net(lambda m, x: ((y := m.a(x)) * m.b(x) + y * y).flatten(1), a=biased(2, 6), b=biased(2, 6)), COMMON,
        ["mul", "mul_1"]),
    "in place": (
        lambda: net(lambda m, x: (m.b(F.elu(y := m.a(x), 1.0, True)) + y).flatten(1), a=conv(2, 6), b=conv(6, 6)),
        COMMON, ["elu"]),
    "ceil mode": (lambda: chain(45, conv(2, 6), nn.MaxPool2d(2, ceil_mode=True), conv(6, 5)), COMMON, ["1"]),
    "a pool to no divisor": (lambda: chain(100, conv(2, 6), nn.AdaptiveAvgPool2d((4, 5)), conv(6, 5)), COMMON, ["1"]),
    "a slice": (lambda: net(lambda m, x: m.a(x)[:, :, 0, 0], 6, a=conv(2, 6)), COMMON, ["getitem"]),
    "a sum of one map with all": (
        lambda: net(lambda m, x: (m.a(x) + m.b(x)).flatten(1), a=conv(2, 6), b=conv(2, 1)), COMMON, ["add"]),
    "BatchNorm with a mean over all batches": (
        lambda: chain(150, conv(2, 6), nn.BatchNorm2d(6, momentum=None), nn.ReLU(), conv(6, 5)), COMMON, ["1"]),
    "BatchNorm without weights": (
        lambda: chain(150, conv(2, 6), nn.BatchNorm2d(6, affine=False), nn.ReLU(), conv(6, 5)), COMMON, ["1"]),
    "logits that fall back": (lambda: nn.Sequential(nn.Linear(9, 4), nn.Softplus()), (9,), ["1"]),
    "shuffled": (lambda: chain(150, conv(2, 8), nn.PixelShuffle(2), conv(2, 5, stride=2)), COMMON, ["1"]),
    "unflattened": (
        lambda: nn.Sequential(nn.Linear(9, 24), nn.Unflatten(1, (2, 3, 4)), conv(2, 5), nn.Flatten(), nn.Linear(60, 4)),
        (9,), ["1"]),
}  # fmt: skip


@pytest.mark.parametrize("name", FALLBACK)
def test_layers_that_fall_back(name: str) -> None:
    make, shape, fallbacks = FALLBACK[name]
    torch.manual_seed(0)
    model = make()
    assert assert_as_dense(model, shape, (17, 5, 17), BRISK).fallbacks == fallbacks


@pytest.mark.parametrize("p", [0.3, 1.0])
def test_dropout_takes_its_chance_from_torch(p: float) -> None:
    torch.manual_seed(0)
    model = net(lambda m, x: F.dropout(m.d(m.a(x)).flatten(1), p, m.training), a=conv(2, 6), d=nn.Dropout2d(p)).eval()
    mask, data = masks(model), batches(COMMON, (17, 5, 17))
    states = []
    for _ in range(2):  # the reader of the model takes nothing from the generator
        torch.manual_seed(3)
        ours, trainer = trained(model, mask, data, BRISK)
        states.append(torch.get_rng_state())
    assert trainer.fallbacks == ["d", "dropout"]
    assert not ours.training
    torch.manual_seed(3)
    exact = dense(model, mask, data, BRISK, torch.float32)
    assert all(torch.equal(state, torch.get_rng_state()) for state in states)
    assert max(distance(ours, exact, model).values()) < 1e-5


def test_bf16_storage() -> None:
    torch.manual_seed(0)
    model, data = FALLBACK["softplus"][0](), batches(COMMON, (33, 5, 33))
    mask = masks(model)
    exact, start = (dense(model, mask, some, Sgd(), torch.float64) for some in (data, []))
    assert max(distance(trained(model, mask, data, Sgd(), "bf16")[0], exact, start).values()) < 1 / 16


class Gate(nn.Module):
    def __init__(self, plain: bool = False) -> None:
        super().__init__()
        self.plain = plain
        self.fc, self.scale = nn.Linear(9, 4), nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * (self.scale if self.plain else self.scale.exp())


class Two(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


SHARED = nn.Linear(4, 4)
REFUSED: dict[str, tuple[Callable[[], nn.Module], Shape]] = {
    "scale outside a layer": (Gate, (9,)),
    "0.weight is used more than once": (lambda: nn.Sequential(SHARED, nn.ReLU(), SHARED), (4,)),
    "0.weight is not trained": (lambda: nn.Sequential(nn.Linear(9, 4).requires_grad_(False)), (9,)),
    "cannot be traced": (lambda: Net(lambda m, x: m.a(x) if x.sum() > 0 else x, a=nn.Linear(9, 4)), (9,)),
    "neither [n, c, h, w] nor [n, features]": (lambda: nn.Sequential(nn.Unflatten(1, (3, 3)), nn.Linear(3, 4)), (9,)),
    "cannot be traced (": (Two, (9,)),
    "takes its inputs in a way": (
        lambda: net(lambda m, x: torch.chunk(m.a(x), 2, dim=1)[0].flatten(1), 90, a=conv(2, 6)), COMMON),
    "the mask of 1.weight": (lambda: nn.Sequential(conv(2, 4), bn(4), nn.Flatten(), nn.Linear(120, 4)), COMMON),
}  # fmt: skip


@pytest.mark.parametrize("make", [lambda: Gate(plain=True), lambda: nn.Linear(9, 4)], ids=["scale", "bare layer"])
def test_what_only_the_reader_of_tokens_knows(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    assert not assert_as_dense(make(), (9,), (17, 5, 17), BRISK, mask={}).fallbacks


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_lowered_is_said_and_left_as_it_was(message: str) -> None:
    make, shape = REFUSED[message]
    model = make()
    mask = {"1.weight": torch.tensor([True, False, True, True])} if "mask of" in message else {}
    before, training = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    with pytest.raises(Unsupported) as found:
        Trainer(model, mask, 4, lr=0.1).step(torch.zeros(4, *shape), torch.zeros(4, dtype=torch.int64))
    assert message in str(found.value)
    assert "\n" not in str(found.value)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert [m.training for m in model.modules()] == training


X, Y = torch.ones(4, *COMMON), torch.arange(4)
MASK = torch.ones(6, 2, 3, 3, dtype=torch.bool)


def trainer(mask: object = None, batch: object = 8, model: nn.Module | None = None, **more: object) -> Trainer:
    model = chain(180, conv(2, 6), bn(6)) if model is None else model
    return Trainer(model, {} if mask is None else mask, batch, **{"lr": 0.1} | more)  # type: ignore[arg-type]


def second(x: object, y: object) -> object:
    ready = trainer()
    ready.step(X, Y)
    return ready.step(x, y)  # type: ignore[arg-type]


MISTAKES: dict[str, Callable[[], object]] = {
    "a bool tensor [6, 2, 3, 3] on the CPU, got float32": lambda: trainer({"0.weight": MASK.float()}),
    "got bool [6, 2, 3] on cpu": lambda: trainer({"0.weight": MASK[..., 0]}),
    "got bool [6, 2, 3, 3] on meta": lambda: trainer({"0.weight": MASK.to("meta")}),
    "the mask of 0.weight must be": lambda: trainer({"0.weight": "dense"}),
    "one of 0.weight, 1.weight, 1.bias, 3.weight, 3.bias, got 'conv'": lambda: trainer({"conv": MASK}),
    "mask must be a dictionary": lambda: trainer([MASK]),
    "model must be a torch.nn.Module": lambda: Trainer(F.relu, {}, 4, lr=0.1),  # type: ignore[arg-type]
    "0.weight of the model must be float32": lambda: trainer(model=chain(180, conv(2, 6)).double()),
    "on meta": lambda: trainer(model=chain(180, conv(2, 6)).to("meta")),
    "batch must be at least 1, got 0": lambda: trainer(batch=0),
    "batch must be at least 1, got 2.0": lambda: trainer(batch=2.0),
    "storage must be 'fp32' or 'bf16'": lambda: trainer(storage="fp16"),
    "on the CPU with n > 0, got float32 [0, 2, 6, 5]": lambda: trainer().step(X[:0], Y[:0]),
    "x must be a float32 tensor": lambda: trainer().step(X.double(), Y),
    "got uint8": lambda: trainer().step(X.byte(), Y),
    "got float32 [4] on cpu": lambda: trainer().step(X[:, 0, 0, 0], Y),
    "got [[1.0]]": lambda: trainer().step([[1.0]], Y),  # type: ignore[arg-type]
    "got float32 [4, 2, 6, 5] on meta": lambda: second(X.to("meta"), Y),
    "[any, 2, 6, 5] on the CPU, got float32 [4, 2, 5, 6]": lambda: second(X.transpose(2, 3), Y),
    "x must be a float32 tensor [any, 2, 6, 5]": lambda: second(X[:, :1], Y),
    "samples must be a whole number from 1 to 8, got 9": lambda: second(torch.ones(9, *COMMON), torch.zeros(9)),
    "the number of samples must be a whole number from 1 to 8, got 0": lambda: second(X[:0], Y[:0]),
    "y must be a int64 tensor [4] on the CPU, got int64 [3]": lambda: second(X, Y[:3]),
    "y must be a int64 tensor [4] on the CPU, got int64 [4, 1]": lambda: second(X, Y[:, None]),
    "got int32 [4] on cpu": lambda: second(X, Y.int()),
    "y must be of 0 to 3, got 4": lambda: second(X, Y + 1),
    "y must be of 0 to 3, got -1": lambda: trainer().step(X, Y - 1),
    "BatchNorm needs more than one value a channel": lambda: trainer(
        model=chain(6, conv(2, 6), bn(6))).step(X[:1, :, :1, :1], Y[:1]),
    "momentum must be 0": lambda: trainer_begun(),
}  # fmt: skip


def trainer_begun() -> None:
    ready = trainer()
    ready.step(X, Y)
    ready.begin(0.1, 0.9, 0.0)


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes_are_named_in_one_line(message: str) -> None:
    with pytest.raises(InputError) as found:
        MISTAKES[message]()
    assert message in str(found.value)
    assert "\n" not in str(found.value)


def test_a_refused_step_changes_nothing() -> None:
    ready = trainer()
    ready.step(X, Y)
    before = ready.weights.w.clone()
    with pytest.raises(InputError):
        ready.step(X, Y + 1)
    assert torch.equal(ready.weights.w, before)


def test_any_memory_order_will_do() -> None:
    model, x = chain(180, conv(2, 6), bn(6)), batches(COMMON, (4,))[0][0]
    start = copy.deepcopy(model)
    wide = copy.deepcopy(model).to(memory_format=torch.channels_last)
    mask = {"0.weight": torch.ones(3, 3, 2, 6, dtype=torch.bool).permute(3, 2, 0, 1)}
    every_other = x.repeat_interleave(2, 0)[::2]
    for own, given in ((model, x), (wide, x.to(memory_format=torch.channels_last)), (start, every_other)):
        ready = Trainer(own, mask, 4, lr=0.1)
        ready.step(given, Y)
        ready.write_()
        assert all(map(torch.equal, own.state_dict().values(), model.state_dict().values()))


def test_nan_is_never_hidden() -> None:
    x = X.clone()
    x[1, 0, 0, 0] = torch.nan
    model = chain(180, conv(2, 6), nn.ReLU(), nn.MaxPool2d(3, 1, 1))
    ready = Trainer(model, {}, 20, lr=0.1)
    assert ready.step(x, Y).isnan()
    ready.write_()
    assert all(bool(w.isnan().any()) for w in model.parameters())
