"""Inference with the non-zero weights alone, against the same model in float64."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedsieve.client.models import MODELS
from fedsieve.kernels import Predictor, unavailable_reason
from fedsieve.kernels import inference as module
from fedsieve.kernels.fusion import fuse_batchnorm
from fedsieve.kernels.graph import FusedProduct
from fedsieve.kernels.trace import read_graph
from fedsieve.types import InputError

pytestmark = pytest.mark.skipif(bool(unavailable_reason()), reason=str(unavailable_reason()))

SHAPES = {
    "resnet18": (3, 32, 32),
    "leaf_cnn": (1, 28, 28),
    "mnist_net": (1, 28, 28),
    "digits_net": (1, 8, 8),
    "lenet5": (3, 32, 32),
    "feddst_net": (3, 32, 32),
    "mobilenet_v2": (3, 32, 32),
    "resnet18_groupnorm": (3, 32, 32),
}
LARGE = ("resnet18", "mobilenet_v2", "resnet18_groupnorm")
SHAPES["mnist_net_softmax"] = SHAPES["mnist_net"]
CLOSE = {"fp32": 1e-5, "bf16": 2e-2}
SIZES = (1, 2, 3, 5, 16, 17, 33)


class Net(nn.Module):
    """Every layer that the kernels know, and the orders that cannot be folded."""

    def __init__(self, channels: int = 3, width: int = 6):
        super().__init__()
        self.stem = nn.Conv2d(channels, width, 5, 2, 1)
        self.norm = nn.BatchNorm2d(width)
        self.wide = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.behind = nn.BatchNorm2d(width)
        self.point = nn.Conv2d(width, width, 1, 2)
        self.shared = nn.Conv2d(width, width, 3, 2, 1)
        self.late = nn.BatchNorm2d(width)
        self.fc1, self.fc2 = nn.Linear(width, 9), nn.Linear(9, 9)
        self.top = nn.Linear(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(F.max_pool2d(self.stem(x), 3, 1, 1))  # behind a pool
        x = F.relu(self.behind(self.wide(x)) + x)
        y = self.shared(x)
        x = F.relu(self.late(y) + self.point(x)) + y  # y is read twice
        x = F.avg_pool2d(x, 2, 1, 1).mean((2, 3))
        x = F.relu(self.fc1(x))
        logits: Tensor = self.top(x + F.relu(self.fc2(x)))
        return logits


class Further(nn.Module):
    """The layers of MobileNet, DenseNet and ConvNeXt."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 6, 3, 2, 1, bias=False), nn.BatchNorm2d(6)
        self.deep, self.behind = nn.Conv2d(6, 12, 5, padding=2, groups=6, bias=False), nn.BatchNorm2d(12)
        self.first, self.second = nn.GroupNorm(11, 11), nn.GroupNorm(2, 22, affine=False)
        self.point, self.groups = nn.Conv2d(12, 5, 1), nn.Conv2d(11, 22, 3, 2, 1, groups=11)
        self.fc1, self.fc2, self.top = nn.Linear(22, 9), nn.Linear(9, 9), nn.Linear(40, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.norm(self.stem(x)))
        y = F.silu(self.behind(self.deep(x)))
        y = torch.cat([F.hardswish(self.point(y)), x], 1)
        y = F.relu(self.first(y) + y)
        x = F.gelu(self.second(self.groups(y))).mean((2, 3))
        y = F.gelu(self.fc1(x), approximate="tanh")
        logits: Tensor = self.top(torch.cat([y, x, self.fc2(y).sigmoid()], 1))
        return logits


