"""A model's accuracy: the share of right labels, counted another way; and by replayed batches, of weights in turn."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fedsieve import Data
from fedsieve.client import process
from fedsieve.client.evaluation import ACCURACY, EagerTest, Evaluation, accuracy
from fedsieve.client.metrics import Metric
from fedsieve.client.process import to_device
from fedsieve.client.training import params_of
from fedsieve.kernels import Predictor, dispatch, unavailable_reason
from fedsieve.kernels.dispatch import Inference
from recorded import Graphs
from tiny import TinyNet


def images(n: int) -> Data:
    """Return examples whose labels are the answers of one model, so that models differ in what they have right."""
    generator = torch.Generator().manual_seed(n)
    x = torch.randint(256, (n, 2, 6, 6), generator=generator).to(torch.uint8)
    data = Data(x, torch.zeros(n, dtype=torch.int64), (0.3, 0.4), (0.2, 0.5))
    return Data(x, outputs(model(7), data).argmax(1), data.mean, data.std)


def model(seed: int) -> TinyNet:
    torch.manual_seed(seed)
    return TinyNet().eval()


@torch.no_grad()
def outputs(net: nn.Module, data: Data) -> Tensor:
    """Return what a model answers to examples one by one, normalised here."""
    mean, std = (torch.tensor(v).view(1, 2, 1, 1) for v in (data.mean, data.std))
    return torch.cat([net((x[None].float() / 255 - mean) / std) for x in data.x])


def share(net: nn.Module, data: Data) -> float:
    answers = outputs(net, data).tolist()
    right = sum(max(range(3), key=row.__getitem__) == y for row, y in zip(answers, data.y.tolist(), strict=True))
    return right / len(data)


@pytest.mark.parametrize(("n", "captures"), [(100, 1), (107, 2), (3, 1)])
def test_replayed_batches_count_what_is_right(n: int, captures: int) -> None:
    """Of several models in one memory, a whole and a last batch captured once; while it is, no number is looked at."""
    data, net, graphs = images(n), model(0), Graphs()
    evaluation = Evaluation(net, data, graphs, batch=10)  # type: ignore[arg-type]
    for seed in (1, 7, 2, 1):
        before = params_of(model(seed))
        wanted = share(model(seed), data)
        assert (
            evaluation.of(before)["accuracy"]
            == wanted
            == accuracy(model(seed), data, 10)
            == accuracy(model(seed), data)
        )
        assert all(torch.equal(v, before[name]) for name, v in params_of(net).items())
    assert evaluation.of(params_of(model(7)))["accuracy"] == 1
    assert graphs.captures == captures


def test_moved_weights_are_captured_anew() -> None:
    data, net, graphs = images(25), model(1), Graphs()
    renewals = list[int]()
    graphs.renew = lambda: renewals.append(graphs.captures)  # type: ignore[method-assign]
    evaluation = Evaluation(net, data, graphs, batch=10)  # type: ignore[arg-type]
    assert evaluation.metrics()["accuracy"] == share(model(1), data)
    net.fc2.weight.data = model(7).fc2.weight.detach().clone()
    assert evaluation.metrics()["accuracy"] == share(net, data)
    assert (graphs.captures, renewals) == (4, [2])


class CountingNet(TinyNet):
    """A model that notes in a buffer how many examples it has answered."""

    def __init__(self) -> None:
        super().__init__()
        self.answered: Tensor
        self.register_buffer("answered", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.answered.add_(len(x))
        return super().forward(x)


def test_a_capture_leaves_no_trace_in_the_model() -> None:
    net = CountingNet().eval()
    Evaluation(net, images(25), Graphs(), batch=10).metrics()["accuracy"]  # type: ignore[arg-type]
    assert int(net.answered) == 25


class CoinNet(TinyNet):
    """A model that draws on the CPU, where it changes nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + 0 * torch.rand(()))


class FullMemory(Graphs):
    """Graphs for which there is no room."""

    def capture(self, step: Callable[[], None]) -> Callable[[], None]:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nMore of it")


