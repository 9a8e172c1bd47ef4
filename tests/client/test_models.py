"""The papers' parameter counts (METHODS, section 7)."""

import pytest
import torch

from fedsieve.client.models import MODELS
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
