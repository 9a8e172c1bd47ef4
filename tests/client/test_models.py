"""The papers' parameter counts (METHODS, section 7)."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fedsieve.client.models import MODELS, xavier_uniform_
from fedsieve.sparse.policy import weight_layers


def parameters(name: str, channels: int, classes: int) -> int:
    return sum(p.numel() for p in MODELS[name](channels, classes).parameters())


@pytest.mark.parametrize(
    ("name", "channels", "classes", "size", "wanted"),
    [
        ("resnet18", 3, 10, 32, 11_173_962),
        ("resnet18", 1, 12, 32, 11_173_836),
        ("leaf_cnn", 1, 62, 28, 6_603_710),
        ("mnist_net", 1, 10, 28, 261_840),
        ("mnist_net_softmax", 1, 10, 28, 261_840),
        ("digits_net", 1, 10, 8, (16 * 9 + 16) + (32 * 16 * 9 + 32) + (512 * 128 + 128) + (1280 + 10)),
    ],
)
def test_sizes_are_the_papers(name: str, channels: int, classes: int, size: int, wanted: int) -> None:
    assert parameters(name, channels, classes) == wanted
    model = MODELS[name](channels, classes).eval()
    assert model(torch.zeros(2, channels, size, size)).shape == (2, classes)


@pytest.mark.parametrize(
    ("name", "shape", "wanted"),
    [
        ("leaf_cnn", (1, 62), {"conv1": 832, "conv2": 51_264, "fc1": 6_424_576, "fc2": 127_038}),
        ("mnist_net", (1, 10), {"conv1": 260, "conv2": 5_020, "fc1": 256_050, "fc2": 510}),
    ],
)
def test_layers_have_the_papers_sizes(name: str, shape: tuple[int, int], wanted: dict[str, int]) -> None:
    model = MODELS[name](*shape)
    assert {n: sum(p.numel() for p in layer.parameters()) for n, layer in weight_layers(model).items()} == wanted


def test_resnet_is_made_of_the_papers_parts() -> None:
    model = MODELS["resnet18"](3, 10)
    convs = [m.weight for m in model.modules() if isinstance(m, torch.nn.Conv2d)]
    assert sum(w.numel() for w in convs if w.shape[2] == 1) == 172_032
    assert convs[0].numel() == 1_728
    assert sum(b.numel() for b in model.buffers() if b.is_floating_point()) == 9_600
    assert len(model.state_dict()) == 122


def test_the_network_with_a_softmax_too_many() -> None:
    """Its outputs are the probabilities of MNISTNet, and cross-entropy takes the logarithm of their softmax."""
    torch.manual_seed(0)
    plain, twin = MODELS["mnist_net"](1, 10), MODELS["mnist_net_softmax"](1, 10)
    twin.load_state_dict(plain.state_dict())
    x, y = torch.randn(5, 1, 28, 28), torch.tensor([0, 3, 9, 3, 1])
    logits, outputs = plain(x), twin(x)
    p = logits.exp() / logits.exp().sum(1, keepdim=True)
    assert torch.allclose(outputs, p, atol=1e-6)
    rows = zip(p.tolist(), y.tolist(), strict=True)
    losses = [math.log(sum(math.exp(v) for v in row)) - row[label] for row, label in rows]
    assert float(F.cross_entropy(outputs, y).detach()) == pytest.approx(sum(losses) / 5, rel=1e-5)
    assert torch.equal(outputs.argmax(1), logits.argmax(1))
    assert twin.policies == plain.policies


def test_xaviers_draw_with_a_gain_of_a_half() -> None:
    model = nn.Sequential(nn.Conv2d(8, 24, 3), nn.BatchNorm2d(24), nn.Flatten(), nn.Linear(96, 50), nn.Linear(50, 4))
    model[4].weight.requires_grad_(False)
    with torch.no_grad():
        for value in model.parameters():
            value.fill_(7)
    xavier_uniform_(model, torch.Generator().manual_seed(3))
    conv, norm, _, linear, frozen = model.requires_grad_(False)
    bound = 0.5 * math.sqrt(6 / (8 * 9 + 24 * 9))
    assert 0.98 * bound < float(conv.weight.abs().max()) <= bound
    assert float(conv.weight.std()) == pytest.approx(bound / math.sqrt(3), rel=0.05)
    assert float(linear.weight.std()) == pytest.approx(0.01, rel=0.05)
    assert bool((norm.weight == 1).all())
    assert not any(layer.bias.any() for layer in (conv, norm, linear, frozen))
    assert bool((frozen.weight == 7).all())
    again = nn.Sequential(nn.Conv2d(8, 24, 3))
    xavier_uniform_(again, torch.Generator().manual_seed(3))
    assert torch.equal(again[0].weight.detach(), conv.weight)
