"""Both sides of a comparison with the NumPy references: the tiny network's data, states, and how chance is shared."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from fedsieve.types import Data, rng
from oracles import reference as ref


def random_state(seed: int, side: int = 6, classes: int = 3) -> ref.State:
    """Return random values, none of them special, for every tensor of the tiny network."""
    g = np.random.default_rng(seed)
    flat = 6 * ((side + 1) // 2) ** 2
    shapes = {
        "conv1.weight": (4, 1, 3, 3),
        "conv1.bias": (4,),
        "conv2.weight": (6, 4, 3, 3),
        "bn.weight": (6,),
        "bn.bias": (6,),
        "bn.running_mean": (6,),
        "bn.running_var": (6,),
        "fc1.weight": (10, flat),
        "fc1.bias": (10,),
        "fc2.weight": (classes, 10),
        "fc2.bias": (classes,),
    }
    return {name: g.normal(size=shape) / np.sqrt(np.prod(shape[1:])) for name, shape in shapes.items()}


ROUNDS, EPOCHS, BATCH, LR = 3, 2, 4, (0.1, 0.03)


SIZES = (13, 8, 10, 5)
"""Training examples of each client: batches of 4 leave a last one of 1, 0, 2 and 1."""


SAMPLED = ((0, 1, 2), (3, 1, 0), (2, 0, 3))
"""The clients of each round."""


TOLERANCE = 1e-5


SEED = 35


FLOAT32_ROUNDING = 1e-6
"""No top-k decision may be narrower than this, else rounding rather than the method could tell the two apart.

The seed is one where none is (see ``margin`` in ``reference.py``); change it when a case or a size changes.
"""


class Net(nn.Module):
    """The tiny network of ``reference.py``."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 4, 3, padding=1)
        self.conv2 = nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(6)
        self.fc1 = nn.Linear(54, 10)
        self.fc2 = nn.Linear(10, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv1(x).relu()
        x = self.bn(self.conv2(x)).relu()
        x = self.fc1(x.flatten(1)).relu()
        return self.fc2(x)


def dataset() -> list[Data]:
    """Return every client's training examples."""
    g = torch.Generator().manual_seed(SEED)
    return [Data(torch.randn(n, 1, 6, 6, generator=g), torch.randint(0, 3, (n,), generator=g)) for n in SIZES]


def fresh() -> Net:
    """Return the untrained network."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return Net()


def chance(t: int, client: int) -> torch.Generator:
    """Return the generator of one client in one round: a new equal one at every call."""
    return rng(SEED, "client", t, client)


def float64(params: dict[str, torch.Tensor]) -> ref.State:
    """Return the floating tensors as arrays."""
    return {name: v.numpy().astype(np.float64) for name, v in params.items() if v.is_floating_point()}


def batches(n: int, g: torch.Generator) -> list[np.ndarray]:
    """Return the order of a client's local training: a permutation an epoch, in chunks, the last one smaller."""
    return [part.numpy() for _ in range(EPOCHS) for part in torch.randperm(n, generator=g).split(BATCH)]


def assert_equal(ours: ref.State, theirs: ref.State, where: str) -> None:
    """Compare every tensor, to the tolerance in itself and relative to the tensor's largest value."""
    assert set(theirs) == set(ours), where
    for name, wanted in ours.items():
        assert theirs[name].shape == wanted.shape, f"{where}: {name}"
        error = np.abs(theirs[name] - wanted).max()
        assert error <= TOLERANCE * min(1.0, np.abs(wanted).max()), f"{where}: {name} is off by {error:.2g}"


def theta_state(seed: int, zeros: float = 0.0) -> ref.State:
    """Return a random state of the tiny network, a share of whose policy weights are exactly zero."""
    g, state = np.random.default_rng(seed), random_state(seed)
    return state | {
        f"{layer}.weight": (v := state[f"{layer}.weight"]) * (g.random(v.shape) >= zeros) for layer in ref.LAYERS
    }


def batch(seed: int, n: int = 5) -> tuple[ref.Array, np.ndarray]:
    g = np.random.default_rng(seed)
    return g.normal(size=(n, 1, 6, 6)), g.integers(0, 3, n)
