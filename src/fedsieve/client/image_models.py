"""Convolutional networks that are no paper's of federated learning: ResNet-50 and MobileNetV2, for 32x32 inputs."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class Bottleneck(nn.Module):
    """A 3x3 convolution between two 1x1 ones, around a shortcut (He et al. 2016, Fig. 5)."""

    def __init__(self, inner: int, width: int, stride: int):
        super().__init__()
        outer = 4 * width
        self.conv1, self.bn1 = nn.Conv2d(inner, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, outer, 1, bias=False), nn.BatchNorm2d(outer)
        self.shortcut = nn.Sequential()
        if stride != 1 or inner != outer:
            self.shortcut = nn.Sequential(nn.Conv2d(inner, outer, 1, stride, bias=False), nn.BatchNorm2d(outer))

    def forward(self, x: Tensor) -> Tensor:
        """[n, inner, h, w] -> [n, 4 width, h / stride, w / stride]."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        return F.relu(self.bn3(self.conv3(y)) + self.shortcut(x))


class ResNet50(nn.Module):
    """ResNet-50 for 32x32 inputs: 3x3 stride-1 stem, no max-pool. 23,520,842 parameters at 3 channels, 10 classes."""

    def __init__(self, channels: int = 3, classes: int = 10):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64)
        inner, layers = 64, list[nn.Module]()
        for width, blocks, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
            layers.append(nn.Sequential(*(Bottleneck(4 * width if i else inner, width, 1 if i else stride)
                                          for i in range(blocks))))  # fmt: skip
            inner = 4 * width
        self.layer1, self.layer2, self.layer3, self.layer4 = layers
        self.fc = nn.Linear(inner, classes)

    def forward(self, x: Tensor) -> Tensor:
        """[n, channels, 32, 32] -> [n, classes]."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


class InvertedResidual(nn.Module):
    """A 1x1, a depthwise 3x3 and a linear 1x1 convolution; around a shortcut where the shape stays (Sandler et al.)."""

    def __init__(self, inner: int, outer: int, expansion: int, stride: int):
        super().__init__()
        width = expansion * inner
        self.conv1, self.bn1 = nn.Conv2d(inner, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, groups=width, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, outer, 1, bias=False), nn.BatchNorm2d(outer)
        self.same = stride == 1 and inner == outer

    def forward(self, x: Tensor) -> Tensor:
        """[n, inner, h, w] -> [n, outer, h / stride, w / stride]."""
        y: Tensor = F.relu6(self.bn1(self.conv1(x)))
        y = self.bn3(self.conv3(F.relu6(self.bn2(self.conv2(y)))))
        return x + y if self.same else y


class MobileNetV2(nn.Module):
    """MobileNetV2 (Sandler et al. 2018) for 32x32 inputs: the first three strides are 1. 2,237,770 parameters."""

    rows = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 1), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
    """Expansion, channels, blocks and first stride (Table 2)."""

    def __init__(self, channels: int = 3, classes: int = 10):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, 32, 3, 1, 1, bias=False), nn.BatchNorm2d(32)
        inner, blocks = 32, list[nn.Module]()
        for expansion, outer, count, stride in self.rows:
            for i in range(count):
                blocks.append(InvertedResidual(outer if i else inner, outer, expansion, 1 if i else stride))
            inner = outer
        self.blocks = nn.Sequential(*blocks)
        self.conv2, self.bn2 = nn.Conv2d(inner, 1280, 1, bias=False), nn.BatchNorm2d(1280)
        self.fc = nn.Linear(1280, classes)

    def forward(self, x: Tensor) -> Tensor:
        """[n, channels, 32, 32] -> [n, classes]."""
        x = self.blocks(F.relu6(self.bn1(self.conv1(x))))
        logits: Tensor = self.fc(F.relu6(self.bn2(self.conv2(x))).mean((2, 3)))
        return logits
