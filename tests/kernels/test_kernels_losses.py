"""Losses other than cross-entropy of labels, and models that return more than logits: by PyTorch, by the kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedsieve import Data
from fedsieve.client.cost import Cost
from fedsieve.client.losses import BinaryCrossEntropy, CrossEntropy, Regression
from fedsieve.client.training import params_of, train_on_mask
from fedsieve.kernels import Trainer, unavailable_reason
from fedsieve.kernels.abi import LossOp
from fedsieve.kernels.checks import Unsupported
from fedsieve.kernels.dispatch import Kernels
from fedsieve.kernels.trace import read_graph
from kernel_training import device_of, mask_of
from nets import biased, bn, conv
from tiny import TinyNet

pytestmark = pytest.mark.skipif(bool(unavailable_reason()), reason=str(unavailable_reason()))
N = 40


def chance() -> torch.Generator:
    return torch.Generator().manual_seed(5)


class Numbers(TinyNet):
    """One number an example, [n]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).sum(1)


class Column(TinyNet):
    """The same, [n, 1] turned to [n]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[:, :1].reshape(-1)


class Maps(nn.Module):
    """A class for every position, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn, self.b = conv(2, 6), bn(6), biased(6, 3)

    def forward(self, x: Tensor) -> dict[str, Any]:
        return {"logits": self.b(self.bn(self.a(x)).relu()), "of": [None, "maps"]}


@dataclass
class Answer:
    hidden: Tensor
    logits: Tensor


class Several(TinyNet):
    """What it returns is read by its own layers, too; and twice; and is a map; and the input."""

    def forward(self, x: Tensor) -> tuple[Answer, dict[str, Tensor]]:  # type: ignore[override]
        first = torch.relu(self.conv1(x))
        h = self.bn(self.conv2(first)).relu()
        hidden = self.fc1(h.flatten(1)).relu()
        return Answer(hidden, self.fc2(hidden)), {"hidden": hidden, "first": first, "x": x}


def own(output: Any, target: dict[str, Tensor]) -> Tensor:
    """A loss that sees all that it is given, and changes some of it in place."""
    answer, maps = output
    assert isinstance(answer, Answer)
    off = answer.logits[:, 0].sub_(target["value"]) * target["weight"]
    return off.square().mean() + maps["first"].square().mean() + (answer.hidden * maps["hidden"]).mean()


def one_by_one(output: Tensor, target: tuple[Tensor, Tensor]) -> Tensor:
    return F.nll_loss(output.log_softmax(1), target[0], reduction="none").mul(target[1]).mean().view(1)


CLASSES, WEIGHTS = torch.randint(3, (N,), generator=chance()), torch.rand(N, generator=chance())
TASKS: dict[str, tuple[type[nn.Module], Any, Callable[[Any, Any], Tensor]]] = {
    "weights and smoothing": (TinyNet, CLASSES, CrossEntropy(weight=(1.0, 2.0, 0.5), label_smoothing=0.1)),
    "soft targets": (TinyNet, torch.rand(N, 3, generator=chance()).softmax(1), F.cross_entropy),
    "labels that do not count": (TinyNet, CLASSES.where(WEIGHTS < 0.7, -100), F.cross_entropy),
    "regression": (Numbers, WEIGHTS, Regression()),
    "a column": (Column, WEIGHTS, F.mse_loss),
    "Huber": (Numbers, 10 * WEIGHTS, Regression("huber", 0.5)),
    "several labels": (
        TinyNet,
        (torch.rand(N, 3, generator=chance()) < 0.4).long(),
        BinaryCrossEntropy((1.0, 2.0, 3.0)),
    ),
    "segmentation": (Maps, torch.randint(4, (N, 6, 6), generator=chance()), CrossEntropy(ignore_index=3)),
    "all that it returns": (Several, {"value": WEIGHTS, "weight": WEIGHTS.flip(0)}, own),
    "a tuple": (TinyNet, (CLASSES, WEIGHTS), one_by_one),
}