@pytest.mark.parametrize(
    ("net", "graphs", "why"),
    [(CoinNet(), Graphs(), "it draws by chance on the CPU"), (model(1), FullMemory(), r"CUDA .* 2.00 GiB\)$")],
)
def test_what_cannot_be_captured_is_tested_eagerly(net: nn.Module, graphs: Graphs, why: str) -> None:
    """One line says so, once."""
    data = images(25)
    evaluation = Evaluation(net.eval(), data, graphs, batch=10)  # type: ignore[arg-type]
    with pytest.warns(EagerTest, match=f"the model's test cannot be captured: it runs eagerly .*{why}"):
        assert evaluation.metrics()["accuracy"] == share(net, data)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert evaluation.metrics()["accuracy"] == share(net, data)
    assert graphs.captures == 0


def sparse(seed: int = 1, density: float = 0.1) -> TinyNet:
    """Return a model with some of its weights."""
    net = model(seed)
    with torch.no_grad():
        for weight in (net.conv2.weight, net.fc1.weight):
            weight.mul_(torch.rand_like(weight) < density)
    return net


@pytest.mark.skipif(bool(unavailable_reason()), reason=str(unavailable_reason()))
def test_the_kernels_compute_tests_that_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the weights as they are at each test, beside other metrics of the outputs."""
    monkeypatch.setattr(dispatch, "LASTING", 36 * 4 * 2 * 9 * 107)
    data, made = images(107), list[int]()
    monkeypatch.setattr(dispatch, "Predictor", lambda net, batch: made.append(batch) or Predictor(net, batch))
    names = {"accuracy": ACCURACY["accuracy"], "mean": Metric(lambda output, y: output[:, 0])}
    net, short = sparse(), Evaluation(sparse(), data.subset(torch.arange(10)))
    evaluation, by_model = (Evaluation(net, data, None, 10, names, Inference(net, how)) for how in ("auto", "dense"))
    for seed in (1, 7, 2):
        params = params_of(sparse(seed))
        ours, theirs = evaluation.of(params), by_model.metrics()
        assert ours["accuracy"] == theirs["accuracy"] == share(net, data)
        assert ours["mean"] == pytest.approx(theirs["mean"], rel=1e-4)
    assert made == [10, 10, 10]
    short.metrics()
    monkeypatch.setattr(dispatch, "LITTLE", 0)
    evaluation.of(params_of(sparse(1, density=0.6)))
    assert made == [10, 10, 10]


@pytest.mark.skipif(bool(unavailable_reason()), reason=str(unavailable_reason()))
def test_the_kernels_do_not_test_what_they_would_not_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model with a hook, or of whose outputs theirs would differ; several inputs, integers and float64."""
    monkeypatch.setattr(dispatch, "LASTING", 0)
    x, net = torch.randn(20, 2, 6, 6), model(1)
    assert Inference(net, "auto").of(x, 20, 10)
    with monkeypatch.context() as other:
        other.setattr(dispatch, "Predictor", lambda *_: lambda few: net(few) + 1)
        assert Inference(net, "auto").of(x, 20, 10) is None
    hooked = model(1)
    hooked.fc1.register_forward_hook(lambda module, args, output: -output)
    assert Inference(hooked, "auto").of(x, 20, 10) is None
    for odd in ((x, x), {"x": x}, x.double(), x.to(torch.uint8)):
        assert Inference(model(1), "auto").of(odd, 20, 10) is None


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        ([1.0, 1000.0], [1.5, 1000.0], True),
        ([1.0, 2.0], [1.01, 2.0], False),
        ([float("nan"), 1.0], [float("nan"), 1.0], True),
        ([float("nan"), 1.0], [1.0, 1.0], False),
        ([float("inf")], [float("inf")], True),
        ([float("inf")], [float("-inf")], False),
    ],
)
def test_outputs_are_close_beside_the_largest(a: list[float], b: list[float], same: bool) -> None:
    assert dispatch.close(torch.tensor(a), torch.tensor(b)) is same
    assert not dispatch.close(torch.tensor(a), torch.tensor(b)[None])


def test_examples_lie_on_a_gpu_if_they_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    data = images(10)
    assert data.nbytes == 10 * (72 + 8)
    moves = list[str]()
    monkeypatch.setattr(Data, "to", lambda self, where: moves.append(where) or self)
    for free in (2666, 2667):  # of which .3 are 799.8 and 800.1
        monkeypatch.setattr(process.torch.cuda, "mem_get_info", lambda _, free=free: (free, free))
        to_device(data, "cuda:1")
    to_device(data, "cpu")
    assert moves == ["cuda:1", "cpu"]
