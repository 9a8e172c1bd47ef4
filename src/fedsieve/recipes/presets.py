"""The papers' settings for each dataset: model, clients, rounds, learning rate. The method goes in; a Run comes out."""

from __future__ import annotations

from typing import Any

from fedsieve.engine import Run, Task
from fedsieve.types import Method


def digits(method: Method[Any], partition: str = "lda:1.0") -> Run:
    """Return scikit-learn's 8x8 digits on a small network: 20 clients, 5 a round, 2 epochs, half a minute."""
    return Run(method, Task("digits_net", "digits", 20, partition), 80, 5, epochs=2, lr=0.4, lr_end=0.02)


def mnist(method: Method[Any], partition: str = "lda:1.0") -> Run:
    """Return MNIST on MNISTNet, 100 clients, 10 a round (FLASH, Table 1)."""
    return Run(method, Task("mnist_net", "mnist", 100, partition), 400, 10, batch=32, lr=0.1, lr_end=0.001)


def cifar10(method: Method[Any], partition: str = "lda:1.0") -> Run:
    """Return CIFAR-10 on ResNet-18, 100 clients, 10 a round (ZeroFL, Sec. 4.1 and A.6)."""
    task = Task("resnet18", "cifar10", 100, partition)
    return Run(method, task, 700, 10, lr=0.1, lr_end=0.01, evaluate_every=10)


def femnist(method: Method[Any], clients: int = 300) -> Run:
    """Return FEMNIST by writer on the LEAF CNN, 35 a round (ZeroFL, Sec. 4.1 and A.6, of 3,597 writers)."""
    task = Task("leaf_cnn", "femnist", clients, "group")
    return Run(method, task, 1000, 35, lr=0.004, lr_end=0.001, evaluate_every=10)


def speech(method: Method[Any], partition: str = "lda:1.0") -> Run:
    """Return Speech Commands, 32x32 MFCC, on ResNet-18, 100 clients, 10 a round (ZeroFL, Sec. 4.1 and A.6)."""
    task = Task("resnet18", "speech_commands", 100, partition)
    return Run(method, task, 200, 10, lr=0.01, lr_end=0.001, evaluate_every=10)
