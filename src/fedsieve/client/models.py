"""The papers' models: ResNet-18 (CIFAR form), LEAF CNN, MNISTNet; and a net for digits. All but one give logits."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import ClassVar, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedsieve.client.image_models import MobileNetV2, ResNet50
from fedsieve.client.vector_models import ViTTiny
from fedsieve.sparse.policy import weight_layers

Norm: TypeAlias = Callable[[int], nn.Module]
"""What makes a norm of so many channels."""


class Block(nn.Module):
    """Two 3x3 convolutions around a shortcut (He et al. 2016, Fig. 2)."""

    def __init__(self, inner: int, outer: int, stride: int, norm: Norm = nn.BatchNorm2d):
        super().__init__()
        self.conv1 = nn.Conv2d(inner, outer, 3, stride, 1, bias=False)
        self.bn1 = norm(outer)
        self.conv2 = nn.Conv2d(outer, outer, 3, 1, 1, bias=False)
        self.bn2 = norm(outer)
        self.shortcut = nn.Sequential()
        if stride != 1 or inner != outer:
            self.shortcut = nn.Sequential(nn.Conv2d(inner, outer, 1, stride, bias=False), norm(outer))

    def forward(self, x: Tensor) -> Tensor:
        """[n, inner, h, w] -> [n, outer, h / stride, w / stride]."""
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNet18(nn.Module):
    """ResNet-18 for 32x32 inputs: 3x3 stride-1 stem, no max-pool. 11,173,962 parameters at 3 channels, 10 classes."""

    norm: Norm = nn.BatchNorm2d

    def __init__(self, channels: int = 3, classes: int = 10):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 64, 3, 1, 1, bias=False)
        self.bn1 = self.norm(64)
        norm = self.norm
        self.layer1 = nn.Sequential(Block(64, 64, 1, norm), Block(64, 64, 1, norm))
        self.layer2 = nn.Sequential(Block(64, 128, 2, norm), Block(128, 128, 1, norm))
        self.layer3 = nn.Sequential(Block(128, 256, 2, norm), Block(256, 256, 1, norm))
        self.layer4 = nn.Sequential(Block(256, 512, 2, norm), Block(512, 512, 1, norm))
        self.fc = nn.Linear(512, classes)

    def forward(self, x: Tensor) -> Tensor:
        """[n, channels, 32, 32] -> [n, classes]."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


class ResNet18GroupNorm(ResNet18):
    """ResNet-18 with norms of 32 groups of channels in place of BatchNorm (Wu and He 2018; Hsieh et al. 2020)."""

    norm = partial(nn.GroupNorm, 32)


class _SmallCNN(nn.Module):
    """Two convolutions and two linear layers; the second convolution's pooled output is ``side`` x ``side``."""

    def __init__(
        self, channels: int, classes: int, widths: tuple[int, int], kernel: int, padding: int, side: int, features: int
    ):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, widths[0], kernel, padding=padding)
        self.conv2 = nn.Conv2d(*widths, kernel, padding=padding)
        self.fc1 = nn.Linear(widths[1] * side**2, features)
        self.fc2 = nn.Linear(features, classes)

    def classify(self, x: Tensor) -> Tensor:
        """[n, channels, side, side] -> [n, classes]."""
        logits: Tensor = self.fc2(F.relu(self.fc1(x.flatten(1))))
        return logits


class LeafCNN(_SmallCNN):
    """LEAF's FEMNIST network (Caldas et al. 2018): two 5x5 convolutions, 2048 hidden. 6,603,710 parameters."""

    policies: ClassVar = {"zerofl": ("conv1", "conv2", "fc1")}

    def __init__(self, channels: int = 1, classes: int = 62):
        super().__init__(channels, classes, widths=(32, 64), kernel=5, padding=2, side=7, features=2048)

    def forward(self, x: Tensor) -> Tensor:
        """[n, channels, 28, 28] -> [n, classes]."""
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        return self.classify(F.max_pool2d(F.relu(self.conv2(x)), 2))


class MNISTNet(_SmallCNN):
    """FLASH's MNIST network: 5x5 convolutions, 3x3 stride-1 max-pools (28-24-22-18-16). 261,840 parameters."""

    policies: ClassVar = {"flash": ("conv2", "fc1")}

    def __init__(self, channels: int = 1, classes: int = 10):
        super().__init__(channels, classes, widths=(10, 20), kernel=5, padding=0, side=16, features=50)

    def forward(self, x: Tensor) -> Tensor:
        """[n, channels, 28, 28] -> [n, classes]."""
        x = F.relu(F.max_pool2d(self.conv1(x), 3, 1))
        return self.classify(F.relu(F.max_pool2d(self.conv2(x), 3, 1)))