class Plain(nn.Module):
    """Two convolutions of one size, of groups or not, for maps that are not square."""

    def __init__(self, size: tuple[int, int], kernel: int, stride: int, padding: int, groups: int):
        super().__init__()
        self.one = nn.Conv2d(2, 6, kernel, stride, padding, groups=min(groups, 2))
        self.two = nn.Conv2d(6, 6, 3, padding=1, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(6)
        with torch.no_grad():
            features = self.maps(torch.zeros(1, 2, *size)).flatten(1).shape[1]
        self.top = nn.Linear(features, 3)

    def maps(self, x: Tensor) -> Tensor:
        x = F.relu(self.one(x))
        return F.relu(self.norm(self.two(x)) + x)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.top(self.maps(x).flatten(1))
        return logits


@torch.no_grad()
def pruned(model: nn.Module, density: float) -> nn.Module:
    """A model with random statistics, in eval mode; density 0: one weight a layer, -1: none."""
    torch.manual_seed(3)
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            keep = torch.rand_like(layer.weight) < density
            keep.view(-1)[-1] |= density == 0
            layer.weight.mul_(keep)
        elif isinstance(layer, nn.BatchNorm2d):
            for vector, low in ((layer.running_mean, -0.2), (layer.running_var, 0.5)):
                assert isinstance(vector, Tensor)
                vector.uniform_(low, low + 1)
            layer.weight.uniform_(-1, 1)
            layer.bias.uniform_(-0.3, 0.3)
    return model.eval()


def error(model: nn.Module, predict: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """The largest difference from the float64 model, relative to its largest logit."""
    with torch.no_grad():
        wanted = copy.deepcopy(model).double()(x.double())
    got = predict(x)
    assert got.shape == wanted.shape
    assert got.dtype == torch.float32
    return float((got - wanted).abs().max() / wanted.abs().max())


@pytest.mark.slow
@pytest.mark.parametrize("storage", CLOSE)
@pytest.mark.parametrize(
    ("name", "density"),
    [(name, 0.05) for name in LARGE] + [(name, d) for name in SHAPES if name not in LARGE for d in (-1, 0, 0.05, 1)],
)
def test_models(name: str, density: float, storage: str) -> None:
    model = pruned(MODELS[name](SHAPES[name][0], 10), density)
    predict = Predictor(model, 16, storage)
    for n in (1, 17) if name in LARGE else SIZES:
        assert error(model, predict, torch.randn(n, *SHAPES[name])) < CLOSE[storage]
    assert predict.reason == ("the kernels do not know softmax" if "softmax" in name else None)


DEEP = ("resnet50", "vit_tiny")


def test_all_models_are_tried() -> None:
    assert MODELS.keys() == {*SHAPES, *DEEP}


@pytest.mark.slow
@pytest.mark.parametrize("name", DEEP)
def test_deep_models(name: str) -> None:
    model, x = pruned(MODELS[name](3, 10), 0.05), torch.randn(3, 3, 32, 32)
    predict = Predictor(model, 16)
    assert error(model, predict, x) < CLOSE["fp32"]
    assert predict.reason is None


def test_a_channel_that_does_not_vary_is_divided_by_the_root_of_eps() -> None:
    """Behind a convolution that has a bias of its own."""
    norm = nn.BatchNorm2d(5)
    model = pruned(nn.Sequential(nn.Conv2d(2, 5, 3), norm, nn.ReLU(), nn.Flatten(), nn.Linear(80, 3)), 0.5)
    assert norm.running_var is not None
    norm.running_var.zero_()
    assert error(model, Predictor(model, 16), torch.randn(17, 2, 6, 6)) < CLOSE["fp32"]


@pytest.mark.parametrize("storage", CLOSE)
@pytest.mark.parametrize("density", [0, 0.3, 1])
@pytest.mark.parametrize("size", [8, 9, 13, 32])
@pytest.mark.parametrize("net", [Net, Further])
def test_every_layer(
    net: type[nn.Module], size: int, density: float, storage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = pruned(net(), density), torch.randn(40, 3, size, size)
    for alone in (0, 100):
        monkeypatch.setattr(module, "ALONE", alone)
        predict = Predictor(model, 40, storage)
        assert error(model, predict, x) < CLOSE[storage]
        assert predict.reason is None


@pytest.mark.parametrize(
    ("kernel", "stride", "padding"), [(1, 1, 0), (1, 2, 0), (3, 1, 0), (3, 2, 1), (3, 1, 2), (5, 2, 4)]
)
@pytest.mark.parametrize("size", [(7, 7), (9, 5), (5, 18), (3, 40)])
@pytest.mark.parametrize("groups", [1, 3, 6])
@pytest.mark.parametrize("alone", [0, 100])
def test_awkward_maps(
    *, size: tuple[int, int], kernel: int, stride: int, padding: int, groups: int, alone: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(module, "ALONE", alone)
    model = pruned(Plain(size, kernel, stride, padding, groups), 0.5)
    predict = Predictor(model, 7)
    assert error(model, predict, torch.randn(9, 2, *size)) < CLOSE["fp32"]
    assert predict.reason is None


@pytest.mark.parametrize("storage", CLOSE)
@pytest.mark.parametrize("n", [1, 2, 16, 29, 77])
@pytest.mark.parametrize("net", [Net, Further])
def test_the_same_with_any_threads(net: type[nn.Module], n: int, storage: str) -> None:
    model, x, before = pruned(net(), 0.4), torch.randn(n, 3, 21, 21), torch.get_num_threads()
    try:
        logits = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            logits.append(Predictor(model, 70, storage)(x))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(logits[0], other) for other in logits[1:])


def test_resnet_is_products_and_one_pool() -> None:
    graph = fuse_batchnorm(read_graph(MODELS["resnet18"](3, 10).eval(), (3, 32, 32)))
    assert [type(layer).__name__ for layer in graph.layers] == ["FusedProduct"] * 20 + ["PoolLayer", "FusedProduct"]
    assert sum(len(layer.inputs) == 2 for layer in graph.layers) == 8
    assert sum(layer.relu == 1 for layer in graph.layers if isinstance(layer, FusedProduct)) == 17


def test_zeros_cost_nothing() -> None:
    model = pruned(MODELS["digits_net"](1, 10), 0.1)
    graph = fuse_batchnorm(read_graph(model, (1, 8, 8)))
    entries = [len(layer.values) for layer in graph.layers if isinstance(layer, FusedProduct)]
    weights = [layer.weight for layer in model.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    assert entries == [int(weight.count_nonzero()) for weight in weights]


def test_no_samples_and_a_new_shape() -> None:
    model = pruned(
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)), 1
    )
    predict = Predictor(model, 4)
    assert predict(torch.zeros(0, 1, 6, 6)).shape == (0, 3)
    for size in (6, 9, 6):
        assert error(model, predict, torch.randn(5, 1, size, size)) < CLOSE["fp32"]


def test_the_model_is_copied() -> None:
    model, x = MODELS["digits_net"](1, 10).train(), torch.randn(3, 1, 8, 8)
    predict = Predictor(model, 4)
    before = predict(x)
    assert model.training
    with torch.no_grad():
        next(model.parameters()).zero_()
    assert torch.equal(predict(x), before)


def test_inference_mode_and_noncontiguous_samples() -> None:
    model = pruned(MODELS["digits_net"](1, 10), 0.5)
    predict, x = Predictor(model, 4), torch.randn(3, 8, 8, 1).permute(0, 3, 1, 2)
    with torch.inference_mode():
        first = predict(x)
    assert torch.equal(predict(x.contiguous()), first)


class Odd(nn.Module):
    """A layer that the kernels do not know."""

    def __init__(self) -> None:
        super().__init__()
        self.top = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.top(torch.tanh(x))
        return logits


class Branching(Odd):
    """A model that cannot be traced."""

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.top(x if x.sum() > 0 else -x)
        return logits


@pytest.mark.parametrize(("made", "why"), [(Odd, "do not know tanh"), (Branching, "cannot be traced")])
def test_other_models_run_as_they_are(made: type[nn.Module], why: str) -> None:
    model, x = made().eval(), torch.randn(5, 6)
    predict = Predictor(model, 2)
    got = predict(x)
    assert why in str(predict.reason)
    with torch.no_grad():
        assert torch.equal(got, torch.cat([model(x[i : i + 2]) for i in (0, 2, 4)]))


def test_no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.library, "unavailable_reason", lambda: "none here")
    model, x = MODELS["digits_net"](1, 10).eval(), torch.randn(3, 1, 8, 8)
    predict = Predictor(model, 4)
    with torch.no_grad():
        assert torch.equal(predict(x), model(x))
    assert predict.reason == "none here"


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (
            torch.zeros(2, 1, 8, 8, dtype=torch.float64),
            r"samples must be \[n, ...\] of torch.float32 on cpu, got .*float64",
        ),
        (torch.zeros(8), r"got \[8\] of torch.float32"),
        (torch.zeros(2, 3, 8, 8), r"the model takes no samples of shape \[3, 8, 8\]: "),
        (torch.zeros(2, 1, 12, 12), r"the model takes no samples of shape \[1, 12, 12\]: "),
    ],
)
def test_refused_samples(x: Tensor, message: str) -> None:
    predict = Predictor(MODELS["digits_net"](1, 10), 4)
    with pytest.raises(InputError, match=message) as caught:
        predict(x)
    assert "\n" not in str(caught.value)
    assert predict(torch.zeros(1, 1, 8, 8)).shape == (1, 10)


class NoZeros(nn.Linear):
    """A layer of samples that are not 0, such as texts that are not padding alone."""

    def forward(self, x: Tensor) -> Tensor:
        if not x.any():
            raise RuntimeError("no numbers")
        return super().forward(x)


def test_a_model_that_takes_no_zeros() -> None:
    model, x = NoZeros(3, 2), torch.ones(4, 3)
    torch.testing.assert_close(Predictor(model, 4)(x), model(x))


def test_refused_settings() -> None:
    with pytest.raises(InputError, match="batch must be at least 1, got 0"):
        Predictor(nn.Linear(2, 2), 0)
    with pytest.raises(InputError, match="storage must be one of fp32, bf16, got 'int8'"):
        Predictor(nn.Linear(2, 2), 1, "int8")
