"""A task that trains in a blink: networks, data, and a run of them."""

from typing import Any

import torch
from torch import Tensor, nn

from fedsieve import Data, Dataset, Method, Run, Task, local, rounds
from fedsieve.engine.round import Round
from fedsieve.methods import Private
from fedsieve.types import flatten

TIMES = {"seconds": 0, "cpu_seconds": 0, "ms_per_step": 0}
"""The columns of a row that no two runs have alike."""


class TinyNet(nn.Module):
    """Convolution, BatchNorm, two linear layers, for 6x6 inputs of two channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 4, 3, padding=1)
        self.conv2 = nn.Conv2d(4, 8, 3, stride=2, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.fc1 = nn.Linear(72, 24)
        self.fc2 = nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv2(torch.relu(self.conv1(x)))).relu()
        logits: Tensor = self.fc2(self.fc1(x.flatten(1)).relu())
        return logits


class PlainNet(TinyNet):
    """The same without BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.Identity()  # type: ignore[assignment]


def net(method: object) -> type[TinyNet]:
    """Return the network that a method is tried on: noise on updates cannot bear running statistics."""
    return PlainNet if isinstance(method, Private) else TinyNet


def blobs() -> Dataset:
    """Three classes of noisy patterns: learnt in a few rounds."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randn(3, 2, 6, 6, generator=generator)
    y = torch.arange(360) % 3
    x = patterns[y] + 0.8 * torch.randn(360, 2, 6, 6, generator=generator)
    return Dataset(
        "blobs", Data(x[:240], y[:240]), Data(x[240:], y[240:]), ("a", "b", "c"), y[:240] * 2, ("u", "v", "w")
    )


def tiny_run(method: Method[Any], **changes: object) -> Run:
    """Six clients of 36 examples and 4 held out, three a round, four rounds."""
    settings = {"rounds": 4, "per_round": 3, "batch": 8, "lr": 0.1, "lr_end": 0.05} | changes
    tiers = method.tiers or 1
    return Run(method, Task(net(method), blobs, 6, "iid", 0.1, tiers=(1 / tiers,) * tiers), **settings)  # type: ignore[arg-type]


def same_state(a: Any, b: Any) -> bool:
    """Tell whether two states of a server have the same names and, to the bit, the same tensors."""
    fa, fb = flatten(a), flatten(b)
    return fa.keys() == fb.keys() and all(torch.equal(fa[name], fb[name]) for name in fa)


def last(run_: Run, engine: Any = None) -> Round:
    *_, final = rounds(run_, engine or local())
    return final


def alike(a: Round, b: Round) -> bool:
    return all(torch.equal(v, b.model[name]) for name, v in a.model.items())


def assert_same(one: Round, other: Round) -> None:
    states = flatten(one.state), flatten(other.state)
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert (one.memory, one.bytes_up, one.bytes_down) == (other.memory, other.bytes_up, other.bytes_down)
    assert (one.metrics, one.accuracy, one.refused) == (other.metrics, other.accuracy, other.refused)
