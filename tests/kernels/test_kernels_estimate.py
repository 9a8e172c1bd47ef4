"""How much work a step is, and that clients train by whichever way the estimate finds faster."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from fedsieve import local, rounds
from fedsieve.kernels import estimate, unavailable_reason
from fedsieve.kernels.dispatch import Kernels, not_worth
from fedsieve.kernels.estimate import count_work, density, shared
from fedsieve.kernels.graph import Graph
from fedsieve.methods import PDST, FedAvg, HeteroFLASH, SparseFedPP, Swat
from fedsieve.types import Mask
from kernel_training import SHAPE, fresh, mask_of
from tiny import TinyNet, tiny_run

pytestmark = pytest.mark.skipif(bool(unavailable_reason()), reason=str(unavailable_reason()))

CONV1, CONV2, FC1, FC2 = 36 * 4 * 2 * 9, 9 * 8 * 4 * 9, 72 * 24, 24 * 3
"""The multiplications of one product of TinyNet's layers with one sample."""


@pytest.fixture
def multiply_adds_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nothing but multiply-adds count, those of PyTorch for less than half as much."""
    for ours, seconds in (
        ("KERNELS", {"products": 1.0, "shared products": 1.0}),
        ("PYTORCH", {"dense products": 0.45}),
    ):
        monkeypatch.setattr(estimate, ours, dict.fromkeys(getattr(estimate, ours), 0.0) | seconds)


def graph_of(model: nn.Module) -> Graph:
    graph = Kernels(model, "sparse").graph(SHAPE)
    assert isinstance(graph, Graph)
    return graph


def counted(model: nn.Module, mask: Mask) -> dict[str, float]:
    return count_work(graph_of(model), partial(density, mask), partial(shared, mask))


def test_the_work_is_that_of_the_layers() -> None:
    """Of a sample, and of a step, by hand: TinyNet has two convolutions, BatchNorm, two linear layers, [2, 6, 6] in."""
    model = fresh()
    mask = mask_of(model, 0.25)
    d = {name: float(own.double().mean()) for name, own in mask.items()}
    sizes = {"conv1.weight": 2 * CONV1, "conv2.weight": 3 * CONV2, "fc1.weight": 3 * FC1}
    weights = {"conv1.weight": 4 * 2 * 9, "conv2.weight": 8 * 4 * 9, "fc1.weight": 72 * 24}
    work = counted(model, mask)
    assert work["dense products"] == 2 * CONV1 + 3 * (CONV2 + FC1 + FC2)
    assert work["products"] == pytest.approx(sum(d[name] * size for name, size in sizes.items()) + 3 * FC2)
    assert work["shared products"] == 0  # random masks, and a layer of three features
    units = {name: own[:1].expand_as(own) for name, own in mask.items()}
    work_of_units = counted(model, units)
    of = {name: float(own.double().mean()) for name, own in units.items()}
    assert work_of_units["shared products"] == pytest.approx(sum(of[name] * size for name, size in sizes.items()))
    assert work_of_units["products"] == 3 * FC2
    assert work["narrow products"] == 2 * CONV1 * 16 / 2 + 3 * CONV2 * 16 / 4
    assert work["weights"] == sum(weights.values()) + 24 * 3
    assert work["nonzeros"] == pytest.approx(sum(d[name] * size for name, size in weights.items()) + 24 * 3)
    assert work["maps"] == 36 * 2 + 36 * 4 + 36 * 4 + 9 * 8 + 72 + 24 + 24 + 3
    assert (work["norms"], work["elsewhere"], work["passages"], work["step"]) == (9 * 8, 0, 0, 1)


@pytest.mark.parametrize("rule", ["swat", "power"])
def test_layers_with_a_rule_of_their_own_tell_their_density(rule: str) -> None:
    model = fresh(rule)
    with torch.no_grad():
        for name, d in (("conv2.weight", 0.3), ("fc1.weight", 0.2)):
            flat = model.get_parameter(name).view(-1)
            flat[round(d * len(flat)) :] = 0
    work = counted(model, {})
    assert work["products"] == pytest.approx(3 * (0.3 * CONV2 + 0.2 * FC1 + FC2), rel=0.01)
    assert work["shared products"] == 2 * CONV1  # dense: four output channels have the same entries


@pytest.mark.parametrize(
    ("density", "examples", "batch", "computed"),
    [
        (0.1, 160, 16, 160),
        (1.0, 160, 16, 160),
        (0.1, 160, 8, 320),  # half of what is multiplied is padding
        (0.3, 160, 8, 320),
        (0.3, 160, 2, 1280),
        (0.3, 17, 16, 32),
        (0.3, 8, 100, 16),
    ],
)
def test_auto_weighs_density_and_padding(
    density: float, examples: int, batch: int, computed: int, multiply_adds_alone: None
) -> None:
    model = fresh()
    graph, mask = graph_of(model), mask_of(model, density)
    work = counted(model, mask)
    share = (work["products"] + work["shared products"]) / work["dense products"] * computed / examples / 0.45
    wanted = f"a step would take the kernels {share:.2g} times as long as PyTorch"
    assert not_worth(graph, mask, examples, batch) == (wanted if share >= 1 else "")


def test_what_a_step_takes_grows_with_its_samples_or_not() -> None:
    """PyTorch computes layers of its own for samples alone, the kernels for whole blocks of sixteen."""
    work = dict.fromkeys((*estimate.KERNELS, *estimate.PYTORCH), 0.0)
    units = {"products": 32, "passages": 17, "nonzeros": 1, "step": 1}
    for name, times in units.items():
        assert estimate.kernel_seconds(work | {name: 2.0}, 17) == 2 * times * estimate.KERNELS[name]
    for name, times in {"dense products": 17, "elsewhere": 17, "weights": 1, "calls": 1}.items():
        assert estimate.pytorch_seconds(work | {name: 2.0}, 17) == 2 * times * estimate.PYTORCH[name]


def test_a_step_that_pytorch_must_do_most_of_is_dense() -> None:
    class Dilated(TinyNet):
        def __init__(self) -> None:
            super().__init__()
            self.wide = nn.Conv2d(2, 2, 5, padding=4, dilation=2, groups=2)
            self.more = nn.Conv2d(2, 256, 1, dilation=2, groups=2)
            self.less = nn.Conv2d(256, 2, 1, dilation=2, groups=2)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(self.less(self.more(self.wide(x))))

    model = Dilated()
    why = not_worth(graph_of(model), mask_of(model, 0.01), 160, 16)
    assert why == "most of the work is in layers that only PyTorch knows (wide, more, less)"


def test_auto_takes_the_kernels_where_they_are_faster(multiply_adds_alone: None) -> None:
    ways = {}
    for method in (FedAvg(), PDST(density=0.1), Swat(0.9, policy="all"), SparseFedPP(sparsity=0.9)):
        ways[method.name] = [
            (r.kernels, r.dense_because) for r in rounds(tiny_run(method, rounds=2, batch=12), local())
        ]
    assert ways["fedavg"][0][1] == "a step would take the kernels 3 times as long as PyTorch"
    assert all(way == ({"sparse": 3}, None) for name in ("pdst", "swat") for way in ways[name])
    assert [list(way) for way, _ in ways["sparsefedpp"]] == [["dense"], ["sparse"]]  # dense until the first cut


def test_unequal_devices_may_train_either_way(multiply_adds_alone: None) -> None:
    method = HeteroFLASH(densities=(0.9, 0.1), c_d=2, E_d=2)
    *_, final = rounds(tiny_run(method, per_round=2, rounds=1, batch=12), local())
    assert final.kernels == {"sparse": 1, "dense": 1}