def data_of(y: Any) -> Data:
    return Data(torch.randn(N, 2, 6, 6, generator=chance()), y)


def masks(model: nn.Module) -> dict[str, Tensor]:
    if isinstance(model, TinyNet):
        return mask_of(model, 0.4)
    return {"a.weight": torch.rand(6, 2, 3, 3, generator=chance()) < 0.5}


@pytest.mark.parametrize("name", TASKS)
def test_any_loss_trains_as_pytorch_does(name: str, one_thread: None) -> None:
    net, y, loss = TASKS[name]
    ends, losses = list[dict[str, Tensor]](), []
    for way in ("dense", "sparse"):
        torch.manual_seed(3)
        model = net()
        device = device_of(model, Cost(model, Kernels(model, way)), momentum=0.9, lr=0.02)
        device = replace(device, data=data_of(y), loss=loss)
        for _ in range(2):  # the second on the same trainer
            metrics, _ = train_on_mask(device, masks(model))
            losses.append(metrics["loss"])
        ends.append(params_of(model))
        assert bool(device.steps.__self__.sparse) == (way == "sparse")  # type: ignore[union-attr]
    for key, value in ends[0].items():
        torch.testing.assert_close(ends[1][key], value, rtol=0, atol=1e-5)
    assert losses[:2] == pytest.approx(losses[2:], rel=1e-5)


@pytest.mark.parametrize("storage", ["fp32", "bf16"])
def test_a_loss_of_ones_own_is_the_native_one(storage: Any, native: None) -> None:
    """Cross-entropy by PyTorch and by the kernels: the same weights, nearly."""
    ends = []
    x, y = torch.randn(33, 2, 6, 6, generator=chance()), torch.randint(3, (33,), generator=chance())
    for loss in (F.cross_entropy, lambda output, target: F.cross_entropy(output, target)):
        torch.manual_seed(3)
        model = TinyNet()
        trainer = Trainer(model, mask_of(model, 0.4), 33, lr=0.1, momentum=0.9, storage=storage, loss=loss)
        losses = [float(trainer.step(x[:n], y[:n])) for n in (33, 1 + 16, 5)]
        assert isinstance(trainer.lowered.loss, LossOp) == (loss is F.cross_entropy)
        trainer.write_()
        ends.append((params_of(model), losses))
    assert ends[0][1] == pytest.approx(ends[1][1], rel=1e-4 if storage == "fp32" else 1e-2)
    for key, value in ends[0][0].items():
        torch.testing.assert_close(ends[1][0][key], value, rtol=0, atol=1e-5 if storage == "fp32" else 1e-2)


def test_what_is_returned_beside_tensors_is_left_as_it_is() -> None:
    graph = read_graph(Maps(), (2, 6, 6))
    assert graph.model_output is not None
    assert graph.model_output.tensors({graph.output: CLASSES}) == {"logits": CLASSES, "of": [None, "maps"]}
    graph = read_graph(Several(), (2, 6, 6))
    assert [value.sizes for value in graph.outputs] == [(24,), (3,), (4, 6, 6), (2, 6, 6)]


class Sized(TinyNet):
    def forward(self, x: Tensor) -> Any:
        return {"logits": super().forward(x), "n": x.size(0)}


class Nothing(TinyNet):
    def forward(self, x: Tensor) -> Any:
        super().forward(x)
        return {}


@pytest.mark.parametrize(
    ("net", "training", "line"),
    [
        (Sized, True, "the model returns size, which is no tensor"),
        (Nothing, True, "does not map \\[n, ...\\] to tensors"),
        (Maps, False, "does not map \\[n, ...\\] to logits \\[n, classes\\]"),
        (Numbers, False, "does not map \\[n, ...\\] to logits \\[n, classes\\]"),
    ],
)
def test_what_a_model_may_not_return(net: type[nn.Module], training: bool, line: str) -> None:
    with pytest.raises(Unsupported, match=line):
        read_graph(net(), (2, 6, 6), training=training)
