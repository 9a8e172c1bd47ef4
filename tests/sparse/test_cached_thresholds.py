"""SparseFedPP as its authors' code has it: a convolution keeps the threshold of a training's first sparse step."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engines import ENGINES
from fedsieve import local
from fedsieve.engine.loop import rounds
from fedsieve.engine.setup import open_run
from fedsieve.methods import SparseFedPP
from fedsieve.sparse.effective import reset_thresholds_
from fedsieve.sparse.layers import PowerConv2d, PowerLinear, powerprop_
from fedsieve.types import InputError
from tiny import assert_same, tiny_run

ZEROS = 60
"""Of the 216 weights of the convolution."""


def conv(a: float = 1.25) -> PowerConv2d:
    torch.manual_seed(0)
    layer = PowerConv2d(nn.Conv2d(4, 6, 3, padding=1, bias=False), a, prune=True, cached=True)
    with torch.no_grad():
        layer.weight.view(-1)[:ZEROS] = 0
    return layer


def gradient(layer: nn.Module, x: Tensor) -> Tensor:
    """The gradient of th, of the sum of squares of the outputs."""
    (grad,) = torch.autograd.grad(layer.train()(x).square().sum(), [layer.weight])
    return grad


def by_hand(layer: PowerConv2d, x: Tensor, least: float) -> Tensor:
    """The same where backward sees of the input what is at least so large."""
    th = layer.weight.detach()
    w, slope = th.sign() * th.abs() ** layer.a, layer.a * th.abs() ** (layer.a - 1)
    kept = torch.tensor([v if abs(v) >= least else 0.0 for v in x.flatten().tolist()]).view(x.shape)
    g = 2 * F.conv2d(x, w, padding=1)
    return slope * torch.nn.grad.conv2d_weight(kept, th.shape, g, padding=1)


def smallest_kept(x: Tensor, share: float) -> float:
    magnitudes = sorted((abs(v) for v in x.flatten().tolist()), reverse=True)
    return magnitudes[-(-round(share * len(magnitudes) * 1e6) // 10**6) - 1]


def test_the_threshold_of_the_first_batch_serves_in_the_second() -> None:
    layer, first, second = conv(), torch.randn(2, 4, 5, 5), 0.5 * torch.randn(3, 4, 5, 5)
    least = smallest_kept(first, (216 - ZEROS) / 216)
    torch.testing.assert_close(gradient(layer, first), by_hand(layer, first, least))
    torch.testing.assert_close(gradient(layer, second), by_hand(layer, second, least))
    assert layer.densities[2] == pytest.approx(float((second.abs() >= least).double().mean()))
    own = smallest_kept(second, (216 - ZEROS) / 216)
    assert not torch.allclose(by_hand(layer, second, least), by_hand(layer, second, own))
    layer.restart()
    torch.testing.assert_close(gradient(layer, second), by_hand(layer, second, own))


def test_a_dense_step_leaves_no_threshold() -> None:
    """The first step whose weight has a zero does; at a = 1 it serves though the zeros are gone (the authors' code)."""
    layer, x, later = conv(1.0), torch.randn(2, 4, 5, 5), torch.randn(2, 4, 5, 5)
    with torch.no_grad():
        layer.weight.fill_(0.1)
    torch.testing.assert_close(gradient(layer, x), by_hand(layer, x, 0.0))
    with torch.no_grad():
        layer.weight.view(-1)[:ZEROS] = 0
    least = smallest_kept(x, (216 - ZEROS) / 216)
    torch.testing.assert_close(gradient(layer, x), by_hand(layer, x, least))
    with torch.no_grad():
        layer.weight.fill_(0.1)
    torch.testing.assert_close(gradient(layer, later), by_hand(layer, later, least))


def test_linear_layers_cut_every_batch() -> None:
    plain = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 3))
    model = powerprop_(plain, ("0.weight", "2.weight"), 1.25, True, True)
    assert isinstance(model[0], PowerConv2d)
    assert isinstance(model[2], PowerLinear)
    assert (model[0].cached, model[2].cached) == (True, False)
    with torch.no_grad():
        model[2].weight[:, :6] = 0
    for x in (torch.randn(8, 8), 0.1 * torch.randn(8, 8)):
        (grad,) = torch.autograd.grad(model.train()[2](x).sum(), [model[2].weight])
        assert model[2].densities[2] == pytest.approx(0.25)
    assert grad.shape == (3, 8)


def test_every_local_training_begins_anew() -> None:
    model = powerprop_(nn.Sequential(nn.Conv2d(4, 6, 3)), ("0.weight",), 1.25, True, True)
    layer = model[0]
    with torch.no_grad():
        layer.weight.view(-1)[:ZEROS] = 0
    gradient(layer, torch.randn(2, 4, 5, 5))
    assert layer.threshold is not None
    reset_thresholds_(model)
    assert layer.threshold is None


@pytest.mark.parametrize("kernels", ["dense", "auto"])
def test_a_clients_threshold_is_not_the_next_clients(kernels: str) -> None:
    """Clients in turn at one worker, or at two others: the same bits, and others than without the cache."""
    run_ = tiny_run(SparseFedPP(0.7, activations="cached"), rounds=3)
    one, two, plain = (
        [*rounds(open_run(this), engine(kernels=kernels))][-1]  # type: ignore[call-arg]
        for this, engine in ((run_, local), (run_, ENGINES["pickled"]), (tiny_run(SparseFedPP(0.7), rounds=3), local))
    )
    assert_same(one, two)
    assert any(not torch.equal(v, plain.model[n]) for n, v in one.model.items())


def test_an_unknown_choice_is_named() -> None:
    with pytest.raises(InputError, match="activations must be one of pruned, cached, all, where_possible, got 'kept'"):
        tiny_run(SparseFedPP(activations="kept"))  # type: ignore[arg-type]