class LeNet5(nn.Module):
    """NIID-Bench's CNN (Li et al. 2022, after LeCun et al. 1998), for 32x32 inputs: 62,006 parameters at 3 channels."""

    kernel, stride, side = 2, 2, 5
    """Those of the max-pools, and the side of the second one's output."""

    def __init__(self, channels: int = 3, classes: int = 10):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 6, 5)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * self.side**2, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, classes)

    def forward(self, x: Tensor) -> Tensor:
        """[n, channels, 32, 32] -> [n, classes]."""
        x = F.max_pool2d(F.relu(self.conv1(x)), self.kernel, self.stride)
        x = F.max_pool2d(F.relu(self.conv2(x)), self.kernel, self.stride)
        logits: Tensor = self.fc3(F.relu(self.fc2(F.relu(self.fc1(x.flatten(1))))))
        return logits


class FedDSTNet(LeNet5):
    """FedDST's CIFAR-10 network, LeNet-5 with 3x3 stride-1 max-pools (32-28-26-22-20). 782,006 parameters."""

    kernel, stride, side = 3, 1, 20


class DigitsNet(_SmallCNN):
    """A small network for 8x8 digits, of the same make as LEAF's."""

    def __init__(self, channels: int = 1, classes: int = 10):
        super().__init__(channels, classes, widths=(16, 32), kernel=3, padding=1, side=4, features=128)

    def forward(self, x: Tensor) -> Tensor:
        """[n, channels, 8, 8] -> [n, classes]."""
        x = F.relu(self.conv1(x))
        return self.classify(F.max_pool2d(F.relu(self.conv2(x)), 2))


class MNISTNetSoftmax(MNISTNet):
    """MNISTNet that gives probabilities, though the loss expects logits: what FLASH's public code trains."""

    def forward(self, x: Tensor) -> Tensor:
        """[n, channels, 28, 28] -> [n, classes], rows that add up to 1."""
        return torch.softmax(super().forward(x), 1)


MODELS: dict[str, Callable[[int, int], nn.Module]] = {
    "resnet18": ResNet18,
    "leaf_cnn": LeafCNN,
    "mnist_net": MNISTNet,
    "mnist_net_softmax": MNISTNetSoftmax,
    "digits_net": DigitsNet,
    "lenet5": LeNet5,
    "feddst_net": FedDSTNet,
    "resnet18_groupnorm": ResNet18GroupNorm,
    "resnet50": ResNet50,
    "mobilenet_v2": MobileNetV2,
    "vit_tiny": ViTTiny,
}


@torch.no_grad()
def truncated_normal_(model: nn.Module, rng: torch.Generator) -> None:
    """Draw, in place, the weight of every convolution and linear layer that is trained; biases stay as they are.

    Guastella et al. 2024 start all models so: variance 1 / fan_in, from a normal distribution of the standard
    deviation sqrt(1 / fan_in) / 0.8796 that is cut at two of them.
    """
    for layer in weight_layers(model).values():
        std = math.sqrt(1 / layer.weight[0].numel()) / 0.8796
        if layer.weight.requires_grad:
            nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std, generator=rng)


@torch.no_grad()
def xavier_uniform_(model: nn.Module, rng: torch.Generator) -> None:
    """Draw, in place, the weights and biases that are trained of convolutions, linear layers and norms.

    What FLASH's public code does to its ResNets: convolutions from Xavier's uniform distribution (Glorot & Bengio
    2010) with a gain of .5, linear weights from a normal distribution of the standard deviation .01, norms' weights 1,
    all biases 0.
    """
    for layer in model.modules():
        weight, bias = getattr(layer, "weight", None), getattr(layer, "bias", None)
        if isinstance(weight, Tensor) and weight.requires_grad:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(weight, std=0.01, generator=rng)
            elif isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
                nn.init.xavier_uniform_(weight, gain=0.5, generator=rng)
            elif weight.dim() == 1:
                weight.fill_(1)
        if isinstance(bias, Tensor) and bias.requires_grad:
            bias.zero_()


INITIALISATIONS: dict[str, Callable[[nn.Module, torch.Generator], None]] = {
    "truncated_normal": truncated_normal_,
    "xavier_uniform": xavier_uniform_,
}
"""What draws a model's weights anew, by the names of ``Task.initialisation``."""
