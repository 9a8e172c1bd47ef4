"""The networks of choice.py's grid: the papers', and small ones of the layers that others are made of."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedsieve.client.models import MODELS
from fedsieve.client.vector_models import GPTBlock, ViTTiny


class MobileNet(nn.Module):
    """Depthwise and pointwise convolutions with BatchNorm and ReLU6, residual sums (after MobileNetV2)."""

    def __init__(self, channels: int, classes: int):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(channels, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU6())
        blocks, width = [], 16
        for out, stride in ((24, 2), (24, 1), (40, 2), (40, 1), (80, 2), (80, 1)):
            blocks.append(Inverted(width, out, stride))
            width = out
        self.blocks, self.fc = nn.Sequential(*blocks), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """[n, channels, 32, 32] -> [n, classes]."""
        return self.fc(F.adaptive_avg_pool2d(self.blocks(self.stem(x)), 1).flatten(1))


class Inverted(nn.Module):
    """Wider, depthwise, narrower."""

    def __init__(self, width: int, out: int, stride: int):
        super().__init__()
        self.same, wide = width == out and stride == 1, 4 * width
        self.layers = nn.Sequential(
            *(nn.Conv2d(width, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU6()),
            *(nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False), nn.BatchNorm2d(wide), nn.ReLU6()),
            *(nn.Conv2d(wide, out, 1, bias=False), nn.BatchNorm2d(out)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.same else self.layers(x)


class DenseNet(nn.Module):
    """Every layer sees all before it, put together by channel (after DenseNet)."""

    def __init__(self, channels: int, classes: int):
        super().__init__()
        self.stem, self.norms, self.convs = nn.Conv2d(channels, 24, 3, 1, 1), nn.ModuleList(), nn.ModuleList()
        for i in range(6):
            self.norms.append(nn.BatchNorm2d(24 + 12 * i))
            self.convs.append(nn.Conv2d(24 + 12 * i, 12, 3, 1, 1))
        self.fc = nn.Linear(24 + 12 * 6, classes)

    def forward(self, x: Tensor) -> Tensor:
        """[n, channels, 32, 32] -> [n, classes]."""
        x = F.avg_pool2d(self.stem(x), 2)
        for norm, conv in zip(self.norms, self.convs, strict=True):
            x = torch.cat([x, conv(F.relu(norm(x)))], 1)
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


def group_norm(channels: int, classes: int) -> nn.Module:
    """Return convolutions with GroupNorm."""
    layers, width = list[nn.Module](), channels
    for out, stride in ((32, 1), (64, 2), (64, 1), (128, 2), (128, 1)):
        layers += [nn.Conv2d(width, out, 3, stride, 1), nn.GroupNorm(8, out), nn.ReLU()]
        width = out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))


class ConvNeXt(nn.Module):
    """Wide depthwise convolutions, a norm over all channels, GELU between pointwise ones (after ConvNeXt)."""

    def __init__(self, channels: int, classes: int):
        super().__init__()
        layers, width = list[nn.Module](), channels
        for out in (32, 64, 128):
            layers += [nn.Conv2d(width, out, 3, 2, 1), nn.GroupNorm(1, out), Wide(out), Wide(out)]
            width = out
        self.layers, self.fc = nn.Sequential(*layers), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """[n, channels, 32, 32] -> [n, classes]."""
        return self.fc(F.adaptive_avg_pool2d(self.layers(x), 1).flatten(1))


class Wide(nn.Module):
    """Depthwise, wider, narrower."""

    def __init__(self, width: int):
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Conv2d(width, width, 7, 1, 3, groups=width), nn.GroupNorm(1, width)),
            *(nn.Conv2d(width, 4 * width, 1), nn.GELU(), nn.Conv2d(4 * width, width, 1)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


def vgg(channels: int, classes: int) -> nn.Module:
    """Return plain convolutions with max-pools (after VGG)."""
    layers, width = list[nn.Module](), channels
    for out in (32, 64, 128):
        layers += [nn.Conv2d(width, out, 3, 1, 1), nn.ReLU(), nn.Conv2d(out, out, 3, 1, 1), nn.ReLU(), nn.MaxPool2d(2)]
        width = out
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(width * 16, 256), nn.ReLU(), nn.Linear(256, classes))


def tanh(channels: int, classes: int) -> nn.Module:
    """Return LeNet-5 as it was, with an activation that only PyTorch knows."""
    maps = [nn.Conv2d(channels, 6, 5), nn.Tanh(), nn.AvgPool2d(2), nn.Conv2d(6, 16, 5), nn.Tanh(), nn.AvgPool2d(2)]
    return nn.Sequential(
        *maps, nn.Flatten(), nn.Linear(400, 120), nn.Tanh(), nn.Linear(120, 84), nn.Linear(84, classes)
    )


def dilated(channels: int, classes: int) -> nn.Module:
    """Return convolutions of which every second is one that only PyTorch knows."""
    layers, width = list[nn.Module](), channels
    for out in (32, 64, 128):
        layers += [nn.Conv2d(width, out, 3, 2, 1), nn.BatchNorm2d(out), nn.ReLU()]
        layers += [nn.Conv2d(out, out, 3, 1, 2, 2), nn.BatchNorm2d(out), nn.ReLU()]
        width = out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))


def mlp(channels: int, classes: int) -> nn.Module:
    """Return linear layers."""
    sizes = (784 * channels, 1024, 1024)
    layers = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *layers, nn.Linear(1024, classes))


def vit(channels: int, classes: int) -> nn.Module:
    """Return four blocks of ViT-tiny: 65 tokens."""
    return ViTTiny(channels, classes, blocks=4)


class Pixels(nn.Module):
    """A transformer of squares of two pixels: 256 tokens, narrow, causal."""

    def __init__(self, channels: int, classes: int):
        super().__init__()
        self.patches, self.head = nn.Conv2d(channels, 96, 2, 2), nn.Linear(96, classes)
        self.blocks = nn.Sequential(*(GPTBlock(96, 4) for _ in range(2)))

    def forward(self, x: Tensor) -> Tensor:
        """[n, channels, 32, 32] -> [n, classes]."""
        y: Tensor = self.head(self.blocks(self.patches(x).flatten(2).transpose(1, 2)).mean(1))
        return y


def built_in(name: str) -> Callable[[int, int], nn.Module]:
    """Return one of the papers' networks."""
    return MODELS[name]


