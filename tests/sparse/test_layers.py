"""SWAT's three products, each against its own formula."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fedsieve.sparse.effective import reset_thresholds_
from fedsieve.sparse.layers import SwatConv2d, SwatLinear, swat_
from fedsieve.sparse.masks import top
from fedsieve.sparse.periodic import PeriodicTopK
from fedsieve.sparse.policy import select_weights, uniform_densities
from fedsieve.types import InputError
from tiny import TinyNet

D = 0.3
CONVS = [
    nn.Conv2d(3, 5, 3, padding=1),
    nn.Conv2d(3, 5, 3, stride=2, padding=1, bias=False),
    nn.Conv2d(4, 6, (1, 3), stride=(2, 1), groups=2),
    nn.Conv2d(3, 7, 5, padding=4, dilation=2),
]


@pytest.mark.parametrize("plain", CONVS, ids=str)
def test_convolution_multiplies_by_what_swat_says(plain: nn.Conv2d) -> None:
    layer = SwatConv2d(plain, D, 1)
    x = torch.randn(2, plain.in_channels, 9, 8, requires_grad=True)
    y = layer(x)
    g = torch.randn_like(y)
    got = torch.autograd.grad(y, [x, plain.weight], g)

    geometry = (plain.stride, plain.padding, plain.dilation, plain.groups)
    w = (plain.weight * top(plain.weight, D)).detach()
    a = (x * top(x, D)).detach()
    assert torch.equal(y, F.conv2d(x, w, plain.bias, *geometry))
    wanted_in = torch.nn.grad.conv2d_input(x.shape, w, g, *geometry)
    wanted_w = torch.nn.grad.conv2d_weight(a, w.shape, g, *geometry)
    torch.testing.assert_close(got[0], wanted_in)
    torch.testing.assert_close(got[1], wanted_w)
    assert got[1].count_nonzero() > w.count_nonzero(), "the weight's gradient is dense"


@pytest.mark.parametrize("bias", [True, False])
def test_linear_multiplies_by_what_swat_says(bias: bool) -> None:
    plain = nn.Linear(7, 5, bias)
    layer = SwatLinear(plain, D, 1)
    x, g = torch.randn(6, 7, requires_grad=True), torch.randn(6, 5)
    inputs = [x, plain.weight, *([plain.bias] if bias else [])]
    got = torch.autograd.grad(layer(x), inputs, g)
    w, a = plain.weight * top(plain.weight, D), x * top(x, D)
    torch.testing.assert_close(got[0], g @ w)
    torch.testing.assert_close(got[1], g.T @ a)
    if bias:
        torch.testing.assert_close(got[2], g.sum(0))


@pytest.mark.parametrize(
    "layer", [SwatLinear(nn.Linear(4, 3), 1.0, 1), SwatConv2d(nn.Conv2d(2, 3, 3), 1.0, 1)], ids=str
)
def test_at_full_density_the_gradient_is_the_true_one(layer: nn.Module) -> None:
    layer = layer.double()
    x = torch.randn(2, *((2, 5, 5) if isinstance(layer, nn.Conv2d) else (4,)), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,))
    weight = layer.weight.detach().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda w: torch.func.functional_call(layer, {"weight": w}, (x.detach(),)), (weight,)
    )


def test_evaluation_uses_the_sparse_weights_and_dense_activations() -> None:
    plain = nn.Linear(20, 4)
    layer = SwatLinear(plain, D, 3).eval()
    x = torch.randn(3, 20)
    assert torch.equal(layer(x), F.linear(x, plain.weight * top(plain.weight, D), plain.bias))


def test_between_refreshes_the_last_threshold_serves() -> None:
    cut = PeriodicTopK(0.5, 2)
    assert cut(torch.tensor([4.0, -3.0, 2.0, 1.0])).tolist() == [4.0, -3.0, 0.0, 0.0]
    assert cut(torch.tensor([1.0, 2.9, -3.0, 9.0])).tolist() == [0.0, 0.0, -3.0, 9.0]
    assert cut(torch.tensor([1.0, 2.5, -0.5, 0.1])).tolist() == [1.0, 2.5, 0.0, 0.0]
    cut.restart()
    assert cut(torch.tensor([0.4, 0.3, 0.2, 0.1])).tolist() == pytest.approx([0.4, 0.3, 0.0, 0.0])


def test_swat_keeps_names_parameters_and_counts_its_densities() -> None:
    model = TinyNet()
    names, before = list(model.state_dict()), {n: p.data_ptr() for n, p in model.named_parameters()}
    net = swat_(model, uniform_densities(select_weights("swat", model), 0.25), 1)
    assert list(net.state_dict()) == names
    assert {n: p.data_ptr() for n, p in net.named_parameters()} == before
    net(torch.randn(4, 2, 6, 6)).sum().backward()
    fc1 = net.get_submodule("fc1")
    assert isinstance(fc1, SwatLinear)
    assert fc1.densities[0] == fc1.densities[1] == 0.25
    assert fc1.densities[2] <= 0.25
    assert not isinstance(net.get_submodule("conv1"), SwatConv2d)


def test_restart_reaches_every_layer() -> None:
    net = swat_(TinyNet(), {"fc1.weight": 0.5, "conv2.weight": 0.5}, 10)
    net(torch.randn(4, 2, 6, 6))
    reset_thresholds_(net)
    steps = [m.cut_input.step for m in net.modules() if isinstance(m, SwatConv2d | SwatLinear)]
    assert steps == [0, 0]


@pytest.mark.parametrize(
    "plain", [nn.Conv2d(2, 2, 3, padding="same"), nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect")]
)
def test_a_layer_that_swat_cannot_train_is_named(plain: nn.Module) -> None:
    with pytest.raises(InputError, match="layer 0 cannot be trained sparsely"):
        swat_(nn.Sequential(plain), {"0.weight": 0.5}, 1)