NETWORKS: dict[str, tuple[Callable[[int, int], nn.Module], int, int, int, str]] = {
    "digits_net": (built_in("digits_net"), 1, 8, 10, "all"),
    "mnist_net": (built_in("mnist_net"), 1, 28, 10, "flash"),
    "leaf_cnn": (built_in("leaf_cnn"), 1, 28, 62, "flash"),
    "lenet5": (built_in("lenet5"), 3, 32, 10, "all"),
    "feddst_net": (built_in("feddst_net"), 3, 32, 10, "all"),
    "resnet18": (built_in("resnet18"), 3, 32, 10, "all"),
    "mobilenet": (MobileNet, 3, 32, 10, "all"),
    "mobilenet_v2": (built_in("mobilenet_v2"), 3, 32, 10, "all"),
    "densenet": (DenseNet, 3, 32, 10, "all"),
    "group_norm": (group_norm, 3, 32, 10, "all"),
    "resnet18_groupnorm": (built_in("resnet18_groupnorm"), 3, 32, 10, "all"),
    "convnext": (ConvNeXt, 3, 32, 10, "all"),
    "vgg": (vgg, 3, 32, 10, "all"),
    "tanh": (tanh, 3, 32, 10, "all"),
    "dilated": (dilated, 3, 32, 10, "all"),
    "mlp": (mlp, 1, 28, 10, "all"),
    "vit": (vit, 3, 32, 10, "all"),
    "pixels": (Pixels, 3, 32, 10, "all"),
}
"""Each with its channels, side, classes and policy."""
